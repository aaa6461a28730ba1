import sys

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from cases import VIEW_CASES, every_operation_on, guarded_pages, noise_images, view_case
from peers import torchvision_views
from torch.library import opcheck

from spd_fast import InputError, augment_views, recipes, reference, sample_view_params, use_backend
from spd_fast.ops.augment_views import _as_buffers, explain
from spd_fast.ops.backends import native
from spd_fast.views import COLUMN

pytestmark = pytest.mark.usefixtures("two_threads")

IDENTITY = dict(mean=(0, 0, 0), std=(1, 1, 1))


# ---------------------------------------------------------------- the reference against torchvision


# torchvision cannot mirror further than the image reaches, so views of one pixel are left out here.
@pytest.mark.parametrize("name", [n for n in VIEW_CASES if not n.startswith("view of one")])
def test_reference_equals_torchvision(name):
    images, params, size = view_case(name)
    ours = reference.augment_views(images, params, size, dtype=torch.float64)
    for i, image in enumerate(images):
        separable = name == "large view"  # torchvision's own blur of the mask takes 15 s there
        theirs = torch.stack(torchvision_views(image, params[i], size, separable_alpha=separable))
        # torchvision computes resize weights in float32 and the hue in float32
        torch.testing.assert_close(ours[:, i], theirs.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("order", range(24))
def test_reference_equals_torchvision_in_every_jitter_order(order):
    images, params, size = view_case("cutpaste")
    params = every_operation_on(params, order)
    ours = reference.augment_views(images, params, size, dtype=torch.float64)
    theirs = torch.stack(torchvision_views(images[0], params[0], size))
    torch.testing.assert_close(ours[:, 0], theirs.double(), atol=1e-4, rtol=0)


def test_reference_resize_takes_extreme_crops():
    image = noise_images([(300, 400)])[0]
    params = sample_view_params(recipes.supervised(spd=False), [(300, 400)], [0], 0, 0, size=64)
    params[..., COLUMN["flip"]] = 0
    for box in [(0, 0, 1, 1), (299, 399, 1, 1), (0, 0, 300, 1), (7, 3, 2, 390), (0, 0, 300, 400)]:
        params[0, 0, 1:5] = torch.tensor(box, dtype=torch.float32)
        ours = reference.augment_views([image], params, (64, 64), dtype=torch.float64)[0, 0]
        theirs = F.resized_crop(
            image.permute(2, 0, 1).double() / 255, *box, [64, 64], antialias=True
        )
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


# -------------------------------------------------------------------- native against the reference


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("name", VIEW_CASES)
def test_native_equals_reference(name, epoch):
    images, params, size = view_case(name, epoch)
    exact = reference.augment_views(images, params, size, dtype=torch.float64)
    single = reference.augment_views(images, params, size, dtype=torch.float32)
    fast = augment_views(images, params, size, **IDENTITY, backend="native")
    assert fast.shape == exact.shape
    allowed = 2 * (single - exact).abs().max().item() + 1e-5
    assert (fast - exact).abs().max().item() <= allowed < 1e-4


@pytest.mark.parametrize("order", range(24))
def test_native_equals_reference_in_every_jitter_order(order):
    images, params, size = view_case("ragged")
    params = every_operation_on(params, order)
    exact = reference.augment_views(images, params, size, dtype=torch.float64)
    fast = augment_views(images, params, size, **IDENTITY, backend="native")
    assert (fast - exact).abs().max() < 1e-5


def test_views_may_be_made_from_any_other_view():
    images, params, size = view_case("ragged")
    params[:, :, COLUMN["source"]] = torch.tensor([2.0, -1.0, 3.0, 1.0])  # 1 -> 3 -> 2 -> 0
    params[:, :, COLUMN["crop_top"]] = params[:, :, COLUMN["crop_left"]] = 2
    params[:, :, COLUMN["crop_height"]] = params[:, :, COLUMN["crop_width"]] = 30
    exact = reference.augment_views(images, params, size, dtype=torch.float64)
    fast = augment_views(images, params, size, **IDENTITY, backend="native")
    assert (fast - exact).abs().max() < 1e-5


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
def test_nothing_beside_the_image_is_read():
    page = guarded_pages()
    for height in (1, 2, 3, 5, 8):
        for width in (*range(1, 24), 40):
            n = 3 * height * width
            for image in (page[:n].view(height, width, 3), page[-n:].view(height, width, 3)):
                image.copy_(noise_images([(height, width)], seed=width)[0])
                params = neutral(height, width)
                exact = reference.augment_views([image], params, (7, 9), dtype=torch.float64)
                fast = augment_views([image], params, (7, 9), **IDENTITY, backend="native")
                assert (fast - exact).abs().max() < 2e-6


def neutral(height: int, width: int) -> torch.Tensor:
    """One view of the whole image, nothing but resized."""
    params = sample_view_params(recipes.supervised(spd=False), [(height, width)], [0], 0, 0, 8)
    params[0, 0, 1:6] = torch.tensor([0, 0, height, width, 0])
    return params


def test_crops_of_every_width():
    """Any number of taps, and neighbours near and far: every way along a row is taken."""
    image = noise_images([(40, 300)])[0]
    params = sample_view_params(recipes.supervised(spd=False), [(40, 300)], [0], 0, 0, size=40)
    for flip in (0, 1):
        for width in (*range(1, 100), 127, 160, 231, 300):
            params[0, 0, 1:6] = torch.tensor([3, 300 - width, 30, width, flip])
            exact = reference.augment_views([image], params, (40, 40), dtype=torch.float64)
            fast = augment_views([image], params, 40, **IDENTITY, backend="native")
            assert (fast - exact).abs().max() < 2e-6, (flip, width)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [64, 72, 97])
def test_rows_need_not_begin_at_a_vector(dtype, size, channels_last):
    images = noise_images([(50, 60)])
    params = sample_view_params(recipes.simsiam(), [(50, 60)], [0], 0, 3, size=size)
    expected = augment_views(images, params, size, dtype=dtype)
    shape = (4, 1, size, size, 3) if channels_last else expected.shape
    memory = torch.full((expected.numel() + 64,), 7, dtype=dtype)
    for offset in (0, 1, 4, 8, 16, 33):
        out = memory[offset : offset + expected.numel()].view(shape)
        out = out.permute(0, 1, 4, 2, 3) if channels_last else out
        augment_views(images, params, out=out)
        assert torch.equal(out, expected)
        assert (memory[:offset] == 7).all() and (memory[offset + expected.numel() :] == 7).all()
        memory.fill_(7)


def test_identity_view_is_the_image():
    image = noise_images([(32, 32)])[0]
    params = torch.zeros(1, 1, len(COLUMN))
    params[..., COLUMN["source"]] = -1
    params[..., COLUMN["crop_height"]] = params[..., COLUMN["crop_width"]] = 32
    for name in ("brightness", "contrast", "saturation"):
        params[..., COLUMN[name]] = params[..., COLUMN["patch_" + name]] = 1
    for backend in ("native", "reference"):
        out = augment_views([image], params, 32, dtype=torch.uint8, backend=backend)
        assert torch.equal(out[0, 0], image.permute(2, 0, 1))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_output_formats(dtype, channels_last):
    images, params, size = view_case("odd view")
    fast, plain = (
        augment_views(
            images, params, size, dtype=dtype, channels_last=channels_last, backend=backend
        )
        for backend in ("native", "reference")
    )
    assert fast.dtype == dtype and fast.stride() == plain.stride()
    assert fast[0].is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    step = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-2, torch.uint8: 1}[dtype]
    difference = (fast.float() - plain.float()).abs()
    assert difference.max() <= step
    assert (difference > step / 4).float().mean() < 1e-3  # only where two roundings disagree


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_rounding_is_to_nearest_even(dtype):
    """Every 8-bit value, normalised to cover subnormal, small and large halves."""
    image = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3).contiguous()
    params = torch.zeros(1, 1, len(COLUMN))
    params[..., COLUMN["source"]] = -1
    params[..., COLUMN["crop_height"]] = params[..., COLUMN["crop_width"]] = 16
    for name in ("brightness", "contrast", "saturation"):
        params[..., COLUMN[name]] = params[..., COLUMN["patch_" + name]] = 1
    kwargs = dict(mean=(0.5, 0.25, 0), std=(2.0**-14, 2.0**8, 2.0**18), backend="native")
    half = augment_views([image], params, 16, dtype=dtype, **kwargs)
    full = augment_views([image], params, 16, dtype=torch.float32, **kwargs)
    assert torch.equal(half, full.to(dtype))


def test_input_forms_and_slices_of_a_batch_agree():
    images, params, size = view_case("ragged")
    expected = augment_views(images, params, size)
    flat = torch.cat([image.flatten() for image in images])
    offsets = np.cumsum([0, *(image.numel() for image in images[:-1])])
    table = [[o, *image.shape[:2]] for o, image in zip(offsets, images)]
    assert torch.equal(augment_views((flat, table), params, size), expected)
    assert torch.equal(augment_views([i.numpy() for i in images], params, size), expected)
    strided = [torch.stack([i, i], 3)[..., 0] for i in images]
    assert not strided[0].is_contiguous()
    assert torch.equal(augment_views(strided, params, size), expected)
    batch = torch.full((4, 5, 3, *size), torch.nan)
    augment_views(images[:2], params[:2], out=batch[:, 1:3])
    augment_views(images[2:], params[2:], out=batch[:, 3:4])
    assert torch.equal(batch[:, 1:4], expected)
    assert batch[:, [0, 4]].isnan().all()

    dense = torch.stack(noise_images([(40, 30)] * 3))
    params = sample_view_params(recipes.simsiam(), [(40, 30)] * 3, range(3), 0, 0, size=32)
    assert torch.equal(augment_views(dense, params, 32), augment_views(list(dense), params, 32))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_empty_batch(backend):
    params = sample_view_params(recipes.simsiam(), np.zeros((0, 2)), [], 0, 0)
    assert augment_views([], params, 32, backend=backend).shape == (4, 0, 3, 32, 32)


def test_threads_do_not_change_a_bit():
    images, params, size = view_case("ragged")
    one = augment_views(images, params, size, threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(augment_views(images, params, size, threads=threads), one)


def test_read_only_and_mirrored_arrays_are_accepted():
    image = noise_images([(20, 20)])[0].numpy()
    params = sample_view_params(recipes.simsiam(), [(20, 20)], [0], 0, 0, size=16)
    mirrored = image[:, ::-1, ::-1]
    expected = augment_views([mirrored.copy()], params, 16)
    assert torch.equal(augment_views([mirrored], params, 16), expected)
    image.flags.writeable = False
    assert augment_views([image], params, np.int64(16)).isfinite().all()


# ------------------------------------------------------------------------------- schema and errors


def test_schema_fake_and_compile():
    images, params, size = view_case("ragged")
    buffers, layout = _as_buffers(images)
    out = torch.empty(4, 3, 3, *size)
    opcheck(
        torch.ops.spd_fast.augment_views.default,
        (buffers, layout, params, out, [0.5] * 3, [0.2] * 3),
        test_utils=("test_schema", "test_faketensor"),
    )
    fake = torch.compile(
        lambda p, o: torch.ops.spd_fast.augment_views(buffers, layout, p, o, [0.0] * 3, [1.0] * 3),
        backend="eager",
        fullgraph=True,
    )
    fake(params, out)
    assert torch.equal(out, augment_views(images, params, size, **IDENTITY))


def unaligned(shape) -> torch.Tensor:
    memory = bytearray(4 * int(np.prod(shape)) + 66)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 64 + 2
    return torch.frombuffer(memory, dtype=torch.float32, offset=start, count=np.prod(shape)).view(
        shape
    )


def broken(column=None, value=None, view=2, **changes):
    images, params, size = view_case("ragged")
    arguments = dict(images=images, params=params, size=size) | changes
    if column:
        arguments["params"][1, view, COLUMN[column]] = value
    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (broken(images=[torch.zeros(4, 4)] * 3), r"images\[0\] must be \(H, W, 3\), got \(4, 4\)"),
        (broken(images=[torch.zeros(4, 4, 3)] * 3), "images must be uint8, got torch.float32"),
        (broken(images=torch.zeros(3, 4, 4, 1)), r"dense batch must be \(N, H, W, 3\)"),
        (broken(images=noise_images([(60, 80)])), r"params must be \(1, V, 27\) for 1 images"),
        (broken(images=(torch.zeros(9, dtype=torch.uint8), [[0, 60, 80]] * 3)), "past its buffer"),
        (broken(params=torch.zeros(3, 4, 5)), r"params must be \(N, V, 27\), got \(3, 4, 5\)"),
        (broken(params=torch.zeros(3, 4, 27).double()), "params must be float32"),
        (broken(size=0), "size must be at least 1"),
        (broken(dtype=torch.int32), "dtype must be one of"),
        (broken(std=(1, 0, 1)), "std must be above 0"),
        (broken(mean=(0, float("nan"), 0)), "3 finite values"),
        (broken(images=["photo.jpg"] * 3), "numpy array or a tensor, got str"),
        (broken(size="large"), "one or two whole numbers"),
        (broken(out=torch.zeros(1).expand(4, 3, 3, 64, 64)), "share memory"),
        (broken("crop_top", 0.5), "crop_top must be a whole number"),
        (
            broken(images=(torch.zeros(99, dtype=torch.uint8), [[2**63 - 100, 40, 50]] * 3)),
            "past its buffer",
        ),
        (
            broken(images=(torch.zeros(99, dtype=torch.uint8), [[0, 2**31, 2**31]] * 3)),
            "sides must be below",
        ),
        (broken(out=torch.zeros(2, 2)), "out must be"),
        (broken(out=torch.zeros(4, 3, 3, 64, 64, requires_grad=True)), "not require gradients"),
        (broken(images=(torch.zeros(9, dtype=torch.uint8), [[0.5, 1, 1]] * 3)), "whole numbers"),
        (broken("source", 4), "image 1, view 2: source must be -1 or a view index below 4"),
        (broken("source", 2), "in a circle"),
        (broken("crop_top", 70), "image 1, view 2: the crop box is empty or reaches outside"),
        (broken("crop_width", 0), "crop box"),
        (broken("jitter_order", 24), r"jitter_order must be 0..23"),
        (broken("brightness", -0.1), "brightness must not be negative"),
        (broken("hue", float("nan")), "NaN or infinity"),
        (broken(out=unaligned((4, 3, 3, 64, 64))), "multiple of its elements' size"),
        (broken("alpha_sigma_x", 2e4, view=3), "alpha_sigma_x must be at most 10000"),
        (broken("patch_kind", 3), "patch_kind must be one of"),
        (broken("patch_kind", 1), "patch or its target is outside the view"),
        (
            broken(backend="fast"),
            "no backend 'fast'; there are: auto, native, cuda, triton, reference",
        ),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        augment_views(**arguments)


def test_the_fast_check_refuses_exactly_what_can_be_explained():
    images, valid, size = view_case("ragged")
    sizes = [image.numel() for image in images]
    layout = np.array([[i, 0, *image.shape[:2]] for i, image in enumerate(images)])
    values = [np.nan, np.inf, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 23, 24, 33, 64, 65, 80, 2e4]
    rng, accepted = np.random.default_rng(0), 0
    for _ in range(3000):
        params, table = valid.numpy().copy(), layout.copy()
        params[tuple(rng.integers(params.shape))] = rng.choice(values)
        if rng.random() < 0.3:
            table[tuple(rng.integers(table.shape))] = rng.choice([-1, 0, 1, 33, 82, 2**24, 2**62])
        try:
            explain(sizes, table, params, *size)
            explained = False
        except InputError:
            explained = True
        assert native.views_are_valid(sizes, table, params, *size) is not explained
        accepted += not explained
    assert 300 < accepted < 2700


def test_a_named_backend_is_used_or_refused(monkeypatch):
    images, params, size = view_case("no spd")
    with use_backend("nonsense"), pytest.raises(InputError, match="nonsense"):
        augment_views(images, params, size)
    monkeypatch.setenv("SPD_FAST_BACKEND", "triton-on-mars")
    with pytest.raises(InputError, match="triton-on-mars"):
        augment_views(images, params, size)
    with use_backend("reference"):
        augment_views(images, params, size)
