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


def test_a_limit_is_a_share_of_itself():
    limit = measure.multiplying(1)
    share, speeds = measure.share(*limit, limit, rounds=3)
    assert share > 0 and len(speeds) == 4 and min(speeds) > 0
