"""The limits that benchmarks compare with: that they do what they say."""

import ctypes
import sys
from shutil import which

import measure
import pytest
import torch

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or which("gcc") is None, reason="needs gcc on Linux"
)


@pytest.mark.parametrize("streams", measure.STREAMS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_is_counted_was_read(threads, streams):
    data, sink = torch.ones(1 << 20), ctypes.c_float()
    count = measure.read_memory(data, threads, streams, sink)
    assert 0.85 * data.numel() < count <= data.numel()
    assert count / sink.value in (4, 8, 16)  # the sum of one of so many lanes


def test_every_thread_multiplies():
    assert measure.multiplying(3)[1] == 3 * measure.multiplying(1)[1] > 0


def test_share_is_the_jobs_speed_between_two_of_the_limit(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    clock = iter([0, 1, 0, 4, 0, 2, 0, 4, 0, 3])  # limit, job, limit, job, limit: from 0 to seconds
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    ran = []
    share, speeds = measure.share(
        lambda: ran.append("job"), 6, (lambda: ran.append("limit"), 12), 2
    )
    assert ran == ["limit", "job", "limit", "job", "limit"]
    assert speeds == [12, 6, 4]
    assert share == pytest.approx((1.5 / 9 + 1.5 / 5) / 2)


def test_threads_that_sleep_are_refused(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with pytest.raises(AssertionError, match="OMP_WAIT_POLICY"):
        measure.share(lambda: None, 1, (lambda: None, 1))
