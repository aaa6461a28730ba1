import copy
import dataclasses
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from skimage import data as photographs
from torchvision.transforms.v2.functional import normalize

from spd_fast import InputError, PaDiM, reference
from spd_fast.detector import feature_network
from spd_fast.models import FeatureLayers, load_backbone
from spd_fast.ops.augment_views import IMAGENET_MEAN, IMAGENET_STD
from spd_fast.ops.backends import native
from spd_fast.ops.factor import converted
from spd_fast.padim import PRESETS, keep_channels
from spd_fast.preprocess import displayed_image, prepare_image, prepare_mask

pytestmark = pytest.mark.usefixtures("two_threads")


def photo_crops(n: int, preset: str, seed: int = 0) -> torch.Tensor:
    """(n, 3, size, size): shifted crops of one photograph, so that features have real structure."""
    photo = photographs.coffee()
    rng = np.random.default_rng(seed)
    crops = []
    for _ in range(n):
        top, left = rng.integers(0, 40, 2)
        crop = photo[top : top + 350, left : left + 500].astype(float) * rng.uniform(0.9, 1.1)
        crop += rng.normal(0, 3, crop.shape)
        crops.append(prepare_image(crop.clip(0, 255).astype(np.uint8), PRESETS[preset]))
    return torch.stack(crops)


def fitted(preset: str, n: int = 12, **kwargs) -> tuple[PaDiM, torch.Tensor]:
    train = photo_crops(n, preset)
    return PaDiM(weights="random", preset=preset, **kwargs).fit(train.split(5)), train


def defective(images: torch.Tensor) -> torch.Tensor:
    images = images.clone()
    images[:, :, 90:120, 100:130] += 1.5
    return images


def test_map_equals_anomalib():
    from anomalib.models.image.padim.torch_model import PadimModel

    model, train = fitted("anomalib")
    theirs = PadimModel("resnet18", ["layer1", "layer2", "layer3"], pre_trained=False)
    missing = theirs.feature_extractor.feature_extractor.load_state_dict(
        load_backbone("resnet18", "random").state_dict(), strict=False
    )
    assert not [name for name in missing.missing_keys if not name.startswith("layer4")]
    theirs.idx = model.channels.clone()
    theirs.train()
    theirs.feature_extractor.eval()
    with torch.no_grad():
        theirs(train)
        theirs.fit()
    theirs.eval()
    test = torch.cat([train[:2], defective(photo_crops(2, "anomalib", seed=9))])
    with torch.no_grad():
        expected = theirs(test)
    maps, scores = model.score(test)
    relative = (maps - expected.anomaly_map[:, 0]).abs() / expected.anomaly_map[:, 0]
    assert relative.max() < 1e-3
    torch.testing.assert_close(scores, expected.pred_score.flatten(), rtol=1e-3, atol=0)
    assert scores[2:].min() > scores[:2].max()


def test_map_equals_scipy():
    """The paper's definition in float64: numpy.cov, its inverse, scipy's distance and filter."""
    model, train = fitted("paper", n_features=30)
    test = defective(photo_crops(1, "paper", seed=5))
    x = reference.embed(model.features(train), model.channels).double().flatten(2).numpy()
    y = reference.embed(model.features(test), model.channels).double().flatten(2).numpy()
    distances = np.empty(x.shape[2])
    for p in range(x.shape[2]):
        inverse = np.linalg.inv(np.cov(x[:, :, p], rowvar=False) + 0.01 * np.eye(30))
        distances[p] = mahalanobis(y[0, :, p], x[:, :, p].mean(0), inverse)
    grid = torch.from_numpy(distances).view(1, 1, 56, 56)
    upsampled = F.interpolate(grid, size=(224, 224), mode="bilinear", align_corners=False)
    expected = gaussian_filter(upsampled[0, 0].numpy(), sigma=4)
    maps, scores = model.score(test)
    assert np.abs(maps[0].numpy() / expected - 1).max() < 1e-3
    assert scores[0].item() == pytest.approx(expected.max(), rel=1e-3)


@pytest.mark.parametrize("channels", [[0, 3, 5, 8], [7, 1, 9], [3, 4, 8, 7]])
def test_kept_channels_are_where_it_is_said(channels):
    """In any order, and where none of a layer is kept."""
    layers = [torch.randn(2, c, 8 >> i, 8 >> i) for i, c in enumerate((3, 3, 4))]
    wide = torch.cat([F.interpolate(layer, size=8) for layer in layers], 1)
    kept, places = keep_channels(layers, torch.tensor(channels))
    assert [layer.shape[2:] for layer in kept] == [layer.shape[2:] for layer in layers]
    assert sum(layer.shape[1] for layer in kept) <= len(channels) + 1
    narrow = torch.cat([F.interpolate(layer, size=8) for layer in kept], 1)
    assert torch.equal(narrow[:, places], wide[:, channels])


def test_batches_do_not_matter():
    model, train = fitted("paper")
    again = PaDiM(weights="random", preset="paper").fit(train.split(12))
    assert torch.equal(again.channels, model.channels)
    maps, scores = model.score(train[:4])
    torch.testing.assert_close(again.score(train[:4])[0], maps, rtol=1e-3, atol=1e-3)
    one_by_one = torch.cat([model.score(image[None])[0] for image in train[:4]])
    torch.testing.assert_close(one_by_one, maps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "factor_dtype, share, rtol", [("float16", 0.5, 2e-3), ("int8", 0.29, 1e-2)]
)
def test_narrow_factor(factor_dtype, share, rtol):
    model, train = fitted("paper")
    narrow = PaDiM(weights="random", factor_dtype=factor_dtype).fit(train.split(5))
    assert narrow.factor.nbytes <= share * model.factor.nbytes
    maps, _ = model.score(train[:3])
    assert ((narrow.score(train[:3])[0] - maps).abs() / maps).max() < rtol


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folded_batch_norms_change_nothing(name):
    backbone = load_backbone(name, "random")
    generator = torch.Generator().manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                values.data.uniform_(0.5, 1.5, generator=generator)
    images = photo_crops(2, "paper")
    with torch.no_grad():
        expected = FeatureLayers(copy.deepcopy(backbone)).eval()(images)
        folded, _ = feature_network(backbone, torch.device("cpu"))
        layers = folded(images)
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for ours, theirs in zip(layers, expected):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch):
    model, _ = fitted("paper", n_features=8)
    model.save(tmp_path / "padim.pt")
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    message = "^torch.compile needs a C[+][+] compiler, but there is no no-such-compiler -m64:"
    with pytest.raises(InputError, match=message):
        PaDiM(weights="random", n_features=8, compile=True)
    with pytest.raises(InputError, match=message):
        PaDiM.load(tmp_path / "padim.pt", compile=True)
    monkeypatch.setenv("CXX", f"{sys.executable} -m64")  # with flags; anything that can be run
    PaDiM(weights="random", n_features=8, compile=True)


def test_compiled_network_gives_the_same(monkeypatch):
    # captured as for any backend, but not translated to C++, which takes a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, train = fitted("paper", n_features=8)
    compiled = PaDiM(weights="random", n_features=8, compile=True)
    compiled.mean, compiled.factor = model.mean, model.factor
    compiled.image_size = model.image_size
    for ours, theirs in zip(compiled.score(train[:2]), model.score(train[:2])):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_merged_parts_equal_one_fit():
    train = photo_crops(12, "paper")
    whole = PaDiM(weights="random", n_features=20).fit([train])
    first, second = (PaDiM(weights="random", n_features=20) for _ in range(2))
    for images in train[:5].split(3):
        first.update(images)
    merged = first.merge(second.update(train[5:])).finish()
    assert merged.count == 12
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        merged.score(train[:2])[0], whole.score(train[:2])[0], rtol=1e-3, atol=1e-3
    )
    with pytest.raises(InputError, match=r"two PaDiMs with images, before finish\(\)"):
        merged.merge(second)
    with pytest.raises(InputError, match=r"finished: fit\(\) starts anew"):
        merged.update(train)
    other = PaDiM(weights="random", n_features=20, seed=1).update(train)
    with pytest.raises(InputError, match="differ in weights, channels"):
        second.merge(other)
    with pytest.raises(InputError, match="with images, before finish"):
        second.merge(PaDiM(weights="random", n_features=20).update(train[:0]))
    with pytest.raises(InputError, match="finished already"):
        merged.finish()


def test_a_failed_fit_leaves_nothing_for_the_next():
    train = photo_crops(6, "paper")
    model = PaDiM(weights="random", n_features=8)
    with pytest.raises(InputError, match="fitted on 224 x 224"):
        model.fit([*[train] * 6, train[:, :, :64, :64]])
    assert model.update(train[:, :, :96, :96]).finish().count == 6
    constant = PaDiM(weights="random", n_features=8)
    constant.settings = dataclasses.replace(constant.settings, ridge=0.0)
    with pytest.raises(InputError, match="not positive definite"):
        constant.update(train[:1].repeat(3, 1, 1, 1)).finish()
    assert constant.count == 0


def test_merging_works_inside_and_outside_of_inference_mode():
    train = photo_crops(6, "paper")
    first, second = (PaDiM(weights="random", n_features=8) for _ in range(2))
    with torch.inference_mode():
        first.update(train[:3])
    assert first.merge(second.update(train[3:])).finish().count == 6


def test_only_memory_of_its_own_is_given_back():
    whole = torch.ones(200, 4992)
    part = whole[100:]
    half = converted(part, 96, torch.float16, consume=True)
    assert torch.equal(half, torch.ones(100, 4992).half())
    assert bool((whole == 1).all())
    converted(whole, 96, torch.float16)
    assert bool((whole == 1).all())
    converted(whole, 96, torch.float16, consume=True)
    assert int((whole == 0).sum()) > 0.9 * whole.numel()


RANK = """
import sys, torch, torch.distributed as dist
from spd_fast import InputError, PaDiM
dist.init_process_group("gloo")
train = torch.load(sys.argv[1])
part = train.split([2, 10])[dist.get_rank()]
model = PaDiM(weights="random", n_features=20).fit(part.split(4), distributed=True)
model.save(f"{sys.argv[2]}/{dist.get_rank()}.pt")
for broken in (part[:0], part + torch.nan):
    attempt = part if dist.get_rank() else broken
    try:
        model.fit(attempt.split(4), distributed=True)
    except InputError as error:
        print(error)
other = PaDiM(weights="random", n_features=20, seed=dist.get_rank())
try:
    other.fit(part.split(4), distributed=True)
except InputError as error:
    print(error)
"""


def test_a_fit_spread_over_ranks_equals_one_fit(tmp_path):
    train = photo_crops(12, "paper")
    torch.save(train, tmp_path / "train.pt")
    (tmp_path / "rank.py").write_text(RANK)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
            *(str(tmp_path / "rank.py"), str(tmp_path / "train.pt"), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("every rank needs an image to fit, they have [0, 10]") == 2
    assert done.stdout.count("rank 0 cannot fit its images: layer1 of resnet18 has NaN") == 2
    assert done.stdout.count("PaDiMs cannot be merged: they differ in weights, channels") == 2
    whole = PaDiM(weights="random", n_features=20).fit([train])
    maps, _ = whole.score(train[:2])
    for rank in range(2):
        model = PaDiM.load(tmp_path / f"{rank}.pt")
        assert model.count == 12
        torch.testing.assert_close(model.score(train[:2])[0], maps, rtol=1e-3, atol=1e-3)


def test_memory_given_back_is_zero_and_nothing_beside_it():
    if native is None:
        pytest.skip("spd_fast._C is not built")
    memory = torch.ones(1 << 20)
    native.give_back(memory[1000:-1000].numpy())
    pages = (memory == 0).nonzero().flatten()
    assert len(pages) > (1 << 20) - 2000 - 2048  # all but a page at either end
    assert pages[0] >= 1000 and pages[-1] < (1 << 20) - 1000
    assert int(memory.sum()) == (1 << 20) - len(pages)


@pytest.mark.parametrize("factor_dtype", ["float32", "float16", "bfloat16", "int8"])
def test_save_and_load(tmp_path, factor_dtype):
    model, train = fitted("anomalib", n_features=20, factor_dtype=factor_dtype)
    model.save(tmp_path / "padim.pt")
    loaded = PaDiM.load(tmp_path / "padim.pt")
    assert loaded.preset == "anomalib" and loaded.count == 12
    for ours, theirs in zip(loaded.score(train[:2]), model.score(train[:2])):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("factor_dtype", ["float32", "float16", "bfloat16", "int8"])
def test_damaged_gaussians_are_named(tmp_path, factor_dtype):
    model, train = fitted("paper", n_features=10, factor_dtype=factor_dtype)
    model.save(tmp_path / "padim.pt")
    whole = torch.load(tmp_path / "padim.pt", weights_only=True)

    def score_with(name: str, position: int, value: float):
        state = whole | {name: whole[name].clone()}
        if state[name].dtype == torch.int8:  # the scale of a row
            state[name][position].view(torch.float32)[0] = value
        else:
            state[name][position, 1] = value
        torch.save(state, tmp_path / "damaged.pt")
        PaDiM.load(tmp_path / "damaged.pt").score(train[:2])

    for name in ("mean", "factor"):
        with pytest.raises(InputError, match="damaged.*Gaussian of position 777 is not finite"):
            score_with(name, 777, torch.nan)
    with pytest.raises(InputError, match="too large to score, or this PaDiM is damaged"):
        score_with("mean", 5, 1e30)


def test_wrong_use_is_named(tmp_path):
    model, train = fitted("paper", n_features=10)
    with pytest.raises(InputError, match="at least 2 images to fit a covariance, got 1"):
        PaDiM(weights="random", n_features=10).fit([train[:1]])
    with pytest.raises(InputError, match="not fitted"):
        PaDiM(weights="random").score(train)
    with pytest.raises(InputError, match="not fitted"):
        PaDiM(weights="random").save(tmp_path / "x.pt")
    with pytest.raises(InputError, match="fitted on 224 x 224"):
        model.score(train[:, :, :222, :])
    for images in (train.numpy(), [train]):
        with pytest.raises(InputError, match=r"float tensor \(B, 3, H, W\), got (ndarray|list)"):
            model.score(images)
    with pytest.raises(InputError, match=r"must be a float \(B, 3, H, W\)"):
        model.score(train[0])
    assert torch.equal(  # an empty batch changes nothing
        PaDiM(weights="random", n_features=10).fit([train[:0], *train.split(5)]).factor,
        model.factor,
    )
    broken = train[:3].clone()
    broken[1, 0, 5, 5] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite features for images \[1\]"):
        model.score(broken)
    with pytest.raises(InputError, match="NaN or infinite"):
        model.fit([train, broken])
    with pytest.raises(InputError, match="not fitted"):  # a failed fit leaves no half-made model
        model.score(train)
    with pytest.raises(InputError, match="preset is one of paper, anomalib"):
        PaDiM(weights="random", preset="mine")
    with pytest.raises(InputError, match="n_features must be 1..448"):
        PaDiM(weights="random", n_features=449)
    with pytest.raises(InputError, match="n_features has no default for resnet34"):
        PaDiM("resnet34", weights="random")
    with pytest.raises(InputError, match="factor_dtype"):
        PaDiM(weights="random", factor_dtype="int4")
    with pytest.raises(InputError, match="n_features must be 1..448"):
        PaDiM(weights="random", n_features=0)
    with pytest.raises(InputError, match="n_features must be a whole number, got 10.5"):
        PaDiM(weights="random", n_features=10.5)
    with pytest.raises(InputError, match="there is no file"):
        PaDiM.load(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(InputError, match="text.pt is not a saved PaDiM"):
        PaDiM.load(tmp_path / "text.pt")
    torch.save({"format": "something else"}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="lacks the mark"):
        PaDiM.load(tmp_path / "other.pt")
    model.fit([train])
    model.save(tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for length in (len(whole) // 2, 20_000, 100):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut.pt is not a saved PaDiM, or is damaged"):
            PaDiM.load(tmp_path / "cut.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    torch.save(state | {"version": 99}, tmp_path / "new.pt")
    with pytest.raises(InputError, match="has version 99"):
        PaDiM.load(tmp_path / "new.pt")
    for part, value in (("image_size", 7), ("mean", 3), ("network", 3), ("preset", "mine")):
        torch.save(state | {part: value}, tmp_path / "part.pt")
        with pytest.raises(InputError, match="part.pt is a damaged PaDiM"):
            PaDiM.load(tmp_path / "part.pt")
    torch.save(state | {"channels": state["channels"][1:]}, tmp_path / "part.pt")
    with pytest.raises(InputError, match="do not fit each other"):
        PaDiM.load(tmp_path / "part.pt")
    del state["mean"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(InputError, match="damaged PaDiM: 'mean'"):
        PaDiM.load(tmp_path / "part.pt")


# ---------------------------------------------------------------------------------- preparation


def test_paper_preset_is_resize_and_centre_crop():
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

    photo = photographs.coffee()[:333]
    lanczos = Compose([Resize(256, InterpolationMode.LANCZOS), CenterCrop(224), ToTensor()])
    expected = lanczos(Image.fromarray(photo))
    ours = displayed_image(prepare_image(photo, PRESETS["paper"]))
    expected = (expected * 255).round().permute(1, 2, 0).numpy()
    # Only the part that is kept is resized: the box's edge is rounded to float32 inside PIL.
    difference = np.abs(ours.astype(float) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    mask = photo[..., 0] > 128
    nearest = Compose([Resize(256, InterpolationMode.NEAREST), CenterCrop(224)])
    expected = np.asarray(nearest(Image.fromarray(mask.astype(np.uint8)))).astype(bool)
    assert (prepare_mask(mask, PRESETS["paper"]) != expected).mean() < 1e-4


def test_anomalib_preset_is_a_square():
    photo = photographs.coffee()
    prepared = prepare_image(photo, PRESETS["anomalib"])
    tensor = torch.from_numpy(photo).permute(2, 0, 1).float()[None] / 255
    expected = F.interpolate(tensor, (256, 256), mode="bilinear", antialias=True)[0]
    assert np.abs(displayed_image(prepared) - (expected * 255).permute(1, 2, 0).numpy()).max() < 0.6
    torch.testing.assert_close(prepared, normalize(expected, IMAGENET_MEAN, IMAGENET_STD))
    mask = prepare_mask(photo[..., 0] > 128, PRESETS["anomalib"])
    assert mask.shape == (256, 256) and mask.dtype == bool and 0 < mask.mean() < 1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 20000), (255, 257), (1000, 31)])
def test_any_image_size_is_prepared(preset, shape):
    size = PRESETS[preset].size
    image = np.full((*shape, 3), 100, np.uint8)
    assert prepare_image(image, PRESETS[preset]).shape == (3, size, size)
    assert prepare_mask(np.ones(shape, bool), PRESETS[preset]).all()
