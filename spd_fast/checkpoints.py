"""Checkpoints of pre-training: writing them, which ones stay, and going on from one."""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn

from spd_fast.errors import InputError
from spd_fast.files import atomic_path, link_or_copy, save_state
from spd_fast.knn import KnnMonitor
from spd_fast.loader import ViewLoader
from spd_fast.methods import Method
from spd_fast.models import CHECKPOINT_FORMAT, CHECKPOINT_VERSION, read_checkpoint
from spd_fast.optim import scheduled_lr
from spd_fast.pretrain_config import MAY_DIFFER, PretrainConfig, settings


@dataclass
class Run:
    """All that changes while a run goes on, and how far it goes."""

    config: PretrainConfig
    model: Method
    trained: nn.Module  # the model, its gradients averaged over all processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss, for float16
    loader: ViewLoader
    knn: KnnMonitor | None  # of the process that writes
    lr: float  # before the schedule
    steps: int  # of the whole run
    step: int = 0  # done
    best: float = float("-inf")  # of the scores of the epochs

    def rate(self) -> float:
        """Of the next step. Warm-up is the same share of a run that `max_steps` shortens."""
        warmup = self.steps * self.config.warmup_epochs // self.config.epochs
        return scheduled_lr(self.config.schedule, self.lr, self.step, self.steps, warmup)


def save_checkpoint(path: Path, run: Run) -> None:
    """Write everything a run needs to go on, and the backbone's weights for `load_backbone`.

    Raises:
        InputError: the disk refuses, or a weight is not finite; what was at `path` is unchanged.
    """
    for name, tensor in run.model.state_dict().items():
        if not bool(tensor.isfinite().all()):  # the loss was still finite before the last update
            raise InputError(
                f"after step {run.step} the weights {name} are not finite: a lower learning rate "
                f"may help; the last checkpoint is kept"
            )
    state = {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "backbone": run.model.backbone.state_dict(),  # its tensors are in the file only once
        "config": settings(run.config),
        "step": run.step,
        "steps": run.steps,
        "best": run.best,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "loader": run.loader.state_dict(),
        "labels": _hash_of_labels(run.loader),
        "classes": run.loader.data.classes,  # in the order of a classifier's outputs
        "rng": torch.get_rng_state(),
    }
    save_state(path, state)


def keep_checkpoint(last: Path, epoch: int, count: int, best: bool) -> None:
    """Let last.pt stay as epoch_EPOCH.pt, beside at most `count` - 1 earlier ones, and best.pt."""
    if best:
        _second_name(last, last.with_name("best.pt"))
    if count:
        _second_name(last, last.with_name(f"epoch_{epoch:04d}.pt"))
        kept = sorted(last.parent.glob("epoch_*.pt"), key=lambda path: (len(path.name), path.name))
        for old in kept[:-count]:
            old.unlink()


def _second_name(path: Path, other: Path) -> None:
    """last.pt is replaced, never written to: a hard link to it costs no space of its own."""
    with atomic_path(other) as temporary:
        temporary.unlink()
        link_or_copy(path, temporary)


def find_checkpoint(config: PretrainConfig) -> dict | None:
    """The checkpoint that the run goes on from, checked against the configuration."""
    path = last = Path(config.out) / "last.pt"
    if config.resume is True or config.resume == "auto":
        if not last.exists():
            return None
    elif config.resume:
        path = Path(config.resume)
    if last.exists() and (not config.resume or path.resolve() != last.resolve()):
        raise InputError(f"{config.out} already holds a run: resume it, or give another `out`")
    if not config.resume:
        return None
    state = read_checkpoint(path)
    own, others = settings(config), state["config"]
    # What the checkpoint lacks is newer than it, and was then as it is by default.
    defaults = {field.name: field.default for field in fields(PretrainConfig)}
    for name in ("recipe", *sorted(own.keys() - set(MAY_DIFFER))):
        before = others.get(name, defaults[name])
        if before not in (None, own[name]):
            raise InputError(
                f"{path} cannot be resumed: it was made with {name} {before!r}, but {name} is now "
                f"{own[name]!r}"
            )
    return state | {"path": path}


def restore(run: Run, state: dict) -> None:
    """Put everything back to where the checkpoint was."""
    path = state["path"]
    try:
        run.loader.load_state_dict(state["loader"])
    except InputError as error:
        raise InputError(f"{path} cannot be resumed: {error}") from error
    if state["steps"] != run.steps:
        raise InputError(
            f"{path} cannot be resumed: its schedule spans {state['steps']} steps, but epochs and "
            f"max_steps now give {run.steps}"
        )
    if run.config.recipe == "supervised" and state["labels"] != _hash_of_labels(run.loader):
        raise InputError(f"{path} cannot be resumed: its images had other classes")
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state.get("scaler", {}))
    torch.set_rng_state(state["rng"])
    run.step = state["step"]
    if path.parent.resolve() == Path(run.config.out).resolve():  # else best.pt is not here
        run.best = state.get("best", run.best)
    state.clear()  # whoever still holds it holds a copy of the model


def _hash_of_labels(loader: ViewLoader) -> str:
    return hashlib.sha256(loader.labels.tobytes()).hexdigest()
