import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from pretrain_runs import config, write_images

from spd_fast import InputError, PaDiM
from spd_fast.cli import main
from spd_fast.export import export_padim
from spd_fast.models import FeatureLayers, load_backbone
from spd_fast.patchcore import FORMAT as PATCHCORE
from spd_fast.pretrain import pretrain


def fitted(path, preset="paper", factor_dtype="float32"):
    """A saved PaDiM, and images it was not fitted on; d = 20 leaves the last panel half empty."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 64, 96, generator=generator)
    images = images + 0.3 * torch.randn(8, 3, 64, 96, generator=generator)
    model = PaDiM(weights="random", n_features=20, preset=preset, factor_dtype=factor_dtype)
    model.fit(images[:5].split(3)).save(path)
    return model, images[5:]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A directory with padim.pt in int8 and padim.pt2, the model, images, the loaded program."""
    directory = tmp_path_factory.mktemp("export")
    model, images = fitted(directory / "padim.pt", "anomalib", "int8")
    assert main(["export", f"--model={directory}/padim.pt", f"--out={directory}/padim.pt2"]) == 0
    return directory, model, images, torch.export.load(directory / "padim.pt2")


def test_program_gives_the_maps_of_the_model(exported):
    _, model, images, program = exported
    for batch in (1, 3):  # neither is the size it was traced with
        for ours, theirs in zip(program.module()(images[:batch]), model.score(images[:batch])):
            assert ours.shape == theirs.shape and not ours.requires_grad
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor_dtype", ["float32", "float16"])
@pytest.mark.parametrize("batch", [1, 3])
def test_program_for_one_size_of_batch(tmp_path, batch, factor_dtype):
    model, images = fitted(tmp_path / "padim.pt", factor_dtype=factor_dtype)
    takes = export_padim(tmp_path / "padim.pt", tmp_path / "padim.pt2", batch)
    assert takes == f"({batch}, 3, 64, 96) images prepared as by preset 'paper'"
    program = torch.export.load(tmp_path / "padim.pt2").module()
    for ours, theirs in zip(program(images[:batch]), model.score(images[:batch])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match=rf"(equal to|==) {batch}\b"):
        program(images[:2])


ELSEWHERE = """
import sys
sys.modules["spd_fast"] = None  # an import of it fails
import torch
images, expected = torch.load(sys.argv[2])
maps, scores = torch.export.load(sys.argv[1]).module()(images)
torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)
assert torch.equal(scores, maps.amax((1, 2)))
assert not [name for name in sys.modules if name.startswith(("spd_fast.", "torchvision"))]
print("the same")
"""


def test_program_runs_where_spd_fast_is_not(exported, tmp_path):
    directory, model, images, _ = exported
    torch.save((images, model.score(images)[0]), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(directory / "padim.pt2"), "expected.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "the same\n", done.stderr


def test_factor_stays_packed_in_its_dtype(exported):
    directory, model, _, program = exported
    factor = program.state_dict["factor"]
    assert factor.dtype == torch.int8 and torch.equal(factor, model.factor)
    sizes = [(directory / name).stat().st_size for name in ("padim.pt", "padim.pt2")]
    assert sizes[1] < sizes[0] + 1_000_000


def test_features_that_are_not_finite_show_in_the_maps(exported):
    _, _, images, program = exported
    images = images.clone()
    images[1, 0, 5, 5] = torch.nan
    _, scores = program.module()(images)
    assert scores.isfinite().tolist() == [True, False, True]


def test_wrong_use_is_named(tmp_path, capsys):
    fitted(tmp_path / "padim.pt")
    with pytest.raises(InputError, match="ends in .pt2, got .*padim.onnx"):
        export_padim(tmp_path / "padim.pt", tmp_path / "padim.onnx")
    with pytest.raises(InputError, match="batch must be at least 1, got 0"):
        export_padim(tmp_path / "padim.pt", tmp_path / "padim.pt2", batch=0)
    with pytest.raises(InputError, match="there is no directory"):
        export_padim(tmp_path / "padim.pt", tmp_path / "nowhere" / "padim.pt2")
    torch.save({"format": PATCHCORE}, tmp_path / "patchcore.pt")
    with pytest.raises(InputError, match="patchcore.pt is not a saved PaDiM"):
        export_padim(tmp_path / "patchcore.pt", tmp_path / "padim.pt2")
    (tmp_path / "text.pt").write_text("not a model")
    assert main(["export", f"--model={tmp_path}/text.pt", f"--out={tmp_path}/padim.pt2"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("spd-fast: ") and "text.pt is not a saved PaDiM" in error
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["padim.pt", "patchcore.pt", "text.pt"]


def test_a_failed_write_leaves_the_old_program(tmp_path, monkeypatch):
    fitted(tmp_path / "padim.pt")
    (tmp_path / "padim.pt2").write_text("old")

    def full_disk(program, path):
        path.write_text("half")
        raise RuntimeError("PytorchStreamWriter failed")

    monkeypatch.setattr(torch.export, "save", full_disk)
    with pytest.raises(InputError, match="cannot be written .is the disk full"):
        export_padim(tmp_path / "padim.pt", tmp_path / "padim.pt2")
    assert (tmp_path / "padim.pt2").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["padim.pt", "padim.pt2"]


# ---------------------------------------------------------------------------------------- backbones


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A checkpoint whose backbone has moved from where it started, and what was exported of it."""
    directory = tmp_path_factory.mktemp("backbone")
    (directory / "images").mkdir()
    images = write_images(directory / "images")
    assert pretrain(config(images, directory / "run", max_steps=1, spd=False)) == 0
    checkpoint = directory / "run" / "last.pt"
    command = ["export", f"--checkpoint={checkpoint}", f"--out={directory}/backbone.pth"]
    assert main(command) == 0
    return load_backbone("resnet18", checkpoint).eval(), directory / "backbone.pth"


def test_torchvision_and_timm_take_the_backbone(backbone):
    ours, path = backbone
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = ours(images)
        theirs = torchvision.models.resnet18()
        theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
        assert not theirs.eval()(images).any()  # the classifier has not learnt anything
        theirs.fc = torch.nn.Identity()
        torch.testing.assert_close(theirs(images), expected)
        timms = timm.create_model("resnet18", checkpoint_path=str(path)).eval()
        found = timms.forward_head(timms.forward_features(images), pre_logits=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_anomalib_takes_the_backbone(backbone):
    """As a network, and as timm's of that name."""
    from anomalib.models.components.feature_extractors import TimmFeatureExtractor

    ours, path = backbone
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = torchvision.models.resnet18()
    network.load_state_dict(torch.load(path, weights_only=True))
    layers = ["layer1", "layer2", "layer3"]
    named = TimmFeatureExtractor("resnet18", layers, pre_trained=False)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith(("layer4", "fc"))}
    named.feature_extractor.load_state_dict(state)
    with torch.no_grad():
        expected = FeatureLayers(ours)(images)
        for extractor in (TimmFeatureExtractor(network.eval(), layers), named.eval()):
            found = extractor(images)
            for name, layer in zip(layers, expected):
                torch.testing.assert_close(found[name], layer, rtol=1e-4, atol=1e-5)


def test_backbones_are_exported_from_checkpoints_only(backbone, tmp_path, capsys):
    for wrong in (backbone[1], tmp_path / "nowhere.pt"):
        assert main(["export", f"--checkpoint={wrong}", f"--out={tmp_path}/out.pth"]) == 2
        assert str(wrong) in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
    with pytest.raises(SystemExit):
        main(["export", "--out=x.pth"])
