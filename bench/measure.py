"""What the benchmarks of the detectors and metrics measure with."""

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def best(job: Callable, seconds: float = 1.0, clock: Callable = time.perf_counter) -> float:
    """Shortest time of a job in seconds, over at least 3 runs that take `seconds` together."""
    return min(_times(job, seconds, clock))


def typical(job: Callable, seconds: float = 1.0, clock: Callable = time.perf_counter) -> float:
    """The median of the same, to be compared with what is run only once."""
    return statistics.median(_times(job, seconds, clock))


def _times(job: Callable, seconds: float, clock: Callable) -> list[float]:
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = clock()
        job()
        times.append(clock() - start)
    return times


def multiply_add_peak(clock: Callable = time.perf_counter) -> float:
    """Flop / s that torch's matrix product reaches here and now."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / best(lambda: a @ a, 2.0, clock)


def peak_memory() -> int:
    """Bytes, of this process. Linux adds its parent's peak to ru_maxrss, but not to this."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
    return 1024 * int(line.split()[1])


class PeakOfTree:
    """Most memory that this process and the processes it started have occupied together, in bytes,
    looked at ten times a second: resident here, and private there, for a fork shares the rest."""

    def __enter__(self) -> "PeakOfTree":
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peak = max(self.peak, _kilobytes("self/status", "VmRSS") + _private_of_children())

    @property
    def bytes(self) -> int:
        return max(1024 * self.peak, peak_memory())


def _kilobytes(file: str, *names: str) -> int:
    lines = (Path("/proc") / file).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in names)


def _private_of_children() -> int:
    total, waiting = 0, ["self"]
    while waiting:
        for task in (Path("/proc") / waiting.pop()).glob("task/*/children"):
            with suppress(OSError):  # it has ended by now
                for child in task.read_text().split():
                    waiting.append(child)
                    total += _kilobytes(f"{child}/smaps_rollup", "Private_Clean", "Private_Dirty")
    return total
