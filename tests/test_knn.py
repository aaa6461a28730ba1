import json

import pytest
import torch
from pretrain_runs import coloured, config, write_images
from torch import nn
from torch.nn.functional import normalize

from spd_fast.datasets.folder import ImageFolder
from spd_fast.errors import InputError
from spd_fast.knn import KnnMonitor, _spread, knn_accuracy
from spd_fast.models import read_checkpoint
from spd_fast.pretrain import pretrain


@pytest.mark.parametrize(("k", "temperature"), [(5, 0.1), (50, 0.07), (400, 1.0)])
def test_accuracy_equals_lightlys(k, temperature):
    from lightly.utils.benchmarking.knn import knn_predict

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 16, generator=generator)
    labels = torch.randint(7, (1700,), generator=generator)
    features = centres[labels] + 2 * torch.randn(1700, 16, generator=generator)
    bank, queries = features[:400], features[400:]  # more than are compared at a time
    unit, unit_bank = normalize(queries, dim=1), normalize(bank, dim=1)
    predicted = knn_predict(unit, unit_bank.T, labels[:400], 7, k, temperature)[:, 0]
    expected = (predicted == labels[400:]).float().mean().item()
    found = knn_accuracy(bank, labels[:400], queries, labels[400:], k, temperature)
    assert found == pytest.approx(expected, abs=2e-3) and 0.3 < found < 1
    more = knn_accuracy(bank, labels[:400], queries, labels[400:], 1000, temperature)
    assert 0 < more < 1  # all that there are


class MeanColour(nn.Module):
    def forward(self, images):
        assert not self.training
        return images.mean((2, 3))


def test_the_monitor_tells_colours(tmp_path):
    train, other = coloured(tmp_path / "train", 0), coloured(tmp_path / "other", 1)
    monitor = KnnMonitor(ImageFolder(train), [other], 32, torch.device("cpu"), workers=2)
    backbone = MeanColour()
    assert monitor.accuracy(backbone) == 1 and backbone.training
    # in the folder of another class, none is right
    (tmp_path / "other" / "blue").rename(tmp_path / "x")
    (tmp_path / "other" / "green").rename(tmp_path / "other" / "blue")
    (tmp_path / "x").rename(tmp_path / "other" / "green")
    monitor = KnnMonitor(ImageFolder(train), [other], 32, torch.device("cpu"), workers=2)
    assert monitor.accuracy(backbone) == pytest.approx(1 / 3)
    coloured(tmp_path / "third", 2, ("blue", "violet"))
    with pytest.raises(InputError, match="the class violet is not one of the training data"):
        KnnMonitor(ImageFolder(train), [tmp_path / "third"], 32, torch.device("cpu"), 1)


def test_images_are_spread_over_the_data(tmp_path):
    data = ImageFolder(coloured(tmp_path / "train", 0))
    paths, labels = _spread(data.paths, data.labels, 4)
    assert labels == [0, 1, 1, 2] and paths[0] == data.paths[0] and paths[-1] == data.paths[-1]
    assert _spread(data.paths, data.labels, 100) == (data.paths, data.labels)


def test_a_run_notes_its_accuracy_and_keeps_the_best(tmp_path, monkeypatch):
    train, other = coloured(tmp_path / "train", 0), coloured(tmp_path / "other", 1)
    accuracies = iter([0.5, 0.75, 0.25])
    measured = []

    def accuracy(self, backbone):
        measured.append(real(self, backbone))
        return next(accuracies)

    real = KnnMonitor.accuracy
    monkeypatch.setattr(KnnMonitor, "accuracy", accuracy)
    out = tmp_path / "run"
    assert pretrain(config(train, out, knn=[str(other)], max_steps=None)) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    noted = [
        (line["step"], line["epoch"], line["knn_top1"]) for line in lines if "knn_top1" in line
    ]
    assert noted == [(4, 0, 0.5), (8, 1, 0.75), (12, 2, 0.25)]
    assert all(0 <= value <= 1 for value in measured)
    assert read_checkpoint(out / "best.pt")["step"] == 8
    assert "Nearest neighbours" in (out / "run.html").read_text()
    assert pretrain(config(train, out, knn=[str(other)], resume=True)) == 0  # reads those lines


def test_other_classes_are_refused_before_a_run_starts(tmp_path):
    (tmp_path / "data").mkdir()
    data = write_images(tmp_path / "data")
    other = coloured(tmp_path / "other", 1)
    with pytest.raises(InputError, match="knn: the class blue"):
        pretrain(config(data, tmp_path / "run", knn=[str(other)]))
    assert not (tmp_path / "run").exists()


def test_an_unreadable_image_does_not_lose_the_epoch(tmp_path):
    train, other = coloured(tmp_path / "train", 0), coloured(tmp_path / "other", 1)
    (other / "red" / "03.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="red/03.png"):
        pretrain(config(train, tmp_path / "run", knn=[str(other)]))
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4
