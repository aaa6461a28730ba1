"""The commands of `spd-fast` that make views and train on them."""

import argparse

from spd_fast.choices import (
    ADAPT,
    LOADERS,
    LOCAL_AUGS,
    OPTIMIZERS,
    PRECISIONS,
    RECIPES,
    SCHEDULES,
    SPD_LOSSES,
    SPD_SOURCES,
)
from spd_fast.cli_arguments import command, given_by, positive, seed
from spd_fast.errors import InputError


def add_training_commands(commands) -> None:
    command(commands, "dali-build", _dali_build, "build the operators for the installed DALI ahead")
    _add_views(commands)
    _add_pretrain(commands)
    _add_adapt(commands)
    _add_probe(commands)
    _add_classify(commands)


def _dali_build(options) -> None:
    from spd_fast.dali_build import build

    print(f"the operators for DALI are in {build()}")


# ----------------------------------------------------------------------------------------- views


def _add_views(commands) -> None:
    parser = command(commands, "views", _views, "draw a sheet of the views made of an image")
    parser.add_argument("image")
    parser.add_argument("--recipe", default="simsiam", choices=RECIPES)
    parser.add_argument("--rows", type=positive, default=4, help="epochs to draw, one per row")
    parser.add_argument("--size", type=positive, default=224)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--out", default="views.png", help="picture to write")


def _views(options) -> None:
    from spd_fast.sheet import write_views_sheet

    write_views_sheet(
        options.image, options.out, options.recipe, options.rows, options.size, options.seed
    )
    print(f"written: {options.out}")


# -------------------------------------------------------------------------------------- pretrain


def _add_pretrain(commands) -> None:
    parser = command(commands, "pretrain", _pretrain, "pre-train a backbone")
    add = _optional(parser)
    add("--config", metavar="FILE", help="settings of an earlier run: its config.yaml")
    add(
        "--data",
        nargs="+",
        help="directories of images, or tar shards or TFRecord files, or a directory of these",
    )
    parser.add_argument("--out", required=True, help="directory of the run")
    add(
        "--init",
        help="weights of the backbone to start from: random (default), imagenet, or a file",
    )
    add(
        "--knn",
        nargs="+",
        metavar="DIR",
        help="other images in folders by class: after each epoch, see how well nearest neighbours "
        "in the features tell their classes",
    )
    add(
        "--resume",
        nargs="?",
        const="auto",
        help="go on from OUT/last.pt if it is there, or from the checkpoint given",
    )
    _add_settings(add)


def _optional(parser):
    def add(*names, **kwargs):
        """What is not given is left out: then the function's own defaults stand."""
        parser.add_argument(*names, default=argparse.SUPPRESS, **kwargs)

    return add


def _add_settings(add) -> None:
    """What `pretrain` and `adapt` can both be told of a run."""
    add(
        "--recipe",
        choices=RECIPES,
        help="default simsiam; sets the options below that name no default",
    )
    add(
        "--spd",
        action=argparse.BooleanOptionalAction,
        help="the SPot-the-Difference regulariser; on by default",
    )
    add("--eta", type=float, help="weight of the SPD loss, default 0.1")
    add(
        "--spd-loss",
        choices=SPD_LOSSES,
        help="formula 2, or the cross-entropy of a classifier that tells negatives from positives",
    )
    add(
        "--spd-source",
        choices=SPD_SOURCES,
        help="make the SPD views from the first strong view (default), or from the image",
    )
    add("--local-aug", choices=LOCAL_AUGS, help="default smoothblend")
    add("--backbone", help="a torchvision ResNet, default resnet50")
    add("--size", type=positive, help="side of the views, pixels, default 224")
    add("--batch-size", type=positive, help="of all processes together")
    add("--epochs", type=positive)
    add("--max-steps", type=positive, help="stop after so many steps; the schedule spans them")
    add("--optimizer", choices=OPTIMIZERS)
    add("--lr", type=float, help="for a batch of 256; scaled with the batch")
    add("--momentum", type=float)
    add("--weight-decay", type=float)
    add("--schedule", choices=SCHEDULES)
    add("--warmup-epochs", type=int)
    add("--dim", type=positive, help="of the projections")
    add("--predictor-dim", type=positive, help="SimSiam")
    add("--temperature", type=float, help="MoCo, SimCLR")
    add("--queue-size", type=positive, help="MoCo")
    add("--key-momentum", type=float, help="MoCo")
    add("--bn-group", type=positive, help="MoCo: images that batch norm sees together")
    add(
        "--sync-bn",
        action=argparse.BooleanOptionalAction,
        help="batch norm over all processes of torchrun",
    )
    add(
        "--shared-forward",
        action=argparse.BooleanOptionalAction,
        help="all views in one pass, normalised together; off by default",
    )
    add("--accumulate", type=positive, help="parts in which a batch passes, default 1")
    add("--precision", choices=PRECISIONS, help="default float32")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the backbone")
    add("--keep", type=int, help="checkpoints of the last epochs to keep, default 0")
    add(
        "--loader",
        choices=LOADERS,
        help="who makes the views: threads (torch), or DALI; default DALI on a GPU, if it is there",
    )
    add("--workers", type=positive, help="threads that read and augment, default 2")
    add("--seed", type=seed, help="of order, views and first weights, default 0")
    add("--device", help="auto (default), cpu or cuda")
    add(
        "--skip-bad-images",
        action=argparse.BooleanOptionalAction,
        help="replace unreadable images, and list them; off by default",
    )


def _pretrain(options) -> int:
    from spd_fast.pretrain import pretrain
    from spd_fast.pretrain_config import PretrainConfig, read_config

    given = given_by(options)
    if "config" in given:
        file = read_config(given["config"])
        recipe = file.get("recipe", "simsiam")
        if given.get("recipe", recipe) != recipe:
            raise InputError(
                f"{given['config']} is of the recipe {recipe}: it cannot be run as "
                f"{given['recipe']}"
            )
        del given["config"]
        given = file | given
    if "data" not in given:
        raise InputError("pretrain needs --data, or a --config that names it")
    return pretrain(PretrainConfig(**given))


# ----------------------------------------------------------------------------------------- adapt


def _add_adapt(commands) -> None:
    parser = command(
        commands, "adapt", _adapt, "pre-train further on the normal images of each category"
    )
    parser.epilog = (
        f"Defaults in place of the recipe's: {ADAPT['epochs']} epochs, batches of "
        f"{ADAPT['batch_size']}, a rate scaled with the root of the batch, no warm-up; MoCo: a "
        f"queue of {ADAPT['queue_size']}. supervised has nothing to learn from one class."
    )
    add = _optional(parser)
    parser.add_argument("--data", required=True, help="root of VisA (either layout) or MVTec-AD")
    add("--category", nargs="+", metavar="NAME", help="only these; default all")
    parser.add_argument(
        "--init", required=True, help="weights to start from: imagenet, random, or a file"
    )
    parser.add_argument("--out", required=True, help="makes a run in OUT/CATEGORY for each")
    add(
        "--resume",
        action="store_true",
        help="leave finished categories as they are, and go on with an interrupted one",
    )
    _add_settings(add)


def _adapt(options) -> int:
    from spd_fast.adapt import adapt

    return adapt(**given_by(options))


# ---------------------------------------------------------------------------- probe and classify


def _add_probe(commands) -> None:
    parser = command(
        commands, "probe", _probe, "train a linear classifier on a frozen backbone, and measure it"
    )
    add = parser.add_argument
    add("--weights", required=True, help="of the backbone: imagenet, random, or a checkpoint file")
    add("--train", nargs="+", required=True, metavar="DIR", help="images in folders by class")
    add("--val", nargs="+", required=True, metavar="DIR", help="others, of the same classes")
    add("--out", required=True, help="output directory")
    add = _optional(parser)
    add("--backbone", help="a torchvision ResNet; a checkpoint of spd-fast tells it")
    add(
        "--size",
        type=positive,
        help="side of the images, pixels; default that of the checkpoint, else 224",
    )
    add("--batch-size", type=positive, help="default 256")
    add("--epochs", type=positive, help="default 90")
    add("--optimizer", choices=OPTIMIZERS, help="default sgd")
    add("--lr", type=float, help="for a batch of 256; scaled with the batch; default 0.1")
    add("--momentum", type=float, help="default 0.9")
    add("--weight-decay", type=float, help="default 0")
    add("--schedule", choices=SCHEDULES, help="default cosine")
    add(
        "--feature-norm",
        action=argparse.BooleanOptionalAction,
        help="standardise the features, so that one learning rate fits every backbone; default on",
    )
    add("--workers", type=positive, help="threads that read and augment, default 2")
    add("--seed", type=seed, help="of order, crops and first weights, default 0")
    add("--device", help="auto (default), cpu or cuda")
    add(
        "--skip-bad-images",
        action="store_true",
        help="replace unreadable training images, and list them in probe.json",
    )
    add("--resume", action="store_true", help="go on from OUT/probe.pt if it is there")


def _probe(options) -> None:
    from spd_fast.held_out import format_top_k
    from spd_fast.probe import ProbeConfig, probe

    print(format_top_k(probe(ProbeConfig(**given_by(options)))))
    print(f"written: {options.out}/probe.json, {options.out}/probe.pt")


def _add_classify(commands) -> None:
    parser = command(
        commands, "classify", _classify, "measure the classifier of supervised training or a probe"
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="of pretrain --recipe supervised, or of probe")
    add("--data", nargs="+", required=True, metavar="DIR", help="images in folders by class")
    add(
        "--size",
        type=positive,
        default=argparse.SUPPRESS,
        help="side of the images, pixels; default that of training",
    )
    add("--workers", type=positive, default=2, help="threads that read images")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--out", default=argparse.SUPPRESS, help="JSON file to write; default none")


def _classify(options) -> None:
    from spd_fast.classify import classify
    from spd_fast.files import write_json
    from spd_fast.held_out import format_top_k

    given = given_by(options)
    out = given.pop("out", None)
    result = classify(**given)
    print(format_top_k(result))
    if out:
        write_json(out, result)
