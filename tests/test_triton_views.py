"""`augment_views` in Triton: interpreted on the CPU in a process of its own, or on a GPU."""

import pytest
import torch
from cases import VIEW_CASES, every_operation_on, noise_images, view_case

from spd_fast import InputError, augment_views, recipes, reference, sample_view_params
from spd_fast.ops.augment_views import IMAGENET_MEAN, IMAGENET_STD
from spd_fast.ops.backends import interpreted, select
from spd_fast.views import COLUMN

pytestmark = pytest.mark.triton
DEVICE = "cpu" if interpreted() else "cuda"
IDENTITY = dict(mean=(0, 0, 0), std=(1, 1, 1))
# Errors that are allowed, of values in [0, 1]: what is kept between launches is rounded, and the
# blur multiplies half-precision numbers.
ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-3}
# The interpreter takes its time for every tile.
CASES = [n for n, (_, (h, w), _) in VIEW_CASES.items() if not interpreted() or h * w < 8000]


def triton_views(images, params, size, **options):
    images = [image.to(DEVICE) for image in images]
    return augment_views(images, params, size, **options, backend="triton").cpu()


def exact_views(images, params, size):
    return reference.augment_views(images, params, size, dtype=torch.float64)


@pytest.fixture(autouse=True)
def poisoned():
    """New memory is NaN, so that what is read must have been written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_views_equal_reference(name, dtype):
    images, params, size = view_case(name)
    exact = exact_views(images, params, size)
    found = triton_views(images, params, size, dtype=dtype, **IDENTITY)
    assert found.dtype == dtype and found.shape == exact.shape
    assert (found - exact).abs().max() <= ALLOWED[dtype]


@pytest.mark.parametrize("order", range(24))
def test_every_jitter_order(order):
    images, params, _ = view_case("odd view")
    params = every_operation_on(params, order)[:1, 1:]
    params[..., COLUMN["source"]] = -1
    images, size = images[:1], (16, 20)
    params[..., COLUMN["crop_top"] : COLUMN["flip"]] = torch.tensor([3.0, 5.0, 30.0, 40.0])
    for name, value in dict(patch_kind=1, patch_top=3, patch_left=2, patch_height=4,
                            patch_width=6, target_top=8, target_left=9,
                            alpha_sigma_y=1, alpha_sigma_x=0.5).items():  # fmt: skip
        params[..., COLUMN[name]] = value
    found = triton_views(images, params, size, **IDENTITY)
    assert (found - exact_views(images, params, size)).abs().max() <= ALLOWED[torch.float32]


@pytest.mark.parametrize("channels_last", [False, True])
def test_uint8_is_off_by_one_step_at_most(channels_last):
    images, params, size = view_case("odd view")
    exact = (255 * exact_views(images, params, size)).round()
    options = dict(dtype=torch.uint8, channels_last=channels_last)
    found = triton_views(images, params, size, **options)
    assert found.stride(2) == (1 if channels_last else size[0] * size[1])
    assert (found - exact).abs().max() <= 1
    assert (found == exact).double().mean() > 0.9


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalised_and_in_either_order(dtype, channels_last):
    images, params, size = view_case("cutpaste")
    shape = (1, 1, 3, 1, 1)
    mean, std = torch.tensor(IMAGENET_MEAN).view(shape), torch.tensor(IMAGENET_STD).view(shape)
    exact = (exact_views(images, params, size) - mean) / std
    found = triton_views(images, params, size, dtype=dtype, channels_last=channels_last)
    # Stored values have a last digit of 2^-8 in bfloat16, in the source of the later views too.
    last_digit = {torch.float32: 0, torch.float16: 2.7 * 2**-11, torch.bfloat16: 4 * 2.7 * 2**-8}
    allowed = ALLOWED.get(dtype, 2e-3) / std.min() + last_digit[dtype]
    assert (found.double() - exact).abs().max() <= allowed


def test_sources_and_rounds():
    """Views from views from views, and from one with a patch."""
    images, params, size = view_case("ragged")
    images, params, size = images[:2], params[:2].clone(), (24, 20)
    params[:, :, COLUMN["source"]] = torch.tensor([3.0, -1.0, 1.0, 1.0])
    params[:, :, COLUMN["crop_top"] : COLUMN["flip"]] = torch.tensor([2.0, 1.0, 18.0, 14.0])
    for name, value in dict(patch_kind=2, patch_top=1, patch_left=2, patch_height=4, patch_width=5,
                            target_top=10, target_left=11).items():  # fmt: skip
        params[:, :, COLUMN[name]] = value * torch.tensor([0.0, 0.0, 0.0, 1.0])
    exact = exact_views(images, params, size)
    found = triton_views(images, params, size, **IDENTITY)
    assert (found - exact).abs().max() <= ALLOWED[torch.float32]
    found = triton_views(images, params, size, dtype=torch.uint8)
    assert (found - (255 * exact).round()).abs().max() <= 1
    params[1, 0, 0] = 2
    with pytest.raises(InputError, match="different sources in different images"):
        triton_views(images, params, size)


def test_images_in_one_buffer_and_in_many():
    images, params, size = view_case("ragged")
    size = (20, 24)
    params = sample_view_params(
        recipes.simsiam(), [i.shape[:2] for i in images], range(3), 0, 3, size
    )
    expected = triton_views(images, params, size)
    starts = torch.tensor([0, *(image.numel() + 7 for image in images)]).cumsum(0)[:-1]
    flat = torch.zeros(int(starts[-1]) + images[-1].numel(), dtype=torch.uint8)
    table = torch.tensor([[s, *i.shape[:2]] for s, i in zip(starts.tolist(), images)])
    for start, image in zip(starts.tolist(), images):
        flat[start : start + image.numel()] = image.flatten()
    assert torch.equal(
        augment_views((flat.to(DEVICE), table), params, size, backend="triton").cpu(), expected
    )
    dense = torch.stack(noise_images([(30, 40)] * 3))
    params = sample_view_params(recipes.simsiam(), [(30, 40)] * 3, range(3), 0, 3, size)
    expected = triton_views(list(dense), params, size)
    assert torch.equal(
        augment_views(dense.to(DEVICE), params, size, backend="triton").cpu(), expected
    )
    out = torch.full((4, 5, 3, *size), 7.0, device=DEVICE)
    augment_views(dense.to(DEVICE), params, out=out[:, 1:4], backend="triton")
    assert torch.equal(out[:, 1:4].cpu(), expected)
    assert (out[:, [0, 4]] == 7).all()


def test_repeated_runs_are_equal():
    """The mean for contrast is summed in a fixed order."""
    images, params, size = view_case("no spd")
    assert torch.equal(triton_views(images, params, size), triton_views(images, params, size))


@pytest.mark.parametrize("spd, launches", [(True, 5), (False, 2)])
def test_number_of_launches(spd, launches, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    kind = InterpretedFunction if interpreted() else JITFunction
    counted, run = [], kind.run
    monkeypatch.setattr(
        kind, "run", lambda self, *a, **k: (counted.append(self), run(self, *a, **k))[1]
    )
    for n in (1, 3):
        counted.clear()
        sizes = [(20, 30)] * n
        params = sample_view_params(recipes.simsiam(spd=spd), sizes, range(n), 0, 0, size=16)
        triton_views(noise_images(sizes), params, 16)
        assert len(counted) == launches


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(16, 24), (21, 70)])
def test_no_access_out_of_bounds_and_no_race(size, dtype):
    from triton_checker import checked

    sizes = [(9, 7), (60, 45), (20, 300)]
    images = noise_images(sizes)
    for seed, recipe in enumerate((recipes.simsiam(), recipes.simclr(local_aug="cutpaste"))):
        params = sample_view_params(recipe, sizes, range(3), 0, seed, size=size)
        flat = torch.cat([image.flatten() for image in images])
        ends = torch.tensor([image.numel() for image in images]).cumsum(0)
        table = torch.tensor([[int(e) - h * w * 3, h, w] for e, (h, w) in zip(ends, sizes)])
        with checked():
            found = augment_views((flat, table), params, size, dtype=dtype, backend="triton")
        assert found.isfinite().all()


def test_what_it_cannot_take_is_said():
    images, params, size = view_case("cutpaste")
    params[:, 3, COLUMN["patch_kind"]] = 1
    params[:, 3, COLUMN["alpha_sigma_y"]] = 200
    with pytest.raises(InputError, match="more than 1024 taps"):
        triton_views(images, params, size)


def test_columns_are_those_of_the_table():
    from spd_fast.kernels import views_table

    names = {"jitter": "jitter_order", "patch_jitter": "patch_jitter_order"}
    found = 0
    for name, value in vars(views_table).items():
        column = names.get(name.lower(), name.lower())
        if column in COLUMN:
            assert value.value == COLUMN[column], name
            found += 1
    assert found == 18 and views_table.COLUMNS.value == len(COLUMN)


def test_which_backend_auto_takes():
    images, params, size = view_case("no spd")
    buffers = [image.to(DEVICE).flatten() for image in images]
    layout = torch.tensor([[i, 0, *image.shape[:2]] for i, image in enumerate(images)])
    out = torch.empty(2, 2, 3, *size, device=DEVICE)
    chosen = select("augment_views", None, buffers, layout, params, out)
    assert chosen.name == ("native" if interpreted() else "triton")
