import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from pretrain_runs import config, signal_at, trace
from torch.nn.functional import cosine_similarity

from spd_fast import checkpoints, recipes
from spd_fast.checkpoints import Run, save_checkpoint
from spd_fast.errors import InputError
from spd_fast.loader import ViewLoader
from spd_fast.methods import SimSiam
from spd_fast.models import load_backbone, read_checkpoint
from spd_fast.optim import new_optimizer, scheduled_lr
from spd_fast.pretrain import SAVED, pretrain
from spd_fast.pretrain_config import read_config, resolved

CHILD = """
import os, sys
import pytest
sys.path.insert(0, {tests!r})
from pretrain_runs import config, signal_at
from spd_fast.pretrain import SAVED, pretrain

with pytest.MonkeyPatch.context() as patch:
    signal_at(5, {number}, patch)
    sys.exit(pretrain(config({data!r}, {out!r})))
"""


def interrupted_run(data, out, number: int) -> int:
    """A process that is signalled in step 5, the second of the second epoch; its exit status."""
    code = CHILD.format(
        tests=str(Path(__file__).parent), number=int(number), data=str(data), out=str(out)
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode, "the run was not interrupted"
    return done.returncode


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert pretrain(config(data, out)) == 0
    return out


# -------------------------------------------------------------------------- going on after an end


@pytest.mark.parametrize(
    ("number", "status", "saved"),
    [(signal.SIGKILL, -signal.SIGKILL, 3), (signal.SIGTERM, SAVED, 5), (signal.SIGUSR1, SAVED, 5)],
    ids=["SIGKILL", "SIGTERM", "SIGUSR1"],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    data, uninterrupted, number, status, saved, tmp_path
):
    out = tmp_path / "run"
    assert interrupted_run(data, out, number) == status
    assert read_checkpoint(out / "last.pt")["step"] == saved
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # as if the machine had gone down
    assert pretrain(config(data, out, resume=True, workers=3)) == 0
    assert len(trace(out)) == 9
    assert trace(out) == trace(uninterrupted)
    ended, expected = (read_checkpoint(run / "last.pt") for run in (out, uninterrupted))
    assert ended["step"] == expected["step"] == 9
    assert ended["loader"] == expected["loader"]
    for name, value in expected["model"].items():
        assert torch.equal(ended["model"][name], value), name


def test_ctrl_c_finishes_the_step_and_saves(data, tmp_path, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    signal_at(2, signal.SIGINT, monkeypatch)
    assert pretrain(config(data, tmp_path)) == 130
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 2
    assert len(trace(tmp_path)) == 2
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopped after step 2 of 9" in capsys.readouterr().out


def test_a_finished_run_is_left_as_it_is(data, uninterrupted):
    before = (uninterrupted / "last.pt").stat().st_mtime_ns, trace(uninterrupted)
    assert pretrain(config(data, uninterrupted, resume="auto")) == 0
    assert ((uninterrupted / "last.pt").stat().st_mtime_ns, trace(uninterrupted)) == before


def test_resume_without_a_checkpoint_starts_anew(data, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5}\n')
    assert pretrain(config(data, tmp_path, resume="auto", max_steps=1)) == 0
    assert len(trace(tmp_path)) == 1 and trace(tmp_path)[0]["loss"] != 5
    fresh = tmp_path / "fresh"
    with pytest.raises(InputError, match="there is no file .*nowhere.pt"):
        pretrain(config(data, fresh, resume=tmp_path / "nowhere.pt"))
    assert not fresh.exists()


def test_resume_from_another_directory(data, uninterrupted, tmp_path):
    assert pretrain(config(data, tmp_path / "a", resume=uninterrupted / "last.pt")) == 0
    assert read_checkpoint(tmp_path / "a" / "last.pt")["step"] == 9
    other = config(data, tmp_path / "b", seed=8, max_steps=1)
    assert pretrain(other) == 0
    before = (tmp_path / "b" / "last.pt").read_bytes()
    with pytest.raises(InputError, match="b already holds a run"):
        pretrain(config(data, tmp_path / "b", resume=uninterrupted / "last.pt"))
    assert (tmp_path / "b" / "last.pt").read_bytes() == before


def test_a_schedule_of_another_length_is_refused(data, uninterrupted):
    for change in ({"epochs": 4}, {"max_steps": 5}):
        with pytest.raises(InputError, match="schedule spans 9 steps, but .* now give"):
            pretrain(config(data, uninterrupted, resume=True, **change))


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch):
    """The loss of the last step is still finite; its update is not."""
    monkeypatch.setattr(checkpoints, "scheduled_lr", lambda *_: float("inf"))
    with pytest.raises(InputError, match="weights .* are not finite"):
        pretrain(config(data, tmp_path, max_steps=1))
    assert not (tmp_path / "last.pt").exists()
    assert (tmp_path / "metrics.jsonl").read_text()  # shows how it came to that


@pytest.mark.parametrize(
    ("name", "value", "before"),
    [("backbone", "resnet34", "resnet18"), ("spd", False, True), ("batch_size", 12, 8)]
    + [("seed", 8, 7), ("size", 40, 32), ("eta", 0.2, 0.1), ("local_aug", "cutpaste", "smoothb")],
)
def test_another_configuration_is_refused(data, uninterrupted, name, value, before):
    with pytest.raises(InputError, match=f"last.pt .*{name} '?{before}.*now '?{value}"):
        pretrain(config(data, uninterrupted, **{"resume": True, name: value}))
    assert len(trace(uninterrupted)) == 9


def test_other_data_is_refused(data, uninterrupted, tmp_path):
    for path in sorted(data.iterdir())[:16]:
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(InputError, match="last.pt cannot be resumed: the data .* 16 images"):
        pretrain(config(tmp_path, uninterrupted, resume=True))


def test_a_run_is_not_overwritten(data, uninterrupted):
    with pytest.raises(InputError, match="already holds a run"):
        pretrain(config(data, uninterrupted))


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(InputError, match="last.pt"):
        pretrain(config(data, tmp_path, resume=True))


# ---------------------------------------------------------------------------- what is computed


def test_the_trace_equals_a_plain_loop(data, uninterrupted):
    """Three steps with lightly's heads and loss and torch's schedule, on the same batches."""
    # imported here, so that the processes that are killed start faster
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead

    torch.manual_seed(7)
    ours = SimSiam("resnet18", 64, 16)
    encoder = torchvision.models.resnet18()
    encoder.fc = torch.nn.Identity()
    projector = SimSiamProjectionHead(512, 512, 64)
    predictor = SimSiamPredictionHead(64, 16, 64)
    encoder.load_state_dict(ours.backbone.state_dict())
    projector.layers.load_state_dict(ours.projector.state_dict())
    predictor.layers.load_state_dict(ours.predictor.state_dict())
    rate = 0.05 * 8 / 256
    decaying = torch.optim.SGD(
        [*encoder.parameters(), *projector.parameters()], rate, 0.9, weight_decay=1e-4
    )
    fixed = torch.optim.SGD(predictor.parameters(), rate, 0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(decaying, T_max=9)
    criterion = NegativeCosineSimilarity()

    batches = list(ViewLoader(data, recipes.simsiam(), 8, size=32, seed=7))
    for batch, line in zip(batches, trace(uninterrupted)):
        z = [projector(encoder(view)) for view in batch.views]
        p = [predictor(z[0]), predictor(z[1])]
        ssl = (criterion(p[0], z[1].detach()) + criterion(p[1], z[0].detach())) / 2
        spd = (cosine_similarity(z[0], z[3]) - cosine_similarity(z[0], z[2])).mean()
        spread = (z[0] / z[0].norm(dim=1, keepdim=True)).std(0).mean()
        assert line["lr"] == pytest.approx(decaying.param_groups[0]["lr"], rel=1e-9)
        assert line["loss_ssl"] == pytest.approx(ssl.item(), abs=2e-4)
        assert line["loss_spd"] == pytest.approx(spd.item(), abs=2e-4)
        assert line["loss"] == pytest.approx((ssl + 0.1 * spd).item(), abs=2e-4)
        assert line["z_std"] == pytest.approx(spread.item(), rel=1e-3)
        decaying.zero_grad()
        fixed.zero_grad()
        (ssl + 0.1 * spd).backward()
        decaying.step()
        fixed.step()
        schedule.step()
    assert [line["epoch"] for line in trace(uninterrupted)] == [0] * 3 + [1] * 3 + [2] * 3
    groups = read_checkpoint(uninterrupted / "last.pt")["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [scheduled_lr("cosine", rate, 8, 9), rate]


def test_the_backbone_can_be_loaded(uninterrupted):
    checkpoint = read_checkpoint(uninterrupted / "last.pt")
    model = SimSiam("resnet18", 64, 16)
    model.load_state_dict(checkpoint["model"])
    loaded = load_backbone("resnet18", uninterrupted / "last.pt")
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(InputError, match="last.pt holds a resnet18 backbone, but a resnet50"):
        load_backbone("resnet50", uninterrupted / "last.pt")
    # the tensors that "backbone" shares with "model" are stored once
    stored = sum(t.nbytes for t in checkpoint["model"].values())
    momentum = sum(p.numel() * 4 for p in model.parameters())
    assert (uninterrupted / "last.pt").stat().st_size < 1.01 * (stored + momentum)


def test_cross_entropy_spd_equals_a_plain_loop(data, tmp_path):
    """Two steps, with the logits and their cross-entropy written out."""
    assert pretrain(config(data, tmp_path, spd_loss="xent", max_steps=2)) == 0
    torch.manual_seed(7)
    model = SimSiam("resnet18", 64, 16)
    model.add_spd_classifier()
    classifier = torch.nn.Linear(512, 2)
    classifier.load_state_dict(model.spd_classifier.state_dict())
    learning = [*model.backbone.parameters(), *model.projector.parameters()]
    groups = [[*learning, *classifier.parameters()], [*model.predictor.parameters()]]
    rate = 0.05 * 8 / 256
    optimizers = [torch.optim.SGD(group, rate, 0.9, weight_decay=1e-4) for group in groups]
    batches = ViewLoader(data, recipes.simsiam(), 8, size=32, seed=7)
    for batch, line in zip(batches, trace(tmp_path)):
        z, z_hat = (model.projector(model.backbone(v)) for v in batch.views[:2])
        p, p_hat = model.predictor(z), model.predictor(z_hat)
        ssl = -cosine_similarity(p, z_hat.detach()) / 2 - cosine_similarity(p_hat, z.detach()) / 2
        of_pos, of_neg = (classifier(model.backbone(view)).softmax(1) for view in batch.views[2:])
        xent = -(of_pos[:, 0].log().mean() + of_neg[:, 1].log().mean()) / 2
        assert line["loss_spd"] == pytest.approx(xent.item(), rel=1e-3)
        assert line["loss"] == pytest.approx((ssl.mean() + 0.1 * xent).item(), rel=1e-3)
        optimizers[0].param_groups[0]["lr"] = line["lr"]
        for optimizer in optimizers:
            optimizer.zero_grad()
        (ssl.mean() + 0.1 * xent).backward()
        for optimizer in optimizers:
            optimizer.step()
    saved = read_checkpoint(tmp_path / "last.pt")
    moved = saved["model"]["spd_classifier.weight"]
    torch.testing.assert_close(moved, classifier.weight.data, rtol=1e-3, atol=1e-5)
    load_backbone("resnet18", tmp_path / "last.pt")  # the classifier is no part of it


def test_a_run_starts_from_given_weights(data, uninterrupted, tmp_path):
    """At a rate of almost zero the backbone stays where it started."""
    start = uninterrupted / "last.pt"
    quiet = config(data, tmp_path / "run", init=start, lr=1e-30, max_steps=2, weight_decay=0.0)
    assert pretrain(replace(quiet, max_steps=1)) == 0
    before, after = (load_backbone("resnet18", p) for p in (start, tmp_path / "run" / "last.pt"))
    for (name, old), new in zip(before.named_parameters(), after.parameters()):
        if not name.startswith("fc."):
            torch.testing.assert_close(old, new, rtol=1e-6, atol=0, msg=name)
    with pytest.raises(InputError, match="made with init .*last.pt', but init is now 'random'"):
        pretrain(replace(quiet, max_steps=1, init="random", resume=True))
    with pytest.raises(InputError, match="holds a resnet18 backbone, but a resnet34"):
        pretrain(config(data, tmp_path / "other", init=start, backbone="resnet34"))


def test_the_first_weights_are_needed_only_once(data, tmp_path, monkeypatch):
    start = tmp_path / "start.pt"
    torch.save(torchvision.models.resnet18().state_dict(), start)
    started = config(data, tmp_path / "run", init=start)
    signal_at(1, signal.SIGTERM, monkeypatch)
    assert pretrain(started) == SAVED
    start.unlink()
    assert pretrain(replace(started, resume=True)) == 0


def test_the_source_of_the_spd_views(data, tmp_path):
    for source in ("anchor", "image"):
        assert pretrain(config(data, tmp_path / source, spd_source=source, max_steps=1)) == 0
    anchor, image = (trace(tmp_path / source)[0] for source in ("anchor", "image"))
    assert anchor["loss_ssl"] == image["loss_ssl"] and anchor["loss_spd"] != image["loss_spd"]


def test_without_spd_and_with_few_steps(data, tmp_path):
    assert pretrain(config(data, tmp_path, spd=False, max_steps=4)) == 0
    lines = trace(tmp_path)
    assert len(lines) == 4
    for step, line in enumerate(lines):
        assert "loss_spd" not in line and line["loss"] == line["loss_ssl"]
        # the schedule spans the steps of the shortened run
        assert line["lr"] == pytest.approx(0.05 / 32 * (1 + np.cos(np.pi * step / 4)) / 2)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["steps"] == 4 and found["images"] == 24 and found["scaled_lr"] == 0.05 / 32
    assert read_config(tmp_path / "config.yaml")["lr"] == 0.05


def test_tensorboard_has_the_same_numbers(uninterrupted):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(uninterrupted / "tensorboard"))
    accumulator.Reload()
    for name in ("loss", "loss_spd", "lr"):
        values = [(e.step, e.value) for e in accumulator.Scalars(name)]
        assert values == [(d["step"], np.float32(d[name])) for d in trace(uninterrupted)]


def test_tensorboard_is_optional(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert pretrain(config(data, tmp_path, max_steps=1)) == 0
    assert "tensorboard is not installed" in capsys.readouterr().out
    assert not (tmp_path / "tensorboard").exists()


# --------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("step", [5, 6])  # 6 ends an epoch: it would be saved
def test_a_loss_that_is_not_finite_stops_the_run(step, data, tmp_path, monkeypatch):
    forward, calls = SimSiam.forward, []

    def broken(*args):
        losses = forward(*args)
        calls.append(1)
        return losses | {"loss": losses["loss"] * (torch.nan if len(calls) == step else 1)}

    monkeypatch.setattr(SimSiam, "forward", broken)
    with pytest.raises(InputError) as caught:
        pretrain(config(data, tmp_path))
    loader = ViewLoader(data, recipes.simsiam(), 8, size=32, seed=7)
    indices = loader._samples(1)[step - 4].tolist()
    assert f"the loss of step {step} is nan, on the images {indices}" in str(caught.value)
    assert [line["step"] for line in trace(tmp_path)] == list(range(1, step))
    checkpoint = read_checkpoint(tmp_path / "last.pt")
    assert checkpoint["step"] == 3
    assert all(t.isfinite().all() for t in checkpoint["model"].values())


def test_a_full_disk_keeps_the_last_checkpoint(data, tmp_path):
    model = SimSiam("resnet18", 64, 16)
    optimizer = new_optimizer("sgd", model, 0.1, 0.9, 0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loader = ViewLoader(data, recipes.simsiam(), 8)
    path = tmp_path / "last.pt"
    run = Run(
        resolved(config(data, tmp_path)),
        model,
        model,
        optimizer,
        scaler,
        loader,
        None,
        0.1,
        steps=9,
        step=1,
    )
    save_checkpoint(path, run)
    run.step = 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # no file may outgrow 1 MiB
    try:
        with pytest.raises(InputError, match="last.pt cannot be written .*unchanged"):
            save_checkpoint(path, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_bad_images(data, tmp_path, capsys):
    root = tmp_path / "data"
    root.mkdir()
    for path in data.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    bad = root / "11.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(InputError, match=str(bad)):
        pretrain(config(root, tmp_path / "run", max_steps=3))
    assert not (tmp_path / "run").exists()
    skipping = config(root, tmp_path / "run", max_steps=3, skip_bad_images=True)
    assert pretrain(skipping) == 0
    out = capsys.readouterr().out
    assert "1 unreadable images were replaced" in out and str(bad) in out


def test_wrong_configurations_leave_nothing_behind(data, tmp_path):
    good = config(data, tmp_path / "run")
    for wrong, message in (
        ({"recipe": "byol"}, "recipe 'byol' is not there; available: simsiam, moco"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"optimizer": "adam"}, "optimizer is one of .*'adam'"),
        ({"schedule": "flat"}, "schedule is one of .*'flat'"),
        ({"warmup_epochs": -1}, "warmup_epochs must be 0..2, less than epochs, got -1"),
        ({"warmup_epochs": 3}, "warmup_epochs must be 0..2, less than epochs, got 3"),
        ({"temperature": 0.1}, "the recipe simsiam has no temperature"),
        ({"lr": -1.0}, "lr must be a positive number, got -1.0"),
        ({"eta": float("nan")}, "eta must be a number, and not negative, got nan"),
        ({"batch_size": 32}, "a batch needs 32 images, but the data has only 24"),
        ({"local_aug": "cutout"}, "cutout"),
        ({"backbone": "vgg16"}, "vgg16"),
        ({"data": [str(tmp_path / "nothing")]}, "nothing"),
        ({"spd_loss": "hinge"}, "spd_loss is one of .*'hinge'"),
        ({"spd_source": "crop"}, "spd_source is one of .*'crop'"),
        ({"init": str(tmp_path / "weights.pt")}, "there is no file .*weights.pt"),
        ({"init": str(data / "00.jpg")}, "00.jpg .*not"),
    ):
        with pytest.raises(InputError, match=message):
            pretrain(replace(good, **wrong))
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="cannot write to the output directory .*00.jpg"):
        pretrain(replace(good, out=data / "00.jpg"))
