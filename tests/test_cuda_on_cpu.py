"""The CUDA kernels on the CPU, in three orders of their threads, in one of them under sanitizers.

With SPD_FAST_CUDA_ON_CPU a module that is built already is taken.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from shutil import which

import cuda_module
import pytest
import torch
from cases import (
    GAUSSIAN_CASES,
    VIEW_CASES,
    every_operation_on,
    exact_map,
    gaussian_case,
    random_gaussians,
    view_case,
)

from spd_fast import recipes, reference, sample_view_params
from spd_fast.ops import augment_views as views
from spd_fast.ops import mahalanobis
from spd_fast.views import COLUMN

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or which("g++") is None, reason="needs g++ on Linux"
)
whole = pytest.mark.skipif(
    "SPD_FAST_CUDA_ON_CPU" in os.environ, reason="of the run that builds the modules"
)
ORDERS = ("0", "1", "7")  # forwards, backwards, shuffled
# The second is taken under the sanitizers, which run the same tests and need more time.
sanitized_here = "SPD_FAST_CUDA_ON_CPU" in os.environ
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return cuda_module.compile_all(tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def module(tmp_path_factory, request):
    if given := os.environ.get("SPD_FAST_CUDA_ON_CPU"):
        return cuda_module.load(Path(given))
    objects = request.getfixturevalue("objects")
    return cuda_module.load(cuda_module.link(tmp_path_factory.mktemp("cuda"), objects))


@pytest.fixture(params=ORDERS[1:2] if sanitized_here else ORDERS[::2])
def on_cpu(request, module, monkeypatch):
    """The CUDA backend takes CPU tensors."""
    monkeypatch.setenv("SPD_FAST_THREAD_ORDER", request.param)
    take(module, monkeypatch)
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    yield
    torch.use_deterministic_algorithms(False)


def take(module, monkeypatch) -> None:
    """Let the operations call this module, and give it no stream."""
    for operation in (mahalanobis, views):
        monkeypatch.setattr(operation, "native", module)
        monkeypatch.setattr(operation, "stream_of", lambda tensor: 0)


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
    exact = exact_map(features, channels, mean, factor)
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
    take(module, monkeypatch)
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


# ----------------------------------------------------------------------------------------- views

IDENTITY = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-3}


def cuda_views(images, params, size, dtype=torch.float32, channels_last=False, normalise=IDENTITY):
    buffers, layout = views._as_buffers(images)
    out = views._empty_views(params, size, dtype, channels_last, torch.device("cpu"))
    reasons = views._cuda_reasons(buffers, layout, params, out)
    assert reasons == ["needs tensors on one GPU, got cpu"]
    views._run_cuda(buffers, layout, params, out, *normalise, 0)
    return out


def params_for(images, size):
    sizes = [image.shape[:2] for image in images]
    return sample_view_params(recipes.simsiam(), sizes, range(len(images)), 0, 0, size)


def exact_views(images, params, size):
    return reference.augment_views(images, params, size, dtype=torch.float64)


@cache
def exact_case(name):
    return exact_views(*view_case(name))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [*ALLOWED] if sanitized_here else [*ALLOWED, torch.uint8])
@pytest.mark.parametrize("name", VIEW_CASES)
def test_views_equal_reference(name, dtype):
    images, params, size = view_case(name)
    found = cuda_views(images, params, size, dtype)
    exact = exact_case(name)
    if dtype == torch.uint8:
        assert (found - (255 * exact).round()).abs().max() <= 1
    else:
        assert (found - exact).abs().max() <= ALLOWED[dtype]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [*ALLOWED, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [(64, 64), (60, 54), (10, 56), (40, 37), (60, 1)])
def test_channels_side_by_side(size, dtype):
    """Other kernels read and store them, if rows have pairs of pixels, and give the same."""
    images, _, _ = view_case("ragged")
    params = params_for(images, size)
    planes = cuda_views(images, params, size, dtype)
    found = cuda_views(images, params, size, dtype, channels_last=True)
    assert found.stride(2) == 1
    assert torch.equal(found, planes)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("left", [0, 1, 2])
@pytest.mark.parametrize("spare", [0, 1, 2])  # columns
@pytest.mark.parametrize("dtype", ALLOWED)
def test_out_is_part_of_a_larger_tensor(dtype, spare, left, channels_last):
    """Not all of its pixels lie where two or four are read and stored at once."""
    images, _, _ = view_case("ragged")
    height, width = size = 40, 44
    params = params_for(images, size)
    shape = (4, len(images), height, width + left + spare, 3)
    if channels_last:
        whole = torch.empty(shape, dtype=dtype).permute(0, 1, 4, 2, 3)
    else:
        whole = torch.empty(*shape[:2], 3, *shape[2:4], dtype=dtype)
    whole.fill_(7)
    out = whole[..., left : left + width]
    views._run_cuda(*views._as_buffers(images), params, out, *IDENTITY, 0)
    assert torch.equal(out, cuda_views(images, params, size, dtype))
    assert (whole[..., :left] == 7).all() and (whole[..., left + width :] == 7).all()


@pytest.mark.usefixtures("on_cpu")
def test_every_jitter_order():
    images, params, size = view_case("cutpaste")
    for order in range(24):
        its = every_operation_on(params, order)
        found = cuda_views(images, its, size)
        assert (found - exact_views(images, its, size)).abs().max() <= ALLOWED[torch.float32]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("least", [0, 255])
def test_a_crop_a_thousand_times_as_wide_as_the_view(least, dtype):
    """The sum of its bytes is no float16. From dark to light, or all white."""
    columns = torch.linspace(least, 255, 3000).to(torch.uint8)
    image = columns[:, None].expand(5, 3000, 3).contiguous()
    params = sample_view_params(recipes.supervised(), [image.shape[:2]], [0], 0, 0, (2, 3))
    values = dict(crop_top=0, crop_left=0, crop_height=5, crop_width=3000, brightness=1,
                  contrast=1, saturation=1, hue=0, grayscale=0, blur_sigma=0)  # fmt: skip
    for name, value in values.items():
        params[:, 0, COLUMN[name]] = value
    found = cuda_views([image], params[:, :1], (2, 3), dtype)
    exact = exact_views([image], params[:, :1], (2, 3))
    assert (found - exact).abs().max() <= ALLOWED[dtype]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
def test_views_from_views_with_patches(dtype, channels_last):
    images, params, size = view_case("odd view")
    params = params.clone()
    params[:, :, COLUMN["source"]] = torch.tensor([3.0, -1.0, 1.0, 1.0])
    params[:, :, COLUMN["crop_top"] : COLUMN["flip"]] = torch.tensor([2.0, 1.0, 30.0, 40.0])
    patch = dict(patch_kind=1, patch_top=1, patch_left=2, patch_height=9, patch_width=8,
                 target_top=20, target_left=31, alpha_sigma_y=2, alpha_sigma_x=1)  # fmt: skip
    for name, value in patch.items():
        params[:, 1:, COLUMN[name]] = value
    exact = exact_views(images, params, size)
    found = cuda_views(images, params, size, dtype, channels_last)
    if dtype == torch.uint8:
        assert (found - (255 * exact).round()).abs().max() <= 1
    else:  # bfloat16 has 8 bits, and the patch is blended into what has been rounded
        allowed = {torch.float16: 2e-3, torch.bfloat16: 5e-3}[dtype]
        assert (found.double() - exact).abs().max() <= allowed


# ------------------------------------------------------------- faults that these checks must find


@pytest.fixture(scope="module")
def modules_with_faults(objects, tmp_path_factory):
    """Compiled two at a time, by what is replaced, while the tests run those there are."""
    pool = ThreadPoolExecutor(2)
    yield {
        fault: pool.submit(
            cuda_module.with_fault, tmp_path_factory.mktemp("fault"), objects, *fault
        )
        for fault in (*WRONG_RESULTS, *(missed[:2] for missed in MISSED))
    }
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def with_fault(modules_with_faults, monkeypatch):
    """Lets the operations call a module with a fault."""
    return lambda *fault: take(cuda_module.load(modules_with_faults[fault].result()), monkeypatch)


@cache
def faults_case():
    """Arguments of a map and of views that every fault spoils, and what is right."""
    features, channels = gaussian_case("three layers")
    gaussians = features, channels, *random_gaussians(64, 20)
    images, params, _ = view_case("odd view")
    params = every_operation_on(params, 8)
    size = 104, 56  # a blur's radius of 5: the second tile's columns lie where the first's did
    views = images, params, size
    return gaussians, reference.mahalanobis_map(*gaussians), views, exact_views(*views)


def errors_by_order(monkeypatch):
    """Of distances and of views, for one thread order after the other."""
    gaussians, distances, views, exact = faults_case()
    for order in ORDERS:
        monkeypatch.setenv("SPD_FAST_THREAD_ORDER", order)
        interleaved = cuda_views(*views, channels_last=True)
        half = cuda_views(*views, torch.float16, channels_last=True)
        for error in (
            cuda_map(*gaussians) - distances,
            *(found - exact for found in (cuda_views(*views), interleaved, half)),
        ):
            yield float(error.abs().nan_to_num(torch.inf).max())


@whole
def test_no_fault_no_error(module, monkeypatch):
    take(module, monkeypatch)
    assert max(errors_by_order(monkeypatch)) < 2e-3


WRONG_RESULTS = (
    ("__syncthreads();\n\n    const T*", "const T*"),  # the features are not all there
    ("__syncthreads();\n    const int b =", "const int b ="),  # nor the warps' sums
    ("__syncthreads();\n    for (int k", "for (int k"),  # nor the places in the layers
    ("lane % image_unit == 0 && ", "lane % image_unit == 1 && lane > 1 && "),
    ("8 * (last + 1)", "8 * last"),
    ("if (threadIdx.x < unsigned(args.layers))", "if (threadIdx.x < 1)"),  # places left out
    ("job.top - radius + 2 * at", "job.top - radius + 1 + 2 * at"),  # a wrong halo
    # The blur reads what is not there yet, or is the next tile's; taps of another place.
    ("            __syncthreads();\n        } else if", "        } else if"),
    ("colors, blur);\n            __syncthreads();", "colors, blur);"),
    ("{pairs[2 * s + 1], pairs[2 * s + 2]});", "{pairs[2 * s], pairs[2 * s + 2]});"),
    ("    __syncthreads();\n    float sum = 0;", "    float sum = 0;"),  # of the block's gray
    # The resize's taps are not there yet, or are of other rows, or are another lane's.
    ("    __syncthreads();\n    float sums_down", "    float sums_down"),
    ("taps_of_rows = memory.down[block_y]", "taps_of_rows = memory.down[0]"),
    ("taps<parts>(first, first + 8)", "taps<parts>(first, first + 6)"),
    ("8 * member + column % 2 * 4", "8 * member"),  # of the sums of taps
    ("__byte_perm(y, z, 0x6532)", "__byte_perm(y, z, 0x6531)"),  # another channel's byte
    ("of_lane.begin, block % warp_size", "of_lane.begin, block % 2"),
    ("divided(blockIdx.x, args.per_tile)", "divided(blockIdx.x, args.per_tile) / 2"),
    # Channels that lie side by side: of another pixel, or in another's place.
    ("low_high(b.y, c.x)}", "low_high(b.y, c.y)}"),
    ("{a.y, b.x, b.w, c.z}", "{a.y, b.x, b.w, c.w}"),
    ("stored[2][i], stored[0][i + 1]", "stored[0][i + 1], stored[2][i]"),
    ("if (place < rows)", "if (place + 5 < rows)"),  # no alpha of the last rows
)


@whole
@pytest.mark.parametrize("old, new", WRONG_RESULTS)
def test_a_wrong_result_is_found(old, new, with_fault, monkeypatch):
    with_fault(old, new)
    assert any(error > 1.5e-3 for error in errors_by_order(monkeypatch))


MISSED = (
    ("shfl_xor_sync(all_lanes, sq", "shfl_xor_sync(all_lanes / 2, sq", "in its own mask"),
    ("    float squares = 0;", "    if (lane == 5) return; float squares = 0;", "do not come"),
    (
        "    __syncthreads();\n    float sums_down",
        "    if (threadIdx.x % warp_size) __syncthreads(); float sums_down",
        "do not come",
    ),
    ("__syncthreads();\n\n    const T", "if (warp) __syncthreads(); const T", "do not come"),
)


@whole
@pytest.mark.parametrize("old, new, message", MISSED)
def test_threads_that_miss_each_other_are_found(old, new, message, with_fault, monkeypatch):
    with_fault(old, new)
    with pytest.raises(RuntimeError, match=message):
        list(errors_by_order(monkeypatch))
