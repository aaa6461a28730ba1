"""Exact metrics of an anomaly scorer, for images and for pixels, in numpy.

Recall changes only at the scores of anomalous items ("positives"), so every number here follows
from, per distinct positive score u, how many positives are >= u and how many negatives are > u and
>= u. A first pass over the scores collects the positives and sorts them. A second one counts the
negatives: it sorts them a chunk at a time, searches the distinct positives in the chunk, and adds
up. So the result is exact with ties, memory holds the positives and one chunk, and as counts are
whole numbers the result is the same to the bit however the scores are cut. A higher score means
more anomalous throughout.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from spd_fast.errors import InputError

try:
    from spd_fast._sort import sort
except ImportError:  # not compiled: numpy's is slower, the most (six times) with AVX-512 on Zen 4

    def sort(values: np.ndarray, scratch: np.ndarray) -> None:
        values.sort()


PRO_LIMIT = 0.3  # AU-PRO is the area up to this false positive rate, divided by it
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
# Negatives sorted at a time. A search costs several times what a sorted negative does, hence a
# chunk of 8 negatives or more for each positive searched in it.
CHUNK, CHUNK_PER_POSITIVE = 1 << 23, 8
LONG = 1 << 28  # pixels from which on a pass shows its progress unasked: several seconds


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
class _Positives:
    """What the first pass over all items finds."""

    score: np.ndarray  # of the anomalous items, ascending
    weight: np.ndarray | None  # 1 / (regions * pixels of the item's region), in the same order
    n_negative: int
    lowest: np.floating  # of all items
    highest: np.floating


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
        InputError: no scores, shapes that differ, a score that is no finite number, a label that is
            not 0 or 1, or only one of the two classes.
    """
    if len(scores) and np.ndim(scores[0]) != 0:
        raise InputError(f"image score 0 has shape {np.shape(scores[0])}, expected one number")
    return _metrics(_count_all(scores, labels))


def check_compat(compat: str | None) -> None:
    """Refuse a `compat` that `pixel_metrics` does not know.

    Raises:
        InputError: it is neither "spot-diff" nor None.
    """
    if compat not in (None, "spot-diff"):
        raise InputError(f"compat is 'spot-diff' or not given, got {compat!r}")


def pixel_metrics(maps, masks, compat: str | None = None, progress: bool | None = None) -> Metrics:
    """Metrics of score maps (N, H, W), or N maps (H, W) of any sizes, against masks of their sizes.

    All images enter, the normal ones with an empty mask. A mask is bool, or a number that is > 0
    where anomalous. float16 and float32 maps are compared in float32. AU-PRO averages the recall
    over the 8-connected regions of the masks and is the area up to a false positive rate of 0.3,
    over 0.3.

    Both may be any sequences: only `len(x)` and `x[i]` are used, once per image in each of two
    passes. So `np.memmap`, or an object that reads image i when indexed, does for sets that do not
    fit the memory: float32 maps take about 120 bytes per anomalous pixel, 64 MB and a few maps.

    compat="spot-diff": `au_roc` and `au_pr` are those of VisA's published script, which places 202
    thresholds by the scores of the anomalous pixels and rounds the areas to 4 decimals.

    progress: show a bar for each pass; None: if there are many pixels.

    Raises:
        InputError: no maps, shapes that differ, scores that are not finite, only one class, or a
            second pass that meets other masks than the first.
    """
    check_compat(compat)
    found = find_positives(maps, masks, progress, regions=True)
    thresholds = found.score[:0] if compat is None else _spot_diff_thresholds(found)
    counts, fp = _count(maps, masks, found, thresholds, progress)
    exact = asdict(_metrics(counts))
    # with weights 1 / (regions * pixels of the region) the mean recall of regions is one recall
    regions = replace(counts, tp=np.cumsum(found.weight[::-1])[counts.tp - 1])
    au_pro = _area_to(PRO_LIMIT, *_roc(regions)) / PRO_LIMIT
    exact["au_pro"] = min(au_pro, 1.0)  # against rounding
    if compat == "spot-diff":
        exact |= _spot_diff_areas(found, thresholds, fp)
    return Metrics(**exact)


@dataclass(frozen=True)
class Curves:
    """For plotting: each a pair of x and y, of at most as many vertices as were asked for."""

    roc: tuple[np.ndarray, np.ndarray]  # false positive rate, recall; from (0, 0) to (1, 1)
    pr: tuple[np.ndarray, np.ndarray]  # recall, precision; from (0, 1) to (1, prevalence)


def curves(scores, labels, points: int = 300, progress: bool | None = None) -> Curves:
    """The exact curves with at most `points` vertices each, so chosen that their shape stays.

    Takes scores and labels (N,), or maps and masks as `pixel_metrics` does, and raises as it does.
    """
    counts = _count_all(scores, labels, progress)
    n_positive = counts.tp[-1]
    recall = _interleave(counts.tp_above, counts.tp) / n_positive
    precision = _interleave(*_precisions(counts))
    prevalence = n_positive / (n_positive + counts.n_negative)
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[1.0], precision, [prevalence]])
    return Curves(_thin(*_roc(counts), points), _thin(recall, precision, points))


# --------------------------------------------------------------------------------------------------
# Input: the items of both classes, checked, as often as they are needed


def _pieces(
    scores, labels, title: str, progress: bool | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores and whether they are anomalous: image by image, or all at once if given flat."""
    if np.ndim(scores[0]) == 0:
        yield _same_shape(floats(scores), _zero_one(labels), "the labels")
        return
    if progress is None:
        progress = len(scores) * math.prod(np.shape(scores[0])) >= LONG
    for i in tqdm(range(len(scores)), desc=title, unit="image", disable=not progress):
        yield _same_shape(floats(scores[i]), np.asarray(labels[i]) > 0, f"the mask of image {i}")


def _same_shape(scores: np.ndarray, anomalous: np.ndarray, what: str):
    if scores.shape != anomalous.shape:
        raise InputError(
            f"{what} and the scores differ in shape, {anomalous.shape} and {scores.shape}"
        )
    return scores, anomalous


def floats(values) -> np.ndarray:
    """As float32 where that is exact (it halves the memory), else as float64."""
    values = np.asarray(values)
    if values.dtype.kind not in "biufO":
        raise InputError(f"scores are of type {values.dtype}, expected real numbers")
    exact = np.can_cast(values.dtype, np.float32)
    try:
        return values.astype(np.float32 if exact else np.float64, copy=False)
    except (TypeError, ValueError) as error:  # an object that is no number
        raise InputError(f"scores must be real numbers: {error}") from None


def _zero_one(labels) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype == bool:
        return labels
    wrong = labels[(labels != 0) & (labels != 1)]
    if wrong.size:
        raise InputError(f"a label is {wrong[0]}, expected 0 (normal) or 1 (anomalous)")
    return labels == 1


def _raise_not_finite(scores) -> None:
    bad = [int(np.count_nonzero(~np.isfinite(floats(scores[i])))) for i in range(len(scores))]
    images = np.flatnonzero(bad)
    raise InputError(
        f"{sum(bad)} scores are NaN or infinite, in {len(images)} of {len(scores)} images, "
        f"the first with index {images[0]}"
    )


# --------------------------------------------------------------------------------------------------
# The two passes


def find_positives(
    scores, labels, progress: bool | None = None, regions: bool = False
) -> _Positives:
    """The first pass. regions: the items are maps, and their pixels are weighed by region."""
    for values in (scores, labels):
        if not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
            raise InputError(
                f"a {type(values).__name__} cannot be read twice: expected an array, a list, or "
                "another sequence with len(x) and x[i]"
            )
    if len(scores) != len(labels):
        raise InputError(f"there are {len(scores)} scores but {len(labels)} labels or masks")
    if len(scores) == 0:
        raise InputError("there are no scores to evaluate, expected at least one of each class")
    positive, weights, extremes = [], [], []
    n_negative = n_regions = 0
    for i, (values, anomalous) in enumerate(_pieces(scores, labels, "anomalous pixels", progress)):
        if regions and values.ndim != 2:
            raise InputError(f"score map {i} has shape {values.shape}, expected (H, W)")
        if values.size:
            extremes.append([values.min(), values.max()])  # NaN if any score is
            if not np.isfinite(extremes[-1]).all():
                _raise_not_finite(scores)
        found = values[anomalous]
        n_negative += values.size - found.size
        positive.append(found)
        if regions and found.size:
            region, n = ndimage.label(anomalous, structure=EIGHT_NEIGHBOURS)
            region = region[anomalous]
            weights.append(1.0 / np.bincount(region)[region])
            n_regions += n
    positive = np.concatenate(positive)
    if not positive.size or not n_negative:
        present = "anomalous" if positive.size else "normal"
        raise InputError(f"everything is {present}, but the metrics need both classes")
    weight = None
    if regions:
        order = np.argsort(positive)
        positive, weight = positive[order], np.concatenate(weights)[order] / n_regions
    else:
        sort(positive, np.empty_like(positive))
    lowest, highest = np.min(extremes, axis=0)[0], np.max(extremes, axis=0)[1]
    return _Positives(positive, weight, n_negative, lowest, highest)


def _count_all(scores, labels, progress: bool | None = None) -> _Counts:
    found = find_positives(scores, labels, progress)
    return _count(scores, labels, found, found.score[:0], progress)[0]


def _count(
    scores, labels, found: _Positives, thresholds: np.ndarray, progress: bool | None
) -> tuple[_Counts, np.ndarray]:
    """The second pass: counts at the distinct positive scores; negatives > each threshold."""
    first = np.concatenate([[0], np.flatnonzero(found.score[1:] != found.score[:-1]) + 1])
    points = np.concatenate([found.score[first], thresholds])
    below = np.zeros(points.size, dtype=np.int64)  # negatives < point
    up_to = np.zeros(points.size, dtype=np.int64)  # negatives <= point
    size = min(max(CHUNK, CHUNK_PER_POSITIVE * points.size), found.n_negative)
    n_negative = 0
    pieces = _pieces(scores, labels, "normal pixels", progress)
    for chunk in _sorted_negatives(pieces, np.empty(size, found.lowest.dtype)):
        n_negative += chunk.size
        left = np.searchsorted(chunk, points, side="left")
        below += left
        up_to += left
        tied = np.flatnonzero(chunk[np.minimum(left, chunk.size - 1)] == points)
        up_to[tied] += np.searchsorted(chunk, points[tied], side="right") - left[tied]
    if n_negative != found.n_negative:
        raise InputError(
            f"there were {found.n_negative} normal items on the first pass but {n_negative} on "
            "the second: the scores and labels must stay the same"
        )
    counts = _Counts(
        score=found.score[first][::-1],
        tp=found.score.size - first[::-1],
        fp_above=n_negative - up_to[first.size - 1 :: -1],
        fp=n_negative - below[first.size - 1 :: -1],
        n_negative=n_negative,
    )
    return counts, n_negative - up_to[first.size :]


def _sorted_negatives(pieces, buffer: np.ndarray) -> Iterator[np.ndarray]:
    """The scores of the normal items, in sorted chunks of the buffer's size (the last: the rest).

    A chunk lies in `buffer`, which the next one overwrites.
    """
    filled = 0
    scratch = np.empty_like(buffer)
    for scores, anomalous in pieces:
        negative = scores[~anomalous]
        while negative.size:
            taken = negative[: buffer.size - filled]
            buffer[filled : filled + taken.size] = taken
            filled += taken.size
            negative = negative[taken.size :]
            if filled == buffer.size:
                sort(buffer, scratch)
                yield buffer
                filled = 0
    if filled:
        sort(buffer[:filled], scratch[:filled])
        yield buffer[:filled]


# --------------------------------------------------------------------------------------------------
# What follows from the counts


def _metrics(counts: _Counts) -> Metrics:
    n_positive = int(counts.tp[-1])
    step = counts.tp - counts.tp_above
    # Twice the pairs in which the positive scores higher, plus the ties: whole numbers, so nothing
    # is rounded. There may be 2 P N, for which int64 is too small from P + N = 2^32 on: so `beaten`
    # (at most 2 N) is summed in halves of 32 bits, both safe for P < 2^31, into a Python integer.
    beaten = 2 * counts.n_negative - counts.fp_above - counts.fp
    pairs = (int(np.sum(step * (beaten >> 32))) << 32) + int(np.sum(step * (beaten & 0xFFFFFFFF)))
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


def _spot_diff_thresholds(found: _Positives) -> np.ndarray:
    """The 202 thresholds, falling, in the type of the scores.

    100 are percentiles of the positives, 100 are evenly spaced over their range, two enclose all
    scores by 1e-8. The script compares them in the type of the scores, where that margin is mostly
    lost: its curve then ends a little before (1, 1), and so does this one.
    """
    positive = found.score
    thresholds = np.concatenate(
        [
            np.percentile(positive, np.linspace(100, 0, 100)),
            np.linspace(positive[-1], positive[0], 100),
            [found.lowest - 1e-8, found.highest + 1e-8],
        ]
    )
    return np.sort(thresholds.astype(found.lowest.dtype))[::-1]


def _spot_diff_areas(found: _Positives, thresholds: np.ndarray, fp: np.ndarray) -> dict[str, float]:
    """Areas of the curve of the 202 thresholds; fp negatives are (strictly) above each."""
    tp = found.score.size - np.searchsorted(found.score, thresholds, side="right")
    precision = np.divide(tp, tp + fp, out=np.ones(tp.size), where=tp + fp > 0)
    recall = tp / found.score.size
    return {
        "au_roc": round(_trapezoid(fp / found.n_negative, recall), 4),
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
