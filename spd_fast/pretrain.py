"""Pre-training with the SPot-the-Difference regulariser (paper section 3.3)."""

import hashlib
import math
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from spd_fast import recipes
from spd_fast.errors import InputError
from spd_fast.files import make_output_dir, save_state, write_json
from spd_fast.info import versions
from spd_fast.loader import Batch, ViewLoader
from spd_fast.losses import spd_cross_entropy, spd_loss
from spd_fast.methods import Method, MoCo, SimCLR, SimSiam, Supervised
from spd_fast.models import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_VERSION,
    load_backbone,
    pick_device,
    read_checkpoint,
)
from spd_fast.optim import new_optimizer, scheduled_lr
from spd_fast.pretrain_config import (
    MAY_DIFFER,
    METHOD_SETTINGS,
    PretrainConfig,
    resolved,
    settings,
    write_config,
)
from spd_fast.steplog import StepLog

METHODS = {"simsiam": SimSiam, "moco": MoCo, "simclr": SimCLR, "supervised": Supervised}


def pretrain(config: PretrainConfig) -> int:
    """Pre-train a backbone; what `spd_fast.models.load_backbone` reads is `out/last.pt`.

    Writes into `config.out`: last.pt after every epoch, at the end, and on SIGINT or SIGTERM;
    metrics.jsonl, one line per step; tensorboard/, if that is installed; config.yaml, from which
    `spd-fast pretrain --config` repeats the run, and run.json: device, steps, versions. A run that
    goes on from a checkpoint ends on a CPU with the same bits as one that was never interrupted,
    given the same number of torch threads.

    Returns:
        0, or 130 or 143 if SIGINT or SIGTERM ended the run early (the step is finished and saved).

    Raises:
        InputError: bad configuration or data; a checkpoint of another run; a loss that is not
            finite (the last checkpoint stays); `out` cannot be written.
    """
    config = resolved(config)
    checkpoint = _find_checkpoint(config)
    run = _new_run(config, load_init=checkpoint is None)
    with _run_directory(config.out) as out:
        if checkpoint:
            _restore(run, checkpoint)
            if not (out / "last.pt").exists():  # it came from another run's directory
                save_checkpoint(out / "last.pt", run)
        found = {
            "device": str(run.loader.device),
            "steps": run.steps,
            "scaled_lr": run.lr,
            "images": len(run.loader.data),
            "classes": len(run.loader.data.classes),
            "versions": versions(),
        }
        write_config(out / "config.yaml", config)
        write_json(out / "run.json", found)
        caught = _train(run, out)
    _say_how_it_ended(run, out)
    return 128 + caught[0] if run.step < run.steps else 0


@dataclass
class Run:
    """All that changes while a run goes on, and how far it goes."""

    config: PretrainConfig
    model: Method
    optimizer: torch.optim.Optimizer
    loader: ViewLoader
    lr: float  # before the schedule
    steps: int  # of the whole run
    step: int = 0  # done

    def rate(self) -> float:
        """Of the next step. Warm-up is the same share of a run that `max_steps` shortens."""
        warmup = self.steps * self.config.warmup_epochs // self.config.epochs
        return scheduled_lr(self.config.schedule, self.lr, self.step, self.steps, warmup)


def _train(run: Run, out: Path) -> list[int]:
    """To the last step, or until a signal comes; returns the signals that came."""
    model, optimizer = run.model, run.optimizer
    with (
        _signals() as caught,
        StepLog(out, run.step, run.steps, run.loader) as log,
        _endless(run.loader) as batches,
    ):
        while run.step < run.steps:
            batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = run.lr if group["fixed_lr"] else run.rate()
            losses = compute_losses(model, batch.views, batch.labels, run.config.eta)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            run.step += 1
            log.add(run.step, batch, losses, optimizer.param_groups[0]["lr"])
            stop = bool(caught)  # read once: a signal after this line is seen at the next step
            if stop or run.step == run.steps or run.step % len(run.loader) == 0:
                log.flush()  # refuses a loss that is not finite before it gets into a checkpoint
                save_checkpoint(out / "last.pt", run)
            if stop:
                break
    return caught


def _new_run(config: PretrainConfig, load_init: bool) -> Run:
    device = pick_device(config.device)
    loader = ViewLoader(
        config.data,
        getattr(recipes, config.recipe)(config.spd, config.local_aug, config.spd_source),
        config.batch_size,
        size=config.size,
        device=device,
        seed=config.seed,
        workers=config.workers,
        skip_bad_images=config.skip_bad_images,
    )
    torch.manual_seed(config.seed)
    model = _new_method(config, len(loader.data.classes))
    if load_init and str(config.init) != "random":
        model.start_from(load_backbone(config.backbone, config.init))
    model.to(device, memory_format=torch.channels_last)
    lr = config.lr * config.batch_size / 256
    optimizer = new_optimizer(config.optimizer, model, lr, config.momentum, config.weight_decay)
    steps = min(config.epochs * len(loader), config.max_steps or math.inf)
    return Run(config, model, optimizer, loader, lr, steps)


def _new_method(config: PretrainConfig, classes: int) -> Method:
    given = {name: getattr(config, name) for name in METHOD_SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    if config.recipe == "supervised":
        if classes < 2:
            raise InputError(
                "supervised needs images of at least two classes, a folder each, got one"
            )
        given["classes"] = classes
    method = METHODS[config.recipe](config.backbone, **given)
    if config.spd and config.spd_loss == "xent":
        method.add_spd_classifier()
    return method


def compute_losses(model: Method, views: Tensor, labels: Tensor, eta: float) -> dict[str, Tensor]:
    """Formula 3 and its parts.

    Args:
        model: backbone and heads.
        views: (V, N, 3, S, S): the method's own and, with SPD, x_pos, x_neg.
        labels: (N,) int64, classes; only `Supervised` reads them.
        eta: weight of the SPD loss.

    Returns:
        Scalars: "loss" (formula 3), "loss_ssl", with SPD "loss_spd"; and "z_std", the standard
        deviation of the normalised projections of x: of SimSiam, MoCo and SimCLR about 1 / sqrt(D)
        if they spread over the sphere, 0 if they have collapsed to one point.
    """
    ssl, z = model.loss(views, labels)
    losses = {"loss": ssl, "loss_ssl": ssl}
    if len(views) == model.strong_views + 2:
        losses["loss_spd"] = _spd_loss(model, z, x_pos=views[-2], x_neg=views[-1])
        losses["loss"] = ssl + eta * losses["loss_spd"]
    losses["z_std"] = F.normalize(z.detach(), dim=1).std(dim=0).mean()
    return losses


def _spd_loss(model: Method, z: Tensor, x_pos: Tensor, x_neg: Tensor) -> Tensor:
    if model.spd_classifier is None:
        return spd_loss(z, z_pos=model.project(x_pos), z_neg=model.project(x_neg))
    return spd_cross_entropy(logits_pos=model.tell_apart(x_pos), logits_neg=model.tell_apart(x_neg))


# ------------------------------------------------------------------------------------ checkpoints


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
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "loader": run.loader.state_dict(),
        "labels": _hash_of_labels(run.loader),
        "rng": torch.get_rng_state(),
    }
    save_state(path, state)


def _hash_of_labels(loader: ViewLoader) -> str:
    return hashlib.sha256(loader.labels.tobytes()).hexdigest()


def _find_checkpoint(config: PretrainConfig) -> dict | None:
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
    # A setting that only one of them has is newer than the checkpoint, or another recipe's.
    for name in ("recipe", *sorted((own.keys() & others.keys()).difference(MAY_DIFFER))):
        if own.get(name) != others.get(name):
            raise InputError(
                f"{path} cannot be resumed: it was made with {name} {others.get(name)!r}, but "
                f"{name} is now {own.get(name)!r}"
            )
    return state | {"path": path}


def _restore(run: Run, state: dict) -> None:
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
    torch.set_rng_state(state["rng"])
    run.step = state["step"]


# -------------------------------------------------------------------------- around the loop


@contextmanager
def _run_directory(path: str | Path) -> Iterator[Path]:
    """The directory of a run; if the block fails before the first step, no trace is left there."""
    existed = Path(path).exists()
    out = make_output_dir(path)
    before = set(out.iterdir())
    for leftover in out.glob(".last.pt.*"):  # of a process that was killed while it saved
        leftover.unlink()
    try:
        yield out
    except BaseException:
        log = out / "metrics.jsonl"
        if not log.exists() or log.stat().st_size == 0:
            for name in ("config.yaml", "run.json", "metrics.jsonl"):
                if out / name not in before:
                    (out / name).unlink(missing_ok=True)
            if out / "tensorboard" not in before:
                shutil.rmtree(out / "tensorboard", ignore_errors=True)
            if not existed and not any(out.iterdir()):
                out.rmdir()
        raise


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list; a second one acts as it did before."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame) -> None:
        caught.append(int(number))
        restore()

    try:
        for number in numbers:
            signal.signal(number, note)
        yield caught
    finally:
        restore()


@contextmanager
def _endless(loader: ViewLoader) -> Iterator[Iterator[Batch]]:
    """Batches of one epoch after the other; the loader's threads end with the block."""

    def epochs():
        while True:
            yield from loader

    with closing(epochs()) as batches:
        yield batches


def _say_how_it_ended(run: Run, out: Path) -> None:
    bad = run.loader.bad_images
    if bad:
        tqdm.write(f"{len(bad)} unreadable images were replaced by others:")
    for reason in bad.values():
        tqdm.write(f"  {reason}")
    if run.step < run.steps:
        tqdm.write(f"stopped after step {run.step} of {run.steps}: resume from {out / 'last.pt'}")
    else:
        tqdm.write(f"checkpoint: {out / 'last.pt'} (step {run.step})")
