"""What a pre-training run is told: a recipe's file, and what is given in its place."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import yaml

from spd_fast.errors import InputError
from spd_fast.files import write_text
from spd_fast.optim import OPTIMIZERS, SCHEDULES

RECIPE_FILES = Path(__file__).parent / "recipes"
RECIPES = ("simsiam", "moco", "simclr", "supervised")
SPD_LOSSES = ("cosine", "xent")


@dataclass(frozen=True)
class PretrainConfig:
    """What `spd-fast pretrain` takes. What is None is as the recipe's file has it."""

    data: Sequence[str | Path]  # directories of images
    out: str | Path
    recipe: str = "simsiam"
    spd: bool = True
    spd_loss: str | None = None  # "cosine", formula 2; "xent": a classifier tells x_neg from x_pos
    spd_source: str = "anchor"  # the SPD views come from x, or from the decoded "image"
    local_aug: str = "smoothblend"  # or "cutpaste"
    eta: float = 0.1  # weight of the SPD loss
    backbone: str = "resnet50"
    init: str | Path = "random"  # weights to start from, as `load_backbone` takes them
    size: int = 224  # of the views, pixels
    batch_size: int | None = None
    epochs: int | None = None
    max_steps: int | None = None  # ends the run early; the schedule then spans these steps
    optimizer: str | None = None  # "sgd" or "lars"
    lr: float | None = None  # for a batch of 256; scaled with the batch
    momentum: float | None = None
    weight_decay: float | None = None
    schedule: str | None = None  # "cosine" or "steps", see `optim.scheduled_lr`
    warmup_epochs: int | None = None
    dim: int | None = None  # of the projections
    predictor_dim: int | None = None  # SimSiam
    temperature: float | None = None  # MoCo, SimCLR
    queue_size: int | None = None  # MoCo
    key_momentum: float | None = None  # MoCo
    bn_group: int | None = None  # MoCo: images that batch norm sees together
    workers: int = 2
    seed: int = 0
    device: str = "auto"
    skip_bad_images: bool = False
    resume: bool | str | Path | None = False  # True or "auto": from out/last.pt if there; or a file


# What does not decide the losses: a run goes on whatever these are. (Of `data`, the files' names
# decide; of `epochs` and `max_steps`, the number of steps.)
FREE = ("data", "out", "epochs", "max_steps", "workers", "device", "skip_bad_images", "resume")
HEADS = ("dim", "predictor_dim", "temperature", "queue_size", "key_momentum", "bn_group")


def read_recipe(name: str) -> dict:
    """The settings of a recipe of the package.

    Raises:
        InputError: there is none of that name.
    """
    if name not in RECIPES:
        raise InputError(f"recipe {name!r} is not there; available: {', '.join(RECIPES)}")
    return yaml.safe_load((RECIPE_FILES / f"{name}.yaml").read_text(encoding="utf-8"))


def resolved(config: PretrainConfig) -> PretrainConfig:
    """With the recipe's own values in place of None.

    Raises:
        InputError: an unknown recipe, a value out of range, or one that this recipe has no use for.
    """
    recipe = read_recipe(config.recipe)
    for name in HEADS:
        if name not in recipe and getattr(config, name) is not None:
            raise InputError(f"the recipe {config.recipe} has no {name}")
    missing = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    config = replace(config, **missing)
    _check(config)
    return config


def settings(config: PretrainConfig) -> dict:
    """The configuration as plain values; whether it was resumed is no part of a run."""
    data = [config.data] if isinstance(config.data, str | Path) else config.data
    values = asdict(config) | {"data": [str(path) for path in data]}
    values |= {"out": str(config.out), "init": str(config.init)}
    del values["resume"]
    return {name: value for name, value in values.items() if value is not None}


def write_config(path: Path, config: PretrainConfig) -> None:
    """What `read_config` reads: all that a run was told."""
    write_text(path, yaml.safe_dump(settings(config), sort_keys=False))


def read_config(path: str | Path) -> dict:
    """Arguments of `PretrainConfig` from a file.

    Raises:
        InputError: it is not there, not YAML, or holds what is no setting.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    known = {field.name for field in fields(PretrainConfig)}
    if not isinstance(values, dict) or not values.keys() <= known:
        unknown = sorted(map(str, values.keys() - known)) if isinstance(values, dict) else [values]
        raise InputError(f"{path} is no configuration of pretrain: {unknown[0]!r} is no setting")
    return values


def _check(config: PretrainConfig) -> None:
    for name, allowed in (
        ("spd_loss", SPD_LOSSES),
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
    ):
        if getattr(config, name) not in allowed:
            raise InputError(f"{name} is one of {allowed}, got {getattr(config, name)!r}")
    for name in ("lr", "eta", "momentum", "weight_decay", "temperature", "key_momentum"):
        value = getattr(config, name)
        positive = name in ("lr", "temperature")
        if value is not None and (not math.isfinite(value) or value < 0 or positive and value == 0):
            raise InputError(f"{name} must be a finite positive number, got {value}")
    if config.key_momentum is not None and config.key_momentum > 1:
        raise InputError(f"key_momentum must be at most 1, got {config.key_momentum}")
    smallest = 4 if config.recipe == "moco" else 2
    if config.batch_size < smallest:
        raise InputError(
            f"batch_size must be at least {smallest} for batch norm, got {config.batch_size}"
        )
    for name in ("epochs", "max_steps", "dim", "predictor_dim", "bn_group"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if config.warmup_epochs < 0:
        raise InputError(f"warmup_epochs must not be negative, got {config.warmup_epochs}")
    if config.queue_size is not None and config.queue_size < config.batch_size:
        raise InputError(
            f"queue_size must be at least one batch, {config.batch_size}, got {config.queue_size}"
        )
