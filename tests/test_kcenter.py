import sys
import threading

import numpy as np
import pytest
import torch
from cases import POINT_CASES, point_case
from sklearn.neighbors import NearestNeighbors
from torch.library import opcheck

from spd_fast import InputError, greedy_kcenter
from spd_fast import reference_patchcore as reference
from spd_fast.ops.backends import native
from spd_fast.ops.bounds import coordinates, principal_axes, rounding
from spd_fast.ops.kcenter import SAMPLE
from spd_fast.ops.nearest import BOUNDS, nearest_neighbors, prepare_bank

pytestmark = pytest.mark.usefixtures("two_threads")

# ------------------------------------------------------- reference against numpy, anomalib, sklearn


@pytest.mark.parametrize("name", POINT_CASES)
def test_squared_distances_equal_numpy(name):
    points = point_case(name)
    x = points.double().numpy()
    expected = np.square(x - x[-1]).sum(1)
    ours = reference.squared_distances(points, points[-1]).double().numpy()
    assert np.abs(ours - expected).max() <= 1e-6 * expected.max()
    exact = reference.squared_distances(points.double(), points[-1].double()).numpy()
    assert np.abs(exact - expected).max() <= 1e-14 * expected.max()


def anomalib_picks(points: torch.Tensor, k: int, start: int, monkeypatch) -> list[int]:
    """anomalib's loop on the points as they are: without its random projection and start."""
    from anomalib.models.components.sampling import k_center_greedy

    sampler = k_center_greedy.KCenterGreedy(points, k / len(points) + 1e-9)
    assert sampler.coreset_size == k
    monkeypatch.setattr(sampler.model, "fit", lambda x: None)
    monkeypatch.setattr(sampler.model, "transform", lambda x: x)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([start]))
    picks = sampler.select_coreset_idxs()
    monkeypatch.undo()
    return picks


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", ["one dimension", "whole partial sums", "ties everywhere"])
def test_picks_equal_anomalib(name, backend, monkeypatch):
    points = point_case(name)
    theirs = anomalib_picks(points, 40, 7, monkeypatch)
    assert greedy_kcenter(points, 40, 7, backend=backend).tolist() == theirs


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("k", [1, 9])
@pytest.mark.parametrize(
    "name", ["odd dimensions", "whole partial sums", "beyond early abandonment"]
)
def test_neighbors_equal_sklearn(name, k, backend):
    bank, queries = point_case(name), point_case(name, seed=1)[:50]
    sklearn = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.double().numpy())
    expected, places = sklearn.kneighbors(queries.double().numpy())
    distances, indices = nearest_neighbors(queries, prepare_bank(bank), k, backend=backend)
    torch.testing.assert_close(distances.double(), torch.from_numpy(expected), rtol=1e-5, atol=0)
    assert np.array_equal(indices.numpy(), places)


# -------------------------------------------------------------------- native against the reference


@pytest.mark.parametrize("start", [0, -1])
@pytest.mark.parametrize("name", POINT_CASES)
def test_native_picks_the_same_points(name, start):
    """All of them, so that every case ends with nothing but copies of picks, or nothing at all."""
    points = point_case(name)
    start %= len(points)
    native, plain = (
        greedy_kcenter(points, len(points), start, backend=b) for b in ("native", "reference")
    )
    assert torch.equal(native, plain)
    assert sorted(native.tolist()) == list(range(len(points))) and native[0] == start


def test_native_picks_the_same_of_clustered_points():
    """Enough points to take a sample of them, and picks for bounds of bytes and of distances to be
    used (csrc/kcenter.cpp: many_picks), many ties."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(60, 100, generator=generator) @ torch.randn(100, 100).softmax(1)
    points = centres[torch.randint(60, (3000,), generator=generator)]
    points = (points * 8 + torch.randn(3000, 100, generator=generator)).round()
    native, plain = (greedy_kcenter(points, 900, 5, backend=b) for b in ("native", "reference"))
    assert torch.equal(native, plain)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", POINT_CASES)
def test_native_finds_the_same_neighbors(name, k):
    points = point_case(name)
    k = min(k, len(points))
    other = point_case(name, seed=1)
    queries = torch.cat([other[:37], points[:9], 3 * other[:2]])  # 9 of distance 0, 2 far away
    bank = prepare_bank(points)
    native, plain = (
        nearest_neighbors(queries, bank, k, backend=b) for b in ("native", "reference")
    )
    assert torch.equal(native[1], plain[1]) and torch.equal(native[0], plain[0])
    for threads in (1, 3):
        again = nearest_neighbors(queries, bank, k, threads=threads)
        assert torch.equal(again[0], plain[0]) and torch.equal(again[1], plain[1])


@pytest.mark.parametrize("count", [2, 16, BOUNDS])
@pytest.mark.parametrize("name", POINT_CASES)
def test_coordinates_bound_distances_from_below(name, count):
    points = point_case(name)
    found = coordinates(points, principal_axes(points[: len(points) // 2 + 1], count))
    assert found.shape == (len(points), count)
    bound = torch.cdist(found.double(), found.double(), compute_mode="donot_use_mm_for_euclid_dist")
    exact = (points.double()[:, None] - points.double()).norm(dim=2)
    margin = 2 * rounding(points, found)
    assert (bound <= exact * 1.0001 + margin).all()
    if count > 2 and name in ("in a plane", "one dimension"):  # and it is worth something
        assert (bound >= 0.99 * exact - margin).all()


def test_memory_order_does_not_matter():
    points = point_case("odd dimensions")
    expected = greedy_kcenter(points, 50)
    assert torch.equal(greedy_kcenter(points.T.contiguous().T, 50), expected)
    assert torch.equal(greedy_kcenter(torch.stack([points] * 2, 2)[:, :, 1], 50), expected)


# ------------------------------------------------------------------------ schema, errors, behaviour


def test_schemas_and_fakes():
    utils = ("test_schema", "test_faketensor")
    points = point_case("odd dimensions")
    opcheck(torch.ops.spd_fast.greedy_kcenter.default, (points, 9, 3), test_utils=utils)
    arguments = (points[:5], *prepare_bank(points), 2)
    opcheck(torch.ops.spd_fast.nearest_neighbors.default, arguments, test_utils=utils)


def test_bad_input_is_named():
    points = point_case("odd dimensions")
    broken = points.clone()
    broken[3, 4] = torch.nan
    for arguments, message in [
        ((points[0], 1), r"points must be float32 \(N, D\), at least one"),
        ((points.double(), 1), "torch.float64"),
        ((points[:0], 1), r"at least one, got torch.float32 \(0, 33\)"),
        ((points, 0), "k must be 1..200"),
        ((points, 201), "k must be 1..200, as there are so many points; got 201"),
        ((points, 5, 200), r"start must be 0..199"),
        ((points, 5, -1), r"start must be 0..199"),
        ((broken, 5), "points must be finite"),
        ((points * 1e20, 5), "at most 1e[+]15 in size"),
        ((torch.zeros(1, 65537), 1), "points must have at most 65536 coordinates each, got 65537"),
    ]:
        with pytest.raises(InputError, match=message):
            greedy_kcenter(*arguments)
    bank = prepare_bank(points)
    for arguments, message in [
        ((points[:, :9], bank), r"queries must be \(Q, 33\) as the bank is"),
        ((points, bank, 201), "k must be 1..200, as the bank has"),
        ((points, bank, 0), "k must be 1..200"),
        ((broken, bank), "queries must be finite"),
        ((points.half(), bank), "queries must be float32"),
    ]:
        with pytest.raises(InputError, match=message):
            nearest_neighbors(*arguments)
    with pytest.raises(InputError, match="bank must be finite"):
        prepare_bank(broken)
    distances, indices = nearest_neighbors(points[:0], bank, 2)
    assert distances.shape == indices.shape == (0, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1.1e15, -1.1e15])
@pytest.mark.parametrize("place", [(0, 0), (1, 0), (2999, 30), (30 * SAMPLE, 32)])
def test_a_bad_value_anywhere_is_found(value, place):
    """Where the sample that tells how far bytes have to reach sees it, and where it does not."""
    points = torch.randn(60 * SAMPLE, 33)  # every 60th is of the sample
    points[place] = value
    for backend in ("native", "reference"):
        with pytest.raises(InputError, match=r"points must be finite and at most 1e\+15 in size"):
            greedy_kcenter(points, 5, backend=backend)


def test_other_threads_run_during_a_selection():
    """The selection lets go of the interpreter: another thread runs before it ends."""
    # Bytes that are all zero rule nothing out, so this takes a while; one report, at the end.
    points, origin = torch.randn(20_000, 256).numpy(), torch.zeros(256).numpy()
    picks, reports = torch.zeros(250, dtype=torch.int64).numpy(), []

    def another_runs() -> bool:
        started, finished = threading.Event(), threading.Event()
        ran = []
        thread = threading.Thread(
            target=lambda: (started.wait(), ran.append(not finished.is_set()))
        )
        thread.start()
        started.set()
        native.greedy_kcenter(points, origin, 1e20, 1e15, picks, reports.append)
        finished.set()
        thread.join()
        return ran == [True]

    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # seconds: the interpreter changes hands only where it is let go of
    try:
        assert any(another_runs() for _ in range(10))  # on a busy machine not at once
    finally:
        sys.setswitchinterval(switch_interval)
    assert set(reports) == {250}


@pytest.mark.parametrize("dim", [5, 100])
def test_few_distances_are_computed(dim):
    """Bytes that reach so far that all are zero rule nothing out; the picks are the same."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1000, dim, generator=generator)
    picks = torch.zeros(300, dtype=torch.int64)
    arguments = (1e15, picks.numpy(), lambda done: None)
    origin = torch.zeros(dim).numpy()
    few = native.greedy_kcenter(points.numpy(), origin, 4.0, *arguments)
    expected = greedy_kcenter(points, 300, backend="reference")
    assert torch.equal(picks, expected)
    all_seen = native.greedy_kcenter(points.numpy(), origin, 1e20, *arguments)
    assert torch.equal(picks, expected)
    assert few < all_seen / 4


@pytest.mark.parametrize("outlier", [0, 1])
def test_a_point_far_from_all_others(outlier):
    """Its bytes are cut off, whether it is one of the sample or not."""
    points = torch.randn(2100, 40, generator=torch.Generator().manual_seed(0))
    points[outlier] = 1e5
    native_picks, plain = (
        greedy_kcenter(points, 300, 2, backend=b) for b in ("native", "reference")
    )
    assert torch.equal(native_picks, plain) and native_picks[1] == outlier


def test_bytes_are_not_made_coarse_by_a_few():
    points = torch.randn(5000, 40, generator=torch.Generator().manual_seed(0))
    origin, reach = native.reach_of_bytes(points.numpy(), SAMPLE)
    assert 2.5 < reach < 4.5  # the largest of thousands of normal numbers
    assert np.abs(origin).max() < 0.5
    points[::31] *= 1e4
    other_origin, other_reach = native.reach_of_bytes(points.numpy(), SAMPLE)
    assert reach / 1.5 < other_reach < reach * 1.5
    assert np.abs(other_origin - origin).max() < 0.2 * reach


@pytest.mark.parametrize("count", [1, 2, 20, 127, 128, 129, 300])
def test_the_reach_is_that_of_the_inner_points(count):
    points = torch.randn(count, 7, generator=torch.Generator().manual_seed(count)).numpy()
    some = points[:: -(-count // SAMPLE)]
    sizes = np.abs(some - some.mean(0)).max(1)
    inner = some[sizes <= np.quantile(sizes, 0.95, method="inverted_cdf")]
    origin, reach = native.reach_of_bytes(points, SAMPLE)
    np.testing.assert_allclose(origin, inner.mean(0), atol=1e-6)
    assert reach == pytest.approx(max(np.abs(inner - inner.mean(0)).max(), 1e-30), rel=1e-5)


@pytest.mark.parametrize("size", [1e-10, 1e-12])
def test_tiny_points_between_huge_ones(size):
    """The bytes of all others are zero, and what is left over underflows when it is squared."""
    points = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * size
    points[:20] = torch.tensor([1e15, 1e15, -1e15, -1e15]).repeat(5)[:, None]
    origin, reach = native.reach_of_bytes(points.numpy(), SAMPLE)  # of every other point
    assert np.abs(origin).max() < 1 and reach == pytest.approx(1e15)
    native_picks, plain = (
        greedy_kcenter(points, 60, 25, backend=b) for b in ("native", "reference")
    )
    assert torch.equal(native_picks, plain)


def tiny_points(name: str) -> torch.Tensor:
    """Of squared distances, or of their differences, that are below the smallest normal number."""
    if name == "one a little farther":
        points = torch.full((200, 1), 1e-18)
        points[0], points[150] = 0, 1.0001e-18
        return points
    generator = torch.Generator().manual_seed(0)
    points = 4.5e-20 * torch.randn(20, 1000, generator=generator).sign().repeat(2, 1)
    points[20:30] = -points[:10]
    points[30:, 0] += 3e-19
    points[35:, 0] += 4e-19
    return points


@pytest.mark.parametrize("name", ["one a little farther", "many coordinates"])
@pytest.mark.parametrize("flush", [False, True])
def test_tiny_points_whether_or_not_denormals_are_flushed(name, flush):
    points = tiny_points(name)
    assert torch.set_flush_denormal(flush)
    try:
        for start in (0, 25, 39):
            native_picks, plain = (
                greedy_kcenter(points, 40, start, backend=b) for b in ("native", "reference")
            )
            assert torch.equal(native_picks, plain)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dim", [65535, 65536])
def test_as_many_coordinates_as_there_may_be(dim):
    points = torch.randn(12, dim, generator=torch.Generator().manual_seed(0))
    points[3:6] = points[:1].sign()  # bytes as large as they get, and copies
    points[6:9] = -points[:1].sign()
    native_picks, plain = (
        greedy_kcenter(points, 12, 2, backend=b) for b in ("native", "reference")
    )
    assert torch.equal(native_picks, plain)


def test_pairs_outside_the_span_of_the_sample():
    """Far out along directions that no axis of a bank has: of these, coordinates hold rounding
    alone. The bytes of k-center are cut off, or coarse."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(1200, 8, generator=generator) @ torch.randn(8, 300, generator=generator)
    far = 1e6 * torch.randn(100, 300, generator=generator)
    points = torch.cat([flat, far, far + 1, far]).contiguous()
    native_picks, plain = (
        greedy_kcenter(points, 400, 3, backend=b) for b in ("native", "reference")
    )
    assert torch.equal(native_picks, plain)
    bank = prepare_bank(points)
    found, expected = (
        nearest_neighbors(points[-300:], bank, 3, backend=b) for b in ("native", "reference")
    )
    assert torch.equal(found[1], expected[1])


def test_progress_is_reported_and_may_interrupt():
    points, reports = torch.randn(2000, 32), []

    def report(done):
        reports.append(done)
        if done > 600:
            raise KeyboardInterrupt

    origin, picks = torch.zeros(32), torch.zeros(1000, dtype=torch.int64)
    with pytest.raises(KeyboardInterrupt):
        native.greedy_kcenter(points.numpy(), origin.numpy(), 4.0, 1e15, picks.numpy(), report)
    assert len(reports) >= 3 and reports == sorted(reports) and reports[-1] < 1000
