"""`augment_views` in Triton: interpreted on the CPU in a process of its own, or on a GPU."""

import pytest
import torch
from cases import VIEW_CASES, every_operation_on, noise_images, view_case
from torch.utils._python_dispatch import TorchDispatchMode

from spd_fast import InputError, augment_views, recipes, reference, sample_view_params
from spd_fast.ops.augment_views import IMAGENET_MEAN, IMAGENET_STD
from spd_fast.ops.backends import OPERATIONS, interpreted, native, select
from spd_fast.views import COLUMN

pytestmark = pytest.mark.triton
DEVICE = "cpu" if interpreted() else "cuda"
PATCH = slice(COLUMN["patch_kind"], len(COLUMN))
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


class Operations(TorchDispatchMode):
    """Notes torch's operations among what else is noted."""

    def __init__(self, noted: list):
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.noted.append(str(function))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("spd, launches", [(True, 5), (False, 2)])
def test_number_of_launches_with_nothing_between(spd, launches, dtype, monkeypatch):
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    noted = []

    def noting(run):
        return lambda *arguments, **options: (noted.append("launch"), run(*arguments, **options))[1]

    if interpreted():  # it reads tensors by operations of torch, which do not count
        monkeypatch.setattr(GridExecutor, "__call__", lambda *a, **k: noted.append("launch"))
    else:
        monkeypatch.setattr(JITFunction, "run", noting(JITFunction.run))
    torch.use_deterministic_algorithms(False)  # it fills new memory
    for n in (1, 3):
        sizes = [(20, 30)] * n
        images = [image.to(DEVICE) for image in noise_images(sizes)]
        params = sample_view_params(recipes.simsiam(spd=spd), sizes, range(n), 0, 0, size=16)
        noted.clear()
        with Operations(noted):
            augment_views(images, params, 16, dtype=dtype, backend="triton")
        assert noted.count("launch") == launches
        first, last = noted.index("launch"), len(noted) - noted[::-1].index("launch")
        between = set(noted[first:last]) - {"launch"}
        assert between <= {"aten.new_empty.default", "aten.empty.memory_format"}


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "dtype, channels_last",
    [(torch.float32, False), (torch.float16, True), (torch.uint8, True)],
)
def test_no_access_out_of_bounds_and_no_race(dtype, channels_last):
    from triton_checker import checked

    sizes, size = [(9, 7), (60, 45), (20, 90)], (21, 70)
    images = noise_images(sizes)
    for seed, recipe in enumerate((recipes.simsiam(), recipes.simclr(local_aug="cutpaste"))):
        params = sample_view_params(recipe, sizes, range(3), 0, seed, size=size)
        if seed:  # a view with a patch that others are made from
            params[:, 0, PATCH] = params[:, 3, PATCH]
        shape = (4, 4, *size, 3) if channels_last else (4, 4, 3, *size)
        whole = torch.zeros(shape, dtype=dtype)
        out = whole.permute(0, 1, 4, 2, 3) if channels_last else whole
        with checked(*images):
            augment_views(images, params, out=out[:, :3], backend="triton")
        assert out[:, :3].float().std() > 0.1 and not out[:, 3].any()


def test_wide_alpha_kernels():
    images, params, size = view_case("cutpaste")
    size = (24, 20)
    params = params[:1, :1].clone()
    values = dict(source=-1, patch_kind=1, patch_top=3, patch_left=2, patch_height=4, patch_width=6,
                  target_top=8, target_left=9, alpha_sigma_y=20, alpha_sigma_x=90)  # fmt: skip
    for name, value in values.items():
        params[..., COLUMN[name]] = value
    found = triton_views(images[:1], params, size, **IDENTITY)
    assert (found - exact_views(images[:1], params, size)).abs().max() <= ALLOWED[torch.float32]


def test_params_in_any_memory_order():
    images, params, _ = view_case("no spd")
    size = (16, 20)
    expected = triton_views(images, params, size)
    swapped = params.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.cat([params, params], 1)[:, :2]
    for others in (swapped, wide):
        assert not others.is_contiguous()
        assert torch.equal(triton_views(images, others, size), expected)
    same = params[:1].expand(2, -1, -1)
    twice = triton_views([images[0]] * 2, same, size)
    assert torch.equal(twice[:, 0], twice[:, 1])


def test_what_it_cannot_take_is_said():
    images, params, _ = view_case("no spd")
    layout = torch.tensor([[i, 0, *image.shape[:2]] for i, image in enumerate(images)])
    buffers, room = [image.to("meta") for image in images], torch.empty(1 << 32, device="meta")
    huge = room.as_strided((2, 2, 3, 4, 4), (16, 32, 1 << 30, 4, 1))
    backend = next(b for b in OPERATIONS["augment_views"] if b.name == "triton")
    assert backend.reasons(buffers, layout, params, huge)[1:] == [
        "a view of out spans more than 2^31 elements"
    ]
    layout[1, 2:] = 40000
    assert "an image has more than 2^31 bytes" in backend.reasons(buffers, layout, params, huge)


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
    built = hasattr(native, "cuda_augment_round")
    assert chosen.name == ("native" if interpreted() else "cuda" if built else "triton")
