"""What an evaluation leaves in its directory, and reading it again.

A run is the dictionary that an evaluation saves as `results.json` in its output directory, plus
`dir`, that directory. Precision-recall curves in it end at (1, prevalence), as `metrics.curves`
makes them; example pictures are files below `dir`, as `sheet.example_sheet` draws them.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spd_fast import bootstrap
from spd_fast.errors import InputError

CATEGORIES = "categories"  # CATEGORIES/<name> has a category's RESULT, pictures and REPLICATES
RESULT, REPLICATES = "result.json", "replicates.npz"
STORED = 3  # version of what these hold: those of another one are made anew
# The first test image with a defect: "image" (h, w, 3) uint8, "mask" (h, w) bool, "map" (h, w) and
# the category's colour "scale", so that maps of several detectors can be drawn side by side.
SHOWN = "shown.npz"
REQUIRED = {"name": str, "config": dict, "categories": list}
REQUIRED_OF_CATEGORY = {
    "name": str,
    "n_train": int,
    "n_test": int,
    "n_anomalous": int,
    "image": dict,
    "curves": dict,
    "examples": list,
}


def load_run(directory: str | Path) -> dict:
    """The run that an evaluation wrote into `directory`, with the key `dir` added.

    Raises:
        InputError: `results.json` is missing or unreadable there, or is not what an evaluation
            writes.
    """
    path = Path(directory) / "results.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; expected the output of spd-fast evaluate"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is damaged, expected JSON: {error}") from error
    _check(run, REQUIRED, f"{path}")
    if not run["categories"]:
        raise InputError(f"{path} holds no category, expected at least one")
    for i, category in enumerate(run["categories"]):
        _check(category, REQUIRED_OF_CATEGORY, f"category {i} in {path}")
    return run | {"dir": Path(directory)}


def _check(value, required: dict[str, type], what: str) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{what} is a {type(value).__name__}, expected named values")
    for key, kind in required.items():
        if not isinstance(value.get(key), kind):
            raise InputError(f"{what} has no valid {key!r}, expected a {kind.__name__}")


class Difference(NamedTuple):
    """By how much a metric of one run is above that of another, as a fraction of 1, and the 95 %
    interval of a paired bootstrap over the test images."""

    value: float
    low: float
    high: float


def difference(
    run: dict, base: dict, level: str, metric: str, names: Iterable[str]
) -> Difference | None:
    """Of the means over categories.

    Args:
        level: "image" or "pixel".
        metric: "au_pr" or "au_roc".
        names: of the categories.

    Returns:
        None if a run lacks one of them, or the level, or they have other test images.
    """
    names = list(names)
    found = [{c["name"]: c for c in r["categories"] if c.get(level)} for r in (run, base)]
    for name in names:
        pair = [its.get(name, {}).get("test_set") for its in found]
        if pair[0] is None or pair[0] != pair[1]:  # results of before there were intervals: None
            return None
    if not names:
        return None
    values = [np.mean([its[name][level][metric] for name in names]) for its in found]
    apart = bootstrap.difference(*(replicates(r, level, metric, names) for r in (run, base)))
    return Difference(float(values[0] - values[1]), apart["low"], apart["high"])


def replicates(run: dict, level: str, metric: str, names: Iterable[str]) -> np.ndarray:
    """(n,): the replicates of the mean over the categories, as fractions of 1.

    Raises:
        InputError: a category's file is missing or damaged, or does not belong to the run: a later
            evaluation in the same directory was interrupted.
    """
    keys = {category["name"]: category.get("key") for category in run["categories"]}
    found = []
    for name in names:
        path = Path(run["dir"]) / CATEGORIES / name / REPLICATES
        try:
            stored = np.load(path)
            key, values = str(stored["key"]), stored[f"{level}_{metric}"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"cannot read the replicates in {path}: {error}") from error
        if key != keys.get(name):
            raise InputError(
                f"{path} is not of the run in {run['dir']}/results.json, but of a later one that "
                "was interrupted: finish that one, or do this one again"
            )
        found.append(values)
    return bootstrap.mean_replicates(found)
