"""One category of a data set: fit a detector to its training images, score and measure its test.

A k-shot protocol does so for several draws of training images, and takes the mean. What comes of a
draw, and in the end of the category, is a directory with a result, pictures, the replicates of the
bootstrap and, if asked for, the model; those of a category are its first draw's pictures and model.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spd_fast import bootstrap, metrics
from spd_fast.datasets import Category, Sample, draw_shots
from spd_fast.datasets.cache import read_resized
from spd_fast.datasets.visa import PAPER_NAMES
from spd_fast.errors import InputError
from spd_fast.files import atomic_directory, link_or_copy, make_output_dir, read_json, write_json
from spd_fast.padim import PaDiM
from spd_fast.patchcore import PatchCore
from spd_fast.preprocess import Preset, displayed_image, normalised
from spd_fast.results import REPLICATES, RESULT, SHOWN
from spd_fast.sheet import example_sheet
from spd_fast.threads import in_threads
from spd_fast.twoclass import Classifier, Training, TwoClass

DRAWS = 5  # of a k-shot protocol (paper section 4.2)
SHOTS = {"5shot": 5, "10shot": 10}
RESAMPLES = 1000  # of the bootstrap

Detector = PaDiM | PatchCore | TwoClass


@dataclass(frozen=True)
class Plan:
    """What is done with each category, beside the detector itself."""

    method: str
    protocol: str
    training: Training | None  # of 2-class models
    draws: int
    seed: int  # of the draws
    compat: str | None
    batch_size: int
    workers: int
    cache: Path | None  # see `datasets.cache`
    skip_bad_images: bool
    save_models: bool


@dataclass
class Scored:
    """The test images of a category and what the detector said of them."""

    samples: list[Sample]
    masks: np.ndarray  # (N, h, w) bool
    maps: np.ndarray  # (N, h, w) float32
    scores: np.ndarray  # (N,) float32

    @property
    def labels(self) -> np.ndarray:
        return np.array([sample.label for sample in self.samples])

    def colour_scale(self) -> tuple[float, float]:
        """Scores of the darkest and the brightest colour of its heat maps."""
        return float(np.quantile(self.maps, 0.01)), float(self.maps.max())


def evaluate_category(
    model: Detector,
    category: Category,
    plan: Plan,
    unfinished: Path,
    directory: Path,
    fingerprint: dict,
    key: str,
) -> None:
    """Fit, score and measure; `directory` then holds the result, beside the `fingerprint` that
    tells whether it is still up to date. `key`, another one for every fingerprint, tells which
    files belong together.

    Draws that are done, and the steps of a 2-class training, are kept below `unfinished` until all
    are; a later call with the same `unfinished` goes on from there.
    """
    draws = []
    k = SHOTS.get(plan.protocol)
    for number in range(plan.draws if k else 1):
        place = unfinished / f"draw_{number}"
        if not (place / RESULT).exists():
            make_output_dir(unfinished)
            shots = draw_shots(category, k, number, plan.seed) if k else category
            title = f"{category.name}, draw {number + 1}" if k else category.name
            _evaluate_draw(model, shots, plan, place, title)
        draws.append(read_json(place / RESULT))
    replicates = _mean_replicates([unfinished / f"draw_{i}" for i in range(len(draws))])
    result = {
        "name": category.name,
        "title": PAPER_NAMES.get(category.name, category.name),
        "key": key,
        **_combined(draws),
        "intervals": {name: bootstrap.interval(values) for name, values in replicates.items()},
    }
    with atomic_directory(directory, mark=RESULT) as temporary:
        first = unfinished / "draw_0"
        for path in first.iterdir():
            if path.name not in (RESULT, REPLICATES):
                link_or_copy(path, temporary / path.name)
        np.savez(temporary / REPLICATES, key=key, **replicates)
        write_json(temporary / RESULT, {"fingerprint": fingerprint, "result": result})
    shutil.rmtree(unfinished)


def _combined(draws: list[dict]) -> dict:
    """The result of a category from those of its draws: of one draw its own; of several the means
    and standard deviations of the metrics, and the first one's threshold, curves and examples."""
    first = draws[0]
    if len(draws) == 1:
        return first
    result = first | {"draws": [{level: d[level] for level in ("image", "pixel")} for d in draws]}
    for level in ("image", "pixel"):
        if first[level] is None:
            continue
        values = {k: [d[level][k] for d in draws] for k, v in first[level].items() if v is not None}
        del values["threshold"]
        result[level] = first[level] | {k: float(np.mean(v)) for k, v in values.items()}
        result[f"{level}_std"] = {k: float(np.std(v, ddof=1)) for k, v in values.items()}
    for draw in draws:
        result["skipped"] = result["skipped"] | draw["skipped"]
    result["seconds"] = {k: sum(d["seconds"][k] for d in draws) for k in first["seconds"]}
    return result


def _mean_replicates(draws: list[Path]) -> dict[str, np.ndarray]:
    """Over the draws: they have the same test images, resampled alike."""
    found = [np.load(draw / REPLICATES) for draw in draws]
    return {name: np.mean([each[name] for each in found], axis=0) for name in found[0].files}


def _evaluate_draw(
    model: Detector, category: Category, plan: Plan, directory: Path, title: str
) -> None:
    skipped: dict[str, str] = {}
    started = perf_counter()
    _fit(model, category, plan, skipped, directory.with_suffix(".pt"), title)
    fitted = perf_counter()
    scored = _score(model, category, plan, skipped, title)
    finished = perf_counter()
    segments = not isinstance(model, Classifier)
    pixel = metrics.pixel_metrics(scored.maps, scored.masks, plan.compat) if segments else None
    replicates = _bootstrap(scored, category.name, segments)
    measured = perf_counter()
    result = {
        "n_train": model.count,
        "n_test": len(scored.samples),
        "n_anomalous": int(scored.labels.sum()),
        "image": asdict(metrics.image_metrics(scored.scores, scored.labels)),
        "pixel": pixel and asdict(pixel),
        "test_set": _test_set(scored.samples),
        "curves": _curves(scored, segments),
        "skipped": skipped,
        "seconds": {
            "fit": fitted - started,
            "score": finished - fitted,
            "measure": measured - finished,
        },
    }
    with atomic_directory(directory, mark=RESULT) as temporary:
        np.savez(temporary / REPLICATES, **replicates)
        _write_shown(scored, model.settings, plan.cache, temporary / SHOWN)
        threshold = pixel.threshold if pixel else None
        result["examples"] = _write_examples(
            scored, model.settings, plan.cache, temporary, threshold
        )
        if plan.save_models:
            model.save(temporary / f"{plan.method}.pt")
        write_json(temporary / RESULT, result)


def _fit(
    model: Detector, category: Category, plan: Plan, skipped: dict, checkpoint: Path, title: str
) -> None:
    if not isinstance(model, TwoClass):
        batches = _batches(category.train, model.settings, plan, skipped, f"{title}: fit")
        model.fit(images for _, images, _ in batches)
        return
    if plan.protocol in SHOTS:  # k are k
        plan = replace(plan, skip_bad_images=False)
    # every epoch needs all images: they stay in memory, resized and in bytes
    images = list(_read(category.train, model.settings, plan, skipped, f"{title}: read"))
    model.fit(
        _Prepared(images),
        plan.training,
        workers=plan.workers,
        checkpoint=checkpoint,
        progress=True,
        title=f"{title}: fit",
    )
    checkpoint.unlink(missing_ok=True)


class _Prepared(Sequence):
    """Samples as they were read, as a 2-class model takes them."""

    def __init__(self, images: list[tuple[Sample, np.ndarray, np.ndarray]]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, np.ndarray]:
        sample, pixels, mask = self.images[i]
        return normalised(pixels), sample.label, mask


def _score(model: Detector, category: Category, plan: Plan, skipped: dict, title: str) -> Scored:
    samples, n = [], len(category.test)
    masks, maps, scores = None, None, np.empty(n, np.float32)
    test = _batches(category.test, model.settings, plan, skipped, f"{title}: score")
    for batch, images, truth in test:
        batch_maps, batch_scores = model.score(images)
        if maps is None:  # filled in place: parts put together in the end would be there twice
            size = tuple(batch_maps.shape[1:])
            masks, maps = np.empty((n, *size), bool), np.empty((n, *size), np.float32)
        place = slice(len(samples), len(samples) + len(batch))
        masks[place], maps[place] = truth, batch_maps.cpu().numpy()
        scores[place] = batch_scores.cpu().numpy()
        samples += batch
    if not samples:
        raise InputError(f"category {category.name} has no readable test image")
    n = len(samples)  # some may have been skipped
    return Scored(samples, masks[:n], maps[:n], scores[:n])


def _batches(
    samples: list[Sample], preset: Preset, plan: Plan, skipped: dict[str, str], title: str
) -> Iterator[tuple[list[Sample], Tensor, np.ndarray]]:
    """Samples, images (B, 3, h, w) and masks (B, h, w) of each batch."""
    loaded = _read(samples, preset, plan, skipped, title, normalised)
    while batch := list(islice(loaded, plan.batch_size)):
        kept, images, masks = zip(*batch)
        yield list(kept), torch.stack(images), np.stack(masks)


def _read(
    samples: list[Sample],
    preset: Preset,
    plan: Plan,
    skipped: dict[str, str],
    title: str,
    prepare: Callable = np.ascontiguousarray,
) -> Iterator[tuple]:
    """Sample, prepare(pixels) and mask of each image, read ahead in threads."""

    def load(sample: Sample) -> tuple | None:
        try:
            pixels, mask = read_resized(sample, preset, plan.cache)
        except InputError as error:
            if not plan.skip_bad_images:
                raise
            skipped[str(sample.image)] = str(error)
            return None
        return sample, prepare(pixels), mask

    with tqdm(total=len(samples), desc=title, unit="image") as progress:
        for item in in_threads(load, samples, plan.workers):
            progress.update()
            if item is not None:
                yield item


def _bootstrap(scored: Scored, name: str, segments: bool) -> dict[str, np.ndarray]:
    """Replicates of the metrics: "image_au_pr", "image_au_roc" and, of maps, "pixel_au_pr" and
    "pixel_au_roc". The resampling depends on the category and the labels of its test images alone:
    replicates of two detectors are paired."""
    counts = bootstrap.resample_counts(scored.labels, RESAMPLES, seed=0, key=name)
    found = {"image": bootstrap.image_replicates(scored.scores, scored.labels, counts)}
    if segments:
        found["pixel"] = bootstrap.pixel_replicates(scored.maps, scored.masks, counts)
    return {
        f"{level}_{metric}": values
        for level, its in found.items()
        for metric, values in its.items()
    }


def _test_set(samples: list[Sample]) -> str:
    """The same for the same test images, in every layout."""
    names = "\n".join(f"{sample.label} {sample.image.stem}" for sample in samples)
    return hashlib.sha256(os.fsencode(names)).hexdigest()


def _curves(scored: Scored, segments: bool) -> dict[str, list[list[float]]]:
    rounded = {}
    levels = [("image", scored.scores, scored.labels)]
    levels += [("pixel", scored.maps, scored.masks)] * segments
    for level, scores, truth in levels:
        curves = metrics.curves(scores, truth)
        for name, curve in (("roc", curves.roc), ("pr", curves.pr)):
            rounded[f"{level}_{name}"] = [np.round(axis, 6).tolist() for axis in curve]
    return rounded


def _write_shown(scored: Scored, preset: Preset, cache: Path | None, path: Path) -> None:
    seen = scored.masks.any((1, 2))  # not where the defect lies outside the centre that was cut out
    first = int(np.argmax(seen if seen.any() else scored.labels))
    picture = _picture(scored.samples[first], preset, cache)
    np.savez(
        path,
        image=picture,
        mask=scored.masks[first],
        map=scored.maps[first],
        scale=scored.colour_scale(),
    )


def _picture(sample: Sample, preset: Preset, cache: Path | None) -> np.ndarray:
    """(h, w, 3) uint8: what the detector saw."""
    pixels, _ = read_resized(sample, preset, cache)
    return displayed_image(normalised(pixels))


def _write_examples(
    scored: Scored,
    preset: Preset,
    cache: Path | None,
    directory: Path,
    threshold: float | None,
    each: int = 2,
) -> list[dict]:
    """Pictures of the worst and best test images; one colour scale per category."""
    labels = scored.labels
    order = np.argsort(scored.scores, kind="stable")
    anomalous, normal = order[labels[order] == 1], order[labels[order] == 0]
    chosen = [
        *(("worst: anomaly with a low score", i) for i in anomalous[:each]),
        *(("worst: normal image with a high score", i) for i in normal[::-1][:each]),
        *(("best: anomaly with a high score", i) for i in anomalous[::-1][:each]),
        *(("best: normal image with a low score", i) for i in normal[:1]),
    ]
    scale = scored.colour_scale()
    examples, drawn = [], set()
    for number, (title, i) in enumerate(chosen):
        if i in drawn:  # a category of few test images
            continue
        drawn.add(i)
        sample = scored.samples[i]
        path = directory / f"example_{number}.jpg"
        picture = _picture(sample, preset, cache)
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
