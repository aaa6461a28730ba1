"""From a data set to numbers: fit a detector per category, score its test images, measure."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spd_fast import __version__, metrics
from spd_fast.datasets import Category, Sample, read_dataset
from spd_fast.datasets.images import read_image, read_mask
from spd_fast.datasets.visa import PAPER_NAMES
from spd_fast.errors import InputError
from spd_fast.files import atomic_directory, make_output_dir, read_json, refuse_inside, write_json
from spd_fast.info import versions
from spd_fast.models import pick_device
from spd_fast.padim import PaDiM
from spd_fast.patchcore import PatchCore
from spd_fast.preprocess import Preset, displayed_image, prepare_image, prepare_mask
from spd_fast.report import format_table, load_run, write_report
from spd_fast.sheet import example_sheet
from spd_fast.threads import in_threads

METHODS = ("padim", "patchcore")
# In the output directory: CATEGORIES/<name>/ with RESULT, pictures and, if asked for, the model
# as <method>.pt.
CATEGORIES, RESULT = "categories", "result.json"
CATEGORY = "{category}"  # in `weights`: the name of each category


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
    compat: str | None = None
    category: tuple[str, ...] = ()
    name: str | None = None
    batch_size: int = 16
    workers: int = 4
    seed: int = 0
    device: str = "auto"
    skip_bad_images: bool = False
    compile: bool = False
    save_models: bool = False


@dataclass
class Scored:
    """The test images of a category and what the detector said of them."""

    samples: list[Sample]
    masks: np.ndarray  # (N, h, w) bool
    maps: np.ndarray  # (N, h, w) float32
    scores: np.ndarray  # (N,) float32


def evaluate(config: EvaluateConfig) -> dict:
    """Evaluate a detector on every category of a data set and write the results.

    Writes `results.json` and `report.html` into `config.out`, and below it one directory per
    category. A category that an earlier, interrupted call with the same configuration has finished
    is not done again. One that was finished with other settings of the same method is replaced.

    In `config.weights`, "{category}" stands for the name of each category, which then has weights
    of its own; what is computed for a category is what it would be with that file given.

    Returns:
        The contents of results.json, plus `dir`; see `spd_fast.report`.

    Raises:
        InputError: bad data, weights or configuration (the file of weights of every category is
            looked for before the first is evaluated), or `config.out` cannot be written or holds
            the results of another method.
    """
    _check(config)
    started = time.perf_counter()
    out = make_output_dir(config.out)
    _refuse_other_method(out, config)
    dataset = read_dataset(config.data, config.protocol, list(config.category) or None)
    own = [_for_category(config, category) for category in dataset]
    model, weights = _new_detector(own[0]), own[0].weights
    categories = []
    for category, its in zip(dataset, own):
        result = _finished(out, its, category)
        if result is None:
            if its.weights != weights:  # one detector for all that have the same
                model, weights = _new_detector(its), its.weights
            result = _evaluate_category(model, category, its, out)
        categories.append(result)
    run = {
        "name": config.name or f"{config.method}, {config.weights}",
        "config": _settings(config) | _chosen(model),
        "versions": versions(),
        "seconds": time.perf_counter() - started,
        "categories": categories,
    }
    write_json(out / "results.json", run)
    run = load_run(out)
    write_report([run], out / "report.html", f"Anomaly detection on {Path(config.data).name}")
    print(format_table([run]))
    skipped = [reason for category in categories for reason in category["skipped"].values()]
    if skipped:
        print(f"{len(skipped)} images were skipped:", *skipped, sep="\n  ")
    print(f"report: {out / 'report.html'}")
    return run


def _check(config: EvaluateConfig) -> None:
    if config.method not in METHODS:
        raise InputError(f"method is one of {', '.join(METHODS)}; got {config.method!r}")
    if config.protocol != "1cls":
        raise InputError(
            f"{config.method} learns normal images only: protocol 1cls, got {config.protocol!r}"
        )
    metrics.check_compat(config.compat)
    refuse_inside(config.out, config.data)
    for name in ("batch_size", "workers"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be at least 1, got {getattr(config, name)}")


def _for_category(config: EvaluateConfig, category: Category) -> EvaluateConfig:
    if CATEGORY not in config.weights:
        return config
    weights = config.weights.replace(CATEGORY, category.name)
    if not Path(weights).is_file():
        raise InputError(f"category {category.name} has no weights: there is no file {weights}")
    return replace(config, weights=weights)


def _refuse_other_method(out: Path, config: EvaluateConfig) -> None:
    """Its results would be replaced one by one."""
    for path in (out / CATEGORIES).glob(f"*/{RESULT}"):
        method = read_json(path).get("fingerprint", {}).get("method", config.method)
        if method != config.method:
            raise InputError(
                f"{path.parent} holds results of {method}: give {config.method} another directory"
            )


def _new_detector(config: EvaluateConfig) -> PaDiM | PatchCore:
    common = {name: getattr(config, name) for name in ("backbone", "preset", "weights", "seed")}
    common |= {"device": pick_device(config.device), "compile": config.compile}
    if config.method == "padim":
        return PaDiM(n_features=config.n_features, factor_dtype=config.factor_dtype, **common)
    return PatchCore(
        coreset_ratio=config.coreset_ratio,
        n_neighbors=config.n_neighbors,
        bank_dtype=config.bank_dtype,
        **common,
    )


def _chosen(model: PaDiM | PatchCore) -> dict:
    """Settings that the model chose where the configuration left them open."""
    if isinstance(model, PaDiM):
        return {"n_features": len(model.channels)}
    return {"n_neighbors": model.n_neighbors}


def _settings(config: EvaluateConfig) -> dict:
    """What decides the numbers, as opposed to where and how fast they are made."""
    settings = asdict(config)
    for name in ("out", "name", "batch_size", "workers", "device", "compile", "save_models"):
        del settings[name]
    settings["category"] = list(config.category)
    return settings


def _fingerprint(config: EvaluateConfig, category: Category) -> dict:
    """If this is unchanged, so are a category's results. Files count by name, size and time."""
    files = [Path(config.weights)] if Path(config.weights).is_file() else []
    for sample in (*category.train, *category.test):
        files += [sample.image] if sample.mask is None else [sample.image, sample.mask]
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return _settings(config) | {
        "category": category.name,
        "files": digest.hexdigest(),
        "version": __version__,
    }


def _finished(out: Path, config: EvaluateConfig, category: Category) -> dict | None:
    directory = out / CATEGORIES / category.name
    if not (directory / RESULT).exists():
        return None
    stored = read_json(directory / RESULT)
    if stored.get("fingerprint") != _fingerprint(config, category):
        return None
    if config.save_models and not (directory / f"{config.method}.pt").exists():
        return None
    tqdm.write(f"{category.name}: already done with these settings and files, results kept")
    return stored["result"]


def _evaluate_category(
    model: PaDiM | PatchCore, category: Category, config: EvaluateConfig, out: Path
) -> dict:
    preset = model.settings
    skipped: dict[str, str] = {}
    directory = make_output_dir(out / CATEGORIES) / category.name
    started = time.perf_counter()
    train = _batches(category.train, preset, config, skipped, f"{category.name}: fit")
    model.fit(images for _, images, _ in train)
    fitted = time.perf_counter()
    scored = _score(model, category, preset, config, skipped)
    finished = time.perf_counter()
    labels = np.array([sample.label for sample in scored.samples])
    pixel = metrics.pixel_metrics(scored.maps, scored.masks, config.compat)
    result = {
        "name": category.name,
        "title": PAPER_NAMES.get(category.name, category.name),
        "n_train": model.count,
        "n_test": len(labels),
        "n_anomalous": int(labels.sum()),
        "image": asdict(metrics.image_metrics(scored.scores, labels)),
        "pixel": asdict(pixel),
        "curves": _curves(scored, labels),
        "skipped": skipped,
        "seconds": {"fit": fitted - started, "score": finished - fitted},
    }
    with atomic_directory(directory, mark=RESULT) as temporary:
        examples = _write_examples(scored, preset, temporary, pixel.threshold)
        for example in examples:
            example["file"] = f"{CATEGORIES}/{category.name}/{example['file']}"
        result["examples"] = examples
        if config.save_models:
            model.save(temporary / f"{config.method}.pt")
        stored = {"fingerprint": _fingerprint(config, category), "result": result}
        write_json(temporary / RESULT, stored)
    return result


def _score(
    model: PaDiM | PatchCore,
    category: Category,
    preset: Preset,
    config: EvaluateConfig,
    skipped: dict[str, str],
) -> Scored:
    samples, masks, maps, scores = [], [], [], []
    test = _batches(category.test, preset, config, skipped, f"{category.name}: score")
    for batch, pixels, truth in test:
        batch_maps, batch_scores = model.score(pixels)
        samples += batch
        masks.append(truth)
        maps.append(batch_maps.cpu().numpy())
        scores.append(batch_scores.cpu().numpy())
    if not samples:
        raise InputError(f"category {category.name} has no readable test image")
    return Scored(
        samples,
        np.concatenate(masks),
        np.concatenate(maps),
        np.concatenate(scores),
    )


def _batches(
    samples: list[Sample],
    preset: Preset,
    config: EvaluateConfig,
    skipped: dict[str, str],
    title: str,
) -> Iterator[tuple[list[Sample], Tensor, np.ndarray]]:
    """Samples, images (B, 3, h, w) and masks (B, h, w) of each batch, read ahead in threads."""

    def load(sample: Sample) -> tuple[Sample, Tensor, np.ndarray] | None:
        try:
            image = read_image(sample.image)
            mask = np.zeros(image.shape[:2], bool)
            if sample.mask is not None:
                mask = read_mask(sample.mask, image.shape[:2])
        except InputError as error:
            if not config.skip_bad_images:
                raise
            skipped[str(sample.image)] = str(error)
            return None
        return sample, prepare_image(image, preset), prepare_mask(mask, preset)

    with tqdm(total=len(samples), desc=title, unit="image") as progress:
        loaded = in_threads(load, samples, config.workers)
        while batch := list(islice(loaded, config.batch_size)):
            progress.update(len(batch))
            good = [item for item in batch if item is not None]
            if good:
                kept, images, masks = zip(*good)
                yield list(kept), torch.stack(images), np.stack(masks)


def _curves(scored: Scored, labels: np.ndarray) -> dict[str, list[list[float]]]:
    rounded = {}
    for level, scores, truth in (
        ("image", scored.scores, labels),
        ("pixel", scored.maps, scored.masks),
    ):
        curves = metrics.curves(scores, truth)
        for name, curve in (("roc", curves.roc), ("pr", curves.pr)):
            rounded[f"{level}_{name}"] = [np.round(axis, 6).tolist() for axis in curve]
    return rounded


def _write_examples(
    scored: Scored, preset: Preset, directory: Path, threshold: float, each: int = 2
) -> list[dict]:
    """Pictures of the worst and best test images; one colour scale per category."""
    labels = np.array([sample.label for sample in scored.samples])
    order = np.argsort(scored.scores, kind="stable")
    anomalous, normal = order[labels[order] == 1], order[labels[order] == 0]
    chosen = [
        *(("worst: anomaly with a low score", i) for i in anomalous[:each]),
        *(("worst: normal image with a high score", i) for i in normal[::-1][:each]),
        *(("best: anomaly with a high score", i) for i in anomalous[::-1][:each]),
        *(("best: normal image with a low score", i) for i in normal[:1]),
    ]
    scale = (float(np.quantile(scored.maps, 0.01)), float(scored.maps.max()))
    examples, drawn = [], set()
    for number, (title, i) in enumerate(chosen):
        if i in drawn:  # a category of few test images
            continue
        drawn.add(i)
        sample = scored.samples[i]
        path = directory / f"example_{number}.jpg"
        picture = displayed_image(prepare_image(read_image(sample.image), preset))
        sheet = example_sheet(picture, scored.maps[i], scored.masks[i], threshold, scale)
        sheet.save(path, quality=88)
        examples.append(
            {
                "title": title,
                "file": path.name,
                "score": float(scored.scores[i]),
                "label": sample.label,
                "defect": sample.defect,
                "caption": sample.image.name,
            }
        )
    return examples
