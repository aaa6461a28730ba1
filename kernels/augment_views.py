"""The augmented views of a batch in Triton: what `spd_fast.reference.augment_views` defines.

A round makes the views whose sources exist: those of the decoded image first, then those made from
them. `resize` (or `resize_view`) crops, resizes, flips and adjusts colours up to contrast, which
needs the mean of the whole view: every program leaves its part of that sum. `finish` does the rest,
blurs, normalises and stores; `paste` blends patches in. Five launches make the four views of SPD.

A program makes a tile of one view. Between the launches pixels are rounded to 16 bits, or to 11, 11
and 10 in views that are made from views and end in less than float32.
"""

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from spd_fast.kernels.target import has_tensor_cores
from spd_fast.kernels.views_finish import finish
from spd_fast.kernels.views_patch import BLOCK, TILE, paste
from spd_fast.kernels.views_resize import resize, resize_view
from spd_fast.kernels.views_table import (
    ALPHA_SIGMA_X,
    ALPHA_SIGMA_Y,
    PATCH_HEIGHT,
    PATCH_KIND,
    PATCH_WIDTH,
    TILE_X,
    TILE_Y,
)

MOST_ALPHA_TAPS = 1024


def rounds_of(sources: Sequence[int]) -> list[tuple[int, ...]]:
    """Views by how many others they are made from: first those of the decoded image."""
    depth = []
    for view in range(len(sources)):
        steps, source = 0, view
        while (source := sources[source]) >= 0:
            steps += 1
        depth.append(steps)
    return [
        tuple(view for view, its in enumerate(depth) if its == steps)
        for steps in range(max(depth) + 1)
    ]


def augment_views(
    pixels: Tensor,
    images: Tensor,
    params: Tensor,
    out: Tensor,
    scales: Sequence[float],
    shifts: Sequence[float],
) -> None:
    """Fill `out` (V, N, 3, height, width) with value * scale + shift of the channel.

    Args:
        pixels: uint8, on out's device.
        images: (N, 3) int64 on the CPU: where an image begins in `pixels`, height and width.
        params: (N, V, 27) float32 on the CPU; in one view all images have the same source.

    Tables in pinned memory are copied as the stream comes to them: a captured graph reads them
    again at every replay. Others are copied to pinned memory first. Nothing synchronises.
    """
    with torch.cuda.device_of(out):
        _launch(pixels, images, params, out, tuple(scales), tuple(shifts))


def _launch(pixels, images, params, out, scales, shifts) -> None:
    n_views, n, _, height, width = out.shape
    sources = params[0, :, 0].int().tolist()
    table, places = _moved(params, out.device), _moved(images, out.device)
    tiles = triton.cdiv(height, TILE_Y.value) * triton.cdiv(width, TILE_X.value)
    radius = height // 20
    # The compiler would rather spill a few registers than use more. Without tensor cores a thread
    # keeps more of a tile, and has to have fewer of its pixels.
    options = {"num_warps": 4, "maxnreg": 128} if has_tensor_cores() else {"num_warps": 8}
    identity = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    # 8 bits are too few to make further views from: then their sources are kept apart.
    coarse = out.dtype in (torch.uint8, torch.bfloat16)
    made_from = [view for view in range(n_views) if view in sources]
    patched = bool((params[:, made_from, PATCH_KIND.value] != 0).any())
    n_halves = (n_views if patched else max(sources) + 1) if coarse else 0
    halves = out.new_empty(n_halves, n, 3, height, width, dtype=torch.float16)
    for depth, views in enumerate(rounds_of(sources)):
        jobs = n * len(views)
        shape = {"views": views, "n_views": n_views, "height": height, "width": width}
        tiled = {"tiles": tiles, "num_stages": 1}
        # 11, 11 and 10 bits would be the largest error of views that are adjusted strongly, as
        # those of the image are.
        tiled["packed"] = packed = depth > 0 and out.dtype != torch.float32
        scratch_shape = (jobs, height * width) if packed else (jobs, 3, height * width)
        scratch = out.new_empty(scratch_shape, dtype=torch.int32 if packed else torch.uint16)
        sums = out.new_empty(jobs, tiles, dtype=torch.float32)
        grid = (jobs * tiles,)
        if depth == 0:
            resize[grid](pixels, places, table, scratch, sums, **shape, **tiled)
        else:
            source, values = (halves, identity) if coarse else (out, (scales, shifts))
            resize_view[grid](
                source, source.stride(), table, scratch, sums, *values, **shape, **tiled
            )
        patches = params[:, list(views)]
        patches = patches[patches[..., PATCH_KIND.value] != 0]
        area = patches[:, PATCH_HEIGHT.value] * patches[:, PATCH_WIDTH.value]
        most = int(area.max()) if len(patches) else 0
        room = triton.next_power_of_2(max(most, BLOCK.value)) if most else 0
        boxes = out.new_empty(jobs, 3, room, dtype=torch.float32)
        finish[grid](
            *(scratch, sums, table, out, out.stride(), scales, shifts, boxes, room),
            *(halves, halves.stride()),
            n_halves=n_halves,
            sums_tile=triton.next_power_of_2(tiles),
            taps_tile=triton.next_power_of_2(radius + 1),
            most_radius=radius,
            **shape,
            **tiled,
            **options,
        )
        if not most:
            continue
        down, across = triton.cdiv(height, TILE_Y.value), triton.cdiv(width, TILE.value)
        pasted = [(out, scales, shifts)]
        if n_halves == n_views:
            pasted.append((halves, *identity))
        for target, *values in pasted:
            paste[(jobs * down * across,)](
                *(boxes, room, table, target, target.stride(), *values),
                taps_tile=alpha_taps(patches),
                **shape,
                num_warps=4,
                num_stages=1,
            )


def alpha_taps(params: Tensor) -> int:
    """Taps of the widest alpha kernel among these rows, as a power of two."""
    sigma = float(params[..., [ALPHA_SIGMA_Y.value, ALPHA_SIGMA_X.value]].max())
    return triton.next_power_of_2(2 * math.ceil(4 * sigma) + 1)


def _moved(table: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not table.is_pinned():
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
