"""`mahalanobis_map` in Triton: interpreted on the CPU in a process of its own, or on a GPU."""

import pytest
import torch
from cases import GAUSSIAN_CASES, exact_map, gaussian_case, random_gaussians

from spd_fast import InputError, mahalanobis_map, reference
from spd_fast.ops.backends import OPERATIONS, interpreted, select

pytestmark = pytest.mark.triton
DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on_device(features, *tensors):
    return [f.to(DEVICE) for f in features], *(t.to(DEVICE) for t in tensors)


@pytest.fixture
def poisoned():
    """New memory is NaN, so that what is read must have been written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GAUSSIAN_CASES)
def test_map_equals_reference(name, dtype):
    features, channels = gaussian_case(name)
    mean, factor = random_gaussians(features[0][0, 0].numel(), len(channels))
    factor = factor.to(dtype)
    exact = exact_map(features, channels, mean, factor)
    plain = mahalanobis_map(features, channels, mean, factor, backend="reference")
    arguments = on_device(features, channels, mean, factor)
    found = mahalanobis_map(*arguments, backend="triton").cpu()
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6 * exact.max()


@pytest.mark.parametrize("name", GAUSSIAN_CASES)
def test_small_integers_are_exact(name):
    features, channels = gaussian_case(name)
    features = [(2 * f).round() for f in features]
    positions, d = features[0][0, 0].numel(), len(channels)
    mean = torch.randint(-2, 3, (positions, d)).float()
    factor = reference.pack(torch.randint(-3, 4, (positions, d, d)).float().tril())
    squares = mahalanobis_map(features, channels, mean, factor, backend="reference") ** 2
    for dtype in DTYPES:
        arguments = on_device(features, channels, mean, factor.to(dtype))
        found = mahalanobis_map(*arguments, backend="triton").cpu()
        assert torch.equal((found**2).round(), squares.round())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wide_factor(dtype):
    """Several tiles of rows and columns, the last ones partly empty."""
    features = [torch.randn(18, c, s, s) for c, s in ((64, 2), (80, 1))]
    channels = torch.randperm(144)[:137]  # in no order
    mean, factor = random_gaussians(4, 137)
    factor = factor.to(dtype)
    exact = exact_map(features, channels, mean, factor)
    for batch in (1, 18):  # 16 and 32 images a tile
        its = [f[:batch] for f in features]
        found = mahalanobis_map(*on_device(its, channels, mean, factor), backend="triton").cpu()
        torch.testing.assert_close(found, exact[:batch].float(), rtol=1e-6, atol=0)


def test_what_float16_rounds_away_is_not_lost():
    """The factor is in float16; the features count with all their digits."""
    features, channels = gaussian_case("three layers")
    mean, factor = random_gaussians(64, 20)
    features = [f + 100 for f in features]
    factor, mean = factor.half(), mean + 100
    exact = exact_map(features, channels, mean, factor)
    found = mahalanobis_map(*on_device(features, channels, mean, factor), backend="triton").cpu()
    torch.testing.assert_close(found, exact.float(), rtol=2e-6, atol=0)
    rounded = exact_map([(f - 100).half() + 100.0 for f in features], channels, mean, factor)
    assert ((rounded - exact) / exact).abs().max() > 2e-5


@pytest.mark.usefixtures("poisoned")
def test_positions_in_blocks(monkeypatch):
    """The scratch memory is used again for every block of positions; the last one is shorter."""
    from spd_fast.kernels import mahalanobis as kernels

    features, channels = gaussian_case("odd grids")
    mean, factor = random_gaussians(63, len(channels))
    arguments = on_device(features, channels, mean, factor.half())
    whole = mahalanobis_map(*arguments, backend="triton")
    monkeypatch.setattr(kernels, "SCRATCH", 1)
    assert torch.equal(mahalanobis_map(*arguments, backend="triton"), whole)
    nothing = [f[:0] for f in arguments[0]]
    assert mahalanobis_map(nothing, *arguments[1:], backend="triton").shape == (0, 9, 7)


def test_memory_order_and_dtype_of_features():
    features, channels = gaussian_case("odd grids")
    features = [f.half().float() for f in features]
    mean, factor = random_gaussians(63, len(channels))
    arguments = on_device(features, channels, mean, factor)
    expected = mahalanobis_map(*arguments, backend="triton")
    features = arguments[0]
    for others in (
        [f.to(memory_format=torch.channels_last) for f in features],
        [torch.stack([f, f], 2)[:, :, 0] for f in features],
        [f.mT.contiguous().mT for f in features],
        [f.half() for f in features],
        [features[0].double(), features[1].half(), features[2]],
    ):
        found = mahalanobis_map(others, *arguments[1:], backend="triton")
        assert torch.equal(found, expected)


def test_one_layer_and_five():
    generator = torch.Generator().manual_seed(0)
    for sizes in ([4], [4, 4, 2, 2, 1]):
        features = [torch.randn(2, 6, s, s, generator=generator) for s in sizes]
        channels = torch.arange(0, 6 * len(sizes), 2)
        mean, factor = random_gaussians(16, len(channels))
        exact = exact_map(features, channels, mean, factor)
        arguments = on_device(features, channels, mean, factor)
        found = mahalanobis_map(*arguments, backend="triton").cpu()
        torch.testing.assert_close(found, exact.float(), rtol=2e-6, atol=0)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_access_out_of_bounds_and_no_race(dtype, monkeypatch):
    from triton_checker import checked

    from spd_fast.kernels import mahalanobis as kernels

    monkeypatch.setattr(kernels, "SCRATCH", 1)
    for name in ("odd grids", "one channel", "many images"):
        features, channels = gaussian_case(name)
        mean, factor = random_gaussians(features[0][0, 0].numel(), len(channels))
        for format in (torch.contiguous_format, torch.channels_last):
            its = [f.to(memory_format=format) for f in features]
            with checked():
                mahalanobis_map(its, channels, mean, factor.to(dtype), backend="triton")


@pytest.mark.interpreted
def test_channels_out_of_range_touch_nothing():
    """On a GPU they are not looked at beforehand."""
    from triton_checker import checked

    from spd_fast.kernels.mahalanobis import mahalanobis_map as launch

    features, channels = gaussian_case("three layers")
    mean, factor = random_gaussians(64, 20)
    channels[3], channels[7] = -1, 1 << 40
    with checked():
        found = launch(features, channels, mean, factor)
    x = torch.zeros(3, 20, 8, 8)
    right = [k for k in range(20) if k not in (3, 7)]
    x[:, right] = reference.embed(features, channels[right])
    torch.testing.assert_close(
        found, reference.mahalanobis_map([x], torch.arange(20), mean, factor), rtol=1e-5, atol=0
    )


def test_what_it_cannot_take_is_said():
    features, channels = gaussian_case("three layers")
    mean, factor = random_gaussians(64, 20)
    arguments = on_device(features, channels, mean, factor)
    with pytest.raises(InputError, match="no int8 factor in Triton"):
        quantized = reference.quantize(arguments[3])
        mahalanobis_map(*arguments[:3], quantized, backend="triton")
    with pytest.raises(InputError, match="must be contiguous"):
        wide = arguments[2].new_empty(64, 40)[:, :20]
        mahalanobis_map(*arguments[:2], wide, arguments[3], backend="triton")


def test_which_backend_auto_takes():
    features, channels = gaussian_case("three layers")
    features = [f.repeat(2, 1, 1, 1) for f in features]  # 6 images
    arguments = on_device(features, channels, *random_gaussians(64, 20))
    chosen = select("mahalanobis_map", None, *arguments)
    assert chosen.name == ("native" if interpreted() else "triton")
    assert [b.name for b in OPERATIONS["mahalanobis_map"]] == [
        *("native", "cuda", "triton", "reference")
    ]
