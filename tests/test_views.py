import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from spd_fast import InputError, recipes, sample_view_params, views
from spd_fast.views import COLUMN, COLUMNS


def column(params: torch.Tensor, name: str, view: int) -> torch.Tensor:
    return params[:, view, COLUMN[name]].double()


def draw(recipe, n=4000, size=(375, 500), **kwargs) -> torch.Tensor:
    arguments = dict(epoch=0, seed=0) | kwargs
    return sample_view_params(recipe, [size] * n, range(n), **arguments)


def test_a_row_depends_on_seed_epoch_index_and_view_alone():
    recipe, sizes = recipes.simsiam(), [(100 + i, 200 - i) for i in range(20)]
    whole = sample_view_params(recipe, sizes, range(20), epoch=2, seed=5)
    order = np.random.default_rng(0).permutation(20)
    shuffled = sample_view_params(recipe, [sizes[i] for i in order], order, epoch=2, seed=5)
    assert torch.equal(shuffled, whole[order])
    part = np.arange(20)[1::4]
    assert torch.equal(
        sample_view_params(list(recipe), [sizes[i] for i in part], part, epoch=2, seed=5),
        whole[part],
    )
    alone = sample_view_params(recipe, [sizes[7]], [7], epoch=2, seed=5)
    assert torch.equal(alone[0], whole[7])
    no_spd = sample_view_params(recipes.simsiam(spd=False), sizes, range(20), epoch=2, seed=5)
    assert torch.equal(no_spd, whole[:, :2])
    for other in (dict(epoch=3, seed=5), dict(epoch=2, seed=6)):
        changed = sample_view_params(recipe, sizes, range(20), **other)
        assert not (changed == whole).all(2).any()
    assert not torch.equal(whole[:, 0], whole[:, 1])
    assert not torch.equal(whole[:, 2, 1:13], whole[:, 3, 1:13])  # the weak draws are independent


@pytest.mark.parametrize("name", ["simsiam", "simclr", "supervised"])
@pytest.mark.parametrize("local_aug", ["smoothblend", "cutpaste"])
@pytest.mark.parametrize("spd_source", ["anchor", "image"])
def test_rows_drawn_in_cpp_are_those_of_numpy(name, local_aug, spd_source, monkeypatch):
    recipe = getattr(recipes, name)(True, local_aug, spd_source)
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 600, (60, 2))
    indices = np.append(rng.integers(0, 2**40, 59), 2**62)
    for seed, epoch, size in ((0, 0, 224), (2**63 - 1, 5, (7, 300)), (3, 2**40, 32)):
        monkeypatch.undo()
        ours = sample_view_params(recipe, sizes, indices, epoch, seed, size)
        monkeypatch.setattr(views, "native", None)
        assert torch.equal(sample_view_params(recipe, sizes, indices, epoch, seed, size), ours)


def test_the_random_numbers_are_those_of_numpy():
    draws = views._uniform(3, 5, np.array([0, 7, 2**62]), np.arange(3))
    philox = np.random.Philox(key=[3, 0], counter=[0, 2, 7, 5])
    assert np.array_equal(np.random.Generator(philox).random(64), draws[1, 2])


def test_rows_are_frozen():
    """A published seed must keep its views: this row was written down when the sampler was made."""
    row = sample_view_params(recipes.simsiam(), [(375, 500)], [11], epoch=1, seed=42)[0, 3]
    assert row.tolist() == pytest.approx(FROZEN_ROW, rel=1e-6)


FROZEN_ROW = [
    0.0,
    3.0,
    10.0,
    220.0,
    211.0,
    0.0,
    7.0,
    1.08390045,
    0.931122124,
    1.08290732,
    -0.0325224735,
    0.0,
    0.221598923,
    1.0,
    174.0,
    64.0,
    13.0,
    34.0,
    123.0,
    86.0,
    8.0,
    0.917723954,
    1.0121547,
    1.07224762,
    -0.0407747515,
    8.0,
    8.0,
]


def test_crop_follows_random_resized_crop():
    """Same distribution as torchvision's get_params, whose random numbers come from elsewhere."""
    n, image = 4000, torch.empty(3, 375, 500)
    params = draw(recipes.simsiam(), n)
    torch.manual_seed(0)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    ).double()
    for k, name in enumerate(("crop_top", "crop_left", "crop_height", "crop_width")):
        ours = column(params, name, 0)
        quantiles = torch.linspace(0.02, 0.98, 13, dtype=torch.float64)
        gap = (ours.quantile(quantiles) - theirs[:, k].quantile(quantiles)).abs().max()
        assert gap < 0.05 * theirs[:, k].max()
    assert (column(params, "crop_top", 0) + column(params, "crop_height", 0)).max() <= 375
    assert (column(params, "crop_left", 0) + column(params, "crop_width", 0)).max() <= 500


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 1), (1, 50)])
def test_crop_falls_back_to_the_centre(size):
    """Where no box fits, torchvision's own fallback gives the same box whatever it draws."""
    params = draw(recipes.supervised(spd=False), 50, size)
    boxes = params[:, 0, 1:5]
    torch.manual_seed(0)
    theirs = {
        tuple(RandomResizedCrop.get_params(torch.empty(3, *size), [1.0, 1.0], [3 / 4, 4 / 3]))
        for _ in range(20)
    }
    one_box = (recipes.ViewSpec(area=(1.0, 1.0)),)
    ours = {tuple(int(v) for v in row) for row in draw(one_box, 20, size)[:, 0, 1:5].tolist()}
    assert ours == theirs and len(ours) == 1
    assert (boxes[:, 2:] >= 1).all()


@pytest.mark.parametrize(
    ("recipe", "jitter", "area"),
    [("simsiam", (0.4, 0.4, 0.4, 0.1), 0.2), ("simclr", (0.8, 0.8, 0.8, 0.2), 0.08)],
)
def test_strong_ranges(recipe, jitter, area):
    params = draw(getattr(recipes, recipe)())
    for name, off, amount in zip(COLUMNS[7:11], (1, 1, 1, 0), jitter):
        values = column(params, name, 0)
        on = values[values != off]
        assert on.numel() / values.numel() == pytest.approx(0.8, abs=0.03)
        assert on.min() >= off - amount - 1e-6 and on.max() <= off + amount + 1e-6
        assert on.min() < off - 0.98 * amount and on.max() > off + 0.98 * amount
    share = column(params, "crop_height", 0) * column(params, "crop_width", 0) / (375 * 500)
    assert area * 0.98 < share.min() < area * 1.1 and share.max() > 0.95
    assert column(params, "grayscale", 0).mean() == pytest.approx(0.2, abs=0.03)
    assert column(params, "flip", 0).mean() == pytest.approx(0.5, abs=0.03)
    sigma = column(params, "blur_sigma", 0)
    assert (sigma > 0).double().mean() == pytest.approx(0.5, abs=0.03)
    assert 0.1 <= sigma[sigma > 0].min() < 0.12 and 1.98 < sigma.max() <= 2.0
    orders = column(params, "jitter_order", 0).long().bincount(minlength=24)
    assert len(orders) == 24 and orders.min() > 100


def test_spd_ranges():
    params = draw(recipes.simsiam())
    for view in (2, 3):
        assert (column(params, "source", view) == 0).all()
        share = column(params, "crop_height", view) * column(params, "crop_width", view) / 224**2
        assert share.min() > 0.89 and share.max() <= 1
        assert (column(params, "grayscale", view) == 0).all()
        sigma = column(params, "blur_sigma", view)
        assert sigma[sigma > 0].min() >= 0.1 - 1e-6 and sigma.max() <= 0.3 + 1e-6
        assert (column(params, "hue", view).abs() <= 0.05 + 1e-6).all()
    assert (column(params, "patch_kind", 2) == 0).all()
    assert (column(params, "patch_kind", 3) == 1).all()
    height, width = column(params, "patch_height", 3), column(params, "patch_width", 3)
    assert 0.0045 < (height * width / 224**2).min() and (height * width / 224**2).max() < 0.0107
    assert 0.28 < (width / height).min() < 0.35 and 2.8 < (width / height).max() < 3.3
    for top, left in (("patch_top", "patch_left"), ("target_top", "target_left")):
        assert (column(params, top, 3) + height).max() == 224
        assert (column(params, left, 3) + width).max() == 224
        assert column(params, top, 3).min() == 0 == column(params, left, 3).min()
    for name in ("patch_brightness", "patch_contrast", "patch_saturation"):
        assert (column(params, name, 3) != 1).double().mean() > 0.99
    assert (column(params, "alpha_sigma_y", 3) == 8).all()
    small = sample_view_params(recipes.simsiam(), [(50, 60)], [0], 0, 0, size=112)
    assert small[0, 3, COLUMN["alpha_sigma_x"]] == 4


def test_variants_of_spd():
    cut = draw(recipes.simclr(local_aug="cutpaste"), 5)
    assert (column(cut, "patch_kind", 3) == 2).all()
    assert (column(cut, "alpha_sigma_x", 3) == 0).all()
    from_image = draw(recipes.moco(spd_source="image"), 200)
    assert (from_image[:, :, COLUMN["source"]] == -1).all()
    assert column(from_image, "crop_height", 2).max() > 300
    assert draw(recipes.supervised(), 3).shape == (3, 3, 27)
    assert draw(recipes.supervised(spd=False), 3).shape == (3, 1, 27)


def test_bad_input_is_named():
    recipe = recipes.simsiam()
    with pytest.raises(InputError, match="sizes has 2 rows but indices has 1"):
        sample_view_params(recipe, [(3, 3), (4, 4)], [0], 0, 0)
    with pytest.raises(InputError, match="at least 1 x 1"):
        sample_view_params(recipe, [(0, 3)], [0], 0, 0)
    with pytest.raises(InputError, match=r"must be in 0..2\^63 - 1"):
        sample_view_params(recipe, [(3, 3)], [-1], 0, 0)
    with pytest.raises(InputError, match=r"must be in 0..2\^63 - 1"):
        sample_view_params(recipe, [(3, 3)], [0], 0, 2**64)
    with pytest.raises(InputError, match=r"sizes must be \(N, 2\)"):
        sample_view_params(recipe, [(30, 40, 3)] * 2, range(3), 0, 0)
    with pytest.raises(InputError, match="local_aug is one of"):
        recipes.simsiam(local_aug="mixup")
    with pytest.raises(InputError, match="spd_source is one of"):
        recipes.simsiam(spd_source="disk")
