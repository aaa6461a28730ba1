"""Exact metrics beside scikit-learn, torchmetrics and anomalib.

    python bench/metrics.py

Checks first that the compared numbers agree to 1e-9 (AU-PRO, which anomalib sums in float32, to
1e-5), then runs the peers in turn, on one thread each. Sorting all scores, by numpy and as the
metrics do, and reading them once, timed in the same run, say how much there is to win.
`metrics_memory.py` goes further.
"""

import argparse
import time
from dataclasses import asdict

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO
from scipy import ndimage
from sklearn import metrics as sk
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from spd_fast import metrics

POSITIVES = 0.01
EXPONENTS = 8  # of the heavy-tailed scores, exp(8 z)


def scores(kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n float32 scores, 1 % of them of anomalous items, and the labels."""
    rng = np.random.default_rng(0)
    labels = rng.random(n) < POSITIVES
    values = rng.standard_normal(n, dtype=np.float32) + labels.astype(np.float32)
    if kind == "ties of 1/512":
        values = np.round(values * 512) / 512
    elif kind == "heavy tail":
        values = np.exp(EXPONENTS * values)
    return values, labels


def by_sklearn(values, labels) -> dict:
    return {
        "au_roc": sk.roc_auc_score(labels, values),
        "average_precision": sk.average_precision_score(labels, values),
    }


def curve_by_sklearn(values, labels) -> dict:
    precision, recall, _ = sk.precision_recall_curve(labels, values)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return {"au_pr": sk.auc(recall, precision), "max_f1": f1.max()}


def by_torchmetrics(values, labels) -> dict:
    values, labels = torch.from_numpy(values), torch.from_numpy(labels.astype(np.int64))
    # to [0, 1], order kept: what lies outside is passed through a sigmoid, which makes ties
    values = (values - values.min()) / (values.max() - values.min())
    return {
        "au_roc": binary_auroc(values, labels, validate_args=False).item(),
        "average_precision": binary_average_precision(values, labels, validate_args=False).item(),
    }


def timed(job, repeats: int = 1):
    """The job's result and its shortest time in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = job()
        times.append(time.perf_counter() - start)
    return result, min(times)


def radix_sort(values) -> np.ndarray:
    values = values.copy()
    metrics.sort(values, np.empty_like(values))
    return values


def compare_with_peers(kind: str, n: int) -> None:
    values, labels = scores(kind, n)
    ours, seconds = timed(lambda: asdict(metrics.image_metrics(values, labels)), 5)
    two, seconds_two = timed(lambda: by_sklearn(values, labels), 2)
    rest, seconds_rest = timed(lambda: curve_by_sklearn(values, labels))
    for name, expected in (two | rest).items():
        error = abs(ours[name] - expected)
        assert error < 1e-9, f"{kind}: {name} differs from scikit-learn's by {error}"
    theirs, seconds_torch = timed(lambda: by_torchmetrics(values, labels), 2)
    off = max(abs(ours[name] - theirs[name]) for name in theirs)
    by_numpy, sort = timed(lambda: np.sort(values), 3)[1], timed(lambda: radix_sort(values), 3)[1]
    read = timed(values.max, 5)[1]
    ratios = [s / seconds for s in (seconds_two, seconds_two + seconds_rest, seconds_torch)]
    print(
        f"{kind:<15}{seconds:>7.2f}{seconds_two:>10.1f} ({ratios[0]:>3.0f}x)"
        f"{seconds_two + seconds_rest:>9.1f} ({ratios[1]:>3.0f}x)"
        f"{seconds_torch:>9.1f} ({ratios[2]:>3.0f}x) {off:.0e}{by_numpy:>9.2f}"
        f"{sort:>7.2f}{read:>7.3f}"
    )


def compare_au_pro(n: int = 50, side: int = 256) -> None:
    rng = np.random.default_rng(0)
    maps = ndimage.gaussian_filter(rng.standard_normal((n, side, side)), (0, 4, 4)) * 8
    masks = ndimage.gaussian_filter(rng.standard_normal((n, side, side)), (0, 8, 8)) > 0.06
    masks[n // 2 :] = False
    maps = (maps + masks).astype(np.float32)
    ours, seconds = timed(lambda: metrics.pixel_metrics(maps, masks), 3)

    def anomalib():
        metric = _AUPRO()
        metric.update(torch.from_numpy(maps), torch.from_numpy(masks).int())
        return metric.compute().item()

    theirs, seconds_theirs = timed(anomalib)
    regions = sum(ndimage.label(mask, metrics.EIGHT_NEIGHBOURS)[1] for mask in masks)
    assert abs(ours.au_pro - theirs) < 1e-5, f"AU-PRO differs: {ours.au_pro}, {theirs}"
    print(
        f"\nAU-PRO of {n} maps of {side} x {side} with {regions} regions: anomalib "
        f"{seconds_theirs:.1f} s, ours (with all other metrics) {seconds:.2f} s, "
        f"ratio {seconds_theirs / seconds:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scores", type=float, default=2e7, help="beside the peers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    n = int(options.scores)
    print(f"{n:.0e} float32 scores, 1 % anomalous; seconds on one thread, ratio to ours")
    print(
        f"{'':<22}{'scikit-learn:':>17}{'and its PR':>16}{'torchmetrics: ROC,':>22}"
        f"{'sort of all:':>13}{'one':>10}\n{'':<15}{'ours':>7}{'ROC, AP':>17}{'curve, F1':>16}"
        f"{'AP; difference':>22}{'numpy':>9}{'ours':>7}{'read':>7}"
    )
    for kind in ("continuous", "ties of 1/512", "heavy tail"):
        compare_with_peers(kind, n)
    compare_au_pro()


if __name__ == "__main__":
    main()
