"""The tests of test_cuda_on_cpu.py under sanitizers, and faults that these must find."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import cuda_module
import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or which("g++") is None, reason="needs g++ on Linux"
)
TESTS = str(Path(__file__).with_name("test_cuda_on_cpu.py"))


@pytest.fixture(scope="module")
def sanitized_objects(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sanitized")
    return cuda_module.compile_all(directory, cuda_module.SANITIZERS)


HALVES = "views_equal_reference", "not views_equal_reference"


def test_sanitizers_find_nothing(sanitized_objects, tmp_path):
    """With the address and undefined-behaviour sanitizers."""
    library = cuda_module.link(tmp_path, sanitized_objects, cuda_module.SANITIZERS)
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(lambda which: sanitized(library, "-k", which), HALVES)
    for done in outcomes:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def sanitized(library: Path, *pytest_arguments: str) -> subprocess.CompletedProcess:
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}.so"], capture_output=True, text=True)
        for name in ("libasan", "libubsan")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "SPD_FAST_CUDA_ON_CPU": str(library),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", TESTS]
    command += pytest_arguments
    return subprocess.run(command, capture_output=True, text=True, env=environment)


MAPS = "map_equals_reference and dtype0"
PART = "larger_tensor and dtype1"
VIEWS, TINY = (f"views_equal_reference and {name} and dtype0" for name in ("cutpaste", "tiny"))
OUT_OF_BOUNDS = (
    (MAPS, "gridDim.x + position]", "gridDim.x + position + 1]", "heap-buffer-overflow"),
    (MAPS, "return layer.data[image", "return layer.data[1 + image", "heap-buffer-overflow"),
    (MAPS, "k < 8 * n_panels;", "k <= 8 * n_panels;", "heap-buffer-overflow"),
    (MAPS, "part[warp][lane / image_unit] =", "part[warp][B + lane / image_unit] =", "bounds"),
    (VIEWS, "+ 3 * column;", "+ 3 * (column + 50 * 61);", "AddressSanitizer"),  # pixels
    (TINY, "min2(place.from + i, last)", "place.from + i", "AddressSanitizer"),
    (VIEWS, "axis.begin -= lead;", "", "misaligned address"),
    (PART, "reinterpret_cast<uintptr_t>(views.data) %", "0 %", "misaligned address"),
    (PART, "views.stride[axis] % n == 0;", "(axis == 3 || views.stride[axis] % n == 0);", "misal"),
    (VIEWS, "] = taps.part[k];", " + count * 128] = taps.part[k];", "out of bounds"),
    (VIEWS, "to[k][2 * BlurMemory", "to[k][9 * BlurMemory", "global-buffer-overflow"),
)


def test_the_sanitizers_find_what_is_out_of_bounds(sanitized_objects, tmp_path):
    def outcome(number: int) -> subprocess.CompletedProcess:
        tests, old, new, _ = OUT_OF_BOUNDS[number]
        (directory := tmp_path / str(number)).mkdir()
        flags = *cuda_module.SANITIZERS, "-O0"  # compiled once, and run once
        library = cuda_module.with_fault(directory, sanitized_objects, old, new, flags)
        return sanitized(library, "-k", tests, "-x")

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(outcome, range(len(OUT_OF_BOUNDS))))
    for (_, old, _, message), done in zip(OUT_OF_BOUNDS, outcomes):
        assert done.returncode and message in done.stdout + done.stderr, (old, done.stderr[-2000:])
