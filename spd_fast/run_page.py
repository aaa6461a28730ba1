"""The page of a pre-training run: its curves, settings and example views, in one HTML file."""

import base64
import io
import json
import statistics
from pathlib import Path

import numpy as np

from spd_fast.files import read_json, write_text
from spd_fast.loader import ViewLoader
from spd_fast.pretrain_config import PretrainConfig, settings
from spd_fast.report import template
from spd_fast.sheet import views_sheet
from spd_fast.step_times import PARTS

PAGE = "run.html"
EXAMPLES = 3  # images
PLOT = (320, 150)  # of a curve, in SVG units
POINTS = 200  # of a curve: the means of so many equal parts of the steps

# title, what to look for, names in metrics.jsonl and what they are called here; FROM_ZERO have a
# meaningful zero
CURVES = (
    ("Loss", "formula 3: what is minimised", {"loss": "loss"}),
    ("Parts of the loss", "", {"loss_ssl": "the method's", "loss_spd": "SPD's"}),
    ("Spread of z", "falls to 0 if the projections collapse to one point", {"z_std": "z_std"}),
    (
        "Likeness to the SPD views",
        "cosines of z with the positives and the negatives",
        {"cos_pos": "positives", "cos_neg": "negatives"},
    ),
    ("SPD margin", "by how much more alike the positives are", {"spd_margin": "margin"}),
    ("Nearest neighbours", "share of other images whose class they give", {"knn_top1": "top 1"}),
    ("Learning rate", "", {"lr": "rate"}),
    ("Images per second", "", {"images_per_s": "images / s"}),
    (
        "Seconds of a step",
        "other: logs, and what ends an epoch",
        {f"{part}_s": part for part in PARTS},
    ),
)
FROM_ZERO = ("z_std", "knn_top1", "lr", "images_per_s", "data_s")


def write_run_page(out: Path, config: PretrainConfig, loader: ViewLoader) -> None:
    """Write out/run.html from out/metrics.jsonl and out/run.json; it needs no other file.

    The examples are the views that some images, spread over the data, have in the first epoch.
    """
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "images_per_s" in line]
    found = read_json(out / "run.json")
    page = template("run.html.j2").render(
        title=f"Pre-training: {config.recipe}{' + SPD' if config.spd else ''}, {config.backbone}"
        + (f", {config.category}" if config.category else ""),
        step=lines[-1]["step"],
        rate=f"{statistics.median(line['images_per_s'] for line in steps):.0f}",
        shares=_shares(steps),
        found=found,
        curves=[curve for curve in (_curve(lines, *row) for row in CURVES) if curve],
        examples=_examples(config, loader),
        settings=settings(config),
        width=PLOT[0],
        height=PLOT[1],
    )
    write_text(out / PAGE, page)


def _shares(steps: list[dict]) -> dict[str, str]:
    """Each part's share of the time, in percent; nothing if no step tells it, as in older runs."""
    steps = [line for line in steps if "data_s" in line]
    seconds = {part: sum(line[f"{part}_s"] for line in steps) for part in PARTS}
    total = sum(seconds.values())
    return {part: f"{took / total:.1%}" for part, took in seconds.items()} if steps else {}


def _curve(lines: list[dict], title: str, note: str, names: dict[str, str]) -> dict | None:
    """One plot with a line for each name that the run has, over its steps."""
    lines = [line for line in lines if names.keys() & line.keys()]
    if not lines:
        return None
    names = {name: label for name, label in names.items() if name in lines[0]}
    steps = np.array([line["step"] for line in lines], dtype=float)
    parts = [part for part in np.array_split(np.arange(len(lines)), POINTS) if len(part)]
    x = np.array([steps[part].mean() for part in parts])
    values = {name: np.array([line[name] for line in lines], dtype=float) for name in names}
    means = {name: np.array([values[name][part].mean() for part in parts]) for name in names}
    low, high = (float(f(np.concatenate(list(means.values())))) for f in (np.min, np.max))
    if any(name in FROM_ZERO for name in names):
        low = 0.0
    if high == low:
        low, high = low - 0.5, high + 0.5
    across = (x - steps[0]) / max(steps[-1] - steps[0], 1)
    drawn = [
        {
            "label": label,
            "value": f"{means[name][-1]:.4g}",
            "points": " ".join(
                f"{PLOT[0] * a:.1f},{PLOT[1] * (high - v) / (high - low):.1f}"
                for a, v in zip(across, means[name], strict=True)
            ),
        }
        for name, label in names.items()
    ]
    return {
        "title": title,
        "note": note,
        "lines": drawn,
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
        "first": int(steps[0]),
        "last": int(steps[-1]),
    }


def _examples(config: PretrainConfig, loader: ViewLoader) -> str:
    """The sheet of views as the text of a data URL."""
    step = -(-len(loader.data) // EXAMPLES)
    rows = [(*loader.read(index), 0) for index in range(0, len(loader.data), step)]
    memory = io.BytesIO()
    views_sheet(loader.recipe, rows, config.size, config.seed).save(memory, "PNG")
    return base64.b64encode(memory.getvalue()).decode()
