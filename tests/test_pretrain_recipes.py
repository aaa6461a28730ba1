"""Every recipe but SimSiam's, through whole runs."""

import copy
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pretrain_runs import config, signal_at, trace
from torch.nn.functional import cosine_similarity, normalize

from spd_fast import recipes
from spd_fast.errors import InputError
from spd_fast.loader import ViewLoader
from spd_fast.methods import MoCo, SimCLR, Supervised
from spd_fast.models import load_backbone, read_checkpoint
from spd_fast.pretrain import SAVED, pretrain
from spd_fast.pretrain_config import PretrainConfig, read_config


@pytest.fixture(scope="module")
def two_classes(data, tmp_path_factory) -> Path:
    """The images again, half of them without red, half without blue."""
    root = tmp_path_factory.mktemp("classes")
    for i, path in enumerate(sorted(data.iterdir())):
        pixels = np.array(Image.open(path))
        pixels[:, :, 2 * (i % 2)] = 0
        folder = root / ("no_red", "no_blue")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / path.name)
    return root


OTHERS = {
    "moco": {"dim": 16, "queue_size": 16, "bn_group": 4},
    "simclr": {"dim": 16, "warmup_epochs": 1},
    "supervised": {},
}


@pytest.mark.parametrize("recipe", OTHERS)
def test_every_recipe_goes_on_with_the_same_bits(recipe, two_classes, tmp_path, monkeypatch):
    def run(out, **kwargs):
        return pretrain(config(two_classes, out, recipe=recipe, **OTHERS[recipe] | kwargs))

    assert run(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        signal_at(5, signal.SIGTERM, patch)
        assert run(tmp_path / "parts") == SAVED
    assert run(tmp_path / "parts", resume=True) == 0
    lines = trace(tmp_path / "whole")
    assert trace(tmp_path / "parts") == lines and len(lines) == 9
    ended, expected = (read_checkpoint(tmp_path / n / "last.pt") for n in ("parts", "whole"))
    for name, value in expected["model"].items():
        assert torch.equal(ended["model"][name], value), name
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_ssl"] + 0.1 * line["loss_spd"], abs=1e-6)
    load_backbone("resnet18", tmp_path / "whole" / "last.pt")
    # the run again, from nothing but its own file
    again = read_config(tmp_path / "parts" / "config.yaml") | {"out": str(tmp_path / "again")}
    assert pretrain(PretrainConfig(**again)) == 0
    assert trace(tmp_path / "again") == lines


def test_supervised_learns_two_classes(two_classes, tmp_path):
    """Each class has a colour of its own."""
    rates = {"lr": 0.4, "epochs": 8, "spd": False}
    assert pretrain(config(two_classes, tmp_path, recipe="supervised", **rates)) == 0
    losses = [line["loss_ssl"] for line in trace(tmp_path)]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])


def test_simclr_and_supervised_equal_plain_loops(two_classes, tmp_path):
    """Two steps each with SGD; the second depends on the gradients of the first."""
    from lightly.loss import NTXentLoss

    for recipe, settings in (
        ("simclr", {"dim": 16, "optimizer": "sgd", "warmup_epochs": 0}),
        ("supervised", {"spd_loss": "cosine"}),
    ):
        out = tmp_path / recipe
        run = config(two_classes, out, recipe=recipe, max_steps=2, schedule="cosine", **settings)
        assert pretrain(run) == 0
        torch.manual_seed(7)
        model = SimCLR("resnet18", 16) if recipe == "simclr" else Supervised("resnet18", 2)
        rate = read_config(out / "config.yaml")["lr"] * 8 / 256
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, rate, 0.9, weight_decay=1e-4)
        views = getattr(recipes, recipe)()
        for batch, line in zip(ViewLoader(two_classes, views, 8, size=32, seed=7), trace(out)):
            x, *others, x_pos, x_neg = batch.views
            z = model.backbone(torch.cat([x, *others]))
            if recipe == "simclr":
                z = model.projector(z)
                ssl = NTXentLoss(temperature=0.1)(z[:8], z[8:])
            else:
                ssl = torch.nn.functional.cross_entropy(model.classifier(z), batch.labels)
            near, far = (model.projector(model.backbone(v)) for v in (x_pos, x_neg))
            spd = (cosine_similarity(z[:8], far) - cosine_similarity(z[:8], near)).mean()
            assert line["loss_ssl"] == pytest.approx(ssl.item(), rel=1e-3)
            assert line["loss_spd"] == pytest.approx(spd.item(), abs=1e-3)
            optimizer.param_groups[0]["lr"] = line["lr"]
            optimizer.zero_grad()
            (ssl + 0.1 * spd).backward()
            optimizer.step()


def test_moco_equals_a_plain_loop(data, tmp_path):
    """As in algorithm 1 of He et al. 2020; the queue of two batches is full and goes round."""
    own = {"dim": 16, "queue_size": 16, "key_momentum": 0.9, "temperature": 0.2, "bn_group": 4}
    run = config(data, tmp_path, recipe="moco", max_steps=5, lr=1.0, **own)
    assert pretrain(run) == 0
    torch.manual_seed(7)
    model = MoCo("resnet18", **own)
    key, queue, oldest = copy.deepcopy(model), model.queue.clone(), 0
    learning = [*model.backbone.parameters(), *model.projector.parameters()]
    optimizer = torch.optim.SGD(learning, 1, 0.9, weight_decay=1e-4)

    def encoded(model, *groups):
        return model.projector(torch.cat([model.backbone(group) for group in groups]))

    for batch, line in zip(
        endless(ViewLoader(data, recipes.moco(), 8, size=32, seed=7)), trace(tmp_path)
    ):
        x, other, x_pos, x_neg = batch.views
        with torch.no_grad():
            for k, q in zip(key.parameters(), model.parameters()):
                k.copy_(0.9 * k + 0.1 * q)
            k = normalize(encoded(key, other[0::2], other[1::2]))
            k = torch.stack([k[:4], k[4:]], 1).flatten(0, 1)  # back in order
        z, near, far = (encoded(model, v[:4], v[4:]) for v in (x, x_pos, x_neg))
        q = normalize(z)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T.clone()], dim=1) / 0.2
        ssl = torch.nn.functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
        queue[oldest : oldest + 8], oldest = k, (oldest + 8) % 16
        spd = (cosine_similarity(z, far) - cosine_similarity(z, near)).mean()
        assert line["loss_ssl"] == pytest.approx(ssl.item(), rel=5e-4)
        assert line["loss_spd"] == pytest.approx(spd.item(), abs=1e-4)
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.zero_grad()
        (ssl + 0.1 * spd).backward()
        optimizer.step()
    assert line["step"] == 5


def endless(loader):
    while True:
        yield from loader


def test_warm_up_is_shortened_with_the_run(data, tmp_path):
    """One of three epochs; of six steps, two."""
    run = config(data, tmp_path, recipe="simclr", dim=16, warmup_epochs=1, max_steps=6)
    assert pretrain(run) == 0
    assert [line["lr"] for line in trace(tmp_path)][:3] == pytest.approx(
        [0, 0.3 / 64, 0.3 / 32], rel=1e-9
    )


def test_supervised_goes_on_with_the_same_classes_only(data, tmp_path):
    """Classes are folders below a root: the same files are a, a, b or x, y, z."""
    root = tmp_path / "data"
    for i, path in enumerate(sorted(data.iterdir())):
        folder = root / ("a/x", "a/y", "b/z")[i // 8]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    start = config(root, tmp_path / "run", recipe="supervised", max_steps=1)
    assert pretrain(start) == 0
    other = replace(start, data=[str(root / "a"), str(root / "b")], resume=True)
    with pytest.raises(InputError, match="cannot be resumed: its images had other classes"):
        pretrain(other)


def test_supervised_needs_classes(data, tmp_path):
    with pytest.raises(InputError, match="at least two classes"):
        pretrain(config(data, tmp_path / "run", recipe="supervised"))
