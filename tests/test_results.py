"""Differences between runs, and their intervals."""

import json

import numpy as np
import pytest
from test_report import Page
from trees import small_visa

from spd_fast import InputError
from spd_fast.evaluate import EvaluateConfig, evaluate
from spd_fast.report import write_report
from spd_fast.results import CATEGORIES, REPLICATES, difference, load_run, replicates

NAMES = ["board", "nut"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two weights on one data set; then two runs of one data set with other test images."""
    root = tmp_path_factory.mktemp("runs")
    visa, other = small_visa(root / "visa", NAMES), small_visa(root / "other", NAMES, anomalous=5)
    done = []
    for number, data in enumerate((visa, visa, other)):
        config = EvaluateConfig(
            data=str(data),
            out=str(root / f"run{number}"),
            weights="random",
            n_features=5,
            seed=number,
            name=f"run {number}",
        )
        done.append(evaluate(config))
    return done


def test_the_difference_of_means_and_its_interval(runs):
    first, second, _ = runs
    apart = difference(second, first, "pixel", "au_pr", NAMES)
    values = [[c["pixel"]["au_pr"] for c in run["categories"]] for run in (second, first)]
    assert apart.value == pytest.approx(np.mean(values[0]) - np.mean(values[1]))
    means = []
    for run in (second, first):
        stored = [np.load(run["dir"] / CATEGORIES / name / REPLICATES) for name in NAMES]
        means.append((stored[0]["pixel_au_pr"] + stored[1]["pixel_au_pr"]) / 2)
        assert np.allclose(means[-1], replicates(run, "pixel", "au_pr", NAMES))
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    assert (apart.low, apart.high) == pytest.approx((low, high)) and low < high
    assert low - 0.02 < apart.value < high + 0.02
    assert difference(first, first, "pixel", "au_pr", NAMES) == (0, 0, 0)


def test_only_the_same_test_images_compare(runs):
    first, second, other = runs
    assert difference(other, first, "image", "au_roc", NAMES) is None
    assert difference(second, first, "image", "au_roc", ["board", "screw"]) is None
    assert difference(second, first, "image", "au_roc", []) is None
    without = json.loads(json.dumps(second | {"dir": ""}))
    without["categories"][0]["pixel"] = None  # as a classifier's
    assert difference(without | {"dir": second["dir"]}, first, "pixel", "au_pr", NAMES) is None


def test_the_report_shows_differences(runs, tmp_path):
    first, second, other = runs
    write_report([first, second, other], tmp_path / "report.html", "Three")
    text = (tmp_path / "report.html").read_text()
    assert "run 1, above run 0" in text and "run 2, above run 0" not in text
    apart = difference(second, first, "pixel", "au_roc", ["nut"])
    cell = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * number for number in apart))
    (row,) = [row for row in Page(text).rows if row[0] == "nut" and "[" in row[1]]
    assert row[4] == cell


def test_missing_replicates_are_named(runs, tmp_path):
    with pytest.raises(InputError, match="cannot read the replicates in .*replicates.npz"):
        replicates(runs[0] | {"dir": tmp_path}, "image", "au_pr", NAMES)
    with pytest.raises(InputError, match="results.json"):
        load_run(tmp_path)
