"""What makes training larger or faster: parts of a batch, precisions, compilation; what stays."""

import copy
import signal
from dataclasses import replace

import pytest
import torch
from pretrain_runs import config, signal_at, trace
from torch.nn.functional import cosine_similarity, normalize

from spd_fast import files, recipes
from spd_fast.checkpoints import keep_checkpoint
from spd_fast.datasets.images import read_image
from spd_fast.errors import InputError
from spd_fast.loader import ViewLoader
from spd_fast.losses import simsiam_loss, spd_loss
from spd_fast.methods import MoCo, SimCLR, SimSiam, Supervised
from spd_fast.models import load_backbone, read_checkpoint
from spd_fast.ops.augment_views import augment_views
from spd_fast.pretrain import SAVED, pretrain
from spd_fast.steplog import StepLog

LABELS = torch.arange(8) % 3


def views(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------- shared forward


def test_shared_forward_normalises_all_views_together():
    torch.manual_seed(0)
    model, x = SimSiam("resnet18", 32, 8), views()
    model.shared_forward = True
    losses = model(x, LABELS, eta=0.5)
    features = model.backbone(x.flatten(0, 1)).chunk(4)
    z, z_hat, z_pos, z_neg = (model.projector(f) for f in features)
    ssl = simsiam_loss(model.predictor(z), model.predictor(z_hat), z, z_hat)
    spd = spd_loss(z, z_neg, z_pos)
    torch.testing.assert_close(losses["loss"], ssl + 0.5 * spd)
    model.shared_forward = False
    assert (model(x, LABELS, eta=0.5)["loss"] - losses["loss"]).abs() > 1e-3


@pytest.mark.parametrize("cls", [SimSiam, MoCo, SimCLR, Supervised])
def test_a_shared_forward_is_the_same_where_batch_norm_does_not_mix(cls):
    """In evaluation mode nothing is normalised by it, and MoCo's groups hold one kind of view."""
    torch.manual_seed(0)
    model = MoCo("resnet18", dim=16, queue_size=16, bn_group=4) if cls is MoCo else cls("resnet18")
    if cls is not MoCo:
        model.eval()
    x, shared = views(model.strong_views + 2), copy.deepcopy(model)
    shared.shared_forward = True
    expected, found = (m(x, LABELS, eta=0.1) for m in (model, shared))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ collapse, precision


def test_collapse_indicators():
    torch.manual_seed(0)
    model, x = SimSiam("resnet18", 32, 8), views()
    found = model(x, LABELS, eta=0.1)
    z, z_pos, z_neg = (model.projector(model.backbone(x[i])) for i in (0, 2, 3))
    expected = {
        "z_std": normalize(z, dim=1).std(0).mean(),
        "cos_pos": cosine_similarity(z, z_pos).mean(),
        "cos_neg": cosine_similarity(z, z_neg).mean(),
    }
    expected["spd_margin"] = expected["cos_pos"] - expected["cos_neg"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        assert not found[name].requires_grad
    # without SPD there is nothing to compare with
    assert set(model(x[:2], LABELS, eta=0.1)) == {"loss", "loss_ssl", "z_std"}


def test_losses_of_halves_are_computed_in_float32():
    z = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = spd_loss(*z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, spd_loss(*z.float()), rtol=1e-6, atol=0)


MOCO = {"dim": 16, "queue_size": 16, "bn_group": 4}


@pytest.mark.parametrize(("precision", "alike"), [("bfloat16", 0.95), ("float16", 0.99)])
def test_half_precision_has_about_the_same_gradients(precision, alike, data, tmp_path):
    states = {}
    for name in ("float32", precision):
        assert pretrain(config(data, tmp_path / name, max_steps=1, precision=name)) == 0
        states[name] = read_checkpoint(tmp_path / name / "last.pt")
    (exact,), (half,) = trace(tmp_path / "float32"), trace(tmp_path / precision)
    assert half["loss"] == pytest.approx(exact["loss"], rel=0.05) and half["loss"] != exact["loss"]
    g, h = (
        torch.cat([v["momentum_buffer"].flatten() for v in state["optimizer"]["state"].values()])
        for state in states.values()
    )
    assert cosine_similarity(g, h, dim=0) > alike
    assert h.norm() == pytest.approx(g.norm().item(), rel=0.05)  # the loss's scale is taken out
    state = states[precision]
    assert {v.dtype for v in state["model"].values()} == {torch.float32, torch.int64}
    assert state["scaler"].get("scale") == (65536 if precision == "float16" else None)
    again = config(data, tmp_path / precision, max_steps=1, precision=precision, resume=True)
    assert pretrain(again) == 0


def test_steps_whose_gradients_overflow_are_left_out(data, tmp_path):
    """MoCo's groups of four make gradients too large for float16 with the first scales."""
    run = config(data, tmp_path, recipe="moco", max_steps=2, precision="float16", **MOCO)
    assert pretrain(run) == 0
    state = read_checkpoint(tmp_path / "last.pt")
    assert state["scaler"]["scale"] == 65536 / 4
    torch.manual_seed(7)
    for name, start in MoCo("resnet18", **MOCO).named_parameters():
        assert torch.equal(state["model"][name], start), name
    assert not state["optimizer"]["state"]  # no momentum from nowhere


# ------------------------------------------------------------------------ parts of a batch, compile


def test_accumulated_gradients_are_those_of_the_parts(data, tmp_path):
    """Two steps of two parts each; the second depends on the gradients of the first."""
    root = tmp_path / "classes"
    for i, path in enumerate(sorted(data.iterdir())):
        folder = root / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    run = config(root, tmp_path / "run", recipe="supervised", accumulate=2, max_steps=2)
    assert pretrain(run) == 0
    torch.manual_seed(7)
    model = Supervised("resnet18", 3)
    model.add_spd_classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    loader = ViewLoader(root, recipes.supervised(), 8, size=32, seed=7)
    for batch, line in zip(loader, trace(tmp_path / "run")):
        optimizer.param_groups[0]["lr"] = line["lr"]
        parts = [
            model(batch.views[:, part], batch.labels[part], 0.1)["loss"]
            for part in (slice(0, 4), slice(4, 8))
        ]
        loss = sum(parts) / 2
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with pytest.raises(InputError, match="batch_size 8 cannot be shared among 3 parts"):
        pretrain(config(root, tmp_path / "other", recipe="supervised", accumulate=3))


def test_moco_moves_its_keys_once_a_step(data, tmp_path, monkeypatch):
    """However many parts a batch has; and the queue takes the keys of all."""
    run = config(data, tmp_path, recipe="moco", accumulate=2, max_steps=1, lr=1e-30, **MOCO)
    torch.manual_seed(7)
    start = MoCo("resnet18", **MOCO)
    moved, before_step = [], MoCo.before_step
    monkeypatch.setattr(MoCo, "before_step", lambda self: (moved.append(1), before_step(self)))
    assert pretrain(run) == 0
    state = read_checkpoint(tmp_path / "last.pt")["model"]
    assert moved == [1] and state["next_row"] == 8
    assert not torch.equal(state["queue"][7], start.queue[7])
    assert torch.equal(state["queue"][8:], start.queue[8:])


def test_a_compiled_backbone_trains_the_same(data, tmp_path):
    """Its weights keep their names."""
    settings = {"max_steps": 2, "spd": False, "batch_size": 8}
    for name, compiled in (("plain", False), ("compiled", True)):
        assert pretrain(config(data, tmp_path / name, compile=compiled, **settings)) == 0
    plain, compiled = trace(tmp_path / "plain"), trace(tmp_path / "compiled")
    for a, b in zip(compiled, plain):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2, abs=1e-3)
    load_backbone("resnet18", tmp_path / "compiled" / "last.pt")


# -------------------------------------------------------------------------------------- what stays


def test_the_last_epochs_and_the_best_stay(data, tmp_path, monkeypatch):
    """The loss of the second of four epochs is the lowest."""
    means = iter([0.5, 0.2, 0.7, 0.6])
    monkeypatch.setattr("spd_fast.steplog.StepLog.epoch_loss", lambda self: next(means))
    assert pretrain(config(data, tmp_path, epochs=4, keep=2)) == 0
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["best.pt", "epoch_0003.pt", "epoch_0004.pt", "last.pt"]
    steps = {name: read_checkpoint(tmp_path / name)["step"] for name in names}
    assert steps == {"best.pt": 6, "epoch_0003.pt": 9, "epoch_0004.pt": 12, "last.pt": 12}
    assert read_checkpoint(tmp_path / "last.pt")["best"] == -0.2
    assert (tmp_path / "last.pt").stat().st_ino == (tmp_path / "epoch_0004.pt").stat().st_ino


def test_the_mean_of_an_epoch_counts_the_steps_before_a_stop(data, tmp_path, monkeypatch):
    means, epoch_loss = [], StepLog.epoch_loss
    with monkeypatch.context() as patch:
        patch.setattr(
            StepLog, "epoch_loss", lambda self: means.append(epoch_loss(self)) or means[-1]
        )
        signal_at(5, signal.SIGTERM, patch)
        assert pretrain(config(data, tmp_path, epochs=2)) == SAVED
        assert pretrain(config(data, tmp_path, epochs=2, resume=True)) == 0
    losses = [line["loss"] for line in trace(tmp_path)]
    assert means == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])
    assert read_checkpoint(tmp_path / "last.pt")["best"] == -min(means)


def test_epochs_of_one_step(data, tmp_path):
    assert pretrain(config(data, tmp_path, batch_size=24, epochs=2)) == 0
    losses = [line["loss"] for line in trace(tmp_path)]
    assert read_checkpoint(tmp_path / "last.pt")["best"] == -min(losses)


def test_checkpoints_stay_where_there_are_no_links(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no links here")

    monkeypatch.setattr(files.os, "link", refused)
    for epoch in (1, 2, 3):
        (tmp_path / "last.pt").write_text(str(epoch))
        keep_checkpoint(tmp_path / "last.pt", epoch, count=2, best=epoch == 1)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"last.pt": "3", "best.pt": "1", "epoch_0002.pt": "2", "epoch_0003.pt": "3"}
    keep_checkpoint(tmp_path / "last.pt", 4, count=0, best=False)  # what was kept stays
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / "epoch_9999.pt").touch()
    keep_checkpoint(tmp_path / "last.pt", 10000, count=1, best=False)
    assert [path.name for path in tmp_path.glob("epoch*")] == ["epoch_10000.pt"]


def test_a_batch_whose_loss_is_not_finite_can_be_made_again(data, tmp_path, monkeypatch):
    forward, seen = SimSiam.forward, []

    def broken(self, x, *rest):
        seen.append(x.clone())
        losses = forward(self, x, *rest)
        return losses | {"loss": losses["loss"] * (torch.nan if len(seen) == 2 else 1)}

    monkeypatch.setattr(SimSiam, "forward", broken)
    with pytest.raises(InputError, match="not_finite_0.pt holds the images' paths"):
        pretrain(config(data, tmp_path))
    found = torch.load(tmp_path / "not_finite_0.pt", weights_only=True)
    assert (found["step"], found["epoch"]) == (2, 0)
    images = [read_image(path) for path in found["paths"]]
    again = augment_views(images, found["params"], 32)
    torch.testing.assert_close(again.float(), seen[1].contiguous(), rtol=0, atol=1e-6)
    assert [
        str(ViewLoader(data, recipes.simsiam(), 8).data.paths[i]) for i in found["indices"]
    ] == (found["paths"])


def test_a_checkpoint_from_before_these_settings_goes_on(data, tmp_path):
    """It lacks them, and was made with what is now their default."""
    assert pretrain(config(data, tmp_path, max_steps=1)) == 0
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["scaler"], state["best"]
    for name in ("accumulate", "precision", "shared_forward", "sync_bn", "keep", "compile"):
        state["config"].pop(name)
    torch.save(state, tmp_path / "last.pt")
    again = config(data, tmp_path, max_steps=1, resume=True)
    for name, value in (("accumulate", 2), ("precision", "float16"), ("shared_forward", True)):
        with pytest.raises(InputError, match=f"{name} .*but {name} is now"):
            pretrain(replace(again, **{name: value}))
    assert pretrain(again) == 0
