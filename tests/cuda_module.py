"""The CUDA kernels built to run on the CPU: see tests/cuda/on_cpu.h."""

import importlib.util
import subprocess
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[1]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def build(directory: Path, flags: tuple[str, ...] = (), sources: Path = ROOT / "csrc") -> Path:
    """Compile csrc/*.cu and their bindings; returns the module's file."""
    include = [sysconfig.get_path("include"), pybind11.get_include(), str(sources)]
    command = ["g++", "-std=c++20", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    command += ["-Wno-unknown-pragmas", "-ffp-contract=fast", "-march=x86-64-v3", *flags]
    command += [f"-I{path}" for path in include]
    objects = []
    for source in (ROOT / "tests/cuda/on_cpu.cpp", *sorted(sources.glob("*.cu"))):
        if source.name == "cuda_state.cu":  # there is no device to ask
            continue
        shim = ["-include", str(ROOT / "tests/cuda/on_cpu.h")] if source.suffix == ".cu" else []
        objects.append(str(directory / f"{source.stem}.o"))
        run([*command, "-x", "c++", *shim, "-c", str(source), "-o", objects[-1]])
    module = directory / "cuda_on_cpu.so"
    run([*command, "-shared", *objects, "-o", str(module)])
    return module


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def load(path: Path):
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
