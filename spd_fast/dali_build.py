"""The DALI operators of csrc/dali: compiled at first use, for the DALI that is installed.

A build fits one version of DALI only, whose symbols carry its number. So the package ships the
sources, and keeps what it has built in the user's cache: $XDG_CACHE_HOME/spd-fast, or else
~/.cache/spd-fast.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from spd_fast.choices import DALI_PACKAGES
from spd_fast.errors import InputError
from spd_fast.ops.backends import native

try:
    import fcntl
except ImportError:  # Windows, for which there is no DALI
    fcntl = None

CPU_SOURCES = ("dali/augment_views_op.cc", "dali/sample_view_params_op.cc", "augment_views.cpp")
GPU_SOURCES = ("dali/augment_views_op_gpu.cc", "augment_views.cu", "cuda_state.cu")
# No FMA where parameters are drawn: it would round differently. GCC 12 takes a deallocation in
# DALI's headers for a wrong one.
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DSPD_ISA=here")
OPERATOR_FLAGS = ("-O2", "-ffp-contract=off", "-Wno-free-nonheap-object")
VIEWS_FLAGS = ("-Wno-maybe-uninitialized",)  # in GCC's own avx512fintrin.h
# Turing, Ampere, Hopper; PTX for those to come.
ARCHITECTURES = (
    "compute_75,code=sm_75",
    "compute_80,code=sm_80",
    "compute_90,code=[sm_90,compute_90]",
)
TAIL = 15  # lines of a compiler's output that an error shows

_loaded: Path | None = None


# ------------------------------------------------------------------------------------ what there is


def dali_version() -> str | None:
    """Of the installed DALI; None without one."""
    return next(filter(None, map(_version_of, DALI_PACKAGES)), None)


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing(cuda: bool = False) -> list[str]:
    """Why the operators are not there and cannot be built, as far as a look shows it.

    Args:
        cuda: the GPU backend is needed, too.
    """
    if dali_version() is None:
        return ["DALI is not installed: pip install 'spd-fast[dali-cu13]', or dali-cu12"]
    if native is None:
        return ["the compiled module spd_fast._C is not there"]
    if plugin(cuda=True).exists() if cuda else is_built():
        return []
    if cuda and nvcc() is None:
        return ["there is no CUDA compiler (nvcc) to build its operators for a GPU with"]
    if compiler() is None:
        return [
            "there is no C++ compiler to build its operators with: install g++, or name one in CXX"
        ]
    if not include_directories():
        version = _version_of("nvidia-cuda-runtime") or "13.0"
        wanted = ".".join(version.split(".")[:2])
        return [
            "there are no headers of CUDA to build its operators with: pip install "
            + " ".join(f"'nvidia-cuda-{part}=={wanted}.*'" for part in ("runtime", "crt", "cccl"))
        ]
    return []


def is_built() -> bool:
    """Whether the CPU operators are in the cache."""
    return plugin(cuda=True).exists() or plugin(cuda=False).exists()


def compiler() -> list[str] | None:
    """The command that CXX names, or the first C++ compiler on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return None


def nvcc() -> str | None:
    """That of CUDA_HOME, or on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def include_directories() -> list[Path]:
    """Where the headers of CUDA are, which DALI's need; those of the toolkit, or of its wheels."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if compiler_of_cuda := nvcc():
        homes.insert(0, str(Path(compiler_of_cuda).resolve().parents[1]))
    found = [[Path(home, "include")] for home in homes if home]
    spec = find_spec("nvidia")
    for place in spec.submodule_search_locations if spec else ():
        for name in ("cu13", "cuda_runtime"):
            include = Path(place, name, "include")
            found.append([include, include / "cccl"])
    for directories in found:
        if all(
            any((directory / name).exists() for directory in directories)
            for name in ("cuda_runtime.h", "crt/host_config.h", "nv/target")
        ):
            return directories
    return []


def source_directory() -> Path:
    """csrc/, as it is installed or in a checkout."""
    here = Path(__file__).resolve().parent
    return here / "csrc" if (here / "csrc").is_dir() else here.parent / "csrc"


def plugin(cuda: bool) -> Path:
    """Where the build for this DALI, these sources and this processor is or would be."""
    source = source_directory()
    digest = hashlib.sha256()
    names = [*CPU_SOURCES, *GPU_SOURCES]
    for path in [*sorted(source.glob("*.h")), *sorted(source.glob("dali/*.h"))]:
        digest.update(path.read_bytes())
    for name in names:
        digest.update((source / name).read_bytes())
    settings = (FLAGS, OPERATOR_FLAGS, VIEWS_FLAGS, ARCHITECTURES, _flags_of_views())
    digest.update(repr(settings).encode())
    kind = "cuda" if cuda else "cpu"
    name = f"dali-{dali_version()}-{kind}-{digest.hexdigest()[:16]}.so"
    return cache_directory() / name


def cache_directory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "spd-fast"


def _flags_of_views() -> list[str]:
    return native.build_config()["flags_of_views"].split()


# ----------------------------------------------------------------------------------------- building


def build() -> Path:
    """The operators' library, from the cache or newly built; with the GPU backend if it is in the
    cache, or there is nvcc.

    Processes that come here at once wait for the first of them.

    Raises:
        InputError: there is no compiler, the cache cannot be written, or the build fails; the
            message ends with the last lines that the compiler has written.
    """
    reasons = missing()
    if reasons:
        raise InputError(f"DALI's loader cannot be used: {'; '.join(reasons)}")
    for cuda in (True, False):
        path = plugin(cuda)
        if path.exists():
            return path
        if cuda and nvcc() is None:
            continue
        with _alone(path):
            if not path.exists():  # another process may have built it while this one waited
                _build(path, cuda)
        return path
    raise AssertionError("unreachable")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time, in a directory that can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as file:
            with suppress(OSError):  # a file system that cannot lock: the last build then stays
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise InputError(
            f"the operators for DALI cannot be built in {path.parent}: {error.strerror}; name a "
            "directory that can be written in XDG_CACHE_HOME"
        ) from error


def _build(path: Path, cuda: bool) -> None:
    started = time.perf_counter()
    what = "CPU and GPU" if cuda else "CPU"
    print(f"building the {what} operators for DALI {dali_version()}, once: {path}", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as directory:
        made = Path(directory)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands(made, cuda)))
        library = made / path.name
        _run(_link_command(made, library, cuda))
        os.replace(library, path)
    print(f"built in {time.perf_counter() - started:.0f} s", flush=True)


def commands(made: Path, cuda: bool) -> list[list[str]]:
    """What compiles the sources into the directory `made`."""
    from nvidia.dali import sysconfig

    directories = [Path(sysconfig.get_include_dir()), *include_directories()]
    include = [text for directory in directories for text in ("-isystem", str(directory))]
    include += [flag for flag in sysconfig.get_compile_flags() if flag.startswith("-D")]
    names = CPU_SOURCES + (GPU_SOURCES if cuda else ())
    found = []
    for name in names:
        if name.endswith(".cu"):
            command = [nvcc(), "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            command += [text for arch in ARCHITECTURES for text in ("-gencode", f"arch={arch}")]
        elif name.endswith(".cc"):
            command = [*compiler(), *FLAGS, *OPERATOR_FLAGS, *include]
        else:
            command = [*compiler(), *FLAGS, *_flags_of_views(), *VIEWS_FLAGS]
        found.append(
            [*command, "-c", str(source_directory() / name), "-o", str(_object(made, name))]
        )
    return found


def _object(made: Path, name: str) -> Path:
    return made / f"{Path(name).name}.o"


def _link_command(made: Path, library: Path, cuda: bool) -> list[str]:
    from nvidia.dali import sysconfig

    names = CPU_SOURCES + (GPU_SOURCES if cuda else ())
    command = [nvcc(), "-shared", "-cudart=static"] if cuda else [*compiler(), "-shared"]
    objects = [str(_object(made, name)) for name in names]
    return [*command, *objects, "-o", str(library), *sysconfig.get_link_flags()]


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise InputError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        tail = "\n".join(done.stdout.rstrip().splitlines()[-TAIL:])
        raise InputError(
            f"building the operators for DALI {dali_version()} failed: {Path(command[0]).name} "
            f"ended with {done.returncode}; its last lines:\n{tail}\n(the whole command: "
            f"{shlex.join(command)})"
        )


# ------------------------------------------------------------------------------------------ loading


def load() -> None:
    """Make fn.spd.augment_views and fn.spd.sample_view_params known to DALI, building them if need
    be. A process loads one build and stays with it: a second one would end the process.

    Raises:
        InputError: as `build`, or DALI refuses the library.
    """
    global _loaded
    from nvidia.dali import fn, plugin_manager

    if _loaded or hasattr(fn, "spd"):
        return
    path = build()
    try:
        plugin_manager.load_library(str(path))
    except RuntimeError as error:
        raise InputError(
            f"DALI {dali_version()} cannot load its operators: {error}; delete {path} to have them "
            "built again"
        ) from error
    _loaded = path


def has_gpu_operator() -> bool:
    """Of what is loaded."""
    from nvidia.dali import backend

    return "spd__AugmentViews" in backend.RegisteredGPUOps()


def describe() -> dict[str, str]:
    """For `spd-fast info`: name -> state."""
    states = {}
    for name, cuda in (("on the CPU", False), ("on a GPU", True)):
        built = [path for path in (plugin(True), plugin(False)) if path.exists()] if native else []
        if cuda:
            built = [path for path in built if "-cuda-" in path.name]
        if reasons := missing(cuda):
            states[name] = "; ".join(reasons)
            if cuda and dali_version():
                states[name] += ": views are made after DALI, by the backends above"
        elif built:
            states[name] = f"built: {built[0]}"
        else:
            states[name] = "will be built at first use, or by spd-fast dali-build"
    return states
