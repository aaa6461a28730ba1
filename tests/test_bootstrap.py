from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage, stats
from sklearn import metrics as sk

from spd_fast.bootstrap import (
    difference,
    image_replicates,
    interval,
    mean_replicates,
    pixel_replicates,
    resample_counts,
)
from spd_fast.errors import InputError
from spd_fast.metrics import image_metrics, pixel_metrics


def by_sklearn(scores, labels, counts):
    """Both areas in each resample; scores and labels (N,), or (N, H, W) that follow the images."""
    areas = {"au_roc": [], "au_pr": []}
    for row in counts:
        weight = np.repeat(row, scores[0].size)
        curve = sk.precision_recall_curve(labels.ravel(), scores.ravel(), sample_weight=weight)
        areas["au_pr"].append(sk.auc(curve[1], curve[0]))
        roc = sk.roc_auc_score(labels.ravel(), scores.ravel(), sample_weight=weight)
        areas["au_roc"].append(roc)
    return areas


def same(ours, expected, tolerance):
    for name in ("au_roc", "au_pr"):
        np.testing.assert_allclose(ours[name], expected[name], rtol=0, atol=tolerance, err_msg=name)


def images(n=80, seed=0, shift=1.0):
    """Scores and labels of n images, a third of them anomalous, not in order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 3 == 0)
    return rng.standard_normal(n) + shift * labels, labels


def smooth_maps(n, size, radius, shift, seed=0):
    """Smooth noise; every second image has a disc that scores higher, a little beside its mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    maps, masks = np.empty((n, size, size), np.float32), np.zeros((n, size, size), bool)
    for i in range(n):
        maps[i] = 8 * ndimage.gaussian_filter(rng.standard_normal((size, size)), 3)
        if i % 2:
            centre = rng.integers(radius, size - radius, 2)
            masks[i] = np.hypot(y - centre[0], x - centre[1]) < radius
            aside = centre + rng.normal(0, radius / 3, 2)
            maps[i] += shift * rng.gamma(2) * (np.hypot(y - aside[0], x - aside[1]) < radius)
    return maps, masks


# --------------------------------------------------------------------------------------------------
# Resamples


def test_resamples_are_stratified_and_multinomial():
    labels = np.arange(50) % 5 == 0
    n = 20_000
    counts = resample_counts(labels, n, seed=0)
    assert counts.shape == (n, 50) and counts.min() == 0
    for of_class in (counts[:, labels], counts[:, ~labels]):
        size = of_class.shape[1]
        assert (of_class.sum(axis=1) == size).all()
        marginal = stats.binom(size, 1 / size)
        np.testing.assert_allclose(of_class.mean(axis=0), 1, atol=5 * marginal.std() / n**0.5)
        for k in range(5):
            share = np.mean(of_class == k, axis=0)
            error = (marginal.pmf(k) * (1 - marginal.pmf(k)) / n) ** 0.5
            np.testing.assert_allclose(share, marginal.pmf(k), atol=5 * error)
        pair = np.cov(of_class[:, 0], of_class[:, 1])[0, 1]
        assert pair == pytest.approx(-1 / size, abs=5 * marginal.var() / n**0.5)


def test_resamples_stay_the_same():
    # stored replicates of two detectors can only be compared while this holds
    counts = resample_counts([0, 0, 1, 0, 1, 0], n=3, seed=7, key="pcb1")
    assert counts.tolist() == [[0, 1, 2, 2, 0, 1], [0, 3, 2, 0, 0, 1], [1, 1, 2, 2, 0, 0]]


def test_resamples_depend_on_labels_seed_and_key_alone():
    _, labels = images(200)
    counts = resample_counts(labels, 50, seed=1, key="pcb1")
    assert (counts == resample_counts(labels.astype(int).tolist(), 50, seed=1, key="pcb1")).all()
    for seed, key in ((2, "pcb1"), (1, "pcb2"), (1, ""), (-1, "pcb1")):
        other = resample_counts(labels, 50, seed, key)
        assert np.mean(counts == other) < 0.5  # of independent Poisson(1) 0.31 are equal


def test_replicates_of_other_keys_are_independent():
    scores, labels = images()
    n = 4000
    a, b, again = (
        image_replicates(scores, labels, resample_counts(labels, n, 0, key))["au_pr"]
        for key in ("pcb1", "pcb2", "pcb1")
    )
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / n**0.5
    # so the mean over categories is as sure as the theory of independent ones says
    assert mean_replicates([a, b]).var() == pytest.approx((a.var() + b.var()) / 4, rel=0.1)
    assert mean_replicates([a, again]).var() == pytest.approx(a.var())
    assert mean_replicates([[0, 6], [0, 3], [3, 0]]).tolist() == [1, 3]


# --------------------------------------------------------------------------------------------------
# Replicates of images


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda scores, labels: scores, id="distinct"),
        pytest.param(lambda scores, labels: scores.astype(np.float16), id="float16"),
        pytest.param(lambda scores, labels: np.round(scores), id="tied"),
        pytest.param(lambda scores, labels: np.round(scores).astype(np.int64), id="integers"),
        pytest.param(lambda scores, labels: labels + scores / 100, id="perfect"),
        pytest.param(lambda scores, labels: scores / 100 - labels, id="inverted"),
        pytest.param(lambda scores, labels: scores * 0 + 3.5, id="constant"),
    ],
)
def test_image_replicates_equal_scikit_learn(change):
    scores, labels = images()
    scores = change(scores, labels)
    counts = resample_counts(labels, 70, seed=0)  # more than a block
    same(image_replicates(scores, labels, counts), by_sklearn(scores, labels, counts), 1e-12)


def test_every_image_once_gives_the_metrics():
    for seed in range(20):
        scores, labels = images(seed=seed)
        scores = np.round(scores, seed % 3)
        exact = image_metrics(scores, labels)
        same(image_replicates(scores, labels, np.ones((1, 80))), vars(exact), 1e-12)


def test_constant_scores():
    _, labels = images()
    counts = resample_counts(labels, 100, seed=0)
    ours = image_replicates(np.zeros(80), labels, counts)
    same(ours, {"au_roc": 0.5, "au_pr": (1 + labels.mean()) / 2}, 1e-15)
    masks = np.arange(80)[:, None, None] * labels[:, None, None] > np.arange(100).reshape(10, 10)
    anomalous, total = counts @ masks.sum(axis=(1, 2)), 100 * 80
    ours = pixel_replicates(np.zeros(masks.shape), masks, counts)
    same(ours, {"au_roc": 0.5, "au_pr": (1 + anomalous / total) / 2}, 1e-12)


# --------------------------------------------------------------------------------------------------
# Replicates of pixels


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_pixel_replicates_are_exact_with_a_threshold_for_every_anomalous_score(decimals):
    maps, masks = smooth_maps(12, 20, 4, shift=1.0)
    maps = np.round(maps, decimals)
    counts = resample_counts(masks.any(axis=(1, 2)), 70, seed=0)
    distinct = np.unique(maps[masks]).size
    expected = by_sklearn(maps, masks, counts)
    same(pixel_replicates(maps, masks, counts, thresholds=distinct), expected, 1e-12)
    fewer = pixel_replicates(maps, masks, counts, thresholds=distinct // 2)
    assert np.abs(fewer["au_pr"] - expected["au_pr"]).max() > 1e-9


def test_pixel_replicates_of_one_pixel_are_those_of_images():
    scores, labels = images()
    counts = resample_counts(labels, 100, seed=0)
    maps, masks = scores.reshape(-1, 1, 1), 255 * labels.reshape(-1, 1, 1).astype(np.uint8)
    same(pixel_replicates(maps, masks, counts), image_replicates(scores, labels, counts), 1e-12)


@pytest.mark.parametrize("dtype", ["f2", ">f4", "u1", "i8", "g"])
def test_maps_of_any_type(dtype):
    maps, masks = smooth_maps(12, 20, 4, shift=1.0)
    maps = np.round(maps * 4 + 100)
    counts = resample_counts(masks.any(axis=(1, 2)), 20, seed=0)
    expected = pixel_replicates(maps, masks, counts)
    same(pixel_replicates(maps.astype(dtype), masks, counts), expected, 1e-12)


def test_maps_of_several_sizes():
    maps, masks = smooth_maps(12, 20, 4, shift=1.0)
    counts = resample_counts(masks.any(axis=(1, 2)), 20, seed=0)
    # an image cut in two halves is drawn as one: its halves get the same count
    halves = [half for image in maps for half in (image[:7], image[7:])]
    their_masks = [half for image in masks for half in (image[:7], image[7:])]
    ours = pixel_replicates(halves, their_masks, np.repeat(counts, 2, axis=1))
    same(ours, pixel_replicates(maps, masks, counts), 1e-12)


def test_thresholds_move_the_areas_little():
    maps, masks = smooth_maps(40, 64, 12, shift=0.5)
    assert masks.sum() > 8000
    counts = resample_counts(masks.any(axis=(1, 2)), 5, seed=0)
    same(pixel_replicates(maps, masks, counts), by_sklearn(maps, masks, counts), 5e-5)


@pytest.mark.parametrize("shift, tolerance", [(1.0, 2e-6), (3.0, 5e-4), (5.0, 5e-4)])
def test_thresholds_move_the_areas_little_at_low_prevalence(shift, tolerance):
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((50, 224, 224), dtype=np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[:25, 100, 80:128] = True  # 5e-4 of the pixels
    maps[masks] += shift
    exact = pixel_metrics(maps, masks)
    ones = np.ones((1, 50))
    few = pixel_replicates(maps, masks, ones, thresholds=200)  # for 1200 anomalous pixels
    assert few["au_pr"][0] == pytest.approx(exact.au_pr, abs=tolerance)
    assert few["au_roc"][0] == pytest.approx(exact.au_roc, abs=1 / 200)
    same(pixel_replicates(maps, masks, ones), vars(exact), 1e-12)


def test_the_error_of_au_roc_has_the_bound_that_is_promised():
    # all normal pixels at one score between two anomalous ones: the worst case, wherever it is
    positives, n = np.arange(1000.0), 20
    mask = np.arange(1010).reshape(1, 10, 101) < 1000
    errors = []
    for place in range(1000):
        scores = np.append(positives, np.full(10, place + 0.5)).reshape(mask.shape)
        ours = pixel_replicates(scores, mask, np.ones((1, 1)), thresholds=n)["au_roc"][0]
        errors.append(abs(ours - (999 - place) / 1000))
    assert 0.9 / n < max(errors) <= 1 / n


# --------------------------------------------------------------------------------------------------
# Intervals


def test_interval_and_difference_of_normal_replicates():
    grid = stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000)
    for level in (0.9, 0.95):
        expected = stats.norm.interval(level, loc=1.5)
        assert interval(grid + 1.5, level) == pytest.approx(expected, abs=2e-3)
        found = difference(grid + 2, np.full(10_000, 0.5), level)
        assert (found["low"], found["high"]) == pytest.approx(expected, abs=2e-3)
        assert found["p"] == pytest.approx(2 * stats.norm.sf(1.5), abs=1e-3)
    zeros = np.zeros(10_000)
    assert difference(zeros, grid + 1.5)["p"] == pytest.approx(2 * stats.norm.sf(1.5), abs=1e-3)
    assert difference(grid + 100, zeros)["p"] == 2 / 10_001


def test_interval_is_near_that_of_scipy():
    scores, labels = images(120)
    ours, theirs = 5000, 1000

    def statistic(name):
        def of(normal, anomalous):
            labels = np.arange(normal.size + anomalous.size) >= normal.size
            return getattr(image_metrics(np.append(normal, anomalous), labels), name)

        return of

    replicates = image_replicates(scores, labels, resample_counts(labels, ours, seed=0))
    # standard error of the 2.5 % quantile of normal replicates, in their standard deviations
    error = (0.025 * 0.975 * (1 / ours + 1 / theirs)) ** 0.5 / stats.norm.pdf(1.96)
    for name in ("au_roc", "au_pr"):
        expected = stats.bootstrap(
            (scores[~labels], scores[labels]),
            statistic(name),
            n_resamples=theirs,
            vectorized=False,
            method="percentile",
            random_state=np.random.default_rng(0),
        ).confidence_interval
        tolerance = 4 * error * replicates[name].std()
        assert tolerance < 0.15 * (expected.high - expected.low)
        assert interval(replicates[name]) == pytest.approx(tuple(expected), abs=tolerance)


def test_interval_covers_the_true_value():
    rng = np.random.default_rng(0)
    labels = np.arange(60) < 30
    grid = stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)  # as good as endless images
    true = image_metrics(np.append(grid, grid + 1.2), np.repeat([0, 1], grid.size))
    assert true.au_roc == pytest.approx(stats.norm.cdf(1.2 / 2**0.5), abs=1e-4)
    covered = {"au_roc": 0, "au_pr": 0}
    for i in range(300):
        scores = rng.standard_normal(60) + 1.2 * labels
        replicates = image_replicates(scores, labels, resample_counts(labels, 500, seed=i))
        for name in covered:
            low, high = interval(replicates[name])
            covered[name] += low <= getattr(true, name) <= high
    assert 0.90 <= covered["au_roc"] / 300 <= 0.98
    assert 0.86 <= covered["au_pr"] / 300 <= 0.96


def test_pairing():
    scores, labels = images(120)
    near = scores + 0.1 * np.random.default_rng(1).standard_normal(120)
    counts = resample_counts(labels, 1000, seed=0)
    other = resample_counts(labels, 1000, seed=1)
    for name in ("au_roc", "au_pr"):
        a = image_replicates(scores, labels, counts)[name]
        again = image_replicates(3 * scores + 1, labels, counts.copy())[name]
        assert difference(a, again) == {"low": 0, "high": 0, "p": 1}
        paired = difference(a, image_replicates(near, labels, counts)[name])
        unpaired = difference(a, image_replicates(near, labels, other)[name])
        assert paired["high"] - paired["low"] < (unpaired["high"] - unpaired["low"]) / 3


def test_pixels_of_an_image_stay_together():
    # pixels drawn one by one would make the interval far too narrow
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2 == 1
    level = rng.standard_normal(40) + labels
    maps = np.broadcast_to(level[:, None, None], (40, 8, 8))
    masks = np.broadcast_to(labels[:, None, None], maps.shape)
    counts = resample_counts(labels, 200, seed=0)
    same(pixel_replicates(maps, masks, counts), image_replicates(level, labels, counts), 1e-12)


# --------------------------------------------------------------------------------------------------
# Wrong input

GOOD = SimpleNamespace(
    scores=np.arange(4.0),
    labels=np.array([0, 1, 0, 1]),
    maps=np.arange(36.0).reshape(4, 3, 3),
    masks=np.arange(36).reshape(4, 3, 3) % 5 == 0,
    counts=np.ones((2, 4)),
)
NAN = np.array([0, 1, np.nan, 3])
EMPTY = np.zeros((4, 3, 3), bool)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda g: resample_counts(g.labels, 0, 0), "0 resamples"),
        (lambda g: resample_counts([0, 0, 0], 5, 0), "everything is normal"),
        (lambda g: resample_counts([1, 1], 5, 0), "everything is anomalous"),
        (lambda g: resample_counts([0, 2], 5, 0), "a label is 2"),
        (lambda g: resample_counts([], 5, 0), "no scores"),
        (lambda g: image_replicates(NAN, g.labels, g.counts), "1 scores are NaN"),
        (lambda g: image_replicates(g.scores[:3], g.labels, g.counts), "3 scores but 4 labels"),
        (lambda g: image_replicates(g.scores, [0, 0, 0, 0], g.counts), "everything is normal"),
        (lambda g: image_replicates(g.scores, g.labels, g.counts[:, :3]), r"shape \(2, 3\)"),
        (lambda g: image_replicates(g.scores, g.labels, g.counts[0]), r"shape \(4,\)"),
        (lambda g: image_replicates(g.scores, g.labels, g.counts[:0]), r"shape \(0, 4\)"),
        (lambda g: pixel_replicates(g.maps * np.nan, g.masks, g.counts), "36 scores are NaN"),
        (lambda g: pixel_replicates(g.maps, g.masks[:3], g.counts), "4 scores but 3"),
        (lambda g: pixel_replicates(g.maps, g.masks[:, :2], g.counts), "mask of image 0"),
        (lambda g: pixel_replicates(g.maps, EMPTY, g.counts), "everything is normal"),
        (lambda g: pixel_replicates(g.maps, g.masks, g.counts.T), r"shape \(4, 2\)"),
        (lambda g: interval([]), "0 of them finite"),
        (lambda g: interval([np.nan, np.nan, 1.0]), "1 of them finite"),
        (lambda g: interval(g.counts), r"\(2, 4\) replicates"),
        (lambda g: interval(g.scores, 95), "the level is 95"),
        (lambda g: difference(g.scores, g.scores[:3]), r"shapes \(4,\) and \(3,\)"),
        (lambda g: difference(g.scores, NAN * np.nan), "0 of them finite"),
        (lambda g: mean_replicates([]), "replicates have shapes"),
        (lambda g: mean_replicates([g.scores, g.scores[:3]]), r"shapes \[\(3,\), \(4,\)\]"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(GOOD)


def test_resamples_of_one_class_have_no_value_and_are_left_out():
    scores, labels = np.array([0.1, 0.4, 0.3, 0.9]), np.array([0, 1, 0, 1])
    counts = [[1, 0, 2, 0], [1, 1, 1, 1], [0, 2, 1, 1]]
    found = image_replicates(scores, labels, counts)
    for values in found.values():
        assert np.isnan(values).tolist() == [True, False, False]
        assert interval(values) == interval(values[1:])
    apart = difference(found["au_roc"], found["au_roc"])
    assert (apart["low"], apart["high"]) == (0, 0)
    maps, masks = scores[:, None, None] * np.ones((4, 2, 2)), np.zeros((4, 2, 2), bool)
    masks[1, 0, 0] = True  # the other anomalous image's defect is out of sight
    found = pixel_replicates(maps, masks, [[1, 0, 1, 2], [1, 1, 1, 1]])
    for values in found.values():
        assert np.isnan(values).tolist() == [True, False]
