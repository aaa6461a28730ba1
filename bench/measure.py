"""What the benchmarks of the detectors and metrics measure with."""

import ctypes
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import torch

from spd_fast.ops.memory import on_huge_pages


def best(job: Callable, seconds: float = 1.0, clock: Callable = time.perf_counter) -> float:
    """Shortest time of a job in seconds, over at least 3 runs that take `seconds` together."""
    return min(_times(job, seconds, clock))


def best_in_turns(jobs: dict[str, Callable], rounds: int = 4) -> dict[str, float]:
    """Shortest times of jobs that take turns, so that a slow second of the machine hits all."""
    turns = [{name: best(job, 0.3) for name, job in jobs.items()} for _ in range(rounds)]
    return {name: min(turn[name] for turn in turns) for name in jobs}


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


STREAMS = 1, 2, 4, 8  # that limits.c knows
Limit = tuple[Callable, int]  # a job that does nothing else, and how much of it


def share(job: Callable, amount: int, limit: Limit, rounds: int = 15) -> tuple[float, list[float]]:
    """How fast a job gets through an amount, as a share of how fast a limit does; and the speeds of
    the limit. On a shared machine they change by the second, so both run in turn, and the share is
    the median over rounds of the job between two runs of the limit. Neither is just repeated: what
    they read is in no cache before. But the threads are awake, as after a network. (A thread that
    sleeps may be woken on a busy core, and waits there for the scheduler's next tick, 4 ms.)"""
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    assert policy.lower() != "passive", "threads would sleep: leave OMP_WAIT_POLICY unset"
    of_limit, amount_of_limit = limit
    speeds = [amount_of_limit / cold(of_limit)]
    shares = []
    for _ in range(rounds):
        of_job = amount / cold(job)
        speeds.append(amount_of_limit / cold(of_limit))
        shares.append(2 * of_job / (speeds[-2] + speeds[-1]))
    return statistics.median(shares), speeds


def cold(job: Callable) -> float:
    """Seconds that a job takes if nothing of it, nor of Python, is in a cache before."""
    _others().sum()
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


@cache
def _others() -> torch.Tensor:
    """What takes the place in the caches of all else when it is read."""
    return torch.ones(1 << 26)


@cache
def reading(threads: int) -> Limit:
    """Reads half a GiB on huge pages, every thread in as many places at once as is fastest here;
    bytes."""
    data, sink = on_huge_pages(torch.empty(1 << 27)).fill_(1), ctypes.c_float()
    jobs = {n: partial(read_memory, data, threads, n, sink) for n in STREAMS}
    times = best_in_turns(jobs)
    job = jobs[min(times, key=times.get)]
    return job, 4 * job()


def read_memory(data: torch.Tensor, threads: int, streams: int, sink: ctypes.c_float) -> int:
    start, count = ctypes.c_void_p(data.data_ptr()), ctypes.c_long(data.numel())
    return _limits().read_memory(start, count, threads, streams, ctypes.byref(sink))


@cache
def multiplying(threads: int) -> Limit:
    """Multiplies and adds in registers alone, for some 10 ms; floating-point operations."""
    sink = ctypes.c_float()
    job = partial(_limits().multiply_add, ctypes.c_long(1 << 22), threads, ctypes.byref(sink))
    return job, job()


@cache
def _limits() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/limits.so"
        source = str(Path(__file__).with_name("limits.c"))
        options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["gcc", *options, source, "-o", library], check=True)
        limits = ctypes.CDLL(library)
    torchs = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    openmp = {
        ctypes.cast(its.omp_get_max_threads, ctypes.c_void_p).value for its in (limits, torchs)
    }
    # Threads of one would wait, awake, on the cores of the other.
    assert len(openmp) == 1, "torch brings another OpenMP than gcc's"
    limits.multiply_add.restype = limits.read_memory.restype = ctypes.c_long
    return limits


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
