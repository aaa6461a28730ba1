import tracemalloc

import numpy as np
import pytest
from scipy import ndimage
from sklearn import metrics as sk

from spd_fast import metrics
from spd_fast.errors import InputError
from spd_fast.metrics import curves, image_metrics, pixel_metrics


def by_sklearn(scores, labels):
    precision, recall, thresholds = sk.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return {
        "au_roc": sk.roc_auc_score(labels, scores),
        "au_pr": sk.auc(recall, precision),
        "average_precision": sk.average_precision_score(labels, scores),
        "max_f1": f1.max(),
        "threshold": thresholds[np.flatnonzero(f1[:-1] > f1.max() - 1e-12)[-1]],
    }


def cases():
    rng = np.random.default_rng(0)
    labels = rng.random(2000) < 0.3
    yield "random", rng.standard_normal(2000) + labels, labels
    yield "float32", (rng.standard_normal(2000) + labels).astype(np.float32), labels
    yield "tied", rng.integers(0, 5, 2000) + labels, labels
    yield "perfect", labels + rng.random(2000) / 2, labels
    yield "inverted", -(labels + rng.random(2000) / 2), labels
    yield "constant", np.full(2000, 3.5), labels
    yield "one positive", rng.random(2000), np.arange(2000) == 77
    yield "one negative", rng.random(2000), np.arange(2000) != 77
    yield "two images", np.array([0.0, -0.0]), np.array([1, 0])
    yield "imbalanced", rng.standard_normal(50_000), rng.random(50_000) < 2e-4
    yield "heavy tail", rng.standard_cauchy(2000) * 1e30, labels


@pytest.mark.parametrize("scores, labels", [pytest.param(*c[1:], id=c[0]) for c in cases()])
def test_image_metrics_equal_scikit_learn(scores, labels):
    ours = image_metrics(scores, labels)
    for name, expected in by_sklearn(scores, labels).items():
        assert getattr(ours, name) == pytest.approx(expected, rel=0, abs=1e-9), name
    assert ours.au_pro is None


def test_max_f1_is_reached_at_the_threshold():
    rng = np.random.default_rng(1)
    labels = rng.random(500) < 0.2
    scores = (rng.standard_normal(500) + labels).astype(np.float32)
    ours = image_metrics(scores, labels)
    assert ours.max_f1 == pytest.approx(sk.f1_score(labels, scores >= ours.threshold), abs=1e-12)


def ranked(true_and_false):
    """Scores and labels of 100 positives, 100,000 negatives: (TP, FP) added at falling scores."""
    scores, labels = [], []
    for i, (tp, fp) in enumerate(true_and_false):
        scores += [-i] * (tp + fp)
        labels += [1] * tp + [0] * fp
    rest = 100_000 - labels.count(0)
    return np.array(scores + [-1e9] * rest), np.array(labels + [0] * rest)


@pytest.mark.parametrize(
    "model, au_roc, au_pr, max_f1",
    [
        ([(1, 9)] * 100, 99.55, 10.45, 18.18),
        ([(1, 10)] * 100, 99.50, 9.55, 16.67),
        ([(1, 0)] * 90 + [(1, 3000)] * 10, 98.50, 90.59, 94.74),
    ],
    ids=["model A as printed", "model A as stated", "model B"],
)
def test_toy_models_of_the_paper_appendix_b(model, au_roc, au_pr, max_f1):
    # the paper prints 99.5 / 10.5 / 18.2 for model A and 98.5 / 90.6 / 94.7 for model B
    ours = image_metrics(*ranked(model))
    assert 100 * ours.au_roc == pytest.approx(au_roc, abs=0.006)
    assert 100 * ours.au_pr == pytest.approx(au_pr, abs=0.006)
    assert 100 * ours.max_f1 == pytest.approx(max_f1, abs=0.006)


def test_constant_scorer_gets_what_it_deserves():
    labels = np.arange(200) < 30
    ours = image_metrics(np.zeros(200), labels)
    assert ours.au_roc == 0.5
    assert ours.au_pr == pytest.approx((1 + 0.15) / 2, abs=1e-12)
    assert ours.average_precision == pytest.approx(0.15, abs=1e-12)


def defects(n=6, size=48, seed=0, levels=None, dtype=np.float32):
    """Maps and masks with several regions (one joined by a diagonal) and normal images."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, size, size), dtype=bool)
    masks[0, 5:15, 8:20] = masks[0, 20, 20] = masks[0, 21, 21] = True
    masks[1, -8:, -8:] = masks[1, :3, :] = True
    masks[2] = ndimage.gaussian_filter(rng.standard_normal((size, size)), 2) > 0.15
    maps = ndimage.gaussian_filter(rng.standard_normal(masks.shape), (0, 2, 2)) * 4 + masks
    if levels:
        maps = np.round(maps * levels) / levels
    return maps.astype(dtype), masks


def pro_by_definition(maps, masks, limit=0.3):
    """Recall of every region at every threshold, averaged, integrated: slow and literal."""
    regions = []
    for i, mask in enumerate(masks):
        labels, n = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [maps[i][labels == k] for k in range(1, n + 1)]
    normal = maps[~masks]
    x, y = [0.0], [0.0]
    for u in np.unique(maps)[::-1]:
        x.append(np.mean(normal >= u))
        y.append(np.mean([np.mean(region >= u) for region in regions]))
    inside = np.array(x) < limit
    x_cut = np.append(np.array(x)[inside], limit)
    y_cut = np.append(np.array(y)[inside], np.interp(limit, x, y))
    return sk.auc(x_cut, y_cut) / limit


@pytest.mark.parametrize("levels", [None, 3, 1], ids=["continuous", "tied", "few levels"])
def test_au_pro_equals_its_definition_and_anomalib(levels):
    maps, masks = defects(size=24 if levels is None else 48, levels=levels)
    au_pro = pixel_metrics(maps, masks).au_pro
    assert au_pro == pytest.approx(pro_by_definition(maps, masks), abs=1e-9)
    anomalib = pytest.importorskip("anomalib.metrics.aupro", reason="anomalib is optional")
    import torch

    theirs = anomalib._AUPRO()
    theirs.update(torch.from_numpy(maps), torch.from_numpy(masks).int())
    assert au_pro == pytest.approx(theirs.compute().item(), abs=1e-5)  # theirs sums in float32


def test_au_pro_of_perfect_and_constant_maps():
    _, masks = defects()
    assert pixel_metrics(masks.astype(np.float32), masks).au_pro == pytest.approx(1, abs=1e-12)
    flat = pixel_metrics(np.ones(masks.shape, dtype=np.float32), masks)
    assert flat.au_pro == pytest.approx(0.15, abs=1e-12)  # the diagonal up to 0.3


def test_au_pro_weighs_small_regions_like_large_ones():
    masks = np.zeros((1, 40, 40), dtype=bool)
    masks[0, :20, :20] = masks[0, 30, 30] = True
    found_large, found_small = np.zeros((1, 40, 40)), np.zeros((1, 40, 40))
    found_large[0, :20, :20] = found_small[0, 30, 30] = 1
    large, small = pixel_metrics(found_large, masks), pixel_metrics(found_small, masks)
    assert large.au_pro == pytest.approx(small.au_pro, abs=1e-12)
    assert large.au_roc > small.au_roc + 0.4


def test_pixel_metrics_equal_scikit_learn_on_all_pixels():
    maps, masks = defects(levels=20)
    ours = pixel_metrics(maps, masks)
    for name, expected in by_sklearn(maps.ravel(), masks.ravel()).items():
        assert getattr(ours, name) == pytest.approx(expected, rel=0, abs=1e-9), name


def test_lists_of_maps_of_different_sizes():
    a, b = defects(size=24, seed=1), defects(size=33, seed=2)
    maps, masks = [*a[0], *b[0]], [*a[1], *b[1]]
    ours = pixel_metrics(maps, masks)
    flat = np.concatenate([m.ravel() for m in maps]), np.concatenate([m.ravel() for m in masks])
    assert ours.au_roc == pytest.approx(sk.roc_auc_score(flat[1], flat[0]), abs=1e-12)
    assert np.array_equal(curves(maps, masks).roc, curves(*flat).roc)


def test_tensors_and_numeric_masks_are_accepted():
    import torch

    maps, masks = defects()
    expected = pixel_metrics(maps, masks)
    assert pixel_metrics(torch.from_numpy(maps), torch.from_numpy(masks)) == expected
    assert pixel_metrics(list(maps), masks.astype(np.uint8) * 255) == expected


def spot_diff_by_definition(maps, masks):
    score, truth = maps.ravel(), masks.ravel()
    hit = score[truth]
    thresholds = [*np.percentile(hit, np.linspace(100, 0, 100))]
    thresholds += [*np.linspace(hit.max(), hit.min(), 100), score.min() - 1e-8, score.max() + 1e-8]
    fpr, tpr, precision = [], [], []
    for threshold in np.sort(np.array(thresholds, dtype=score.dtype))[::-1]:
        predicted = score > threshold
        fpr.append(np.mean(predicted[~truth]))
        tpr.append(np.mean(predicted[truth]))
        precision.append(np.mean(truth[predicted]) if predicted.any() else 1.0)
    return sk.auc(fpr, tpr), sk.auc(tpr, precision)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_spot_diff_compatible_areas(dtype):
    maps, masks = defects(dtype=dtype)
    exact, ours = pixel_metrics(maps, masks), pixel_metrics(maps, masks, compat="spot-diff")
    expected = spot_diff_by_definition(maps, masks)
    assert (ours.au_roc, ours.au_pr) == tuple(round(area, 4) for area in expected)
    assert ours.au_roc == pytest.approx(exact.au_roc, abs=0.02)
    assert (ours.au_pro, ours.threshold) == (exact.au_pro, exact.threshold)
    with pytest.raises(InputError, match="spot_diff"):
        pixel_metrics(maps, masks, compat="spot_diff")


@pytest.mark.parametrize("dtype, area", [(np.float32, 0.0), (np.float64, 0.5)])
def test_spot_diff_loses_its_margin_in_float32(dtype, area):
    # 1 - 1e-8 is 1 in float32: no threshold is below the only score, and the curve never leaves 0
    maps, masks = np.ones((1, 4, 4), dtype), np.zeros((1, 4, 4), bool)
    masks[0, 0] = True
    assert spot_diff_by_definition(maps, masks)[0] == area
    assert pixel_metrics(maps, masks, compat="spot-diff").au_roc == area


class Read:
    """A sequence whose items are made when they are asked for, and how often that was."""

    def __init__(self, items):
        self.items, self.reads = items, [0] * len(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.reads[i] += 1
        return self.items[i].copy()


@pytest.mark.parametrize("levels", [None, 20], ids=["continuous", "tied"])
@pytest.mark.parametrize("chunk", [1, 7, 1000, 48 * 48])
def test_chunks_and_reading_image_by_image_change_no_bit(levels, chunk, monkeypatch):
    maps, masks = defects(levels=levels)
    expected = pixel_metrics(maps, masks), pixel_metrics(maps, masks, compat="spot-diff")
    exact = curves(maps, masks)
    monkeypatch.setattr(metrics, "CHUNK", chunk)
    monkeypatch.setattr(metrics, "CHUNK_PER_POSITIVE", 0)
    lazy = Read(maps), Read(masks)
    assert (pixel_metrics(*lazy), pixel_metrics(*lazy, compat="spot-diff")) == expected
    assert np.array_equal(curves(*lazy).roc, exact.roc)
    assert np.array_equal(curves(*lazy).pr, exact.pr)


def test_maps_on_disk_are_read_twice_whatever_their_type(tmp_path):
    maps, masks = defects(dtype=np.float16)
    np.save(tmp_path / "maps.npy", maps)
    mapped = np.load(tmp_path / "maps.npy", mmap_mode="r")
    expected = pixel_metrics(maps.astype(np.float32), masks)
    assert pixel_metrics(mapped, masks) == expected
    mixed = Read([maps[0].astype(np.float64), *maps[1:]])
    assert pixel_metrics(mixed, masks) == expected
    assert max(mixed.reads[1:]) == 2


@pytest.mark.parametrize("dtype", ["f2", ">f4", "f8", ">f8", "g", "i4", "O"])
def test_scores_of_any_type(dtype):
    scores, labels = np.arange(100) * 7 % 50, np.arange(100) % 3 == 0
    assert image_metrics(scores.astype(dtype), labels) == image_metrics(scores * 1.0, labels)


@pytest.mark.parametrize("dtype", [complex, "U3", "M8[s]"])
def test_scores_that_are_no_numbers_are_refused(dtype):
    scores = np.arange(100).astype("i8").astype(dtype)
    with pytest.raises(InputError, match="scores are of type .*, expected real numbers"):
        image_metrics(scores, np.arange(100) % 3 == 0)


@pytest.mark.parametrize("odd", ["high", [1.0]])
def test_objects_that_are_no_numbers_are_refused(odd):
    scores = np.full(100, 0.5, dtype=object)
    scores[7] = odd
    with pytest.raises(InputError, match="scores must be real numbers: "):
        image_metrics(scores, np.arange(100) % 3 == 0)


def test_memory_holds_the_anomalous_pixels_and_a_chunk(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 10_000)
    size, n = 500, 40

    class Maps:
        def __len__(self):
            return n

        def __getitem__(self, i):
            if not 0 <= i < n:
                raise IndexError(i)
            return np.random.default_rng(i).standard_normal((size, size), dtype=np.float32)

    class Masks(Maps):
        def __getitem__(self, i):
            mask = np.zeros((size, size), bool)
            mask[:10, : i + 1] = True
            return mask

    tracemalloc.start()
    pixel_metrics(Maps(), Masks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 4 * size * size < 4 * n * size * size / 4  # a few maps, not all of them


def test_au_roc_is_exact_where_pairs_overflow_64_bits():
    # 10^9 positives above all negatives; 10^9 below half of them and tied with the others
    half = 25 * 10**8
    counts = metrics._Counts(
        score=np.array([2.0, 1.0]),
        tp=np.array([10**9, 2 * 10**9]),
        fp_above=np.array([0, half]),
        fp=np.array([0, 2 * half]),
        n_negative=2 * half,
    )
    assert 10**9 * 2 * counts.n_negative > 2**63
    assert metrics._metrics(counts).au_roc == (1 + 0.25) / 2


def test_progress_is_shown_when_asked_for_or_long(capsys, monkeypatch):
    maps, masks = defects()
    pixel_metrics(maps, masks)
    assert capsys.readouterr().err == ""
    pixel_metrics(maps, masks, progress=True)
    assert "normal pixels: 100%" in capsys.readouterr().err
    monkeypatch.setattr(metrics, "LONG", maps.size)
    curves(maps, masks)
    assert "anomalous pixels: 100%" in capsys.readouterr().err


def test_maps_that_change_between_the_passes():
    maps, masks = defects()

    class Emptied(Read):
        def __getitem__(self, i):
            return super().__getitem__(i) & (self.reads[2] < 2)

    with pytest.raises(InputError, match="on the first pass but .* on the second"):
        pixel_metrics(maps, Emptied(masks))


def test_few_points_are_the_exact_curve():
    rng = np.random.default_rng(3)
    labels = rng.random(60) < 0.4
    scores = rng.integers(0, 12, 60) + 3 * labels
    x, y = curves(scores, labels).roc
    fpr, tpr, _ = sk.roc_curve(labels, scores)
    assert np.allclose(np.interp(fpr + tpr, x + y, x), fpr)  # x + y grows, x alone need not
    assert sk.auc(x, y) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    recall, precision = curves(scores, labels).pr
    assert sk.auc(recall, precision) == pytest.approx(image_metrics(scores, labels).au_pr, abs=1e-9)


def test_thinned_curves_keep_ends_and_shape():
    rng = np.random.default_rng(4)
    labels = rng.random(200_000) < 0.02
    scores = rng.standard_normal(200_000) + 2 * labels
    exact = image_metrics(scores, labels)
    x, y = curves(scores, labels).roc
    assert len(x) == 300 and (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    fpr, tpr, _ = sk.roc_curve(labels, scores)
    assert np.abs(np.interp(fpr, x, y) - tpr)[fpr > 1e-3].max() < 0.01
    assert sk.auc(x, y) == pytest.approx(exact.au_roc, abs=1e-4)
    x, y = curves(scores, labels).pr
    assert len(x) == 300 and (x[0], y[0], x[-1], y[-1]) == (0, 1, 1, labels.mean())
    assert sk.auc(x, y) == pytest.approx(exact.au_pr, abs=1e-3)
    assert np.all(np.diff(x) >= 0)


@pytest.mark.parametrize(
    "scores, labels, message",
    [
        ([], [], "no scores"),
        ([0.1, 0.2], [0, 0], "everything is normal"),
        ([0.1, 0.2], [1, 1], "everything is anomalous"),
        ([0.1, 0.2, 0.3], [0, 1], "3 scores but 2 labels"),
        ([0.1, 0.2], [0, 255], "a label is 255"),
        ([0.1, np.nan, 0.3, np.inf], [0, 1, 0, 1], "2 scores are NaN.*2 of 4 images.*index 1"),
        ([[0.1], [0.2]], [0, 1], r"image score 0 has shape \(1,\)"),
    ],
)
def test_bad_image_scores(scores, labels, message):
    with pytest.raises(InputError, match=message):
        image_metrics(scores, labels)


def test_bad_maps():
    maps, masks = defects()
    with pytest.raises(InputError, match="everything is normal"):
        pixel_metrics(maps, np.zeros_like(masks))
    with pytest.raises(InputError, match=r"mask of image 0.*\(48, 47\).*\(48, 48\)"):
        pixel_metrics(maps, masks[:, :, 1:])
    with pytest.raises(InputError, match=r"score map 0 has shape \(1, 48, 48\)"):
        pixel_metrics(maps[:, None], masks[:, None])
    with pytest.raises(InputError, match="no scores"):
        pixel_metrics(maps[:0], masks[:0])
    with pytest.raises(InputError, match="a generator cannot be read twice"):
        pixel_metrics((m for m in maps), masks)
    maps[4, 3, :7] = np.nan
    maps[2, 0, 0] = -np.inf
    with pytest.raises(InputError, match="8 scores are NaN.*2 of 6 images.*index 2"):
        pixel_metrics(maps, masks)
