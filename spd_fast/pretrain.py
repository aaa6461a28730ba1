"""Pre-training: SimSiam with the SPot-the-Difference regulariser (paper section 3.3)."""

import json
import math
import signal
import threading
import time
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
from spd_fast.files import make_output_dir, save_state, write_json, write_text
from spd_fast.info import versions
from spd_fast.loader import Batch, ViewLoader
from spd_fast.losses import simsiam_loss, spd_loss
from spd_fast.models import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_VERSION,
    SimSiam,
    pick_device,
    read_checkpoint,
)

RECIPES = {"simsiam": recipes.simsiam}


@dataclass(frozen=True)
class PretrainConfig:
    """What `spd-fast pretrain` takes. The defaults are SimSiam's own, and SPD's eta."""

    data: Sequence[str | Path]  # directories of images
    out: str | Path
    recipe: str = "simsiam"
    spd: bool = True
    local_aug: str = "smoothblend"  # or "cutpaste"
    backbone: str = "resnet50"
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
    *("recipe", "spd", "local_aug", "backbone", "size", "batch_size", "eta", "lr", "momentum"),
    *("weight_decay", "seed"),
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
    device = pick_device(config.device)
    views = RECIPES[config.recipe](config.spd, config.local_aug)
    loader = ViewLoader(
        config.data,
        views,
        config.batch_size,
        size=config.size,
        device=device,
        seed=config.seed,
        workers=config.workers,
        skip_bad_images=config.skip_bad_images,
    )
    steps = min(config.epochs * len(loader), config.max_steps or math.inf)
    torch.manual_seed(config.seed)
    model = SimSiam(config.backbone).to(device, memory_format=torch.channels_last)
    lr = config.lr * config.batch_size / 256
    optimizer = torch.optim.SGD(
        model.parameter_groups(), lr, config.momentum, weight_decay=config.weight_decay
    )
    out = make_output_dir(config.out)
    for leftover in out.glob(".last.pt.*"):  # of a process that was killed while it saved
        leftover.unlink()
    step = 0
    if checkpoint:
        step = _restore(checkpoint, steps, model, optimizer, loader)
        if not (out / "last.pt").exists():  # it came from another run's directory
            save_checkpoint(out / "last.pt", config, model, optimizer, loader, step, steps)
    resolved = {
        "device": str(device),
        "steps": steps,
        "initial_lr": lr,
        "images": len(loader.data),
    }
    write_json(out / "config.json", _settings(config) | resolved | {"versions": versions()})

    with (
        _signals() as caught,
        _StepLog(out, step, steps, loader) as log,
        _endless(loader) as batches,
    ):
        while step < steps:
            batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = lr if group["fixed_lr"] else cosine_lr(lr, step, steps)
            losses = compute_losses(model, batch.views, config.eta)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            step += 1
            log.add(step, batch, losses, optimizer.param_groups[0]["lr"])
            stop = bool(caught)  # read once: a signal after this line is seen at the next step
            if stop or step == steps or step % len(loader) == 0:
                log.flush()  # refuses a loss that is not finite before it gets into a checkpoint
                save_checkpoint(out / "last.pt", config, model, optimizer, loader, step, steps)
            if stop:
                break
    _say_how_it_ended(out, step, steps, loader)
    return 128 + caught[0] if step < steps else 0


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
        losses["loss_spd"] = spd_loss(
            z, z_pos=model.project(views[2]), z_neg=model.project(views[3])
        )
        losses["loss"] = ssl + eta * losses["loss_spd"]
    losses["z_std"] = F.normalize(z.detach(), dim=1).std(dim=0).mean()
    return losses


def cosine_lr(initial: float, step: int, steps: int) -> float:
    """From `initial` at step 0 to 0 at `steps`, along half a cosine."""
    return initial * 0.5 * (1 + math.cos(math.pi * step / steps))


def _check(config: PretrainConfig) -> None:
    if config.recipe not in RECIPES:
        raise InputError(f"recipe {config.recipe!r} is not there; available: {', '.join(RECIPES)}")
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
    settings = asdict(config) | {"data": [str(path) for path in data], "out": str(config.out)}
    del settings["resume"]
    return settings


# ------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(
    path: Path,
    config: PretrainConfig,
    model: SimSiam,
    optimizer: torch.optim.Optimizer,
    loader: ViewLoader,
    step: int,
    steps: int,
) -> None:
    """Write everything a run needs to go on, and the backbone's weights for `load_backbone`.

    Raises:
        InputError: the disk refuses, or a weight is not finite; what was at `path` is unchanged.
    """
    for name, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):  # the loss was still finite before the last update
            raise InputError(
                f"after step {step} the weights {name} are not finite: a lower learning rate may "
                f"help; the last checkpoint is kept"
            )
    state = {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "backbone": model.backbone.state_dict(),  # its tensors are in the file only once
        "config": _settings(config),
        "step": step,
        "steps": steps,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "loader": loader.state_dict(),
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


def _restore(
    state: dict, steps: int, model: SimSiam, optimizer: torch.optim.Optimizer, loader: ViewLoader
) -> int:
    """Put everything back to where the checkpoint was; returns its step."""
    path = state["path"]
    try:
        loader.load_state_dict(state["loader"])
    except InputError as error:
        raise InputError(f"{path} cannot be resumed: {error}") from error
    if state["steps"] != steps:
        raise InputError(
            f"{path} cannot be resumed: its schedule spans {state['steps']} steps, but epochs and "
            f"max_steps now give {steps}"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["step"]


# -------------------------------------------------------------------------- around the loop


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


class _StepLog:
    """The numbers of every step: metrics.jsonl, TensorBoard and the progress line.

    A step is written while the next one is computed: a GPU would have to wait if its loss were read
    at once. On starting from a checkpoint, what was written after that is dropped.
    """

    def __init__(self, out: Path, step: int, steps: int, loader: ViewLoader):
        self.loader, self.pending = loader, None
        self.path = out / "metrics.jsonl"
        self._drop_lines_after(step)
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)
        self.tensorboard = _tensorboard(out / "tensorboard", step)
        self.progress = tqdm(
            total=steps * loader.batch_size,
            initial=step * loader.batch_size,
            desc="pretrain",
            unit="image",
            mininterval=0.5,
        )
        self.started = self.last = time.perf_counter()
        self.last_wait = self.loader.wait_seconds

    def __enter__(self) -> "_StepLog":
        return self

    def __exit__(self, *error) -> None:
        self.progress.close()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()

    def add(self, step: int, batch: Batch, losses: dict[str, Tensor], lr: float) -> None:
        self.flush()
        now, wait = time.perf_counter(), self.loader.wait_seconds
        values = torch.stack([loss.detach() for loss in losses.values()])
        speed = {
            "lr": lr,
            "images_per_s": self.loader.batch_size / (now - self.last),
            "wait_share": (wait - self.last_wait) / (now - self.last),
        }
        self.pending = step, list(losses), values, speed, batch.indices
        self.last, self.last_wait = now, wait

    def flush(self) -> None:
        """Write the step that is waiting.

        Raises:
            InputError: its loss is not finite.
        """
        if self.pending is None:
            return
        step, names, values, speed, indices = self.pending
        self.pending = None
        numbers = dict(zip(names, values.tolist()))
        if not math.isfinite(numbers["loss"]):
            raise InputError(
                f"the loss of step {step} is {numbers['loss']}, on the images {indices.tolist()}: "
                f"a lower learning rate may help; the last checkpoint is kept"
            )
        numbers |= speed
        epoch = (step - 1) // len(self.loader)
        self.file.write(json.dumps({"step": step, "epoch": epoch, **numbers}) + "\n")
        if self.tensorboard:
            for name, number in numbers.items():
                self.tensorboard.add_scalar(name, number, step)
        waiting = self.loader.wait_seconds / (time.perf_counter() - self.started)
        self.progress.set_postfix_str(
            f"loss {numbers['loss']:.4f}, waiting for data {waiting:.0%}", refresh=False
        )
        self.progress.update(self.loader.batch_size)

    def _drop_lines_after(self, step: int) -> None:
        kept = []
        if step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    number = json.loads(line)["step"]
                except ValueError:  # cut off when the machine went down
                    continue
                if number <= step:
                    kept.append(line + "\n")
        write_text(self.path, "".join(kept))


def _tensorboard(path: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tqdm.write("tensorboard is not installed: the curves are in metrics.jsonl only")
        return None
    return SummaryWriter(path, purge_step=step + 1)


def _say_how_it_ended(out: Path, step: int, steps: int, loader: ViewLoader) -> None:
    if loader.bad_images:
        tqdm.write(f"{len(loader.bad_images)} unreadable images were replaced by others:")
    for reason in loader.bad_images.values():
        tqdm.write(f"  {reason}")
    if step < steps:
        tqdm.write(f"stopped after step {step} of {steps}: resume from {out / 'last.pt'}")
    else:
        tqdm.write(f"checkpoint: {out / 'last.pt'} (step {step})")
