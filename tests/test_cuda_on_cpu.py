"""The CUDA kernels, run on the CPU in three orders of their threads, and once more under sanitizers.

With SPD_FAST_CUDA_ON_CPU a module that is built already is taken.
"""

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import cuda_module
import pytest
import torch
from cases import GAUSSIAN_CASES, gaussian_case, random_gaussians

from spd_fast import reference
from spd_fast.ops import mahalanobis

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or which("g++") is None, reason="needs g++ on Linux"
)
ORDERS = ("0", "1", "7")  # forwards, backwards, shuffled
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    given = os.environ.get("SPD_FAST_CUDA_ON_CPU")
    return cuda_module.load(Path(given or cuda_module.build(tmp_path_factory.mktemp("cuda"))))


@pytest.fixture(params=ORDERS)
def on_cpu(request, module, monkeypatch):
    """The CUDA backend takes CPU tensors."""
    monkeypatch.setenv("SPD_FAST_THREAD_ORDER", request.param)
    monkeypatch.setattr(mahalanobis, "native", module)
    monkeypatch.setattr(mahalanobis, "stream_of", lambda tensor: 0)
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


def cuda_map(*arguments):
    reasons = mahalanobis._cuda_reasons(*arguments)
    assert reasons == ["needs tensors on one GPU, got cpu"]
    return mahalanobis._map_cuda(*arguments, 0)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GAUSSIAN_CASES)
def test_map_equals_reference(name, dtype):
    features, channels = gaussian_case(name)
    mean, factor = random_gaussians(features[0][0, 0].numel(), len(channels))
    factor = factor.to(dtype)
    double = [f.double() for f in features]
    exact = reference.mahalanobis_map(double, channels, mean.double(), factor.double())
    plain = reference.mahalanobis_map(features, channels, mean, factor)
    allowed = 2 * (plain - exact).abs().max() + 1e-6 * exact.max()
    for start in range(min(len(exact), 4)):
        its = [f[start : start + 4] for f in features]
        found = cuda_map(its, channels, mean, factor)
        assert (found - exact[start : start + 4]).abs().max() <= allowed


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(dtype, batch):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randint(-3, 4, (batch, c, s, s)).float() for c, s in ((90, 2), (60, 1))]
    channels = torch.randperm(150, generator=generator)[:137]  # in no order
    mean = torch.randint(-2, 3, (4, 137)).float()
    factor = reference.pack(torch.randint(-3, 4, (4, 137, 137)).float().tril())
    plain = reference.mahalanobis_map(features, channels, mean, factor)
    found = cuda_map(features, channels, mean, factor.to(dtype))
    assert torch.equal((found**2).round(), (plain**2).round())


@pytest.mark.usefixtures("on_cpu")
def test_memory_order_of_features():
    features, channels = gaussian_case("odd grids")
    features = [f[:3] for f in features]
    mean, factor = random_gaussians(63, len(channels))
    expected = cuda_map(features, channels, mean, factor)
    for others in (
        [f.to(memory_format=torch.channels_last) for f in features],
        [torch.stack([f, f], 2)[:, :, 0] for f in features],
    ):
        assert torch.equal(cuda_map(others, channels, mean, factor), expected)


@pytest.mark.usefixtures("on_cpu")
def test_channels_out_of_range_are_features_of_zero():
    features, channels = gaussian_case("three layers")
    mean, factor = random_gaussians(64, 20)
    right = [k for k in range(20) if k not in (3, 7)]
    x = torch.zeros(3, 20, 8, 8)
    x[:, right] = reference.embed(features, channels[right])
    expected = reference.mahalanobis_map([x], torch.arange(20), mean, factor)
    channels[3], channels[7] = -1, 1 << 40
    found = cuda_map(features, channels, mean, factor)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_no_image(module, monkeypatch):
    monkeypatch.setattr(mahalanobis, "native", module)
    features, channels = gaussian_case("three layers")
    arguments = [f[:0] for f in features], channels, *random_gaussians(64, 20)
    assert cuda_map(*arguments).shape == (0, 8, 8)


def test_what_it_cannot_take_is_said():
    features, channels = gaussian_case("many images")
    mean, factor = random_gaussians(25, 57)
    reasons = mahalanobis._cuda_reasons([f.half() for f in features], channels, mean, factor)
    assert reasons[1:] == ["takes at most 4 images at a time, got 21", "features must be float32"]
    reasons = mahalanobis._cuda_reasons(features[:1] * 5, channels, mean.mT, factor.to(torch.int8))
    assert "no int8 factor in CUDA" in reasons
    assert any("4 layers" in r for r in reasons) and any("contiguous" in r for r in reasons)
    odd = torch.empty(factor.numel() + 1)[1:].view_as(factor)
    assert "16 bytes" in mahalanobis._cuda_reasons(features, channels, mean, odd)[-1]


@pytest.mark.skipif("SPD_FAST_CUDA_ON_CPU" in os.environ, reason="this is that run")
def test_sanitizers_find_nothing(tmp_path):
    """All of the above, with the address and undefined-behaviour sanitizers."""
    library = cuda_module.build(tmp_path, cuda_module.SANITIZERS)
    done = sanitized([__file__], library)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def sanitized(pytest_arguments: list[str], library: Path) -> subprocess.CompletedProcess:
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}.so"], capture_output=True, text=True)
        for name in ("libasan", "libubsan")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "SPD_FAST_CUDA_ON_CPU": str(library),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *pytest_arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)
