import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pretrain_runs import coloured, config
from torch import nn
from torchvision import transforms

from spd_fast import held_out
from spd_fast import probe as module
from spd_fast.classify import classify, load_classifier
from spd_fast.cli import main
from spd_fast.datasets.folder import ImageFolder
from spd_fast.errors import InputError
from spd_fast.held_out import format_top_k, outputs, top_k
from spd_fast.models import load_backbone, read_checkpoint
from spd_fast.pretrain import pretrain
from spd_fast.probe import ProbeConfig, probe, read_probe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    return coloured(root / "train", 0), coloured(root / "val", 1)


def probe_config(folders, out, **kwargs) -> ProbeConfig:
    """4 steps per epoch."""
    train, val = folders
    tiny = {"backbone": "resnet18", "size": 32, "batch_size": 8, "epochs": 3, "lr": 1.0}
    return ProbeConfig("random", [str(train)], [str(val)], str(out), **tiny | kwargs)


class MeanColour(nn.Module):
    """(N, 3, S, S) -> (N, 3), times a scale."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale, self.fc = scale, nn.Linear(3, 1000)

    def forward(self, images):
        assert not self.training
        return self.fc(self.scale * images.mean((2, 3)))


@pytest.mark.parametrize(
    ("scale", "settings"),
    [
        (1, {"lr": 2.0}),
        (0.01, {"lr": 2.0}),  # the same rate fits
        (1, {"lr": 2.0, "schedule": "steps"}),
        (1, {"lr": 4.0, "feature_norm": False}),
    ],
)
def test_the_probe_is_as_good_as_logistic_regression(scale, settings, tmp_path, monkeypatch):
    """On images of one colour each, of classes whose colours overlap."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    colours, labels = {}, {}
    for part, each in (("train", 64), ("val", 100)):
        labels[part] = np.repeat(np.arange(3), each)
        drawn = 128 + 30 * np.eye(3)[labels[part]] + 25 * rng.standard_normal((3 * each, 3))
        colours[part] = drawn.clip(0, 255).astype(np.uint8)
        for i, (colour, label) in enumerate(zip(colours[part], labels[part])):
            folder = tmp_path / part / "abc"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), tuple(colour.tolist())).save(folder / f"{i:03d}.png")
    monkeypatch.setattr(module, "load_backbone", lambda *_: MeanColour(scale))
    folders = tmp_path / "train", tmp_path / "val"
    run = probe_config(folders, tmp_path / "out", size=8, batch_size=32, epochs=12, **settings)
    result = probe(run)
    fit = LogisticRegression().fit(colours["train"] / 255.0, labels["train"])
    expected = fit.score(colours["val"] / 255.0, labels["val"])
    assert 0.6 < expected < 0.95
    assert result["top1"] == pytest.approx(expected, abs=0.03)
    assert "top5" not in result and "no top-5" in format_top_k(result)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_resumed_probe_equals_an_uninterrupted_one(optimizer, folders, tmp_path, monkeypatch):
    whole = probe(probe_config(folders, tmp_path / "whole", optimizer=optimizer))
    measured = []

    def interrupted(*args):
        measured.append(1)
        if len(measured) == 3:  # before training, after the first epoch, after the second
            raise KeyboardInterrupt
        return top_k(*args)

    parts = probe_config(folders, tmp_path / "parts", optimizer=optimizer, resume=True, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "top_k", interrupted)
        with pytest.raises(KeyboardInterrupt):
            probe(parts)
    assert not (tmp_path / "parts" / "probe.json").exists()
    assert len(read_probe(tmp_path / "parts" / "probe.pt")["history"]) == 1
    result = probe(parts)
    ended, expected = (read_probe(tmp_path / name / "probe.pt") for name in ("parts", "whole"))
    for part in ("head", "backbone"):
        for name, value in expected[part].items():
            assert torch.equal(ended[part][name], value), name
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == lines
    assert [json.loads(line)["epoch"] for line in lines.splitlines()] == [1, 2, 3]
    assert result["top1"] == whole["top1"] == json.loads(lines.splitlines()[-1])["top1"]
    assert probe(parts) == result  # nothing is left to do


def test_the_backbone_is_frozen_and_the_classifier_learns(folders, tmp_path):
    result = probe(probe_config(folders, tmp_path))
    state = read_probe(tmp_path / "probe.pt")
    backbone = load_backbone("resnet18", "random").state_dict()
    for name, value in state["backbone"].items():  # batch norm's statistics as well
        assert torch.equal(value, backbone[name]), name
    first, *_, last = state["history"]
    assert last["loss"] < first["loss"] and result["top1"] > 0.6
    assert state["classes"] == ["blue", "green", "red"]
    found = classify(tmp_path / "probe.pt", folders[1])
    assert {name: result[name] for name in found} == found
    assert json.loads((tmp_path / "probe.json").read_text()) == result


def test_top_k_equals_scikit_learns(monkeypatch):
    from sklearn.metrics import top_k_accuracy_score

    generator = torch.Generator().manual_seed(0)
    for classes in (12, 6, 5, 2):
        labels = torch.randint(classes, (150,), generator=generator)
        logits = torch.randn(150, classes, generator=generator)
        logits += torch.nn.functional.one_hot(labels, classes)
        monkeypatch.setattr(held_out, "outputs", lambda *_, x=logits: iter(x.split(64)))
        found = top_k(None, range(150), labels.tolist(), 32, CPU, 1)
        scores = logits if classes > 2 else logits[:, 1] - logits[:, 0]  # of the second class
        for name, k in (("top1", 1), ("top5", 5)):
            if classes <= 5 and k == 5:
                assert name not in found
            else:
                expected = top_k_accuracy_score(labels, scores, k=k, labels=range(classes))
                assert found[name] == pytest.approx(expected) and 0 < expected < 1
    logits[140, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        top_k(None, range(150), labels.tolist(), 32, CPU, 1)


def test_images_are_prepared_as_torchvision_evaluates(tmp_path):
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(90, 71), (60, 64), (40, 300)]):
        pixels = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.BICUBIC)
        image.save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.iterdir())
    for size, resized in ((224, 256), (32, 36)):
        wanted = transforms.Compose(
            [
                transforms.Resize(resized),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )
        found = torch.cat([*outputs(nn.Identity(), paths, size, CPU, 2)])
        expected = torch.stack([wanted(Image.open(path)) for path in paths])
        difference = (found - expected).abs() * 255 * 0.225
        assert difference.max() < 2.1 and difference.mean() < 0.3  # steps of 8 bits


@pytest.fixture(scope="module")
def supervised(folders, tmp_path_factory):
    """A run that learns blue, green and red."""
    out = tmp_path_factory.mktemp("supervised")
    settings = {"recipe": "supervised", "spd": False, "schedule": "cosine", "lr": 0.6, "seed": 1}
    assert pretrain(config(folders[0], out / "run", epochs=12, **settings)) == 0
    return out / "run"


def test_the_classifier_of_supervised_training(folders, supervised, tmp_path, capsys):
    checkpoint = supervised / "last.pt"
    assert main(["classify", "--checkpoint", str(checkpoint), "--data", str(folders[1])]) == 0
    printed = capsys.readouterr().out
    found = classify(checkpoint, folders[1])
    assert printed == format_top_k(found) + "\n" and "36 images of 3 classes" in printed
    # by its own weights, spelt out
    model = read_checkpoint(checkpoint)["model"]
    backbone = load_backbone("resnet18", checkpoint).eval()
    backbone.fc = nn.Identity()
    data = ImageFolder(folders[1])
    with torch.no_grad():
        features = torch.cat([*outputs(backbone, data.paths, 32, CPU, 1)])
    logits = features @ model["classifier.weight"].T + model["classifier.bias"]
    right = (logits.argmax(1) == torch.tensor(data.labels)).float()
    assert found["top1"] == pytest.approx(right.mean().item()) and found["top1"] > 0.9
    # fewer classes, whose numbers would be others; which one is right does not depend on that
    for name in ("green", "red"):
        (tmp_path / name).symlink_to(folders[1] / name)
    fewer = classify(checkpoint, tmp_path)
    assert fewer["top1"] == pytest.approx(right[12:].mean().item())
    assert "24 images of 2 of the 3 classes" in format_top_k(fewer)
    network, classes, size = load_classifier(checkpoint)
    assert classes == ["blue", "green", "red"] and size == 32 and not network.training


def test_a_checkpoint_tells_backbone_and_size(folders, supervised, tmp_path):
    run = probe_config(folders, tmp_path, backbone=None, size=None, epochs=1)
    result = probe(replace(run, weights=supervised / "last.pt"))
    assert (result["config"]["backbone"], result["config"]["size"]) == ("resnet18", 32)
    assert len(result["weights_sha256"]) == 64
    with pytest.raises(InputError, match="which backbone"):
        probe(replace(run, weights="imagenet"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"weight_decay": -1.0}, "weight_decay must be a number, and not negative"),
        ({"optimizer": "adam"}, "optimizer is one of"),
        ({"schedule": "linear"}, "schedule is one of"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"batch_size": 64}, "a batch needs 64 images, but the data has only 36"),
        ({"backbone": "vgg16"}, "torchvision's ResNets"),
    ],
)
def test_wrong_settings(settings, message, folders, tmp_path):
    with pytest.raises(InputError, match=message):
        probe(probe_config(folders, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_wrong_classes(folders, supervised, tmp_path):
    other = coloured(tmp_path / "other", 2, ("blue", "violet"))
    with pytest.raises(InputError, match="val: the class violet is not one of the training data"):
        probe(probe_config((folders[0], other), tmp_path / "out"))
    with pytest.raises(InputError, match="last.pt: the class violet is not one"):
        classify(supervised / "last.pt", other)
    with pytest.raises(InputError, match="at least two classes"):
        probe(probe_config((folders[0] / "red", folders[1] / "red"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unreadable_image_is_named_before_an_epoch_is_trained(folders, supervised, tmp_path):
    bad = coloured(tmp_path / "bad", 3)
    (bad / "red" / "03.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="red/03.png"):
        classify(supervised / "last.pt", bad)
    with pytest.raises(InputError, match="red/03.png"):
        probe(probe_config((folders[0], bad), tmp_path / "val"))
    assert not any((tmp_path / "val").iterdir())
    with pytest.raises(InputError, match="red/03.png"):
        probe(probe_config((bad, folders[1]), tmp_path / "train"))
    run = probe_config((bad, folders[1]), tmp_path / "skipped", skip_bad_images=True, epochs=1)
    (reason,) = probe(run)["skipped"]
    assert "red/03.png" in reason


def test_wrong_checkpoints(folders, supervised, data, tmp_path):
    assert pretrain(config(data, tmp_path / "simsiam", max_steps=1)) == 0
    with pytest.raises(InputError, match="recipe simsiam, .* `spd-fast probe --weights`"):
        classify(tmp_path / "simsiam" / "last.pt", folders[1])
    state = read_checkpoint(supervised / "last.pt")
    torch.save(state["backbone"], tmp_path / "backbone.pth")
    with pytest.raises(InputError, match="backbone.pth is not a checkpoint of `pretrain"):
        classify(tmp_path / "backbone.pth", folders[1])
    with pytest.raises(InputError, match="there is no file"):
        classify(tmp_path / "nothing.pt", folders[1])
    del state["classes"]
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(InputError, match="does not hold the names of its classes"):
        classify(tmp_path / "old.pt", folders[1])


def test_only_the_same_probe_goes_on(folders, supervised, tmp_path):
    run = probe_config(folders, tmp_path / "out", epochs=1)
    probe(run)
    with pytest.raises(InputError, match="already holds a probe: resume it"):
        probe(run)
    run = replace(run, resume=True)
    two = [folders[0] / name for name in ("blue", "green")]
    for changed, message in (
        (replace(run, lr=2.0), "made with lr 1.0, but lr is now 2.0"),
        (replace(run, epochs=2), "made with epochs 1"),
        (replace(run, weights=supervised / "last.pt"), "are other weights"),
        (replace(run, train=[*folders]), "72 images with fingerprint .* instead of 36"),
        (replace(run, train=two, val=two), "its images had other classes"),
        (replace(run, val=[folders[1] / "blue"]), "measured on other images of val"),
    ):
        with pytest.raises(InputError, match=message):
            probe(changed)
    state = read_probe(tmp_path / "out" / "probe.pt")
    torch.save(state | {"version": 99}, tmp_path / "out" / "probe.pt")
    with pytest.raises(InputError, match="version 99"):
        probe(run)


def test_several_processes_are_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        probe(probe_config(folders, tmp_path / "out", epochs=1))


def test_a_terminated_process_has_lost_no_finished_epoch(folders, tmp_path):
    out = tmp_path / "out"
    arguments = ["probe", "--weights", "random", "--backbone", "resnet18", "--size", "32"]
    arguments += ["--train", str(folders[0]), "--val", str(folders[1]), "--out", str(out)]
    arguments += ["--batch-size", "8", "--epochs", "500", "--resume"]
    code = f"import sys; from spd_fast.cli import main; sys.exit(main({arguments}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "probe.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    state = read_probe(out / "probe.pt")
    assert len(state["history"]) >= 1 and state["loader"]["epoch"] == len(state["history"])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) - len(state["history"]) in (0, 1)
