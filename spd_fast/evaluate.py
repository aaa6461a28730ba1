"""From a data set to numbers: fit a detector per category, score its test images, measure."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spd_fast import metrics
from spd_fast.datasets import Category, Sample, read_dataset
from spd_fast.datasets.images import read_image, read_mask
from spd_fast.datasets.visa import PAPER_NAMES
from spd_fast.errors import InputError
from spd_fast.files import atomic_directory, make_output_dir, read_json, write_json
from spd_fast.info import versions
from spd_fast.models import pick_device
from spd_fast.padim import PaDiM
from spd_fast.preprocess import (
    Preset,
    displayed_image,
    find_preset,
    prepare_image,
    prepare_mask,
)
from spd_fast.report import format_table, load_run, write_report
from spd_fast.sheet import example_sheet

METHODS = ("padim",)


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
    category: tuple[str, ...] = ()
    name: str | None = None
    batch_size: int = 16
    workers: int = 4
    seed: int = 0
    device: str = "auto"
    skip_bad_images: bool = False
    save_models: bool = False


@dataclass
class Scored:
    """The test images of a category and what the detector said of them."""

    samples: list[Sample]
    images: Tensor  # (N, 3, h, w) as the detector saw them
    masks: np.ndarray  # (N, h, w) bool
    maps: np.ndarray  # (N, h, w) float32
    scores: np.ndarray  # (N,) float32


def evaluate(config: EvaluateConfig) -> dict:
    """Evaluate a detector on every category of a data set and write the results.

    Writes `results.json` and `report.html` into `config.out`, and below it one directory per
    category. A category that an earlier, interrupted call with the same configuration has finished
    is not done again.

    Returns:
        The contents of results.json, plus `dir`; see `spd_fast.report`.

    Raises:
        InputError: bad data, weights or configuration, or `config.out` cannot be written.
    """
    if config.method not in METHODS:
        raise InputError(f"method is one of {', '.join(METHODS)}; got {config.method!r}")
    started = time.perf_counter()
    out = make_output_dir(config.out)
    dataset = read_dataset(config.data, config.protocol, list(config.category) or None)
    model = PaDiM(
        config.backbone,
        config.n_features,
        config.preset,
        config.factor_dtype,
        config.weights,
        config.seed,
        pick_device(config.device),
    )
    skipped: dict[str, str] = {}
    categories = []
    for category in dataset:
        result = _finished(out, config, category)
        if result is None:
            result = _evaluate_category(model, category, config, out, skipped)
        categories.append(result)
    run = {
        "name": config.name or f"{config.method}, {config.weights}",
        "config": _settings(config) | {"n_features": len(model.channels)},
        "versions": versions(),
        "seconds": time.perf_counter() - started,
        "skipped_images": skipped,
        "categories": categories,
    }
    write_json(out / "results.json", run)
    run = load_run(out)
    write_report([run], out / "report.html", f"Anomaly detection on {Path(config.data).name}")
    print(format_table([run]))
    for path, reason in skipped.items():
        print(f"skipped {path}: {reason}")
    print(f"report: {out / 'report.html'}")
    return run


def _settings(config: EvaluateConfig) -> dict:
    """What decides the numbers, as opposed to where and how fast they are made."""
    settings = asdict(config)
    for name in ("out", "name", "batch_size", "workers", "device", "save_models"):
        del settings[name]
    settings["category"] = list(config.category)
    return settings


def _fingerprint(config: EvaluateConfig, category: Category) -> dict:
    """If this is unchanged, so are a category's results. A weights file counts by size and time."""
    weights = Path(config.weights)
    stat = weights.stat() if weights.is_file() else None
    return _settings(config) | {
        "category": category.name,
        "weights_file": [stat.st_size, stat.st_mtime_ns] if stat else None,
        "images": [len(category.train), len(category.test)],
    }


def _finished(out: Path, config: EvaluateConfig, category: Category) -> dict | None:
    path = out / category.name / "result.json"
    if not path.exists() or config.save_models:
        return None
    stored = read_json(path)
    if stored.get("fingerprint") != _fingerprint(config, category):
        return None
    tqdm.write(f"{category.name}: already done, results kept")
    return stored["result"]


def _evaluate_category(
    model: PaDiM, category: Category, config: EvaluateConfig, out: Path, skipped: dict[str, str]
) -> dict:
    preset = find_preset(config.preset)
    started = time.perf_counter()
    train = _batches(category.train, preset, config, skipped, f"{category.name}: fit")
    model.fit(images for _, images, _ in train)
    fitted = time.perf_counter()
    scored = _score(model, category, preset, config, skipped)
    finished = time.perf_counter()
    labels = np.array([sample.label for sample in scored.samples])
    pixel = metrics.pixel_metrics(scored.maps, scored.masks)
    result = {
        "name": category.name,
        "title": PAPER_NAMES.get(category.name, category.name),
        "n_train": model.count,
        "n_test": len(labels),
        "n_anomalous": int(labels.sum()),
        "image": asdict(metrics.image_metrics(scored.scores, labels)),
        "pixel": asdict(pixel),
        "curves": _curves(scored, labels),
        "seconds": {"fit": fitted - started, "score": finished - fitted},
    }
    with atomic_directory(out / category.name) as directory:
        examples = _write_examples(scored, directory, pixel.threshold)
        result["examples"] = [e | {"file": f"{category.name}/{e['file']}"} for e in examples]
        if config.save_models:
            model.save(directory / "padim.pt")
        stored = {"fingerprint": _fingerprint(config, category), "result": result}
        write_json(directory / "result.json", stored)
    return result


def _score(
    model: PaDiM,
    category: Category,
    preset: Preset,
    config: EvaluateConfig,
    skipped: dict[str, str],
) -> Scored:
    samples, images, masks, maps, scores = [], [], [], [], []
    test = _batches(category.test, preset, config, skipped, f"{category.name}: score")
    for batch, pixels, truth in test:
        batch_maps, batch_scores = model.score(pixels)
        samples += batch
        images.append(pixels)
        masks.append(truth)
        maps.append(batch_maps.cpu().numpy())
        scores.append(batch_scores.cpu().numpy())
    if not samples:
        raise InputError(f"category {category.name} has no readable test image")
    return Scored(
        samples,
        torch.cat(images),
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
        except InputError as error:
            if not config.skip_bad_images:
                raise
            skipped[str(sample.image)] = str(error)
            return None
        mask = np.zeros(image.shape[:2], bool)
        if sample.mask is not None:
            mask = read_mask(sample.mask, image.shape[:2])
        return sample, prepare_image(image, preset), prepare_mask(mask, preset)

    loaded = in_threads(load, tqdm(samples, desc=title, unit="image"), config.workers)
    good = (item for item in loaded if item is not None)
    while batch := list(islice(good, config.batch_size)):
        kept, images, masks = zip(*batch)
        yield list(kept), torch.stack(images), np.stack(masks)


def in_threads(function: Callable, items: Iterable, workers: int) -> Iterator:
    """function(item) for every item, in order, computed a little ahead by `workers` threads."""
    items = iter(items)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            waiting = deque(pool.submit(function, i) for i in islice(items, 2 * max(workers, 1)))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, i) for i in islice(items, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _curves(scored: Scored, labels: np.ndarray) -> dict[str, list[list[float]]]:
    curves = {}
    for level, scores, truth in (
        ("image", scored.scores, labels),
        ("pixel", scored.maps.ravel(), scored.masks.ravel()),
    ):
        for name, curve in (("roc", metrics.roc_curve), ("pr", metrics.pr_curve)):
            x, y = curve(scores, truth)
            curves[f"{level}_{name}"] = [np.round(x, 6).tolist(), np.round(y, 6).tolist()]
    return curves


def _write_examples(scored: Scored, directory: Path, threshold: float, each: int = 2) -> list[dict]:
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
        sheet = example_sheet(
            displayed_image(scored.images[i]), scored.maps[i], scored.masks[i], threshold, scale
        )
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
