"""The command line: `spd-fast`. Each command imports what it needs when it runs."""

import argparse
import os
import sys

from spd_fast import __version__
from spd_fast.choices import FACTOR_DTYPES, METHODS, ONE_CLASS, TWO_CLASS
from spd_fast.cli_arguments import command, given_by, positive, seed
from spd_fast.cli_training import add_training_commands
from spd_fast.datasets import PROTOCOLS
from spd_fast.errors import InputError

INTERRUPTED = 130  # what a shell reports after Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for wrong input, 130 if interrupted, 75 if
    pre-training saved and ended early, 1 if a category failed or a data set is not as it should."""
    options = _parser().parse_args(arguments)
    if not sys.stderr.isatty():  # a log file wants few progress lines
        os.environ.setdefault("TQDM_MININTERVAL", "5")
    # Idle OpenMP threads spin by default and take the cores from the threads that read images.
    # Read once when torch is loaded, which is why it is set here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return options.run(options) or 0
    except InputError as error:
        return _complain(str(error))
    except OSError as error:  # a full disk, a directory that vanished
        where = f" ({error.filename})" if error.filename else ""
        return _complain(f"{error.strerror or error}{where}")
    except KeyboardInterrupt:
        print("spd-fast: interrupted", file=sys.stderr)
        return INTERRUPTED


def _complain(message: str) -> int:
    print(f"spd-fast: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spd-fast",
        description="SPot-the-Difference pre-training and fast PaDiM for anomaly detection.",
    )
    parser.add_argument("--version", action="version", version=f"spd-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_info(commands)
    _add_demo(commands)
    _add_data(commands)
    add_training_commands(commands)
    _add_evaluate(commands)
    _add_reproduce(commands)
    _add_predict(commands)
    _add_export(commands)
    _add_report(commands)
    return parser


# --------------------------------------------------------------------------------- info and demo


def _add_info(commands) -> None:
    command(commands, "info", _info, "show versions, compiled code and available backends")


def _info(options) -> None:
    from spd_fast.info import describe

    print(describe())


def _add_demo(commands) -> None:
    parser = command(
        commands, "demo", _demo, "pre-train with and without SPD on small real data, and compare"
    )
    parser.add_argument("--out", default="demo", help="output directory")


def _demo(options) -> None:
    from spd_fast.demo import demo

    demo(options.out)


# ------------------------------------------------------------------------------------------ data


def _add_data(commands) -> None:
    data = commands.add_parser("data", help="check or make data sets").add_subparsers(
        dest="data_command", required=True, metavar="command"
    )
    check = command(data, "check", _data_check, "compare a VisA tree with the paper's table 1")
    check.add_argument("root", help="directory that holds the objects")
    prepare = command(
        data, "prepare", _data_prepare, "write VisA's reorganised layout, as its own script does"
    )
    prepare.add_argument("data", metavar="VISA", help="directory that holds the objects")
    prepare.add_argument("--out", required=True, help="directory to write in; a later call goes on")
    prepare.add_argument(
        "--protocol", nargs="+", default=PROTOCOLS, choices=PROTOCOLS, help="splits to write"
    )
    prepare.add_argument(
        "--link",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="hard-link images where possible: they take no space, but share their bytes with the "
        "data set, so who changes one changes both; --no-link copies them",
    )
    prepare.add_argument("--workers", type=positive, default=4, help="threads that read and write")
    synth = command(
        data, "synth", _data_synth, "write a small synthetic data set in the official VisA layout"
    )
    synth.add_argument("--out", required=True, help="directory to make")
    synth.add_argument("--seed", type=seed, default=0)
    synth.add_argument("--normal", type=positive, default=60, help="normal images per category")
    synth.add_argument("--anomalous", type=positive, default=20, help="anomalous ones")
    photos = command(
        data, "photos", _data_photos, "write crops of real photographs as an image folder"
    )
    photos.add_argument("--out", required=True, help="directory to make")
    photos.add_argument("--count", type=positive, default=200)
    photos.add_argument("--seed", type=seed, default=0)


def _data_check(options) -> int:
    from spd_fast.datasets.check import check_visa, format_check

    reports = check_visa(options.root)
    print(format_check(reports))
    return 0 if all(report.ok for report in reports) else 1


def _data_prepare(options) -> None:
    from spd_fast.datasets.prepare import prepare_visa

    done = prepare_visa(options.data, options.out, options.protocol, options.link, options.workers)
    if done["drawn"]:
        print(f"{options.data} has no split_csv: the splits were drawn, unlike the published ones")
    print(
        f"written: {options.out}, {done['written']} categories, and {done['kept']} were there "
        f"already; {done['images']} images, {done['masks']} masks"
    )


def _data_synth(options) -> None:
    from spd_fast.datasets.synthetic import write_synthetic_visa

    write_synthetic_visa(
        options.out, options.seed, n_normal=options.normal, n_anomaly=options.anomalous
    )
    print(f"written: {options.out}")


def _data_photos(options) -> None:
    from spd_fast.datasets.photos import write_photographs

    write_photographs(options.out, options.count, options.seed)
    print(f"written: {options.out}")


# ----------------------------------------------------------- evaluate, predict, export and report


def _add_evaluate(commands) -> None:
    parser = command(commands, "evaluate", _evaluate, "fit and score every category of a data set")
    add = parser.add_argument
    add("--data", required=True, help="root of VisA (either layout) or MVTec-AD")
    add(
        "--protocol",
        default="1cls",
        choices=(*ONE_CLASS, *TWO_CLASS),
        help="1cls for padim and patchcore; the others for classifier and unet, the k-shot ones on "
        "several draws of k normal and k anomalous training images",
    )
    add("--method", default="padim", choices=tuple(METHODS))
    add("--backbone", default="resnet18", help="a torchvision ResNet")
    add(
        "--weights",
        default="imagenet",
        help="imagenet, random, or a checkpoint file; {category} in its name stands for each "
        "category's",
    )
    add("--name", help="label of the run in reports")
    _add_evaluation_settings(parser)
    add("--out", required=True, help="output directory")


def _add_evaluation_settings(parser) -> None:
    """What evaluate and reproduce have in common."""
    add = parser.add_argument
    add("--category", nargs="+", default=(), help="only these")
    add("--preset", default="paper", choices=("paper", "anomalib"), help="image preparation")
    add("--n-features", type=positive, help="PaDiM: channels kept; default as in its paper")
    add(
        "--factor-dtype",
        default="float32",
        choices=FACTOR_DTYPES,
        help="PaDiM: fewer bits, less memory; int8 is off by about 1 %%; bfloat16 is for GPUs",
    )
    add("--coreset-ratio", type=float, default=0.1, help="PatchCore: patches that the bank keeps")
    add(
        "--n-neighbors",
        type=positive,
        help="PatchCore: bank items that re-weight the image score; default by preset, 1 or 9",
    )
    add("--bank-dtype", default="float32", choices=("float32", "float16"), help="PatchCore")
    add("--epochs", type=positive, help="2-class models; default 80, or with k shots iterations")
    add(
        "--iterations",
        type=positive,
        help="2-class models; default with k shots 1000 for the classifier, 500 for the U-Net",
    )
    add("--lr", type=float, default=1e-4, help="2-class models: rate of SGD, constant")
    add("--train-batch-size", type=positive, default=16, help="2-class models")
    add(
        "--flips",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="2-class models: flip training images at random",
    )
    add("--draws", type=positive, default=5, help="of the k-shot protocols; means are reported")
    add(
        "--compat",
        choices=("spot-diff",),
        help="pixel AU-ROC and AU-PR as VisA's published script computes them, not exact",
    )
    add("--batch-size", type=positive, help="of scoring; default 4 on a CPU, 32 on a GPU")
    add("--workers", type=positive, default=4, help="threads that read images")
    add("--cache", help="directory that keeps resized images for the next run")
    add("--seed", type=seed, default=0, help="of what is drawn, random weights included")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--skip-bad-images", action="store_true", help="leave unreadable images out, and list them")
    add("--compile", action="store_true", help="torch.compile the network; takes minutes at first")
    add("--save-models", action="store_true", help="write OUT/categories/NAME/METHOD.pt")


def _evaluate(options) -> int:
    from spd_fast.evaluate import EvaluateConfig, evaluate

    run = evaluate(EvaluateConfig(**given_by(options) | {"category": tuple(options.category)}))
    return 1 if run["failed"] else 0


def _add_reproduce(commands) -> None:
    parser = command(
        commands, "reproduce", _reproduce, "the paper's tables and figures beside what is measured"
    )
    add = parser.add_argument
    add(
        "targets",
        nargs="+",
        metavar="TARGET",
        help="table2 to table14, figure7, figure8, figure11, figure12, curves; table2 brings "
        "figures 7, 8 and 12 with it",
    )
    add("--visa", help="root of VisA, in either layout")
    add("--mvtec", help="root of MVTec-AD")
    add(
        "--weights",
        required=True,
        help="NAME=SOURCE,...: a name of the paper's rows, such as simsiam, simsiam+spd "
        "or supervised, and what evaluate takes as --weights",
    )
    add("--backbone", help="a torchvision ResNet in place of the paper's")
    _add_evaluation_settings(parser)
    add("--out", required=True, help="output directory; an interrupted run goes on there")


def _reproduce(options) -> int:
    from spd_fast.evaluate import EvaluateConfig
    from spd_fast.reproduce import ReproduceConfig, reproduce

    given = given_by(options) | {"category": tuple(options.category)}
    own = {name: given.pop(name) for name in ("targets", "out", "backbone")}
    data = {name: given.pop(name) for name in ("visa", "mvtec")}
    weights = _named_weights(given.pop("weights"))
    settings = EvaluateConfig(data="", out=options.out, **given)
    failed = reproduce(
        ReproduceConfig(
            **own | {"targets": tuple(options.targets)},
            weights=weights,
            data={name: root for name, root in data.items() if root},
            settings=settings,
        )
    )
    return 1 if failed else 0


def _named_weights(text: str) -> dict[str, str]:
    weights = {}
    for part in text.split(","):
        name, equals, source = part.partition("=")
        if not (name and equals and source):
            raise InputError(f"--weights takes NAME=SOURCE,..., got {part!r}")
        if name in weights:
            raise InputError(f"--weights names {name} twice")
        weights[name] = source
    return weights


def _add_predict(commands) -> None:
    parser = command(commands, "predict", _predict, "score images with a saved detector")
    parser.add_argument("--model", required=True, help="what evaluate --save-models wrote")
    parser.add_argument("images", nargs="+", help="files or directories")
    parser.add_argument("--out", required=True, help="output directory")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--workers", type=positive, default=4, help="threads that read images")
    parser.add_argument("--skip-bad-images", action="store_true")


def _predict(options) -> None:
    from spd_fast.predict import predict

    scores = predict(
        options.model,
        options.images,
        options.out,
        options.device,
        options.workers,
        options.skip_bad_images,
    )
    print(f"scores: {scores}")


def _add_export(commands) -> None:
    parser = command(commands, "export", _export, "write for others what was fitted or trained")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", help="a PaDiM that evaluate --save-models wrote: as a program of plain torch"
    )
    source.add_argument(
        "--checkpoint", help="of pretrain: its backbone as a state dict for torchvision and timm"
    )
    parser.add_argument("--out", help="file to write; default padim.pt2 or backbone.pth")
    parser.add_argument(
        "--batch", type=positive, help="the only number of images a program takes; default any"
    )


def _export(options) -> None:
    from spd_fast.export import export_backbone, export_padim

    if options.checkpoint:
        out = options.out or "backbone.pth"
        print(f"written: {out}, a {export_backbone(options.checkpoint, out)} of torchvision")
        return
    out = options.out or "padim.pt2"
    print(f"written: {out}, takes {export_padim(options.model, out, options.batch)}")


def _add_report(commands) -> None:
    parser = command(commands, "report", _report, "compare evaluations side by side in one page")
    parser.add_argument("runs", nargs="+", help="output directories of evaluate")
    parser.add_argument("--title", default="Anomaly detection")
    parser.add_argument("--out", default="report.html", help="page to write")


def _report(options) -> None:
    from spd_fast.report import format_table, write_report
    from spd_fast.results import load_run

    runs = [load_run(directory) for directory in options.runs]
    write_report(runs, options.out, options.title)
    print(format_table(runs))
    print(f"report: {options.out}")


if __name__ == "__main__":
    sys.exit(main())
