"""A model of how long the GPU kernels take, without a GPU: bytes, instructions, and what binds.

python bench/gpu_roofline.py prints the tables. Nothing in them was measured: a kernel is given the
time of its bytes at the memory's rate or of its instructions at the pipes' rates, whichever is
longer, as if nothing ever waited. Instructions are those of the compiled code, each as often as its
loops turn on average (bench/sass.py). Needs Triton and nvcc.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ahead import Compiled, compiled_for
from gpu_kernels import CHANNELS, LAYERS, Usage, cuda_usage, launch_distances, launch_views
from gpu_turns import Turns, Views, center_in_triton, distances_in_cuda, distances_in_triton
from sass import PIPES, ROOT, Instruction, executed, kernels_of

from spd_fast import recipes, sample_view_params
from spd_fast.kernels.mahalanobis import CHANNELS_TILE, tiles_of
from spd_fast.ops.augment_views import CUDA_TILE, TRITON_TILE
from spd_fast.ops.view_rounds import groups_of
from spd_fast.reference import packed_size


class Device(NamedTuple):
    """Datasheet numbers; the rates are instructions of a warp per clock and multiprocessor."""

    name: str
    multiprocessors: int
    gigahertz: float
    bandwidth: float  # GB/s
    float_rate: float
    memory_rate: float  # loads, stores and exchanges
    tensor_rate: float  # products of (16, 16) and (16, 8), on a T4 of half of that
    threads: int  # that a multiprocessor holds
    shared: int  # KB of a multiprocessor


DEVICES = {
    75: Device("T4", 40, 1.59, 320, 2, 0.5, 0.5, 1024, 64),
    80: Device("A100", 108, 1.41, 2039, 2, 1, 0.5, 2048, 164),
    89: Device("RTX 4090", 128, 2.52, 1008, 4, 1, 0.125, 1536, 100),
    90: Device("H100", 132, 1.83, 3350, 4, 1, 1, 2048, 228),
    100: Device("B200", 148, 1.85, 8000, 4, 1, 1, 2048, 228),
    120: Device("RTX 5090", 170, 2.41, 1792, 4, 1, 0.125, 1536, 100),
}
ISSUED = 4  # of all kinds; these are alike on all devices, too
RATES = {"other": 2, "multiply": 2, "special": 0.5}


class Launch(NamedTuple):
    name: str
    warps: int
    instructions: dict[str, float]  # of one warp, by pipe
    registers: int  # of a thread
    shared: int  # bytes of a block
    threads: int  # of a block
    bytes: float

    def microseconds(self, device: Device) -> dict[str, float]:
        """By what could bind."""
        clocks = {
            "issue": sum(self.instructions.values()) / ISSUED,
            "float": self.instructions["float"] / device.float_rate,
            "load/store": self.instructions["memory"] / device.memory_rate,
            "tensor": self.instructions["tensor"] / device.tensor_rate,
        } | {pipe: self.instructions[pipe] / rate for pipe, rate in RATES.items()}
        rate = device.multiprocessors * device.gigahertz * 1e3
        times = {pipe: self.warps * its / rate for pipe, its in clocks.items()}
        return times | {"DRAM": self.bytes / device.bandwidth / 1e3}

    def occupancy(self, device: Device) -> float:
        """Share of the threads that a multiprocessor could hold."""
        registers = -(-self.registers // 8) * 8 * self.threads
        blocks = min(65536 // registers, device.threads // self.threads)
        if self.shared:
            blocks = min(blocks, 1024 * device.shared // self.shared)
        return blocks * self.threads / device.threads


# ------------------------------------------------------------------------------ what was compiled


def compiled(source: Path, arch: int, directory: Path) -> Path:
    binary = directory / "kernels.cubin"
    command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-cubin", f"-arch=sm_{arch}"]
    subprocess.run([*command, "-o", str(binary), str(source)], check=True)
    return binary


@cache
def in_cuda(source: str, arch: int) -> dict[str, tuple[list[Instruction], Usage]]:
    """The kernels of a file in csrc/."""
    with tempfile.TemporaryDirectory() as directory:
        binary = compiled(ROOT / "csrc" / source, arch, Path(directory))
        usage = {its.kernel: its for its in cuda_usage(binary, arch)}
        kernels = kernels_of(binary)
    names = subprocess.run(["c++filt", *kernels], capture_output=True, text=True, check=True).stdout
    found = {}
    for name, kernel in zip(names.splitlines(), kernels.values()):
        name = name.replace("(anonymous namespace)::", "").replace("spd::", "")
        name = re.match(r"(?:void )?(\w+(?:<.*>)?)\(", name)[1]
        found[name] = kernel, usage[name]
    return found


def in_triton(kernel: Compiled) -> list[Instruction]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.binary)
        file.flush()
        (found,) = kernels_of(Path(file.name)).values()
    return found


def mean_of(kernel: list[Instruction], turns: Turns) -> dict[str, float]:
    counts = executed(kernel, turns.get)
    return {pipe: float(np.mean(counts[pipe])) for pipe in (*PIPES, "other")}


# ------------------------------------------------------------------------------------------ views

IMAGES, PHOTO, SIZE = 256, (375, 500), (224, 224)
PLANE = SIZE[0] * SIZE[1]


@cache
def table() -> torch.Tensor:
    """SPD's views of 2,048 images, for the averages; a launch has IMAGES."""
    n = 2048
    return sample_view_params(recipes.simsiam(), [PHOTO] * n, range(n), 0, 0)


def rounds(tile: tuple[int, int]) -> Iterator[Views]:
    params = table()
    for views, _ in groups_of(params)[0]:
        yield Views(params[:, list(views)].flatten(0, 1).numpy(), SIZE, tile)


def least_bytes(itemsize: int) -> int:
    """The images once, and the views once."""
    return IMAGES * 3 * (PHOTO[0] * PHOTO[1] + 4 * PLANE * itemsize)


def view_bytes(
    kernel: str, views: Views, itemsize: int, depth: int, pasted: tuple[int, int]
) -> float:
    """Of one view. Pixels that two tiles read are taken to be in a cache the second time. Patches
    are blended into all of the `pasted` tiles that they touch."""
    kept = PLANE * (4 if depth and itemsize < 4 else 6)
    crop = (views["crop_height"] * views["crop_width"]).mean()
    if kernel.startswith("resize_view"):  # all of a source's views are made about the same time
        return 3 * itemsize * crop / (len(views.params) / len(table())) + kept
    if kernel.startswith("resize"):
        return 3 * crop + kept
    area = (views["patch_height"] * views["patch_width"] * views.patches).mean()
    if kernel.startswith("finish"):
        return kept + 3 * itemsize * PLANE + 12 * area
    return 2 * 3 * itemsize * views.touched(pasted).mean() * PLANE + 12 * area


def views_in_cuda(dtype: str, arch: int) -> Iterator[Launch]:
    itemsize = torch.empty(0, dtype=getattr(torch, dtype)).itemsize
    name = {"float32": "float", "float16": "Half"}[dtype]
    packed = "false" if dtype == "float32" else "true"
    for depth, views in enumerate(rounds(CUDA_TILE)):
        parts = 2 if dtype == "float32" else 1
        resize = f"resize_view_kernel<{name}, (Reads)0>" if depth else f"resize_kernel<{parts}>"
        kernels = [resize, f"finish_kernel<{name}, {packed if depth else 'false'}, false>"]
        for kernel in kernels + [f"paste_kernel<{name}>"] * bool(views.patches.any()):
            code, usage = in_cuda("augment_views.cu", arch)[kernel]
            jobs = IMAGES * len(views.params) // len(table())
            turns = mean_of(code, views.in_cuda(kernel))
            sector = 1, 32 // itemsize
            moved = jobs * view_bytes(kernel, views, itemsize, depth, sector)
            blocks = jobs if kernel.startswith("paste") else jobs * views.tiles
            yield Launch(kernel, 8 * blocks, turns, usage.registers, usage.shared, 256, moved)


def views_in_triton(dtype: str, arch: int) -> Iterator[Launch]:
    itemsize = torch.empty(0, dtype=getattr(torch, dtype)).itemsize
    with compiled_for(arch, fresh=True) as compiled:
        launch_views(dtype, channels_last=False)
    of_rounds = list(enumerate(rounds(TRITON_TILE)))
    for kernel in compiled:
        depth, views = of_rounds[kernel is not compiled[0] and kernel is not compiled[1]]
        if kernel.name == "paste":
            views = Views(views.params, SIZE, (16, 32))
        turns = mean_of(in_triton(kernel), views.in_triton(kernel.name))
        moved = IMAGES * len(views.params) // len(table())
        moved *= view_bytes(kernel.name, views, itemsize, depth, views.tile)
        warps = kernel.grid[0] * kernel.threads // 32
        yield _of_triton(kernel, warps, turns, moved)


def _of_triton(kernel: Compiled, warps: int, turns: dict[str, float], moved: float) -> Launch:
    registers = kernel.resources["registers"]
    return Launch(kernel.name, warps, turns, registers, kernel.shared, kernel.threads, moved)


# ------------------------------------------------------------------------------------------ PaDiM

POSITIONS = LAYERS[0][1] ** 2
ITEMSIZE = {"float32": 4, "float16": 2}


def padim_bytes(dtype: str, batch: int) -> int:
    """The factor, the means, the features and the distances, each once."""
    per_position = packed_size(CHANNELS) * ITEMSIZE[dtype] + 4 * CHANNELS + 4 * batch
    share = sum(c * s * s for c, s in LAYERS) / sum(c for c, _ in LAYERS)
    return round(POSITIONS * per_position + 4 * batch * CHANNELS * share)


def padim_in_cuda(dtype: str, batch: int, arch: int) -> Iterator[Launch]:
    name = {"float32": "float", "float16": "Half"}[dtype]
    kernel = f"mahalanobis_kernel<{name}, {batch}>"
    code, usage = in_cuda("mahalanobis.cu", arch)[kernel]
    turns = mean_of(code, distances_in_cuda(CHANNELS, batch, 16 // ITEMSIZE[dtype]))
    shared = usage.shared + 8 * -(-CHANNELS // 8) * batch * 4
    moved = padim_bytes(dtype, batch)
    yield Launch(kernel, 4 * POSITIONS, turns, usage.registers, shared, 128, moved)


def padim_in_triton(dtype: str, batch: int, arch: int) -> Iterator[Launch]:
    """What `center` leaves is taken to be in the L2 cache when `distances` reads it."""
    with compiled_for(arch, fresh=True) as compiled:
        launch_distances(dtype, batch, channels_last=False)
        tiles = tiles_of(getattr(torch, dtype), batch)
    center, distances = compiled
    factor = POSITIONS * packed_size(CHANNELS) * ITEMSIZE[dtype]
    padded = -(-CHANNELS // 64) * 64
    warps = POSITIONS // 32 * batch * (padded // 64) * center.threads // 32
    turns = mean_of(in_triton(center), center_in_triton(CHANNELS, len(LAYERS), CHANNELS_TILE))
    moved = padim_bytes(dtype, batch) - factor + 4 * POSITIONS * batch * padded
    yield _of_triton(center, warps, turns, moved)
    warps = POSITIONS * -(-batch // tiles["images_tile"]) * distances.threads // 32
    turns = mean_of(
        in_triton(distances),
        distances_in_triton(CHANNELS, tiles["rows_tile"], tiles["columns_tile"]),
    )
    yield _of_triton(distances, warps, turns, factor)


# ------------------------------------------------------------------------------------------ tables


def show(title: str, launches: Iterable[Launch], device: Device, least: int) -> float:
    """Prints a table; returns how many times as long as moving `least` bytes it takes."""
    print(f"\n{title}, {device.name}")
    print(f"{'':36} {'MB':>7} {'instructions':>13} {'of warps':>9} {'binds':>11} {'us':>7}")
    total = moved = 0.0
    for launch in launches:
        times = launch.microseconds(device)
        binds = max(times, key=times.get)
        count = sum(launch.instructions.values())
        print(
            f"{launch.name:36} {launch.bytes / 1e6:7.1f} {count:6.0f} a warp "
            f"{launch.occupancy(device):9.0%} {binds:>11} {times[binds]:7.1f}"
        )
        total, moved = total + times[binds], moved + launch.bytes
    floor = least / device.bandwidth / 1e3
    print(
        f"{'all':36} {moved / 1e6:7.1f} = {moved / least:.2f} x the least bytes"
        f"{total:17.1f} = {total / floor:.2f} x their time"
    )
    return total / floor


def main(arches: list[int]) -> None:
    print("A model, not a measurement: see bench/gpu_roofline.py.")
    for arch in arches:
        device = DEVICES[arch]
        for dtype in ("float32", "float16"):
            least = least_bytes(ITEMSIZE[dtype])
            title = f"four views of {IMAGES} photographs of {PHOTO[1]} x {PHOTO[0]}, {dtype}"
            show(f"CUDA: {title}", views_in_cuda(dtype, arch), device, least)
            show(f"Triton: {title}", views_in_triton(dtype, arch), device, least)
        for dtype in ("float32", "float16"):
            for batch in (1, 2, 4):
                title = f"CUDA: distances, d {CHANNELS}, {batch} images, {dtype} factor"
                least = padim_bytes(dtype, batch)
                show(title, padim_in_cuda(dtype, batch, arch), device, least)
            for batch in (8, 32):
                title = f"Triton: distances, d {CHANNELS}, {batch} images, {dtype} factor"
                least = padim_bytes(dtype, batch)
                show(title, padim_in_triton(dtype, batch, arch), device, least)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]] or list(DEVICES))
