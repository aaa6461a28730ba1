"""The CUDA kernels built to run on the CPU: see tests/cuda/on_cpu.h."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[1]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def compile_bindings(directory: Path, flags: tuple[str, ...] = ()) -> Path:
    """An object file: it takes longest, and is the same whatever the kernels are."""
    object_file = directory / "bindings.o"
    source = ROOT / "tests/cuda/on_cpu.cpp"
    run([*compiler(flags), f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(object_file)])
    return object_file


def build(
    directory: Path, bindings: Path, flags: tuple[str, ...] = (), sources: Path = ROOT / "csrc"
) -> Path:
    """Compile the .cu files of a folder for the CPU; returns the module's file."""
    objects = [str(bindings)]
    for source in sorted(sources.glob("*.cu")):
        if source.name == "cuda_state.cu":  # there is no device to ask
            continue
        objects.append(str(directory / f"{source.stem}.o"))
        shim = ["-x", "c++", "-include", str(ROOT / "tests/cuda/on_cpu.h"), f"-I{ROOT / 'csrc'}"]
        run([*compiler(flags), *shim, "-c", str(source), "-o", objects[-1]])
    module = directory / "cuda_on_cpu.so"
    run([*compiler(flags), "-shared", *objects, "-o", str(module)])
    return module


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
