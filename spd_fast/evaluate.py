"""From a data set to numbers: fit a detector per category, score its test images, measure."""

import hashlib
import shutil
import time
import traceback
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from spd_fast import __version__, metrics
from spd_fast.choices import METHODS, ONE_CLASS
from spd_fast.datasets import Category, read_dataset
from spd_fast.datasets.leaks import find_leaks
from spd_fast.distributed import (
    agreed,
    barrier,
    of_all_ranks,
    process_group,
    rank,
    world_size,
)
from spd_fast.errors import InputError
from spd_fast.evaluate_category import DRAWS, SHOTS, Detector, Plan, evaluate_category
from spd_fast.files import (
    locked,
    make_output_dir,
    read_json,
    refuse_foreign,
    refuse_inside,
    write_json,
)
from spd_fast.info import versions
from spd_fast.models import pick_device
from spd_fast.padim import PaDiM
from spd_fast.patchcore import PatchCore
from spd_fast.report import format_table, write_report
from spd_fast.results import CATEGORIES, RESULT, STORED, load_run
from spd_fast.twoclass import Classifier, Training, UNet

UNFINISHED = "unfinished"  # in the output directory: what is not yet among the categories
CATEGORY = "{category}"  # in `weights`: the name of each category
FEW_SHOT_POOL = "2cls_fewshot"  # the split that the k-shot protocols draw from
# What iterations a k-shot model learns for (paper appendix C); the high-shot ones: 80 epochs.
ITERATIONS = {"classifier": 1000, "unet": 500}
# Images that are scored together. On a CPU more are not faster, and only need memory.
BATCH = {"cpu": 4, "cuda": 32}
PATIENCE = timedelta(days=30)  # of a process that has done its categories, for the others


@dataclass(frozen=True)
class EvaluateConfig:
    """What `spd-fast evaluate` takes; see its help for the meaning of each."""

    data: str
    out: str
    protocol: str = "1cls"
    method: str = "padim"
    backbone: str = "resnet18"
    weights: str = "imagenet"
    preset: str = "paper"
    n_features: int | None = None
    factor_dtype: str = "float32"
    coreset_ratio: float = 0.1
    n_neighbors: int | None = None
    bank_dtype: str = "float32"
    epochs: int | None = None
    iterations: int | None = None
    lr: float = Training.lr
    train_batch_size: int = Training.batch_size
    flips: bool = True
    draws: int = DRAWS
    compat: str | None = None
    category: tuple[str, ...] = ()
    name: str | None = None
    batch_size: int | None = None
    workers: int = 4
    cache: str | None = None
    seed: int = 0
    device: str = "auto"
    skip_bad_images: bool = False
    compile: bool = False
    save_models: bool = False


def evaluate(config: EvaluateConfig) -> dict:
    """Evaluate a detector on every category of a data set and write the results.

    Writes `results.json` and `report.html` into `config.out`, and below it one directory per
    category. A category that an earlier, interrupted call with the same configuration has finished
    is not done again; one that it was at goes on from its last finished draw or saved training. One
    that was finished with other settings of the same method is replaced. A category that fails is
    reported and does not stop the others.

    Processes that torchrun starts share the categories out among them.

    In `config.weights`, "{category}" stands for the name of each category, which then has weights
    of its own; what is computed for a category is what it would be with that file given.

    Returns:
        The contents of results.json, plus `dir`; see `spd_fast.results`.

    Raises:
        InputError: bad data, weights or configuration (the file of weights of every category is
            looked for before the first is evaluated), `config.out` cannot be written or holds the
            results of another method or protocol, or every category fails.
    """
    check(config)
    with process_group(pick_device(config.device), PATIENCE) as device:
        return _evaluate(config, device)


def _evaluate(config: EvaluateConfig, device: torch.device) -> dict:
    started = time.perf_counter()
    out = make_output_dir(config.out)
    with locked(out) if not rank() else nullcontext():
        # What one process finds wrong ends all: none may wait for one that is gone.
        jobs, failed, models, chosen = agreed(_prepare, config, out, device)
        todo = [job for job in jobs if job.category.name not in failed and not _finished(out, job)]
        barrier()  # nothing is written before all have seen what there is
        for job in todo[rank() :: world_size()]:
            name = job.category.name
            try:
                _evaluate_category(models, job, out)
            except Exception as error:
                failed[name] = _reason(error)
                tqdm.write(f"{name} failed: {failed[name]}")
        failed = of_all_ranks(failed)
        if not rank():
            with suppress(OSError):  # a category that failed has left something in it
                (out / UNFINISHED).rmdir()
        return agreed(_conclude, config, jobs, failed, chosen, started, out)


@dataclass(frozen=True)
class _Job:
    """A category, and the configuration with its own weights."""

    category: Category
    config: EvaluateConfig


def _prepare(
    config: EvaluateConfig, out: Path, device: torch.device
) -> tuple[list[_Job], dict[str, str], "_Models", dict]:
    """The jobs, why some can not be done, and the detector with the settings that it chose; what is
    wrong with the data, the settings or the weights is said now."""
    _refuse_other_results(out, config)
    if config.cache:
        make_output_dir(config.cache)
    dataset = read_dataset(config.data, split_of(config.protocol), list(config.category) or None)
    jobs = [_Job(category, _for_category(config, category)) for category in dataset]
    models = _Models(device)
    chosen = _chosen(models.of(jobs[0].config))
    failed = {}
    for job in jobs:
        name = job.category.name
        refuse_foreign(out / CATEGORIES / name, RESULT)
        if _finished(out, job):
            if not rank():
                tqdm.write(f"{name}: done before with these settings and files, results kept")
            continue
        try:
            told = find_leaks(job.category)
        except InputError as error:
            failed[name] = str(error)
        else:
            for text in told if not rank() else ():
                tqdm.write(f"{name}: {text}")
    if not rank():  # what a killed process has left
        for path in (out / CATEGORIES).glob(".*"):
            shutil.rmtree(path, ignore_errors=True)
    return jobs, failed, models, chosen


def _conclude(
    config: EvaluateConfig, jobs: list[_Job], failed: dict, chosen: dict, started: float, out: Path
) -> dict:
    """Write what all processes found; the run."""
    done = {job.category.name: _finished(out, job) for job in jobs}
    for name, result in done.items():
        if result:
            failed.pop(name, None)
        else:
            failed.setdefault(name, "it was not done, for no reason that is known")
    if not any(done.values()):
        first = jobs[0].category.name
        raise InputError(f"{first}: {failed[first]}" if len(jobs) > 1 else failed[first])
    if not rank():
        run = {
            "name": config.name or f"{config.method}, {config.weights}",
            "config": settings_of(config) | chosen | {"split_drawn": jobs[0].category.drawn},
            "versions": versions(),
            "seconds": time.perf_counter() - started,
            "categories": [result for result in done.values() if result],
            "failed": failed,
        }
        write_json(out / "results.json", run)
        _write_report(config, load_run(out))
    barrier()
    return load_run(out)


def _write_report(config: EvaluateConfig, run: dict) -> None:
    report = run["dir"] / "report.html"
    write_report([run], report, f"Anomaly detection on {Path(config.data).name}")
    print(format_table([run]))
    skipped = [reason for found in run["categories"] for reason in found["skipped"].values()]
    if skipped:
        print(f"skipped images: {len(skipped)}", *skipped, sep="\n  ")
    for name, reason in run["failed"].items():
        print(f"{name} failed: {reason}")
    print(f"report: {report}")


def _reason(error: Exception) -> str:
    if not isinstance(error, (InputError, OSError, MemoryError)):  # a fault of ours, or of torch
        traceback.print_exception(error)
        return f"{type(error).__name__}: {error}"
    return str(error) or type(error).__name__


def check(config: EvaluateConfig) -> None:
    """Refuse wrong settings.

    Raises:
        InputError: the message names the setting, what it is and what was expected.
    """
    if config.method not in METHODS:
        raise InputError(f"method is one of {', '.join(METHODS)}; got {config.method!r}")
    protocols = METHODS[config.method]
    if config.protocol not in protocols:
        learns = "normal images only" if protocols == ONE_CLASS else "normal and anomalous images"
        raise InputError(
            f"{config.method} learns {learns}: protocol {' or '.join(protocols)}, got "
            f"{config.protocol!r}"
        )
    metrics.check_compat(config.compat)
    refuse_inside(config.out, config.data)
    if config.cache:
        refuse_inside(config.cache, config.data)
    for name in ("batch_size", "workers", "train_batch_size", "draws", "epochs", "iterations"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if config.epochs and config.iterations:
        raise InputError("give epochs or iterations, not both")
    if not config.lr > 0:
        raise InputError(f"lr must be above 0, got {config.lr}")


def split_of(protocol: str) -> str:
    """The split of the data set that a protocol takes its images from."""
    return FEW_SHOT_POOL if protocol in SHOTS else protocol


def _for_category(config: EvaluateConfig, category: Category) -> EvaluateConfig:
    if CATEGORY not in config.weights:
        return config
    weights = config.weights.replace(CATEGORY, category.name)
    if not Path(weights).is_file():
        raise InputError(f"category {category.name} has no weights: there is no file {weights}")
    return replace(config, weights=weights)


def _refuse_other_results(out: Path, config: EvaluateConfig) -> None:
    """They would be replaced one by one."""
    for path in (out / CATEGORIES).glob(f"[!.]*/{RESULT}"):
        found = read_json(path).get("fingerprint", {})
        for name in ("method", "protocol"):
            held, wanted = found.get(name), getattr(config, name)
            if held not in (None, wanted):
                raise InputError(
                    f"{path.parent} holds results of {held}: give {wanted} another directory"
                )


class _Models:
    """The detector of a configuration: one for all categories that have the same weights."""

    def __init__(self, device: torch.device):
        self.device, self.weights, self.model = device, None, None

    def of(self, config: EvaluateConfig) -> Detector:
        if config.weights != self.weights:
            self.model, self.weights = _new_detector(config, self.device), config.weights
        return self.model


def _new_detector(config: EvaluateConfig, device: torch.device) -> Detector:
    common = {name: getattr(config, name) for name in ("backbone", "preset", "weights", "seed")}
    common |= {"device": device}
    if config.method in ("classifier", "unet"):
        return {"classifier": Classifier, "unet": UNet}[config.method](**common)
    common |= {"compile": config.compile}
    if config.method == "padim":
        return PaDiM(n_features=config.n_features, factor_dtype=config.factor_dtype, **common)
    return PatchCore(
        coreset_ratio=config.coreset_ratio,
        n_neighbors=config.n_neighbors,
        bank_dtype=config.bank_dtype,
        **common,
    )


def _chosen(model: Detector) -> dict:
    """Settings that the model chose where the configuration left them open."""
    if isinstance(model, PaDiM):
        return {"n_features": len(model.channels)}
    return {"n_neighbors": model.n_neighbors} if isinstance(model, PatchCore) else {}


def _training(config: EvaluateConfig) -> Training | None:
    """The schedule of a 2-class model: the paper's, unless another is given."""
    if METHODS[config.method] == ONE_CLASS:
        return None
    epochs, iterations = config.epochs, config.iterations
    if epochs is None and iterations is None:
        shots = config.protocol in SHOTS
        iterations = ITERATIONS[config.method] if shots else None
        epochs = None if shots else Training.epochs
    return Training(
        epochs=epochs,
        iterations=iterations,
        lr=config.lr,
        batch_size=config.train_batch_size,
        flips=config.flips,
    )


def settings_of(config: EvaluateConfig) -> dict:
    """What decides the numbers, as opposed to where and how fast they are made."""
    settings = asdict(config)
    for name in (
        *("out", "name", "batch_size", "workers", "cache", "device", "compile", "save_models"),
        *("epochs", "iterations", "lr", "train_batch_size", "flips", "draws"),
    ):
        del settings[name]
    training = _training(config)
    if training:
        settings |= asdict(training)
    if config.protocol in SHOTS:
        settings["draws"] = config.draws
    settings["category"] = list(config.category)
    return settings


def _fingerprint(job: _Job) -> dict:
    """If this is unchanged, so are a category's results. Files count by name, size and time."""
    config, category = job.config, job.category
    files = [("weights", Path(config.weights))] if Path(config.weights).is_file() else []
    for part, samples in (("train", category.train), ("test", category.test)):
        for sample in samples:
            files += [
                (f"{part} {sample.label}", file) for file in (sample.image, sample.mask) if file
            ]
    digest = hashlib.sha256()
    for what, file in files:
        stat = file.stat() if file.exists() else None
        found = f"{stat.st_size} {stat.st_mtime_ns}" if stat else "missing"
        digest.update(f"{what} {file} {found}\n".encode())
    return settings_of(config) | {
        "category": category.name,
        "files": digest.hexdigest(),
        "version": __version__,
        "stored": STORED,
    }


def _finished(out: Path, job: _Job) -> dict | None:
    """The result of a category, if it is there and up to date."""
    name = job.category.name
    directory = out / CATEGORIES / name
    if not (directory / RESULT).exists():
        return None
    stored = read_json(directory / RESULT)
    if stored.get("fingerprint") != _fingerprint(job):
        return None
    if job.config.save_models and not (directory / f"{job.config.method}.pt").exists():
        return None
    result = stored["result"]
    examples = [
        example | {"file": f"{CATEGORIES}/{name}/{example['file']}"}
        for example in result["examples"]
    ]
    return result | {"examples": examples}


def _evaluate_category(models: "_Models", job: _Job, out: Path) -> None:
    config, name = job.config, job.category.name
    fingerprint = _fingerprint(job)
    key = repr((sorted(fingerprint.items()), config.save_models))
    key = hashlib.sha256(key.encode()).hexdigest()[:16]
    plan = Plan(
        method=config.method,
        protocol=config.protocol,
        training=_training(config),
        draws=config.draws,
        seed=config.seed,
        compat=config.compat,
        batch_size=config.batch_size or BATCH[models.device.type],
        workers=config.workers,
        cache=Path(config.cache) if config.cache else None,
        skip_bad_images=config.skip_bad_images,
        save_models=config.save_models,
    )
    unfinished = out / UNFINISHED / f"{name}-{key}"
    for left in (out / UNFINISHED).glob(f"{name}-{'?' * 16}"):  # of other settings
        if left != unfinished:
            shutil.rmtree(left, ignore_errors=True)
    evaluate_category(
        models.of(config),
        job.category,
        plan,
        unfinished=unfinished,
        directory=make_output_dir(out / CATEGORIES) / name,
        fingerprint=fingerprint,
        key=key,
    )
