"""Confidence intervals of AU-ROC and AU-PR by a paired bootstrap over the test images.

Images are drawn with replacement, the normal and the anomalous ones apart (stratified), so every
resample has as many of each as the test set. Pixels of one image are not independent: pixel
metrics follow the images. A resample depends on the labels, the seed and the key alone, so
detectors scored on the same test images meet the same resamples, and the difference of their
replicates is that of their metrics. Replicates, one number per resample, are all that has to be
kept. The detector is taken as it is: what training it again would change is not in the interval.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from spd_fast.errors import InputError
from spd_fast.metrics import find_positives, floats, image_metrics, sort

BLOCK = 64  # resamples at a time: bounds the memory, and a block stays in the cache


def resample_counts(labels, n: int, seed: int, key: str = "") -> np.ndarray:
    """How often each image is in each of n resamples: (n, N) int32 for labels (N,), 0 or 1.

    key: name of the test set, such as the category; each has its own, independent resamples.
    Raises InputError: n is below 1, a label is not 0 or 1, or there is only one class.
    """
    if n < 1:
        raise InputError(f"{n} resamples were asked for, expected 1 or more")
    image_metrics(np.zeros(len(labels)), labels)  # checks the labels
    # Raw Philox numbers are the same for every numpy, which Generator.multinomial does not promise:
    # replicates stored long ago can still be compared.
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    counts = np.zeros((n, len(labels)), dtype=np.int32)
    for label in (0, 1):
        images = np.flatnonzero(np.asarray(labels) == label)
        drawn = (philox.random_raw(n * images.size) % images.size).astype(np.int64)
        place = drawn + np.repeat(np.arange(n), images.size) * images.size
        counts[:, images] = np.bincount(place, minlength=n * images.size).reshape(n, -1)
    return counts


def image_replicates(scores, labels, counts) -> dict[str, np.ndarray]:
    """`au_roc` and `au_pr` (n,) of image scores (N,) in each resample, as fractions of 1.

    Exact, also with ties: those of `image_metrics` for every image repeated counts[i] times.
    Raises InputError: as `image_metrics`, or counts are not (n, N). NaN where one class is left.
    """
    image_metrics(scores, labels)  # checks both
    order = np.argsort(scores)[::-1]
    scores, anomalous = np.asarray(scores)[order], np.asarray(labels)[order] == 1
    last = np.append(np.flatnonzero(scores[1:] != scores[:-1]), scores.size - 1)  # of those tied

    def at_or_above(block):
        drawn = block[:, order]
        tp = np.cumsum(drawn * anomalous, axis=1)[:, last]
        return tp, np.cumsum(drawn, axis=1)[:, last] - tp

    return _replicates(counts, scores.size, at_or_above)


def pixel_replicates(maps, masks, counts, thresholds: int = 2000) -> dict[str, np.ndarray]:
    """`au_roc` and `au_pr` (n,) of the pixels of maps (N, H, W) in each resample of the N images.

    Maps and masks are what `pixel_metrics` takes, read twice, image by image. Pixels are counted
    at and between thresholds, which are scores of anomalous pixels. If those have no more distinct
    scores than `thresholds`, the result is exact. Else pixels between neighbouring thresholds count
    as tied. That moves au_roc by at most half the largest share of the anomalous pixels between
    two: 1 / thresholds when every image counts once. au_pr has no such bound, but half of the
    thresholds lie ever denser towards the highest scores, where few pixels decide: in the simulated
    maps of the tests it moves by less than 5e-5. Takes 4 bytes per anomalous pixel, a few maps, and
    32 bytes per image and threshold.
    Raises InputError: as `pixel_metrics`, or counts are not (n, N). NaN where one class is left.
    """
    points = _thresholds(find_positives(maps, masks, progress=False).score, thresholds)
    tp = np.empty((len(maps), 2 * points.size + 1))  # float64, for a fast and exact product
    fp = np.empty_like(tp)
    for i in range(len(maps)):
        scores, anomalous = np.asarray(maps[i]), np.asarray(masks[i]) > 0
        tp[i] = _above_and_at(scores[anomalous], points)
        fp[i] = _above_and_at(scores[~anomalous], points)
    return _replicates(counts, len(maps), lambda block: (block @ tp, block @ fp))


def _thresholds(positives: np.ndarray, n: int) -> np.ndarray:
    """At most n of the ascending positives (P,), falling; all that are distinct if so few."""
    chosen = np.unique(positives)
    if chosen.size > n:
        even = np.linspace(1, positives.size, n - n // 2 + 1)[1:]
        dense = np.geomspace(1, positives.size, n // 2)
        ranks = np.concatenate([even, dense]).astype(np.int64)  # 1 is the highest score
        chosen = np.unique(positives[-ranks])
    return chosen[::-1]


def _above_and_at(scores: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(2 K + 1,): how many scores are > and >= each of K falling points, alternating, then all."""
    scores = np.array(floats(scores))
    sort(scores, np.empty_like(scores))
    above = scores.size - np.searchsorted(scores, points, side="right")
    at = scores.size - np.searchsorted(scores, points, side="left")
    return np.append(np.stack([above, at], axis=1), scores.size)


def _replicates(counts, images: int, at_or_above: Callable) -> dict[str, np.ndarray]:
    """at_or_above: from a block of counts to the tp and fp that `_areas` takes."""
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] != images or not len(counts):
        raise InputError(f"counts have shape {counts.shape}, expected (n, {images}) for the images")
    blocks = [counts[i : i + BLOCK].astype(np.float64) for i in range(0, len(counts), BLOCK)]
    au_roc, au_pr = np.concatenate([_areas(*at_or_above(block)) for block in blocks], axis=1)
    return {"au_roc": au_roc, "au_pr": au_pr}


def _areas(tp: np.ndarray, fp: np.ndarray) -> np.ndarray:
    """AU-ROC and AU-PR (2, B), defined as in `metrics`.

    tp, fp: (B, points), the positives and negatives at or above falling points, the last has all.
    """
    tp, fp = np.pad(tp, ((0, 0), (1, 0))), np.pad(fp, ((0, 0), (1, 0)))  # from above all scores on
    positives, negatives = tp[:, -1], fp[:, -1]
    precision = np.divide(tp, tp + fp, out=np.ones_like(tp), where=tp + fp > 0)
    step = np.diff(tp)
    # without a class there is no area
    positives, negatives = (np.where(n > 0, n, np.nan) for n in (positives, negatives))
    beaten = 2 * negatives[:, None] - fp[:, 1:] - fp[:, :-1]
    au_roc = np.sum(step * beaten, axis=1) / (2 * positives * negatives)
    au_pr = np.sum(step * (precision[:, 1:] + precision[:, :-1]), axis=1) / (2 * positives)
    return np.stack([au_roc, np.where(np.isnan(au_roc), np.nan, au_pr)])


def mean_replicates(replicates: Sequence) -> np.ndarray:
    """Replicates (n,) of a mean over categories, from the replicates of each, of its own key.

    Raises InputError: there are none, or they differ in number.
    """
    shapes = {np.shape(values) for values in replicates}
    if len(shapes) != 1:
        raise InputError(f"replicates have shapes {sorted(shapes)}, expected one, the same for all")
    return np.mean(replicates, axis=0)


def interval(replicates, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval, low and high, of replicates (n,), as fractions of 1 like them.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. With few
    images it is a little too narrow: of intervals at 95 % from 30 normal and 30 anomalous images,
    some 93 % held the true AU-ROC and 90 % the true AU-PR (simulated, as in the tests).
    Resamples without a value (NaN), since they had one class only, are left out.
    Raises InputError: fewer than half have a value, or a level that is not in (0, 1).
    """
    replicates = np.asarray(replicates, np.float64)
    known = replicates[np.isfinite(replicates)]
    if replicates.ndim != 1 or 2 * known.size < max(replicates.size, 1):
        raise InputError(
            f"{replicates.shape} replicates, {known.size} of them finite; expected (n,), and most"
        )
    if not 0 < level < 1:
        raise InputError(f"the level is {level}, expected a number between 0 and 1, such as 0.95")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference(a, b, level: float = 0.95) -> dict[str, float]:
    """How far detector a is above b, from the replicates (n,) of both in the same resamples.

    That they are the same cannot be seen here: both need one test set, seed and key. Gives `low`
    and `high`, the interval of a - b, and `p`, two-sided: twice the share of replicates at or
    beyond 0 on the rarer side, one counted more so that it is never 0. An interval of level
    1 - alpha leaves out 0 where p < alpha, but for rounding.
    Raises InputError: as `interval`, or a and b differ in number.
    """
    if np.shape(a) != np.shape(b):
        raise InputError(f"replicates have shapes {np.shape(a)} and {np.shape(b)}, expected equal")
    apart = np.subtract(a, b)
    low, high = interval(apart, level)
    rarer = min(np.count_nonzero(apart <= 0), np.count_nonzero(apart >= 0))
    known = np.count_nonzero(np.isfinite(apart))
    return {"low": low, "high": high, "p": min(1.0, 2 * (rarer + 1) / (known + 1))}
