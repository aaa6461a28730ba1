"""What the GPU kernels need, compiled without a GPU: registers, stack and shared memory.

python bench/gpu_kernels.py prints the table; tests/test_gpu_budget.py holds it against
gpu_budget.yaml. Needs Triton and a module that was built with CUDA.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import torch
from ahead import ARCHITECTURES, TOOLS, compiled_for

from spd_fast import _C, recipes, sample_view_params
from spd_fast.kernels import augment_views, mahalanobis
from spd_fast.ops.augment_views import TRITON_TILE
from spd_fast.ops.view_rounds import make_views
from spd_fast.reference import packed_size

# PaDiM on a WideResNet-50 at 256 x 256 pixels.
LAYERS, CHANNELS = ((256, 64), (512, 32), (1024, 16)), 550
DTYPES = ("float32", "float16", "bfloat16")
# How views are stored.
VIEWS = (
    *(("float32", "NCHW"), ("float16", "NCHW"), ("float16", "NHWC")),
    *(("bfloat16", "NCHW"), ("uint8", "NHWC")),
)


class Usage(NamedTuple):
    """What a kernel takes on one architecture: bytes, but `registers` of a thread."""

    kernel: str
    arch: int
    registers: int
    stack: int  # of a thread: spilled registers, or arrays that are not in registers
    shared: int  # of a block; of the CUDA kernels what is known before the launch


def triton_launches() -> dict[str, Callable[[], object]]:
    """By what tells kernels of one name apart; on `meta` tensors."""
    orders = {"NCHW": False, "NHWC": True}
    found = {
        f"{dtype}, {batch} images, {order}": partial(launch_distances, dtype, batch, channels_last)
        for dtype, batch in product(DTYPES, (16, 32))
        for order, channels_last in orders.items()
    }
    for dtype, order in VIEWS:
        found[f"views {dtype}, {order}"] = partial(launch_views, dtype, orders[order])
    return found


def launch_views(dtype: str, channels_last: bool) -> None:
    """Four views of 256 photographs."""
    n, height, width = 256, 375, 500
    params = sample_view_params(recipes.simsiam(), [(height, width)] * n, range(n), 0, 0)
    layout = torch.tensor([[0, 0, height, width]]).repeat(n, 1)
    pixels = torch.empty(n * height * width * 3, dtype=torch.uint8, device="meta")
    shape = (4, n, 224, 224, 3) if channels_last else (4, n, 3, 224, 224)
    out = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    out = out.permute(0, 1, 4, 2, 3) if channels_last else out
    scales = (4.0,) * 3, (-2.0,) * 3
    make_views(augment_views.make_round, [pixels], layout, params, out, *scales, TRITON_TILE)


def launch_distances(dtype: str, batch: int, channels_last: bool) -> torch.Tensor:
    layers = [torch.empty(batch, c, s, s, device="meta") for c, s in LAYERS]
    if channels_last:
        layers = [layer.to(memory_format=torch.channels_last) for layer in layers]
    positions = LAYERS[0][1] ** 2
    channels = torch.empty(CHANNELS, dtype=torch.int64, device="meta")
    mean = torch.empty(positions, CHANNELS, device="meta")
    shape, dtype = (positions, packed_size(CHANNELS)), getattr(torch, dtype)
    factor = torch.empty(shape, dtype=dtype, device="meta")
    return mahalanobis.mahalanobis_map(layers, channels, mean, factor)


def triton_usage(arch: int) -> list[Usage]:
    used = []
    with compiled_for(arch) as found:
        for variant, launch in triton_launches().items():
            before = len(found)
            launch()
            for kernel in found[before:]:
                name = f"{kernel.name}, {variant}"
                used.append(Usage(name, arch, **kernel.resources, shared=kernel.shared))
    return used


def cuda_usage(binary: Path | str = _C.__file__, arch: int = 0) -> Iterator[Usage]:
    """Of all kernels and architectures in a compiled module, or of a file for one `arch`."""
    text = _output([str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(binary)])
    text = _output(["c++filt"], text).replace("(anonymous namespace)::", "").replace("spd::", "")
    kernel = r"Function (?:void )?(\w+<.*>|\w+)\(.*\):\n *REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for found in re.finditer(rf"arch = sm_(\d+)|{kernel}", text):
        header, name, *used = found.groups()
        if header:
            arch = int(header)
        else:
            yield Usage(name, arch, *map(int, used))


def _output(command: list[str], given: str | None = None) -> str:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def main() -> None:
    used: dict[str, dict[int, set[Usage]]] = {}
    for usage in (*cuda_usage(), *chain.from_iterable(map(triton_usage, ARCHITECTURES))):
        used.setdefault(usage.kernel, {}).setdefault(usage.arch, set()).add(usage)
    width = max(map(len, used))
    print("registers of a thread / bytes of shared memory of a block + bytes of stack, if any")
    print(f"{'':{width}}", *(f"{f'sm_{arch}':>10}" for arch in ARCHITECTURES))
    for kernel, by_arch in used.items():
        cells = []
        for arch in ARCHITECTURES:
            its = by_arch.get(arch, set())
            text = f"{max(u.registers for u in its)}/{max(u.shared for u in its)}" if its else "-"
            stack = max((u.stack for u in its), default=0)
            cells.append(f"{text + (f'+{stack}' if stack else ''):>10}")
        print(f"{kernel:{width}}", *cells)


if __name__ == "__main__":
    main()
