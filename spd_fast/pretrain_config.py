"""What a pre-training run is told: a recipe's file, and what is given in its place."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import get_args

import yaml

from spd_fast.checks import check_at_least, check_choice, check_number
from spd_fast.choices import LOADERS, OPTIMIZERS, PRECISIONS, RECIPES, SCHEDULES, SPD_LOSSES
from spd_fast.errors import InputError
from spd_fast.files import write_text
from spd_fast.methods import bn_groups

RECIPE_FILES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class PretrainConfig:
    """What `spd-fast pretrain` takes. What is None is as the recipe's file has it."""

    data: Sequence[str | Path]  # directories or archives of images; with `category`, its data set
    out: str | Path
    category: str | None = None  # only its normal training images, as `read_dataset` gives them
    recipe: str = "simsiam"
    spd: bool = True
    spd_loss: str | None = None  # "cosine", formula 2; "xent": a classifier tells x_neg from x_pos
    spd_source: str = "anchor"  # the SPD views come from x, or from the decoded "image"
    local_aug: str = "smoothblend"  # or "cutpaste"
    eta: float = 0.1  # weight of the SPD loss
    backbone: str = "resnet50"
    init: str | Path = "random"  # weights to start from, as `load_backbone` takes them
    size: int = 224  # of the views, pixels
    batch_size: int | None = None  # of all processes together
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
    sync_bn: bool | None = None  # batch norm over all processes
    shared_forward: bool = False  # all views in one pass, see `methods.Method`
    accumulate: int = 1  # parts of a process's batch that pass one after the other
    precision: str = "float32"  # or "bfloat16", "float16": of the passes, by autocast
    compile: bool = False  # the backbone, by torch.compile
    knn: Sequence[str | Path] | None = None  # directories of other images, see `knn.KnnMonitor`
    keep: int = 0  # checkpoints of the last epochs that stay beside last.pt and best.pt
    loader: str = "auto"  # or "torch", "dali": see `ViewLoader`
    workers: int = 2
    seed: int = 0
    device: str = "auto"
    skip_bad_images: bool = False
    resume: bool | str | Path | None = False  # True or "auto": from out/last.pt if there; or a file


# What does not decide the losses: a run goes on whatever these are. (Of `data`, the files' names
# and classes decide; of `epochs` and `max_steps`, the number of steps.)
MAY_DIFFER = (
    "data",
    "out",
    "epochs",
    "max_steps",
    "loader",
    "workers",
    "device",
    "skip_bad_images",
    "compile",
    "keep",
    "knn",
)
DIRECTORIES = ("data", "knn")
METHOD_SETTINGS = ("dim", "predictor_dim", "temperature", "queue_size", "key_momentum", "bn_group")


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
    for name in METHOD_SETTINGS:
        if name not in recipe and getattr(config, name) is not None:
            raise InputError(f"the recipe {config.recipe} has no {name}")
    missing = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    config = replace(config, **missing)
    _check(config)
    return config


def settings(config: PretrainConfig) -> dict:
    """The configuration as plain values; whether it was resumed is no part of a run."""
    values = asdict(config)
    for name in DIRECTORIES:
        given = values[name]
        if given is not None:
            paths = [given] if isinstance(given, str | Path) else given
            values[name] = [str(Path(path).resolve()) for path in paths]
    init = str(config.init)
    values |= {"out": str(config.out)}
    values["init"] = init if init in ("random", "imagenet") else str(Path(init).resolve())
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
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is no configuration of pretrain: it holds {values!r}")
    kinds = {field.name: get_args(field.type) or (field.type,) for field in fields(PretrainConfig)}
    for name, value in values.items():
        if name not in kinds:
            raise InputError(f"{path} is no configuration of pretrain: {name!r} is no setting")
        if not _is_one_of(value, kinds[name] if name not in DIRECTORIES else (list, str)):
            raise InputError(f"{path}: {name} cannot be {value!r}")
        if float in kinds[name] and value is not None:
            values[name] = float(value)
    return values


def _is_one_of(value, kinds: tuple) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if float in kinds and isinstance(value, int):
        return True
    if float in kinds and isinstance(value, str):  # YAML reads 1e-4 as text, and 1.0e-4 as a number
        return _is_number(value)
    return isinstance(value, kinds)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def part_size(config: PretrainConfig, ranks: int) -> int:
    """Images that pass together: a process's share of the batch, cut into `accumulate` parts.

    Raises:
        InputError: the parts are not of one size, or too small for batch norm.
    """
    names = [f"{ranks} processes"] * (ranks > 1) + [f"{config.accumulate} parts"] * (
        config.accumulate > 1
    )
    among = f" among {' of '.join(reversed(names))}" if names else ""
    size, rest = divmod(config.batch_size, ranks * config.accumulate)
    if rest:
        raise InputError(f"batch_size {config.batch_size} cannot be shared{among}")
    groups = bn_groups(size, config.bn_group, ranks) if config.recipe == "moco" else ranks
    if size * ranks < 2 * groups:
        raise InputError(
            f"batch_size must be at least {2 * groups * config.accumulate} for batch norm{among}, "
            f"got {config.batch_size}"
        )
    if ranks > 1 and size * ranks % groups:
        raise InputError(
            f"batch_size / accumulate must be a multiple of {groups}, as many as MoCo's groups, "
            f"got {size * ranks}"
        )
    return size


def _check(config: PretrainConfig) -> None:
    if config.category is not None:
        if not isinstance(config.data, str | Path) and len(config.data) != 1:
            raise InputError(
                f"the category {config.category} is of one data set, got {len(config.data)} of them"
            )
        if config.recipe == "supervised":
            raise InputError(
                f"the category {config.category} has one class of images, the normal ones: nothing "
                "for the recipe supervised to learn"
            )
    check_choice(config, "spd_loss", SPD_LOSSES)
    check_choice(config, "optimizer", OPTIMIZERS)
    check_choice(config, "schedule", SCHEDULES)
    check_choice(config, "precision", PRECISIONS)
    check_choice(config, "loader", LOADERS)
    for name in ("eta", "momentum", "weight_decay", "key_momentum"):
        check_number(config, name)
    for name in ("lr", "temperature"):
        check_number(config, name, positive=True)
    if config.key_momentum is not None and config.key_momentum > 1:
        raise InputError(f"key_momentum must be at most 1, got {config.key_momentum}")
    for name in ("epochs", "max_steps", "dim", "predictor_dim", "accumulate"):
        check_at_least(config, name, 1)
    check_at_least(config, "bn_group", 2)
    check_at_least(config, "keep", 0)
    if config.sync_bn and config.recipe == "moco":
        raise InputError("sync_bn would undo what MoCo's groups are for: leave it off")
    if not 0 <= config.warmup_epochs < config.epochs:
        raise InputError(
            f"warmup_epochs must be 0..{config.epochs - 1}, less than epochs, got "
            f"{config.warmup_epochs}"
        )
    if config.queue_size is not None and config.queue_size < config.batch_size:
        raise InputError(
            f"queue_size must be at least one batch, {config.batch_size}, got {config.queue_size}"
        )
