"""Exact metrics of an anomaly scorer, for images and for pixels, in plain numpy.

Recall changes only at the scores of anomalous items ("positives"), so every number here follows
from, per distinct positive score u, how many positives are >= u and how many negatives are > u and
>= u. Sorting the two classes apart and looking the few positives up among the many negatives gives
these counts, exact with ties, without ever sorting or copying all scores together. A higher score
means more anomalous throughout.
"""

import heapq
from dataclasses import asdict, dataclass

import numpy as np
from scipy import ndimage

from spd_fast.errors import InputError

PRO_LIMIT = 0.3  # AU-PRO is the area up to this false positive rate, divided by it
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Metrics:
    """Metrics of one category, as fractions of 1.

    `au_pr` is the trapezoid under the precision-recall curve from (recall 0, precision 1) on, tied
    scores being one point: the paper's AU-PR (section 4.2, appendix B). A constant scorer gets
    (1 + prevalence) / 2 there but only the prevalence in `average_precision`, the step-wise sum.
    `max_f1` is reached by calling an item anomalous if its score is >= `threshold`; of several such
    thresholds it is the highest. `au_pro` (pixels only) averages the recall over defect regions.
    """

    au_roc: float
    au_pr: float
    average_precision: float
    max_f1: float
    threshold: float
    au_pro: float | None = None


@dataclass(frozen=True)
class _Counts:
    """Items above each distinct positive score, highest first; the positives may be weighted."""

    score: np.ndarray
    tp: np.ndarray  # positives with score >= u, float64 when weighted
    fp_above: np.ndarray  # negatives with score > u
    fp: np.ndarray  # negatives with score >= u
    n_negative: int

    @property
    def tp_above(self) -> np.ndarray:
        return np.concatenate([[0], self.tp[:-1]])


def image_metrics(scores, labels) -> Metrics:
    """Metrics of image scores (N,) against labels (N,), 0 normal and 1 anomalous; au_pro is None.

    Raises:
        InputError: no scores, shapes that differ, a score that is not finite, a label that is not 0
            or 1, or only one of the two classes.
    """
    if len(scores) and np.ndim(scores[0]) != 0:
        raise InputError(f"image score 0 has shape {np.shape(scores[0])}, expected one number")
    return _metrics(_count_unsorted(scores, labels))


def pixel_metrics(maps, masks, compat: str | None = None) -> Metrics:
    """Metrics of score maps (N, H, W), or N maps (H, W) of any sizes, against masks of their sizes.

    All images enter, the normal ones with an empty mask. A mask is bool, or a number that is > 0
    where anomalous. float32 maps are kept in float32. AU-PRO averages the recall over the
    8-connected regions of the masks and is the area up to a false positive rate of 0.3, over 0.3.

    compat="spot-diff": `au_roc` and `au_pr` are those of VisA's published script, which places 202
    thresholds by the scores of the anomalous pixels and rounds the areas to 4 decimals.

    Raises:
        InputError: no maps, shapes that differ, scores that are not finite, or only one class.
    """
    if compat not in (None, "spot-diff"):
        raise InputError(f"unknown compat {compat!r}, expected None or 'spot-diff'")
    _check_maps(maps)
    positive, negative = _split(maps, masks)
    order = np.argsort(positive)
    positive, negative = positive[order], np.sort(negative)
    exact = asdict(_metrics(_count(positive, negative)))
    # with weights 1 / (regions * pixels of the region) the mean recall of regions is one recall
    regions = _count(positive, negative, _region_weights(masks)[order])
    au_pro = _area_to(PRO_LIMIT, *_roc(regions)) / PRO_LIMIT
    exact["au_pro"] = min(au_pro, 1.0)  # against rounding
    if compat == "spot-diff":
        exact |= _spot_diff_areas(positive, negative)
    return Metrics(**exact)


def roc_curve(scores, labels, points: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """(false positive rate, recall) from (0, 0) to (1, 1), for plotting.

    Takes scores and labels (N,), or maps and masks as `pixel_metrics` does. Of the exact curve at
    most `points` vertices are kept, both ends among them, so chosen that its shape stays.
    """
    return _thin(*_roc(_count_unsorted(scores, labels)), points)


def pr_curve(scores, labels, points: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """(recall, precision) from (0, 1) to (1, prevalence), for plotting; else as `roc_curve`."""
    counts = _count_unsorted(scores, labels)
    n_positive = counts.tp[-1]
    recall = _interleave(counts.tp_above, counts.tp) / n_positive
    precision = _interleave(*_precisions(counts))
    prevalence = n_positive / (n_positive + counts.n_negative)
    recall = np.concatenate([[0.0], recall, [1.0]])
    return _thin(recall, np.concatenate([[1.0], precision, [prevalence]]), points)


# --------------------------------------------------------------------------------------------------
# Input: the scores of the two classes, checked


def _split(scores, labels) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the anomalous and of the normal items, in the order in which they came."""
    if len(scores) != len(labels):
        raise InputError(f"there are {len(scores)} scores but {len(labels)} labels or masks")
    if len(scores) == 0:
        raise InputError("there are no scores to evaluate, expected at least one of each class")
    if np.ndim(scores[0]) == 0:
        parts = [_split_one(_floats(scores), _zero_one(labels), "the labels")]
    else:
        parts = [
            _split_one(_floats(scores[i]), np.asarray(labels[i]) > 0, f"the mask of image {i}")
            for i in range(len(scores))
        ]
    positive, negative = (np.concatenate(kind) for kind in zip(*parts, strict=True))
    _check_finite(scores, positive, negative)
    if not positive.size or not negative.size:
        present = "anomalous" if positive.size else "normal"
        raise InputError(f"everything is {present}, but the metrics need both classes")
    return positive, negative


def _split_one(scores: np.ndarray, anomalous: np.ndarray, what: str):
    if scores.shape != anomalous.shape:
        raise InputError(
            f"{what} and the scores differ in shape, {anomalous.shape} and {scores.shape}"
        )
    return scores[anomalous], scores[~anomalous]


def _floats(values) -> np.ndarray:
    """As float32 where that is exact (it halves the memory), else as float64."""
    values = np.asarray(values)
    return values.astype(np.result_type(values.dtype, np.float32), copy=False)


def _zero_one(labels) -> np.ndarray:
    labels = np.asarray(labels)
    wrong = labels[(labels != 0) & (labels != 1)]
    if wrong.size:
        raise InputError(f"a label is {wrong[0]}, expected 0 (normal) or 1 (anomalous)")
    return labels == 1


def _check_maps(maps) -> None:
    for i in range(len(maps)):
        if np.ndim(maps[i]) != 2:
            raise InputError(f"score map {i} has shape {np.shape(maps[i])}, expected (H, W)")


def _check_finite(scores, positive: np.ndarray, negative: np.ndarray) -> None:
    if np.isfinite(positive).all() and np.isfinite(negative).all():
        return
    bad = [int(np.count_nonzero(~np.isfinite(_floats(scores[i])))) for i in range(len(scores))]
    images = np.flatnonzero(bad)
    raise InputError(
        f"{sum(bad)} scores are NaN or infinite, in {len(images)} of {len(scores)} images, "
        f"the first with index {images[0]}"
    )


# --------------------------------------------------------------------------------------------------
# Counts and what follows from them


def _count_unsorted(scores, labels) -> _Counts:
    return _count(*(np.sort(kind) for kind in _split(scores, labels)))


def _count(positive: np.ndarray, negative: np.ndarray, weights=None) -> _Counts:
    """Counts at the distinct positive scores; both classes sorted, `weights` of the positives."""
    first = np.concatenate([[0], np.flatnonzero(positive[1:] != positive[:-1]) + 1])
    score = positive[first]
    if weights is None:
        tp = positive.size - first
    else:
        tp = np.cumsum(weights[::-1])[positive.size - 1 - first]
    return _Counts(
        score=score[::-1],
        tp=tp[::-1],
        fp_above=negative.size - np.searchsorted(negative, score, side="right")[::-1],
        fp=negative.size - np.searchsorted(negative, score, side="left")[::-1],
        n_negative=negative.size,
    )


def _metrics(counts: _Counts) -> Metrics:
    n_positive = int(counts.tp[-1])
    step = counts.tp - counts.tp_above
    # twice the pairs in which the positive scores higher, plus the ties: whole numbers, no rounding
    pairs = int(np.sum(step * (2 * counts.n_negative - counts.fp_above - counts.fp)))
    before, after = _precisions(counts)
    f1 = 2 * counts.tp / (counts.tp + counts.fp + n_positive)
    best = int(np.argmax(f1))
    return Metrics(
        au_roc=pairs / (2 * n_positive * counts.n_negative),
        au_pr=float(np.sum(step * (before + after)) / (2 * n_positive)),
        average_precision=float(np.sum(step * after) / n_positive),
        max_f1=float(f1[best]),
        threshold=float(counts.score[best]),
    )


def _precisions(counts: _Counts) -> tuple[np.ndarray, np.ndarray]:
    """Precision just above each distinct positive score (1 where nothing is above) and at it."""
    above = counts.tp_above + counts.fp_above
    before = np.divide(counts.tp_above, above, out=np.ones(above.size), where=above > 0)
    return before, counts.tp / (counts.tp + counts.fp)


def _roc(counts: _Counts) -> tuple[np.ndarray, np.ndarray]:
    fpr = _interleave(counts.fp_above, counts.fp) / counts.n_negative
    recall = _interleave(counts.tp_above, counts.tp) / counts.tp[-1]
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], recall, [1.0]])


def _interleave(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return np.stack([before, after], axis=1).ravel()


def _area_to(limit: float, x: np.ndarray, y: np.ndarray) -> float:
    """Area under the polyline from x = 0 to x = limit."""
    end = int(np.searchsorted(x, limit, side="right"))
    if end < x.size:
        share = (limit - x[end - 1]) / (x[end] - x[end - 1])
        y = np.append(y[:end], y[end - 1] + share * (y[end] - y[end - 1]))
        x = np.append(x[:end], limit)
    return _trapezoid(x, y)


def _trapezoid(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.dot(np.diff(x), (y[1:] + y[:-1]) / 2))


def _region_weights(masks) -> np.ndarray:
    """1 / (regions * pixels of its region) per anomalous pixel, in the order of `_split`."""
    weights, regions = [], 0
    for i in range(len(masks)):
        mask = np.asarray(masks[i]) > 0
        labels, n = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
        regions += n
        labels = labels[mask]
        weights.append(1.0 / np.bincount(labels)[labels])
    return np.concatenate(weights) / regions


def _spot_diff_areas(positive: np.ndarray, negative: np.ndarray) -> dict[str, float]:
    """Areas of the 202-threshold curve, from sorted scores.

    100 thresholds are percentiles of the positives, 100 are evenly spaced over their range, two
    enclose all scores by 1e-8. They are compared in the type of the scores (strictly), where that
    margin is mostly lost: the curve then ends a little before (1, 1), here as there.
    """
    lowest = min(positive[0], negative[0]) - 1e-8
    highest = max(positive[-1], negative[-1]) + 1e-8
    thresholds = np.concatenate(
        [
            np.percentile(positive, np.linspace(100, 0, 100)),
            np.linspace(positive[-1], positive[0], 100),
            [lowest, highest],
        ]
    )
    thresholds = np.sort(thresholds.astype(positive.dtype))[::-1]
    tp = positive.size - np.searchsorted(positive, thresholds, side="right")
    fp = negative.size - np.searchsorted(negative, thresholds, side="right")
    precision = np.divide(tp, tp + fp, out=np.ones(tp.size), where=tp + fp > 0)
    recall = tp / positive.size
    return {
        "au_roc": round(_trapezoid(fp / negative.size, recall), 4),
        "au_pr": round(_trapezoid(recall, precision), 4),
    }


def _thin(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` vertices of a polyline (Ramer-Douglas-Peucker, worst stretch first)."""

    def farthest(first: int, last: int):
        """The vertex between the two that is farthest from their chord, as a heap entry."""
        dx, dy = x[last] - x[first], y[last] - y[first]
        inner = slice(first + 1, last)
        distance = np.abs(dx * (y[inner] - y[first]) - dy * (x[inner] - x[first]))
        i = int(np.argmax(distance))
        return -distance[i] / (np.hypot(dx, dy) or 1.0), first, first + 1 + i, last

    kept = [0, x.size - 1]
    heap = [farthest(0, x.size - 1)] if x.size > 2 else []
    while heap and len(kept) < points and heap[0][0] < 0:
        _, first, middle, last = heapq.heappop(heap)
        kept.append(middle)
        for a, b in ((first, middle), (middle, last)):
            if b - a > 1:
                heapq.heappush(heap, farthest(a, b))
    kept.sort()
    return x[kept], y[kept]
