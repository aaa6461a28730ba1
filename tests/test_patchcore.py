import csv
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data as photographs
from sklearn.neighbors import NearestNeighbors
from test_evaluate import small_visa
from test_padim import defective, photo_crops

from spd_fast import InputError, PatchCore, greedy_kcenter, patchcore
from spd_fast import reference_patchcore as reference
from spd_fast.cli import main
from spd_fast.models import load_backbone, new_backbone
from spd_fast.patchcore import (
    PRESETS,
    johnson_lindenstrauss,
    pooled_patches,
    random_projection,
)
from spd_fast.preprocess import displayed_image, prepare_image


def new_detector(preset: str = "paper", **kwargs) -> PatchCore:
    return PatchCore(**dict(backbone="resnet18", weights="random", preset=preset) | kwargs)


def pictures(n: int, preset: str, seed: int = 0, broken: bool = False) -> torch.Tensor:
    """(n, 3, 128, 128) crops of a photograph, prepared; 256 patches each, fast to compute."""
    images = photo_crops(n, preset, seed)
    return (defective(images) if broken else images)[:, :, 64:192, 64:192]


def fitted(preset: str, n: int = 4, **kwargs) -> tuple[PatchCore, torch.Tensor]:
    train = pictures(n, preset)
    return new_detector(preset, **kwargs).fit(train.split(3)), train


def some_layers(channels: tuple[int, int], batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, channels[0], 6, 8), torch.randn(batch, channels[1], 3, 4)]


# ------------------------------------------------------------------------------------ against peers


def anomalib_model(model: PatchCore):
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    theirs = PatchcoreModel(
        ["layer2", "layer3"], model.backbone, pre_trained=False, num_neighbors=model.n_neighbors
    )
    missing = theirs.feature_extractor.feature_extractor.load_state_dict(
        load_backbone(model.backbone, "random", seed=model.seed).state_dict(), strict=False
    )
    assert not [name for name in missing.missing_keys if not name.startswith("layer4")]
    return theirs.eval()


@pytest.mark.parametrize("n_neighbors", [None, 1, 5000])  # 9 by the preset, more than there are
def test_maps_and_scores_equal_anomalib(n_neighbors):
    model, train = fitted("anomalib", n_neighbors=n_neighbors)
    theirs = anomalib_model(model)
    theirs.train()
    theirs.feature_extractor.eval()
    with torch.no_grad():
        patches = theirs(train)
    torch.testing.assert_close(model.patches(train).flatten(0, 2), patches, rtol=1e-4, atol=1e-5)
    theirs.eval()
    theirs.memory_bank = model.bank.points[:, : patches.shape[1]]
    # No image of the training: anomalib subtracts norms, and finds patches of the bank not at 0.
    test = torch.cat([pictures(1, "anomalib", 9), pictures(2, "anomalib", 8, broken=True)])
    with torch.no_grad():
        expected = theirs(test)
    maps, scores = model.score(test)
    relative = (maps - expected.anomaly_map[:, 0]).abs() / expected.anomaly_map[:, 0]
    assert relative.max() < 1e-3
    torch.testing.assert_close(scores, expected.pred_score, rtol=1e-3, atol=0)
    assert scores[1:].min() > scores[0]


@pytest.mark.parametrize("channels", [(128, 256), (512, 1024)])  # ResNet-18, WideResNet-50
def test_pooled_patches_equal_unfolding(channels):
    layers = some_layers(channels)
    ours = pooled_patches(layers, 1024)
    assert ours.shape == (2, 48, 1024)
    torch.testing.assert_close(ours, reference.pooled_patches(layers, 1024), rtol=1e-5, atol=1e-6)


def test_reference_patches_equal_loops():
    """patchcore-inspection's order, place by place: neighbourhood, resizing, pooling, pooling."""
    layers = some_layers((4, 6), batch=1)
    neighbourhoods = []
    for layer in layers:
        padded = F.pad(layer, (1, 1, 1, 1))
        height, width = layer.shape[2:]
        taps = torch.stack(
            [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)], 2
        )
        taps = F.interpolate(taps.flatten(1, 2), size=(6, 8), mode="bilinear")
        neighbourhoods.append(taps[0].flatten(1).T)  # (48, C * 9)
    patches = reference.pooled_patches(layers, 16)
    for p in (0, 13, 47):
        pooled = [F.adaptive_avg_pool1d(n[p : p + 1], 16)[0] for n in neighbourhoods]
        joined = torch.cat(pooled)
        torch.testing.assert_close(patches[0, p], (joined[0::2] + joined[1::2]) / 2)


def test_map_equals_scipy_and_sklearn():
    """The preset "paper" in float64, by other code from the patches on."""
    model, train = fitted("paper", coreset_ratio=0.1)
    test = pictures(1, "paper", 5, broken=True)
    patches = model.patches(test)[0].flatten(0, 1).double().numpy()
    bank = model.bank.points.double().numpy()[:, : patches.shape[1]]
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(bank)
    distances = torch.from_numpy(search.kneighbors(patches)[0]).view(1, 1, 16, 16)
    upsampled = F.interpolate(distances, size=(128, 128), mode="bilinear", align_corners=False)
    maps, scores = model.score(test)
    expected = gaussian_filter(upsampled[0, 0].numpy(), sigma=4)
    assert np.abs(maps[0].numpy() / expected - 1).max() < 1e-4
    assert scores[0].item() == pytest.approx(distances.max().item(), rel=1e-5)


def test_paper_preset_is_torchvisions_resize_and_centre_crop():
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

    photo = photographs.coffee()[:333]
    prepared = displayed_image(prepare_image(photo, PRESETS["paper"]))
    expected = Compose([Resize(256), CenterCrop(224), ToTensor()])(Image.fromarray(photo))
    difference = np.abs(prepared - (expected * 255).permute(1, 2, 0).numpy())
    assert difference.max() <= 1 + 1e-3 and (difference > 0.5).mean() < 3e-3


# --------------------------------------------------------------------------------------- the bank


@pytest.mark.parametrize("preset", PRESETS)
def test_bank_is_the_plain_coreset_of_the_projected_patches(preset):
    model, train = fitted(preset, coreset_ratio=0.05, seed=4)
    # In the batches of the fit: a network rounds otherwise in others.
    blocks = [model.patches(batch).flatten(0, 2) for batch in train.split(3)]
    patches = torch.cat(blocks)
    assert model.patch_count == len(patches) == 1024 and model.count == 4
    generator = torch.Generator().manual_seed(4)
    start = int(torch.randint(1024, (1,), generator=generator))
    components = PRESETS[preset].components or johnson_lindenstrauss(1024)
    sparse = PRESETS[preset].sparse
    projection = random_projection(patches.shape[1], components, sparse, generator)
    projected = torch.cat([block @ projection for block in blocks])
    picks = reference.greedy_kcenter(projected, 51, start)
    assert picks[0] == start
    assert torch.equal(model.bank.points[:, : patches.shape[1]], patches[picks])


def test_projection_keeps_lengths():
    for sparse in (False, True):
        x = torch.randn(200, 1536)
        projection = random_projection(1536, 320, sparse, torch.Generator().manual_seed(0))
        ratio = (x @ projection).norm(dim=1) / x.norm(dim=1)
        assert 0.97 < ratio.mean() < 1.03 and ratio.std() < 0.1
        assert (projection == 0).float().mean() == pytest.approx(0.974 if sparse else 0, abs=0.003)
    from sklearn.random_projection import johnson_lindenstrauss_min_dim

    for count in (1, 2, 784, 460_800):
        needed = johnson_lindenstrauss_min_dim(max(count, 2), eps=0.9)
        assert needed <= johnson_lindenstrauss(count) < needed + 32
        assert johnson_lindenstrauss(count) % 32 == 0


def test_patches_of_few_channels_are_not_projected(monkeypatch):
    monkeypatch.setattr(patchcore, "johnson_lindenstrauss", lambda count: 416)  # above 384 channels
    monkeypatch.setattr(patchcore, "random_projection", None)
    model, train = fitted("anomalib", n=2, coreset_ratio=0.05)
    patches = model.patches(train).flatten(0, 2)
    generator = torch.Generator().manual_seed(model.seed)
    start = int(torch.randint(len(patches), (1,), generator=generator))
    picks = greedy_kcenter(patches, int(0.05 * len(patches)), start, backend="reference")
    assert torch.equal(model.bank.points[:, :384], patches[picks])


def test_all_patches_are_kept_at_ratio_1():
    model, train = fitted("anomalib", n=1, coreset_ratio=1)
    maps, scores = model.score(train)
    assert len(model.bank.points) == 256 and (maps == 0).all() and (scores == 0).all()


def test_batches_do_not_matter():
    model, train = fitted("paper", coreset_ratio=0.05)
    maps, scores = model.score(train)
    again = new_detector(coreset_ratio=0.05).fit([train[:0], *train.split(1)])
    for ours, theirs in zip(again.score(train), (maps, scores)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
    one_by_one = torch.cat([model.score(image[None])[0] for image in train])
    torch.testing.assert_close(one_by_one, maps, rtol=1e-4, atol=1e-4)
    no_maps, no_scores = model.score(train[:0])
    assert no_maps.shape == (0, 128, 128) and no_scores.shape == (0,)


# ----------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("bank_dtype", ["float32", "float16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_save_and_load(tmp_path, preset, bank_dtype):
    model, train = fitted(preset, bank_dtype=bank_dtype, coreset_ratio=0.03, n_neighbors=3)
    model.save(tmp_path / "patchcore.pt")
    loaded = PatchCore.load(tmp_path / "patchcore.pt")
    assert (loaded.preset, loaded.n_neighbors, loaded.count) == (preset, 3, 4)
    for ours, theirs in zip(loaded.score(train[:2]), model.score(train[:2])):
        assert torch.equal(ours, theirs)
    stored = torch.load(tmp_path / "patchcore.pt", weights_only=True)["bank"]
    assert str(stored.dtype) == f"torch.{bank_dtype}"
    assert stored.untyped_storage().nbytes() == stored.numel() * stored.itemsize


def test_compiled_network_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, train = fitted("paper", coreset_ratio=0.03)
    model.save(tmp_path / "patchcore.pt")
    compiled = PatchCore.load(tmp_path / "patchcore.pt", compile=True)
    assert compiled._run is not compiled.network
    for ours, theirs in zip(compiled.score(train[:2]), model.score(train[:2])):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_half_precision_bank():
    model, train = fitted("paper", coreset_ratio=1)
    half = new_detector(bank_dtype="float16", coreset_ratio=1).fit([train])
    test = pictures(1, "paper", 5, broken=True)
    maps, _ = model.score(test)
    assert ((half.score(test)[0] - maps).abs() / maps).max() < 2e-3


def test_files_that_are_not_a_saved_patchcore(tmp_path):
    model, _ = fitted("paper", n=1, coreset_ratio=0.05)
    whole = tmp_path / "whole.pt"
    model.save(whole)
    (tmp_path / "half.pt").write_bytes(whole.read_bytes()[:-1000])
    state = torch.load(whole, weights_only=True)
    torch.save(state | {"version": 99}, tmp_path / "new.pt")
    torch.save(state | {"format": "spd-fast padim"}, tmp_path / "padim.pt")
    torch.save({k: v for k, v in state.items() if k != "bank"}, tmp_path / "part.pt")
    torch.save(state | {"bank": state["bank"] * torch.nan}, tmp_path / "nan.pt")
    torch.save(state | {"bank": state["bank"][:, 1:]}, tmp_path / "narrow.pt")
    torch.save(state | {"bank": "text"}, tmp_path / "text.pt")
    torch.save(state | {"image_size": None}, tmp_path / "size.pt")
    for name, message in [
        ("none.pt", "there is no file"),
        ("half.pt", "half.pt is not a saved PatchCore, or is damaged"),
        ("new.pt", "has version 99, this spd-fast reads 1"),
        ("padim.pt", "lacks the mark"),
        ("part.pt", "damaged PatchCore: 'bank'"),
        ("nan.pt", "damaged PatchCore: bank must be finite"),
        ("narrow.pt", r"damaged PatchCore: patches have 1024 features, its bank is \(\d+, 1023\)"),
        ("text.pt", "text.pt is a damaged PatchCore"),
        ("size.pt", "size.pt is a damaged PatchCore"),
    ]:
        with pytest.raises(InputError, match=message):
            PatchCore.load(tmp_path / name)


# -------------------------------------------------------------------------------------- wrong input


def test_wrong_use_is_named(tmp_path):
    model, train = fitted("paper", n=2, coreset_ratio=0.05)
    for arguments, message in [
        (dict(preset="mine"), "preset is one of paper, anomalib"),
        (dict(coreset_ratio=0), "coreset_ratio must be above 0 and at most 1, got 0"),
        (dict(coreset_ratio=1.5), "coreset_ratio"),
        (dict(coreset_ratio=float("nan")), "coreset_ratio"),
        (dict(n_neighbors=0), "n_neighbors must be at least 1"),
        (dict(bank_dtype="int8"), "bank_dtype is one of float32, float16"),
        (dict(backbone="resnet999"), "resnet999"),
    ]:
        with pytest.raises(InputError, match=message):
            new_detector(**arguments)
    with pytest.raises(InputError, match="not fitted"):
        new_detector().score(train)
    with pytest.raises(InputError, match="not fitted"):
        new_detector().save(tmp_path / "x.pt")
    with pytest.raises(InputError, match="at least 1 image to fit, got 0"):
        new_detector().fit([train[:0]])
    with pytest.raises(InputError, match="of 256 patches is less than 1"):
        new_detector(coreset_ratio=0.001).fit([train[:1]])
    with pytest.raises(InputError, match="fitted on 128 x 128"):
        model.score(train[:, :, 2:, :])
    with pytest.raises(InputError, match="fitted on 128 x 128"):
        new_detector().fit([train, train[:, :, 2:, 2:]])
    with pytest.raises(InputError, match=r"must be a float \(B, 3, H, W\)"):
        model.score(train[0])
    broken = train.clone()
    broken[1, 0, 5, 5] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite features for images \[1\]"):
        model.score(broken)
    with pytest.raises(InputError, match="NaN or infinite"):
        model.fit([train, broken])
    with pytest.raises(InputError, match="not fitted"):  # a failed fit leaves no half-made model
        model.score(train)


def test_features_beyond_half_precision_are_refused(tmp_path):
    network = new_backbone("resnet18")
    torch.nn.init.constant_(network.layer2[1].bn2.bias, 1e6)
    torch.save(network.state_dict(), tmp_path / "large.pt")
    train = pictures(1, "paper")
    half = new_detector(weights=tmp_path / "large.pt", bank_dtype="float16")
    with pytest.raises(InputError, match=r"a feature of \d(\.\d+)?e\+06 does not fit float16"):
        half.fit([train])


# ----------------------------------------------------------------------------- evaluate and predict


def test_evaluate_and_predict(tmp_path, capsys):
    data = small_visa(tmp_path / "visa", categories=("board",))
    out = tmp_path / "out"
    arguments = ["evaluate", "--data", str(data), "--method", "patchcore", "--weights", "random"]
    arguments += ["--coreset-ratio", "0.05", "--save-models", "--out", str(out)]
    assert main(arguments) == 0
    assert "PatchCore" in (out / "report.html").read_text()
    model = out / "categories/board/patchcore.pt"
    images = data / "board/Data/Images"
    arguments = ["predict", "--model", str(model), str(images / "Anomaly"), str(images / "Normal")]
    assert main([*arguments, "--out", str(tmp_path / "heat")]) == 0
    rows = list(csv.DictReader(open(tmp_path / "heat/scores.csv", newline="")))
    assert all("Anomaly" in row["image"] for row in rows[:3])
    (tmp_path / "text.pt").write_text("not a detector")
    capsys.readouterr()
    arguments = ["predict", "--model", str(tmp_path / "text.pt"), str(images / "Normal")]
    assert main([*arguments, "--out", str(tmp_path / "heat")]) == 2
    assert "text.pt is not a saved detector" in capsys.readouterr().err
