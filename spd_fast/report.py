"""The results of one or several evaluations as one HTML file and as a table for the terminal.

What a run is, `results.py` says.
"""

import base64
import itertools
import math
import mimetypes
from collections.abc import Iterable
from pathlib import Path

import jinja2
import numpy as np

from spd_fast import files
from spd_fast.errors import InputError
from spd_fast.results import difference

METRICS = {
    "au_roc": "AU-ROC",
    "au_pr": "AU-PR",
    "average_precision": "AP",
    "max_f1": "max F1",
    "au_pro": "AU-PRO",
}
LEVELS = {"image": list(METRICS)[:4], "pixel": list(METRICS)}
CURVES = {  # name in a run -> title, x axis, y axis, what its area is called
    "image_roc": ("Images: ROC", "false positive rate", "recall", "au_roc"),
    "image_pr": ("Images: precision and recall", "recall", "precision", "au_pr"),
    "pixel_roc": ("Pixels: ROC", "false positive rate", "recall", "au_roc"),
    "pixel_pr": ("Pixels: precision and recall", "recall", "precision", "au_pr"),
}
METHODS = {"padim": "PaDiM", "patchcore": "PatchCore", "unet": "U-Net"}
PROTOCOLS = {
    "1cls": "only normal images are seen before the test",
    "2cls_highshot": "normal and anomalous images are used for training",
    "2cls_fewshot": "a few normal and anomalous images are used for training",
}
PRESETS = {
    "paper": "shorter side resized to 256 pixels, centre 224 x 224 scored",
    "anomalib": "resized to 256 x 256 pixels",
}
NO_VALUE = "–"
# Of what there are paired intervals: level and metric.
PAIRED = [(level, metric) for level in LEVELS for metric in ("au_pr", "au_roc")]
PLOT = 180  # side of a curve's square, in SVG units


def write_report(runs: list[dict], path: str | Path, title: str) -> None:
    """Write the runs side by side into one HTML file that needs no network and no other file.

    Raises:
        InputError: there is no run, or an example picture of a run is missing.
    """
    if not runs:
        raise InputError("there is no run to report, expected at least one")
    page = template("report.html.j2").render(
        title=title,
        runs=runs,
        summary=_summary(runs),
        settings=_settings(runs),
        tables=_tables(runs),
        partial=len({frozenset(c["name"] for c in run["categories"]) for run in runs}) > 1,
        differences=_differences(runs),
        failed=_failed(runs),
        plots=_plots(runs),
        categories=_categories(runs),
        plot=PLOT,
    )
    files.write_text(path, page)


def template(name: str) -> jinja2.Template:
    """A page of `templates/`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def format_table(runs: list[dict]) -> str:
    """Percentages per category and their mean, for a terminal; of several runs `*` marks the best.

    One row per category for one run, one row per run below each category for several.
    """
    rows = _compare(runs)
    several = len(runs) > 1
    names = [f"  {run['name']}" for run in runs] if several else []
    width = max(len(text) for text in ["category", *names, *(row["title"] for row in rows)])
    groups = "".join(f"  {level:<{9 * len(keys) - 2}}" for level, keys in LEVELS.items())
    labels = "".join(f"{METRICS[key]:>8} " for keys in LEVELS.values() for key in keys)
    lines = [f"{'per cent':<{width}}{groups}".rstrip(), f"{'category':<{width}}{labels}".rstrip()]
    lines.append("-" * len(lines[1]))
    for row in rows:
        if row["mean"]:
            lines.append(lines[2])
        if several:
            lines.append(row["title"])
        for i in range(len(runs)):
            cells = (f"{texts[i]:>8}{'*' if i in best else ' '}" for texts, best in row["cells"])
            name = names[i] if several else row["title"]
            lines.append(f"{name:<{width}}{''.join(cells)}".rstrip())
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# What the page shows


def _compare(runs: list[dict]) -> list[dict]:
    """Rows of all categories and of the mean: per metric the texts of the runs and which are best.

    The mean is over the categories that all runs have, or it would not compare them.
    """
    by_name = [{c["name"]: c for c in run["categories"]} for run in runs]
    titles = {c["name"]: _title(c) for run in runs for c in run["categories"]}
    metrics = [(level, key) for level, keys in LEVELS.items() for key in keys]
    values = {
        name: [[_value(found.get(name), *metric) for found in by_name] for metric in metrics]
        for name in titles
    }
    shared = [values[name] for name in titles if all(name in found for found in by_name)]
    means = []
    for m in range(len(metrics)):
        complete = [row[m] for row in shared if all(math.isfinite(value) for value in row[m])]
        means.append(list(np.mean(complete, axis=0)) if complete else [math.nan] * len(runs))
    mean_title = "Mean" if len(shared) == len(titles) else "Mean (of shared)"
    rows = [(name, titles[name], values[name]) for name in titles] + [(None, mean_title, means)]
    return [
        {
            "name": name,  # None: the mean
            "title": title,
            "mean": name is None,
            "cells": [_texts_and_best(cell) for cell in cells],
            "small": [_small(by_name[0].get(name), *metric) for metric in metrics],
        }
        for name, title, cells in rows
    ]


def _small(category: dict | None, level: str, key: str) -> list[str]:
    """What stands below a number of the first run: its deviation over draws and its interval."""
    found = []
    deviation = ((category or {}).get(f"{level}_std") or {}).get(key)
    if deviation is not None:
        found.append(f"± {100 * deviation:.1f}")
    interval = ((category or {}).get("intervals") or {}).get(f"{level}_{key}")
    if interval:
        found.append("[{:.1f}, {:.1f}]".format(*(100 * end for end in interval)))
    return found


def _differences(runs: list[dict]) -> list[dict]:
    """Per run after the first how far it is above the first: rows of (text, whether 0 is outside of
    the interval) for each of PAIRED; empty where they have no test images in common."""
    first, *others = runs
    tables = []
    for run in others:
        shared = [
            c for c in run["categories"] if c["name"] in {f["name"] for f in first["categories"]}
        ]
        names = [(c["name"], _title(c), [c["name"]]) for c in shared]
        names.append((None, "Mean", [c["name"] for c in shared]))
        rows = []
        for name, title, together in names:
            found = [difference(run, first, *pair, together) for pair in PAIRED]
            rows.append({"name": name, "title": title, "cells": [_apart(f) for f in found]})
        if any(text != NO_VALUE for row in rows for text, _ in row["cells"]):
            tables.append({"run": run["name"], "first": first["name"], "rows": rows})
    return tables


def _apart(found) -> tuple[str, bool]:
    if found is None:
        return NO_VALUE, False
    value, low, high = (100 * number for number in found)
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", low > 0 or high < 0


def _failed(runs: list[dict]) -> list[str]:
    """Categories without results, and why."""
    several = len(runs) > 1
    return [
        f"{run['name']}, {name} failed: {reason}" if several else f"{name} failed: {reason}"
        for run in runs
        for name, reason in run.get("failed", {}).items()
    ]


def _title(category: dict) -> str:
    return category.get("title") or category["name"]


def _value(category: dict | None, level: str, key: str) -> float:
    value = ((category or {}).get(level) or {}).get(key)
    return math.nan if value is None else float(value)


def _texts_and_best(values: list[float]) -> tuple[list[str], set[int]]:
    """Equal as printed counts as equal: then all of them are best, or none if all runs are."""
    texts = [_percent(value) for value in values]
    numbers = [float(text) if text != NO_VALUE else -1.0 for text in texts]
    best = {i for i, number in enumerate(numbers) if number == max(numbers) >= 0}
    return texts, best if len(best) < len(texts) else set()


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else NO_VALUE


def _tables(runs: list[dict]) -> list[dict]:
    """One table with both levels for one run; for several one per level, runs in columns."""
    rows = _compare(runs)
    levels = [(f"{level.capitalize()} level", keys) for level, keys in LEVELS.items()]
    if len(runs) == 1:
        labels = [METRICS[key] for _, keys in levels for key in keys]
        groups = [(title, len(keys)) for title, keys in levels]
        table = {"title": "Results", "groups": groups, "labels": labels, "rows": rows}
        return [table | {"small": any(text for row in rows for text in row["small"])}]
    tables, start = [], 0
    for title, keys in levels:
        part = slice(start, start + len(keys))
        start += len(keys)
        tables.append(
            {
                "title": title,
                "groups": [(METRICS[key], len(runs)) for key in keys],
                "labels": [run["name"] for run in runs] * len(keys),
                "rows": [row | {"cells": row["cells"][part], "small": []} for row in rows],
                "small": False,
            }
        )
    return tables


def _summary(runs: list[dict]) -> dict:
    """The facts of the opening paragraph."""

    def of_all(key: str) -> str:
        return " and ".join(_distinct(shown_setting(run["config"].get(key, "?")) for run in runs))

    def explained(key: str, meanings: dict[str, str]) -> str:
        found = _distinct(str(run["config"].get(key)) for run in runs)
        return "; ".join(meanings[name] for name in found if name in meanings)

    return {
        "n_categories": len(_distinct(c["name"] for run in runs for c in run["categories"])),
        **{key: of_all(key) for key in ("data", "protocol", "backbone", "preset")},
        "method": explained("method", METHODS) or of_all("method"),
        "protocol_note": explained("protocol", PROTOCOLS),
        "preset_note": explained("preset", PRESETS),
        "image_prevalence": _span(_image_prevalence(c) for r in runs for c in r["categories"]),
        "pixel_prevalence": _span(_pixel_prevalence(c) for r in runs for c in r["categories"]),
    }


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _image_prevalence(category: dict) -> float:
    return category["n_anomalous"] / max(category["n_test"], 1)


def _pixel_prevalence(category: dict) -> float:
    curve = category["curves"].get("pixel_pr")
    return curve[1][-1] if curve else math.nan


def _span(values: Iterable[float]) -> str:
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return NO_VALUE
    low, high = _share(min(found)), _share(max(found))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _share(value: float) -> str:
    """Per cent, with more digits for the small shares that defects have of all pixels."""
    if not math.isfinite(value):
        return NO_VALUE
    return f"{100 * value:.1f}" if value >= 0.01 else f"{100 * value:.2g}"


def _settings(runs: list[dict]) -> list[tuple[str, list[str]]]:
    """(name, value of every run) of the configuration and the versions."""
    parts = [run["config"] | run.get("versions", {}) for run in runs]
    rows = [
        (key, [shown_setting(part.get(key)) for part in parts])
        for key in _distinct(key for part in parts for key in part)
    ]
    steps = [_step_seconds(run) for run in runs]
    rows += [
        (f"time: {step}", [_duration(seconds.get(step)) for seconds in steps])
        for step in _distinct(step for seconds in steps for step in seconds)
    ]
    return rows


def _step_seconds(run: dict) -> dict[str, float]:
    """Seconds of each step over all categories, and of the whole run."""
    totals: dict[str, float] = {}
    for category in run["categories"]:
        for step, seconds in (category.get("seconds") or {}).items():
            totals[step] = totals.get(step, 0.0) + seconds
    return totals | ({"all": run["seconds"]} if "seconds" in run else {})


def shown_setting(value) -> str:
    if value is None:
        return NO_VALUE
    if isinstance(value, list):
        return ", ".join(map(shown_setting, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NO_VALUE
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _plots(runs: list[dict]) -> list[dict]:
    """Per kind of curve one small plot per category, with a line per run."""
    kinds = []
    for kind, (title, x_label, y_label, area) in CURVES.items():
        plots: dict[str, dict] = {}
        for i, run in enumerate(runs):
            for category in run["categories"]:
                curve = category["curves"].get(kind)
                if not curve:
                    continue
                name = category["name"]
                new = {"name": name, "title": _title(category), "lines": []}
                plot = plots.setdefault(name, new)
                plot["chance"] = None if kind.endswith("roc") else curve[1][-1]
                value = _percent(_value(curve_owner(category), kind.split("_")[0], area))
                line = {"run": i, "name": run["name"], "value": value, "points": _points(*curve)}
                plot["lines"].append(line)
        if plots:
            axes = {"x_label": x_label, "y_label": y_label, "area": METRICS[area]}
            kinds.append({"title": title, "plots": list(plots.values()), **axes})
    return kinds


def curve_owner(category: dict) -> dict:
    """Of a k-shot protocol the draw that the curves are of, the first; else the category."""
    return category["draws"][0] if "draws" in category else category


def _points(x: list[float], y: list[float]) -> str:
    """Coordinates of an SVG polyline in the square of side PLOT, without repeated points."""
    texts = (f"{PLOT * a:.1f},{PLOT * (1 - b):.1f}" for a, b in zip(x, y, strict=True))
    return " ".join(text for text, _ in itertools.groupby(texts))


def _categories(runs: list[dict]) -> list[dict]:
    """Per category its counts and the examples of every run."""
    sections: dict[str, dict] = {}
    for run in runs:
        for category in run["categories"]:
            counts = {key: category[key] for key in ("n_train", "n_test", "n_anomalous")}
            facts = {"name": category["name"], "title": _title(category), "runs": [], **counts}
            facts["image_prevalence"] = _share(_image_prevalence(category))
            facts["pixel_prevalence"] = _share(_pixel_prevalence(category))
            section = sections.setdefault(category["name"], facts)
            threshold = category["image"].get("threshold")
            examples = [_example(run["dir"], section, e, threshold) for e in category["examples"]]
            section["runs"].append({"name": run["name"], "examples": examples})
    return list(sections.values())


def _example(directory: Path, section: dict, example: dict, threshold: float | None) -> dict:
    path = Path(directory) / example["file"]
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        raise InputError(f"cannot read the example image {path}: {error.strerror}") from error
    kind = mimetypes.guess_type(path.name)[0] or "image/jpeg"
    truth = "anomalous" if example["label"] else "normal"
    if example.get("defect"):
        truth += f" ({example['defect']})"
    score = f"score {example['score']:.4g}"
    if threshold is not None:
        called = "anomalous" if example["score"] >= threshold else "normal"
        score += f": called {called} at threshold {threshold:.4g}"
    return {
        "title": example["title"],
        "caption": example.get("caption") or "",
        "facts": f"{truth}, {score}",
        "alt": f"{section['title']}, {example['title']}: {truth}, {score}",
        "source": f"data:{kind};base64,{data}",
    }
