"""Linear evaluation: how well a linear classifier tells classes by a frozen backbone's features.

SimSiam, MoCo and SimCLR are compared by it; `docs/method.md` says how it is done here.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from spd_fast import recipes
from spd_fast.checks import check_at_least, check_choice, check_number
from spd_fast.choices import OPTIMIZERS, SCHEDULES
from spd_fast.datasets.shards import Images, open_images
from spd_fast.errors import InputError
from spd_fast.files import (
    make_output_dir,
    read_marked,
    read_state,
    save_state,
    write_json,
    write_text,
)
from spd_fast.held_out import labels_among, top_k
from spd_fast.info import versions
from spd_fast.loader import ViewLoader
from spd_fast.models import CHECKPOINT_FORMAT, WEIGHTS_FILE, load_backbone, pick_device
from spd_fast.optim import optimizer_of, scheduled_lr

PROBE_FORMAT = "spd-fast probe"
PROBE_VERSION = 1
CHECKPOINT = "probe.pt"
PARTS = ("backbone", "head", "optimizer", "loader")  # of a run, whose states a checkpoint holds


@dataclass(frozen=True)
class ProbeConfig:
    """What `spd-fast probe` takes."""

    weights: str | Path  # of the backbone, as `load_backbone` takes them
    train: Sequence[str | Path]  # directories of images in folders by class
    val: Sequence[str | Path]  # others, of the same classes
    out: str | Path
    backbone: str | None = None  # None: as a checkpoint of ours says
    size: int | None = None  # of the images, pixels; None: as the checkpoint says, else 224
    batch_size: int = 256
    epochs: int = 90
    optimizer: str = "sgd"  # or "lars"
    lr: float = 0.1  # for a batch of 256; scaled with the batch
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "cosine"  # or "steps", see `optim.scheduled_lr`
    feature_norm: bool = True  # see `new_head`
    workers: int = 2
    seed: int = 0  # of order, crops and first weights
    device: str = "auto"
    skip_bad_images: bool = False  # of `train`; those of `val` are always needed
    resume: bool = False  # from out/probe.pt if it is there


# What decides the numbers, the files aside: a run goes on only with the same.
DECIDES = (
    "backbone",
    "size",
    "batch_size",
    "epochs",
    "optimizer",
    "lr",
    "momentum",
    "weight_decay",
    "schedule",
    "feature_norm",
    "seed",
)


@dataclass
class _Run:
    """All that changes while a probe trains, and what it is measured on."""

    config: ProbeConfig
    backbone: nn.Module  # (N, 3, S, S) -> (N, width)
    head: nn.Module  # (N, width) -> (N, classes)
    optimizer: torch.optim.Optimizer
    loader: ViewLoader
    lr: float  # before the schedule
    val: Images
    labels: list[int]  # of `val`, as `loader` numbers them
    sha256: str | None  # of the file of weights
    history: list[dict]  # a line of metrics.jsonl for each epoch that is done


def probe(config: ProbeConfig) -> dict:
    """Train a linear classifier on the features of a frozen backbone, and measure it.

    The backbone is in evaluation mode: no weight and no statistic of it changes. Writes into
    `config.out` after every epoch: probe.pt, backbone and classifier, which `spd_fast.classify`
    reads, and metrics.jsonl, a line per epoch; at the end probe.json. A run that goes on after any
    interruption does the epoch that was not finished again, and ends on a CPU with the same bits.

    Returns:
        The contents of probe.json: "top1", "top5" (see `held_out.top_k`) after the last epoch,
        "images", "classes", "data_classes" (of `val`), "weights_sha256", the settings, versions.

    Raises:
        InputError: bad settings, weights or data; a class of `val` that is none of `train`; an
            image that cannot be read; a loss that is not finite; `out` cannot be written, or holds
            a run and it is not `resume`, or one with other settings, weights or images.
    """
    run = _new_run(_completed(config))
    config, loader = run.config, run.loader
    _restore(run)
    make_output_dir(config.out)
    if not run.history:
        _measure(run)  # an image that cannot be read shows now, and not after an epoch
    with tqdm(
        total=config.epochs * len(loader) * config.batch_size,
        initial=len(run.history) * len(loader) * config.batch_size,
        desc="probe",
        unit="image",
        mininterval=0.5,
    ) as progress:
        while len(run.history) < config.epochs:
            line = {"epoch": len(run.history) + 1} | _train_epoch(run, progress) | _measure(run)
            run.history.append(line)
            progress.set_postfix_str(f"loss {line['loss']:.3f}, top-1 {line['top1']:.2%}")
            _save(run)
    result = {name: run.history[-1][name] for name in ("top1", "top5") if name in run.history[-1]}
    result |= {
        "images": len(run.val),
        "classes": len(loader.data.classes),
        "data_classes": len(run.val.classes),
        "train_images": len(loader.data),
        "skipped": list(loader.bad_images.values()),
        "weights_sha256": run.sha256,
        "config": _plain(config),
        "versions": versions(),
    }
    write_json(Path(config.out) / "probe.json", result)
    return result


def new_head(width: int, classes: int, feature_norm: bool, seed: int = 0) -> nn.Sequential:
    """A linear classifier (N, width) -> (N, classes), its first weights drawn as MoCo's code does.

    With `feature_norm` features are standardised first, by a batch norm without parameters, so that
    one learning rate fits every backbone. Its running statistics are the mean over all batches so
    far: the features of a frozen backbone do not drift. What it computes in evaluation is linear.
    """
    linear = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    norm = (
        nn.BatchNorm1d(width, 1e-6, momentum=None, affine=False) if feature_norm else nn.Identity()
    )
    return nn.Sequential(norm, linear)


def _train_epoch(run: _Run, progress: tqdm) -> dict[str, float]:
    """The rate of the last step; the means of the loss and of how often the class was right."""
    run.head.train()
    sums = torch.zeros(2, device=run.loader.device)  # read once: a GPU would have to wait
    step, steps = run.loader.epoch * len(run.loader), run.config.epochs * len(run.loader)
    for batch in run.loader:
        for group in run.optimizer.param_groups:
            group["lr"] = scheduled_lr(run.config.schedule, run.lr, step, steps)
        with torch.no_grad():
            features = run.backbone(batch.views[0])
        logits = run.head(features)
        loss = F.cross_entropy(logits, batch.labels)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        right = (logits.detach().argmax(1) == batch.labels).float().mean()
        sums += torch.stack([loss.detach(), right])
        step += 1
        progress.update(len(batch.labels))
    loss, right = (sums / len(run.loader)).tolist()
    if not math.isfinite(loss):
        raise InputError(
            f"the loss of epoch {run.loader.epoch} is {loss}: a lower learning rate may help; the "
            "last checkpoint is kept"
        )
    return {"lr": run.optimizer.param_groups[0]["lr"], "loss": loss, "train_top1": right}


def _measure(run: _Run) -> dict[str, float]:
    network = nn.Sequential(run.backbone, run.head).eval()
    config, device = run.config, run.loader.device
    return top_k(network, run.val.paths, run.labels, config.size, device, config.workers)


# ------------------------------------------------------------------------------- before and after


def _completed(config: ProbeConfig) -> ProbeConfig:
    """With what a checkpoint of ours tells of its backbone and size, where that is not given."""
    held = {}
    if str(config.weights) not in ("random", "imagenet"):
        state = read_state(config.weights, WEIGHTS_FILE)
        if isinstance(state, dict) and state.get("format") == CHECKPOINT_FORMAT:
            held = state["config"]
    backbone = config.backbone or held.get("backbone")
    if backbone is None:
        raise InputError(
            f"which backbone? {config.weights} is no checkpoint of spd-fast, which would tell: "
            "give the name of a torchvision ResNet"
        )
    return replace(config, backbone=backbone, size=config.size or held.get("size", 224))


def _new_run(config: ProbeConfig) -> _Run:
    _check(config)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("probe runs in one process: start it without torchrun")
    device = pick_device(config.device)
    loader = ViewLoader(
        config.train,
        recipes.supervised(spd=False),  # random resized crop and flip
        config.batch_size,
        size=config.size,
        device=device,
        seed=config.seed,
        workers=config.workers,
        skip_bad_images=config.skip_bad_images,
    )
    classes = loader.data.classes
    if len(classes) < 2:
        raise InputError("probe needs images of at least two classes, a folder each, got one")
    val = open_images(config.val)
    labels = labels_among(classes, val, "val")
    backbone = load_backbone(config.backbone, config.weights, config.seed)
    head = new_head(backbone.fc.in_features, len(classes), config.feature_norm, config.seed)
    backbone.fc = nn.Identity()
    backbone.eval().to(device, memory_format=torch.channels_last)
    head.to(device)
    lr = config.lr * config.batch_size / 256
    optimizer = optimizer_of(
        config.optimizer, head.parameters(), lr, config.momentum, config.weight_decay
    )
    sha256 = _sha256(config.weights)
    return _Run(config, backbone, head, optimizer, loader, lr, val, labels, sha256, history=[])


def _check(config: ProbeConfig) -> None:
    check_choice(config, "optimizer", OPTIMIZERS)
    check_choice(config, "schedule", SCHEDULES)
    check_number(config, "lr", positive=True)
    check_number(config, "momentum")
    check_number(config, "weight_decay")
    check_at_least(config, "epochs", 1)
    check_at_least(config, "batch_size", 2 if config.feature_norm else 1)


def _plain(config: ProbeConfig) -> dict:
    values = asdict(config)
    for name in ("train", "val"):
        roots = values[name]
        roots = [roots] if isinstance(roots, str | Path) else roots
        values[name] = [str(Path(root).resolve()) for root in roots]
    values |= {"weights": str(config.weights), "out": str(config.out)}
    del values["resume"]
    return values


def _save(run: _Run) -> None:
    out = Path(run.config.out)
    # All lines again, from what the checkpoint holds: none is missing or double after a resume.
    write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in run.history))
    state = {
        "format": PROBE_FORMAT,
        "version": PROBE_VERSION,
        "config": _plain(run.config),
        "classes": run.loader.data.classes,
        "val": run.val.fingerprint,
        "history": run.history,
    }
    parts = {name: getattr(run, name).state_dict() for name in PARTS}
    save_state(out / CHECKPOINT, state | parts)


def _restore(run: _Run) -> None:
    """Put everything back to where the last epoch ended, if there is a checkpoint."""
    path = Path(run.config.out) / CHECKPOINT
    if not path.exists():
        return
    if not run.config.resume:
        raise InputError(f"{path.parent} already holds a probe: resume it, or give another `out`")
    state = read_probe(path)
    for name in DECIDES:
        before, now = state["config"][name], getattr(run.config, name)
        if before != now:
            raise InputError(
                f"{path} cannot be resumed: it was made with {name} {before!r}, but {name} is now "
                f"{now!r}"
            )
    own = run.backbone.state_dict()
    if any(not torch.equal(own[name].cpu(), value) for name, value in state["backbone"].items()):
        raise InputError(f"{path} cannot be resumed: {run.config.weights} are other weights")
    if state["classes"] != run.loader.data.classes:
        raise InputError(f"{path} cannot be resumed: its images had other classes")
    if state["val"] != run.val.fingerprint:
        raise InputError(f"{path} cannot be resumed: it was measured on other images of val")
    try:
        for name in PARTS:
            getattr(run, name).load_state_dict(state[name])
    except InputError as error:
        raise InputError(f"{path} cannot be resumed: {error}") from error
    run.history = state["history"]


def read_probe(path: str | Path) -> dict:
    """What `probe` wrote after an epoch, on the CPU.

    Raises:
        InputError: it is missing, damaged, something else, or of another version.
    """
    return read_marked(path, "a checkpoint of probe", PROBE_FORMAT, PROBE_VERSION)


def _sha256(weights: str | Path) -> str | None:
    """Of the file, if they come from one."""
    if str(weights) in ("random", "imagenet"):
        return None
    return hashlib.sha256(Path(weights).read_bytes()).hexdigest()
