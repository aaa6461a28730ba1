"""Pre-training: SimSiam with the SPot-the-Difference regulariser (paper section 3.3)."""

import math
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
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
from spd_fast.losses import simsiam_loss, spd_cross_entropy, spd_loss
from spd_fast.models import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_VERSION,
    SimSiam,
    load_backbone,
    pick_device,
    read_checkpoint,
)
from spd_fast.steplog import StepLog

RECIPES = {"simsiam": recipes.simsiam}
SPD_LOSSES = ("cosine", "xent")


@dataclass(frozen=True)
class PretrainConfig:
    """What `spd-fast pretrain` takes. The defaults are SimSiam's own, and SPD's eta."""

    data: Sequence[str | Path]  # directories of images
    out: str | Path
    recipe: str = "simsiam"
    spd: bool = True
    spd_loss: str = "cosine"  # formula 2, or "xent": a classifier tells x_neg from x_pos
    spd_source: str = "anchor"  # the SPD views come from x, or from the decoded "image"
    local_aug: str = "smoothblend"  # or "cutpaste"
    backbone: str = "resnet50"
    init: str | Path = "random"  # weights to start from, as `load_backbone` takes them
    size: int = 224  # of the views, pixels
    batch_size: int = 512
    epochs: int = 100
    max_steps: int | None = None  # ends the run early; the schedule then spans these steps
    eta: float = 0.1  # weight of the SPD loss
    lr: float = 0.05  # for a batch of 256; scaled with the batch
    momentum: float = 0.9
    weight_decay: float = 1e-4
    workers: int = 2
    seed: int = 0
    device: str = "auto"
    skip_bad_images: bool = False
    resume: bool | str | Path | None = False  # True or "auto": from out/last.pt if there; or a file


# What decides the losses: a run goes on only with the same. (Of `data`, the files' names decide.)
FIXED = (
    *("recipe", "spd", "spd_loss", "spd_source", "local_aug", "backbone", "init", "size"),
    *("batch_size", "eta", "lr", "momentum", "weight_decay", "seed"),
)


def pretrain(config: PretrainConfig) -> int:
    """Pre-train a backbone; what `spd_fast.models.load_backbone` reads is `out/last.pt`.

    Writes into `config.out`: last.pt after every epoch, at the end, and on SIGINT or SIGTERM;
    metrics.jsonl, one line per step; tensorboard/, if that is installed; config.json. A run that
    goes on from a checkpoint ends on a CPU with the same bits as one that was never interrupted,
    given the same number of torch threads.

    Returns:
        0, or 130 or 143 if SIGINT or SIGTERM ended the run early (the step is finished and saved).

    Raises:
        InputError: bad configuration or data; a checkpoint of another run; a loss that is not
            finite (the last checkpoint stays); `out` cannot be written.
    """
    _check(config)
    checkpoint = _find_checkpoint(config)
    run = _new_run(config, load_init=checkpoint is None)
    with _run_directory(config.out) as out:
        if checkpoint:
            _restore(run, checkpoint)
            if not (out / "last.pt").exists():  # it came from another run's directory
                save_checkpoint(out / "last.pt", run)
        resolved = {
            "device": str(run.loader.device),
            "steps": run.steps,
            "initial_lr": run.lr,
            "images": len(run.loader.data),
            "versions": versions(),
        }
        write_json(out / "config.json", _settings(config) | resolved)
        caught = _train(run, out)
    _say_how_it_ended(run, out)
    return 128 + caught[0] if run.step < run.steps else 0


@dataclass
class Run:
    """All that changes while a run goes on, and how far it goes."""

    config: PretrainConfig
    model: SimSiam
    optimizer: torch.optim.Optimizer
    loader: ViewLoader
    lr: float  # initial
    steps: int  # of the whole run
    step: int = 0  # done


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
                fixed = group["fixed_lr"]
                group["lr"] = run.lr if fixed else cosine_lr(run.lr, run.step, run.steps)
            losses = compute_losses(model, batch.views, run.config.eta)
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
        RECIPES[config.recipe](config.spd, config.local_aug, config.spd_source),
        config.batch_size,
        size=config.size,
        device=device,
        seed=config.seed,
        workers=config.workers,
        skip_bad_images=config.skip_bad_images,
    )
    torch.manual_seed(config.seed)
    model = SimSiam(config.backbone, spd_classifier=config.spd and config.spd_loss == "xent")
    if load_init and str(config.init) != "random":
        start = load_backbone(config.backbone, config.init)
        start.fc = torch.nn.Identity()
        model.backbone.load_state_dict(start.state_dict())
    model.to(device, memory_format=torch.channels_last)
    lr = config.lr * config.batch_size / 256
    optimizer = torch.optim.SGD(
        model.parameter_groups(), lr, config.momentum, weight_decay=config.weight_decay
    )
    steps = min(config.epochs * len(loader), config.max_steps or math.inf)
    return Run(config, model, optimizer, loader, lr, steps)


def compute_losses(model: SimSiam, views: Tensor, eta: float) -> dict[str, Tensor]:
    """Formula 3 and its parts. Each view is a pass of its own: batch norm sees one kind of view.

    Args:
        model: encoder and heads.
        views: (V, N, 3, S, S): x, x_hat and, with SPD, x_pos, x_neg.
        eta: weight of the SPD loss.

    Returns:
        Scalars: "loss" (formula 3), "loss_ssl", with SPD "loss_spd"; and "z_std", the standard
        deviation of the normalised projections of x: about 1 / sqrt(D) if they spread over the
        sphere, 0 if they have collapsed to one point.
    """
    (p, z), (p_hat, z_hat) = model(views[0]), model(views[1])
    ssl = simsiam_loss(p, p_hat, z, z_hat)
    losses = {"loss": ssl, "loss_ssl": ssl}
    if len(views) == 4:
        losses["loss_spd"] = _spd_loss(model, z, x_pos=views[2], x_neg=views[3])
        losses["loss"] = ssl + eta * losses["loss_spd"]
    losses["z_std"] = F.normalize(z.detach(), dim=1).std(dim=0).mean()
    return losses


def _spd_loss(model: SimSiam, z: Tensor, x_pos: Tensor, x_neg: Tensor) -> Tensor:
    if model.spd_classifier is None:
        return spd_loss(z, z_pos=model.project(x_pos), z_neg=model.project(x_neg))
    return spd_cross_entropy(logits_pos=model.tell_apart(x_pos), logits_neg=model.tell_apart(x_neg))


def cosine_lr(initial: float, step: int, steps: int) -> float:
    """From `initial` at step 0 to 0 at `steps`, along half a cosine."""
    return initial * 0.5 * (1 + math.cos(math.pi * step / steps))


def _check(config: PretrainConfig) -> None:
    if config.recipe not in RECIPES:
        raise InputError(f"recipe {config.recipe!r} is not there; available: {', '.join(RECIPES)}")
    if config.spd_loss not in SPD_LOSSES:
        raise InputError(f"spd_loss is one of {SPD_LOSSES}, got {config.spd_loss!r}")
    for name in ("lr", "eta", "momentum", "weight_decay"):
        value = getattr(config, name)
        if not math.isfinite(value) or value < 0 or (name == "lr" and value == 0):
            raise InputError(f"{name} must be a finite positive number, got {value}")
    if config.batch_size < 2:
        raise InputError(f"batch_size must be at least 2 for batch norm, got {config.batch_size}")
    for name in ("epochs", "max_steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def _settings(config: PretrainConfig) -> dict:
    """The configuration as plain values; whether it was resumed is no part of a run."""
    data = [config.data] if isinstance(config.data, str | Path) else config.data
    settings = asdict(config) | {"data": [str(path) for path in data]}
    settings |= {"out": str(config.out), "init": str(config.init)}
    del settings["resume"]
    return settings


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
        "config": _settings(run.config),
        "step": run.step,
        "steps": run.steps,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "loader": run.loader.state_dict(),
        "rng": torch.get_rng_state(),
    }
    save_state(path, state)


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
    own = _settings(config)
    for name in FIXED:
        if own[name] != state["config"].get(name):
            raise InputError(
                f"{path} cannot be resumed: it was made with {name} {state['config'].get(name)!r}, "
                f"but {name} is now {own[name]!r}"
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
            for name in ("config.json", "metrics.jsonl"):
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
