"""Time and peak memory of exact pixel metrics over more maps than should be held.

    python bench/metrics_memory.py --held          # 2e8 pixels: maps made on the fly, and held
    python bench/metrics_memory.py --pixels 1e9    # on the fly only

Maps are made from their index, in each of the two passes, so that only the metrics need memory.
With --held a second process holds them all and sorts them in one piece: the result must be the same
to the last bit.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
from measure import peak_memory

from spd_fast import metrics

SIDE = 1000  # pixels of a map: SIDE^2
DEFECT = (100, 200)  # pixels, in every second image: 1 % of all


class Maps:
    """Score maps, made when asked for."""

    def __init__(self, pixels: int):
        self.n = pixels // SIDE**2

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> np.ndarray:
        rng = np.random.Generator(np.random.SFC64(i))
        return rng.standard_normal((SIDE, SIDE), dtype=np.float32) + Masks.__getitem__(self, i)


class Masks(Maps):
    def __getitem__(self, i: int) -> np.ndarray:
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        if i % 2:
            top, left = 7 * i % (SIDE - DEFECT[0]), 11 * i % (SIDE - DEFECT[1])
            mask[top : top + DEFECT[0], left : left + DEFECT[1]] = True
        return mask


def seconds_of(job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def measure(pixels: int, held: bool) -> dict:
    maps, masks = Maps(pixels), Masks(pixels)
    measured = {}
    if held:
        maps, masks = (np.stack(list(map(x.__getitem__, range(len(x))))) for x in (maps, masks))
        metrics.CHUNK = maps.size
    else:
        measured["making"] = 2 * seconds_of(lambda: [maps[i].size for i in range(len(maps))])
    measured["memory before"] = peak_memory() / 2**30
    start = time.perf_counter()
    measured["result"] = asdict(metrics.pixel_metrics(maps, masks))
    measured["seconds"] = time.perf_counter() - start
    measured["memory"] = peak_memory() / 2**30
    if held:
        measured["read"] = seconds_of(maps.max)
        scratch = np.empty(maps.size, maps.dtype)
        measured["sort"] = seconds_of(lambda: metrics.sort(maps.ravel(), scratch))
    return measured


def in_own_process(pixels: int, how: str) -> dict:
    command = [sys.executable, __file__, "--pixels", str(pixels), "--measure", how]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=float, default=2e8)
    parser.add_argument("--held", action="store_true")
    parser.add_argument("--measure", choices=["held", "made"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    pixels = int(options.pixels)
    if options.measure:
        print(json.dumps(measure(pixels, options.measure == "held")))
        return
    print(f"{pixels:.0e} pixels in maps of {SIDE} x {SIDE}, 1 % anomalous")
    made = in_own_process(pixels, "made")
    print(
        f"made on the fly: {made['seconds']:.1f} s, {made['making']:.1f} s of it for making them "
        f"twice; peak memory {made['memory']:.2f} GiB, {made['memory before']:.2f} GiB before"
    )
    if options.held:
        held = in_own_process(pixels, "held")
        assert held["result"] == made["result"], "the result depends on the chunks"
        print(
            f"held, sorted in one piece: {held['seconds']:.1f} s; peak memory "
            f"{held['memory']:.2f} GiB, {held['memory before']:.2f} GiB before; same result to "
            f"the last bit\nsorting all scores once {held['sort']:.1f} s, reading them once "
            f"{held['read']:.2f} s"
        )
    print("  ".join(f"{name} {value:.6f}" for name, value in made["result"].items()))


if __name__ == "__main__":
    main()
