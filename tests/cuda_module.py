"""The CUDA kernels built to run on the CPU: see tests/cuda/on_cpu.h."""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[1]
SOURCES, SHARED = ROOT / "csrc", "views_gpu.h"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def compile_all(directory: Path, flags: tuple[str, ...] = ()) -> dict[str, Path]:
    """Object files, by the names of the sources: the bindings, and the .cu files for the CPU."""
    sources = [ROOT / "tests/cuda/on_cpu.cpp", *SOURCES.glob("*.cu")]
    sources = [s for s in sources if s.name != "cuda_state.cu"]  # there is no device to ask
    return {source.name: compile_one(source, directory, flags) for source in sources}


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
    found = [path for path in [*SOURCES.glob("*.cu"), SOURCES / SHARED] if old in path.read_text()]
    assert len(found) == 1, found
    (directory / found[0].name).write_text(found[0].read_text().replace(old, new))
    changed = "augment_views.cu" if found[0].name == SHARED else found[0].name
    if found[0].name == SHARED:
        shutil.copy(SOURCES / changed, directory)
    objects = objects | {changed: compile_one(directory / changed, directory, flags)}
    return link(directory, objects, flags)


def compiler(flags: tuple[str, ...]) -> list[str]:
    command = ["g++", "-std=c++20", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
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
