"""What the benchmarks of the detectors and metrics measure with."""

import time
from collections.abc import Callable
from pathlib import Path

import torch


def best(job: Callable, seconds: float = 1.0, clock: Callable = time.perf_counter) -> float:
    """Shortest time of a job in seconds, over at least 3 runs that take `seconds` together."""
    times = []
    while sum(times) < seconds or len(times) < 3:
        start = clock()
        job()
        times.append(clock() - start)
    return min(times)


def multiply_add_peak(clock: Callable = time.perf_counter) -> float:
    """Flop / s that torch's matrix product reaches here and now."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / best(lambda: a @ a, 2.0, clock)


def peak_memory() -> int:
    """Bytes, of this process. Linux adds its parent's peak to ru_maxrss, but not to this."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
    return 1024 * int(line.split()[1])
