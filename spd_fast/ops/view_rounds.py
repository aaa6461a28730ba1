"""How a GPU makes the views of a batch: which views together, and in what memory.

A round makes the views whose sources exist, those of the decoded images first. It launches a kernel
that resizes, one that finishes the views, and one that pastes patches if there are any.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spd_fast.views import COLUMN

LEAST_ROOM = 1024  # pixels; powers of two from here on, so that few kernels are compiled
_captured: list[Tensor] = []  # tables that captured graphs read again at every replay


class Stored(NamedTuple):
    """Views in memory, (V, N, 3, height, width): value * scale + shift of the channel."""

    views: Tensor
    scales: tuple[float, float, float]
    shifts: tuple[float, float, float]


class Round(NamedTuple):
    """What the kernels of one round are given. All tensors are on the GPU."""

    views: tuple[int, ...]  # that are made
    pixels: Tensor  # uint8
    images: Tensor  # (N, 3) int64: where an image begins in `pixels`, height, width
    params: Tensor  # (N, V, 27)
    source: Stored | None  # views to make these from; None: the decoded images
    target: Stored
    # (jobs, 3, pixels) uint16, or packed: (jobs, pixels) int32; with room for rows of even length.
    scratch: Tensor
    sums: Tensor  # (jobs, tiles): of gray, before contrast
    boxes: Tensor  # (jobs, 3, room): patches before they are pasted; room 0: there are none
    fine: Stored  # the first views once more, if `target` is too coarse to make others from
    paste_fine: bool  # whether patches are to be pasted there, too

    @property
    def packed(self) -> bool:
        return self.scratch.dtype == torch.int32


def make_views(
    make_round: Callable[[Round], None],
    buffers: Sequence[Tensor],
    layout: Tensor,
    params: Tensor,
    out: Tensor,
    scales: tuple[float, float, float],
    shifts: tuple[float, float, float],
    tile: tuple[int, int],
) -> None:
    """Fill `out` round by round; arguments as `spd_fast.augment_views` has checked them. `tile`:
    height and width of what a block of threads, or a program, makes of a view.

    Nothing waits for the GPU. A captured graph reads `params` again at every replay if it is
    contiguous and in pinned memory, else the table as it was.
    """
    pixels = buffers[0].view(-1)
    starts = torch.from_numpy(np.array([buffer.data_ptr() for buffer in buffers], np.int64))
    images = layout[:, 1:].clone()  # offset, height, width
    images[:, 0] += (starts - starts[0])[layout[:, 0]]
    groups, sources = groups_of(params)
    _, n, _, height, width = out.shape
    tiles = -(-height // tile[0]) * -(-width // tile[1])
    target = Stored(out, scales, shifts)
    # 8 bits are too few to make further views from: then the first views, up to the last that is a
    # source, are also stored in 16.
    coarse = bool(sources) and out.dtype in (torch.uint8, torch.bfloat16)
    shape = sources[-1] + 1 if coarse else 0, n, 3, height, width
    fine = Stored(out.new_empty(shape, dtype=torch.float16), (1.0,) * 3, (0.0,) * 3)
    with torch.cuda.device_of(out):
        table, places = _moved(params, out.device), _moved(images, out.device)
        for depth, (views, room) in enumerate(groups):
            jobs = n * len(views)
            # 11, 11 and 10 bits would be the largest error of views that are adjusted strongly, as
            # those of the image are.
            packed = depth > 0 and out.dtype != torch.float32
            plane = height * (width + width % 2)
            shape = (jobs, plane) if packed else (jobs, 3, plane)
            make_round(
                Round(
                    views,
                    pixels,
                    places,
                    table,
                    (fine if coarse else target) if depth else None,
                    target,
                    out.new_empty(shape, dtype=torch.int32 if packed else torch.uint16),
                    out.new_empty(jobs, tiles, dtype=torch.float32),
                    out.new_empty(jobs, 3, room, dtype=torch.float32),
                    fine,
                    coarse and bool(set(views) & set(sources)),
                )
            )


def groups_of(params: Tensor) -> tuple[list[tuple[tuple[int, ...], int]], list[int]]:
    """Views by how many others they are made from, with room for the largest patch of each group, 0
    without one; and the views that others are made from."""
    sources = params[0, :, COLUMN["source"]].int().tolist()
    depth = []
    for view in range(len(sources)):
        steps, source = 0, view
        while (source := sources[source]) >= 0:
            steps += 1
        depth.append(steps)
    area = params[..., COLUMN["patch_height"]] * params[..., COLUMN["patch_width"]]
    area = (area * (params[..., COLUMN["patch_kind"]] != 0)).amax(0).int().tolist()
    groups = []
    for steps in range(max(depth) + 1):
        views = tuple(view for view, its in enumerate(depth) if its == steps)
        most = max(area[view] for view in views)
        groups.append((views, max(LEAST_ROOM, 1 << (most - 1).bit_length()) if most else 0))
    return groups, sorted({source for source in sources if source >= 0})


def _moved(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. From pinned memory it is made when the stream comes to it."""
    table = table.contiguous()
    if device.type == "cuda" and not table.is_pinned():
        table = table.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _captured.append(table)
    return table.to(device, non_blocking=True)
