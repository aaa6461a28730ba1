"""The CUDA kernels built to run on the CPU: see tests/cuda/on_cpu.h."""

import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc"
# Of augment_views.cu alone.
SHARED = ("views_gpu.h", "views_gpu_blur.h", "views_gpu_resize.h", "views_gpu_source.h")
SANITIZERS = (
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"),
    "-Og",  # as fast as -O1, which takes twice the time to compile
    "-fsanitize-sections=spd_shared",  # shared memory, which would be left out otherwise
)


def compile_all(directory: Path, flags: tuple[str, ...] = ()) -> dict[str, Path]:
    """Object files, by the names of the sources: the bindings, and the .cu files for the CPU."""
    sources = [ROOT / "tests/cuda/on_cpu.cpp", *SOURCES.glob("*.cu")]
    sources = [s for s in sources if s.name != "cuda_state.cu"]  # there is no device to ask
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda source: compile_one(source, directory, flags), sources)
        return {source.name: file for source, file in zip(sources, made)}


def compile_one(source: Path, directory: Path, flags: tuple[str, ...]) -> Path:
    """Headers beside the source are taken before those of csrc/."""
    shim = ["-include", str(ROOT / "tests/cuda/on_cpu.h")] if source.suffix == ".cu" else []
    made = directory / f"{source.name}.o"
    command = [*compiler(flags), "-x", "c++", *shim, f"-I{SOURCES}"]
    run([*command, "-c", str(source), "-o", str(made)])
    return made


def link(directory: Path, objects: dict[str, Path], flags: tuple[str, ...] = ()) -> Path:
    """The module's file."""
    module = directory / "cuda_on_cpu.so"
    run([*compiler(flags), "-shared", *map(str, objects.values()), "-o", str(module)])
    return module


def with_fault(
    directory: Path, objects: dict[str, Path], old: str, new: str, flags: tuple[str, ...] = ()
) -> Path:
    """The module with a text of one source replaced; the others are not compiled again."""
    sources = [*SOURCES.glob("*.cu"), *(SOURCES / name for name in SHARED)]
    found = [path for path in sources if old in path.read_text()]
    assert len(found) == 1, found
    changed = found[0].name
    if changed in SHARED:  # a header is taken from beside the file that includes it
        changed = "augment_views.cu"
        for name in (changed, *SHARED):
            shutil.copy(SOURCES / name, directory)
    (directory / found[0].name).write_text(found[0].read_text().replace(old, new))
    objects = objects | {changed: compile_one(directory / changed, directory, flags)}
    return link(directory, objects, flags)


def compiler(flags: tuple[str, ...]) -> list[str]:
    command = [
        "g++",
        "-std=c++20",
        "-O1",  # compiling takes longer than running
        "-fPIC",
        "-fno-strict-aliasing",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
    ]
    command += ["-Wno-unknown-pragmas", "-ffp-contract=fast", "-march=x86-64-v3", *flags]
    include = sysconfig.get_path("include"), pybind11.get_include()
    return command + [f"-I{path}" for path in include]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def load(path: Path):
    """pybind11 keeps one module of each full name, so the folder is made part of it."""
    name = f"{str(path.parent).replace('.', '_')}.cuda_on_cpu"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
