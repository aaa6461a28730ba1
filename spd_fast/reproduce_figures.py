"""The paper's figures from our runs, as PNG and PDF."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spd_fast import figures, paper
from spd_fast.attention import attention_maps, nearest_normal
from spd_fast.datasets import Category, Sample, read_dataset
from spd_fast.datasets.cache import read_resized
from spd_fast.datasets.visa import PAPER_NAMES
from spd_fast.errors import InputError
from spd_fast.evaluate import CATEGORY
from spd_fast.evaluate_category import SHOTS
from spd_fast.models import load_backbone, pick_device
from spd_fast.padim import PRESETS
from spd_fast.preprocess import displayed_image, normalised
from spd_fast.report import CURVES, METRICS, curve_owner
from spd_fast.reproduce_table import Job, compare
from spd_fast.results import CATEGORIES, SHOWN
from spd_fast.threads import in_threads

PADIM = ("1cls", "padim")
BATCH = 16  # images whose features are computed together


@dataclass(frozen=True)
class Drawn:
    """A figure that was written, as NAME.png and NAME.pdf."""

    name: str
    title: str
    alt: str  # what it shows, for those who cannot see it
    category: str | None = None  # that it is of, if it is of one


@dataclass(frozen=True)
class Target:
    """A figure that can be asked for: the tables whose runs it needs, and how it is drawn from the
    settings and the runs."""

    tables: tuple[str, ...]
    draw: Callable


def write_figures(
    config, runs: dict[Job, dict], directory: Path, failed: dict[str, str]
) -> list[Drawn]:
    """Draw the figures among `config.targets`, and those that cost nothing beside their table.

    Why one could not be drawn is noted in `failed`.
    """
    targets = [name for name in FIGURES if name in config.targets]
    if "table2" in config.targets:
        targets = list(dict.fromkeys(["figure7", "figure8", "figure12", *targets]))
    drawn = []
    for name in targets:
        try:
            for figure, result in FIGURES[name].draw(config, runs):
                figures.save_figure(figure, directory / result.name)
                drawn.append(result)
        except InputError as error:
            failed[name] = str(error)
    return drawn


def _scatter(metric: str, name: str, config, runs: dict[Job, dict]) -> Iterator:
    """Figures 7 and 8: means of classification against those of segmentation."""
    points: dict[str, dict] = {}
    for row in compare(paper.table("table2"), runs):
        for cell in row.cells:
            q = cell.quantity
            if q.metric != metric:
                continue
            level = {"image": "classification", "pixel": "segmentation"}[q.level]
            for source, value in (("paper", cell.paper), ("ours", cell.ours and cell.ours.value)):
                if value is not None:
                    key = (paper.PRINTED[q.dataset], q.weights, source)
                    points.setdefault(key, {"name": q.weights, "source": source})[level] = value
    by_dataset: dict[str, list[dict]] = {}
    for (dataset, _, _), point in points.items():
        by_dataset.setdefault(dataset, []).append(point)
    title = f"Pre-trainings by {METRICS[metric]}, PaDiM, 1-class"
    figure = figures.scatter(by_dataset, METRICS[metric], title)
    alt = f"Classification against segmentation, {METRICS[metric]}: the paper's values and ours"
    yield figure, Drawn(name, f"{title} (figure {name[-1]})", alt)


def _curves(config, runs: dict[Job, dict]) -> Iterator:
    """ROC and precision-recall curves of every evaluation and category, a line for each weights."""
    for place, job in {job.name: job for job in runs}.items():
        together = {other.weights: run for other, run in runs.items() if other.name == place}
        lines: dict[tuple, list] = {}
        for weights, run in together.items():
            for category in run["categories"]:
                for kind, (x, y) in category["curves"].items():
                    level, curve = kind.split("_")
                    area = 100 * curve_owner(category)[level][f"au_{curve}"]
                    key = (category["name"], category["title"], kind)
                    lines.setdefault(key, []).append((weights, x, y, area))
        for (name, title, kind), its in lines.items():
            what = CURVES[kind][0]
            draw = ", first draw" if job.protocol in SHOTS else ""
            full = f"{what}. {title}, {job.setting}{draw}"
            alt = f"{full}: " + ", ".join(f"{weights} {area:.1f}" for weights, _, _, area in its)
            figure = figures.curves(kind, its, title=f"{title}, {job.setting}{draw}\n{what}")
            yield figure, Drawn(f"{kind}_{place}_{name}", full, alt, name)


def _segmentations(config, runs: dict[Job, dict]) -> Iterator:
    """Figure 12: the heat maps of the first test image with a defect of every category."""
    for dataset in paper.DATASETS:
        own = {j.weights: r for j, r in runs.items() if (j.dataset, j[2:]) == (dataset, PADIM)}
        shown: dict[str, dict] = {}  # title of a category -> weights -> what is stored
        for weights, run in own.items():
            for category in run["categories"]:
                path = Path(run["dir"]) / CATEGORIES / category["name"] / SHOWN
                shown.setdefault(category["title"], {})[weights] = np.load(path)
        shown = {title: its for title, its in shown.items() if len(its) == len(own)}
        if not shown:
            continue
        firsts = [next(iter(its.values())) for its in shown.values()]
        figure = figures.segmentation_sheet(
            [first["image"] for first in firsts],
            [first["mask"] for first in firsts],
            {weights: [its[weights]["map"] for its in shown.values()] for weights in own},
            list(shown),
            {(w, title): tuple(its[w]["scale"]) for title, its in shown.items() for w in own},
        )
        title = f"Segmentations on {paper.PRINTED[dataset]} (figure 12)"
        alt = f"Heat maps of PaDiM with {', '.join(own)} under an anomalous image of each category"
        yield figure, Drawn(f"figure12_{dataset}", title, alt)


def _attention(config, runs: dict[Job, dict]) -> Iterator:
    """Figure 11: what in the first test image with a defect of a category differs from its nearest
    normal training image, by weights. It needs no evaluation."""
    if "visa" not in config.data:
        raise InputError("it is drawn from VisA, and no VisA was given")
    normals, images, masks, titles = [], [], [], []
    maps: dict[str, list] = {weights: [] for weights in config.weights}
    dataset, wanted = read_dataset(config.data["visa"]), config.settings.category
    dataset = [category for category in dataset if not wanted or category.name in wanted]
    for category in tqdm(dataset, desc="attention maps", unit="category"):
        image, mask = _first_defect(category, config)
        for weights in config.weights:
            backbone = _backbone(config, weights, category.name)
            nearest = nearest_normal(backbone, image, _batches(category.train, config))
            maps[weights].append(attention_maps(backbone, image[None], nearest[None])[0].numpy())
            if weights == next(iter(config.weights)):
                normals.append(displayed_image(nearest))
        images.append(displayed_image(image))
        masks.append(mask)
        titles.append(PAPER_NAMES.get(category.name, category.name))
    figure = figures.attention_sheet(normals, images, masks, maps, titles)
    first = next(iter(config.weights))
    title = f"Attention maps by GradCAM (figure 11); above, the normal image nearest for {first}"
    alt = f"GradCAM of an anomalous image of {', '.join(titles)}, with {', '.join(maps)}"
    yield figure, Drawn("figure11", title, alt)


def _backbone(config, weights: str, category: str) -> torch.nn.Module:
    source = config.weights[weights].replace(CATEGORY, category)
    name = config.backbone or paper.BACKBONES[weights]
    return load_backbone(name, source, config.settings.seed).to(pick_device(config.settings.device))


def _first_defect(category: Category, config) -> tuple[Tensor, np.ndarray]:
    """The first test image with a defect in the part that is seen, and its mask."""
    read = (_read(sample, config) for sample in category.test if sample.label)
    first = None
    for pair in filter(None, read):
        if pair[1].any():
            return pair
        first = first or pair
    if first is None:
        raise InputError(f"category {category.name} has no readable anomalous test image")
    return first


def _batches(train: list[Sample], config) -> Iterator[Tensor]:
    read = in_threads(lambda sample: _read(sample, config), train, config.settings.workers)
    images = (pair[0] for pair in read if pair is not None)
    while batch := list(itertools.islice(images, BATCH)):
        yield torch.stack(batch)


def _read(sample: Sample, config) -> tuple[Tensor, np.ndarray] | None:
    """Normalised image and mask; None if it is unreadable and such images are to be left out."""
    cache = config.settings.cache
    try:
        pixels, mask = read_resized(sample, PRESETS["paper"], Path(cache) if cache else None)
    except InputError:
        if config.settings.skip_bad_images:
            return None
        raise
    return normalised(pixels), mask


def check_targets(targets: tuple[str, ...]) -> None:
    """Refuse what is neither a table nor a figure.

    Raises:
        InputError: there is no target, or one is unknown.
    """
    known = (*paper.TABLES, *FIGURES)
    for target in targets:
        if target not in known:
            raise InputError(f"{target!r} is none of {', '.join(known)}")


FIGURES = {
    "figure7": Target(("table2",), partial(_scatter, "au_pr", "figure7")),
    "figure8": Target(("table2",), partial(_scatter, "au_roc", "figure8")),
    "figure11": Target((), _attention),
    "figure12": Target(("table2",), _segmentations),
    "curves": Target((), _curves),
}
