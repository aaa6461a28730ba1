"""The augmented views of a batch in Triton: what `spd_fast.reference.augment_views` defines.

A round makes the views whose sources exist: those of the decoded image first, then those made from
them. `resize` (or `resize_view`) crops, resizes, flips and adjusts colours up to contrast, which
needs the mean of the whole view: every program leaves its part of that sum. `finish` does the rest,
blurs, normalises and stores; `paste` blends patches in. Five launches make the four views of SPD.

A program makes a tile of one view. Between the launches pixels are rounded to 16 bits, or to 11, 11
and 10 in views that are made from views and end in less than float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from spd_fast.kernels.target import has_tensor_cores
from spd_fast.kernels.views_finish import finish
from spd_fast.kernels.views_patch import TILE, paste
from spd_fast.kernels.views_resize import resize, resize_view
from spd_fast.kernels.views_table import PATCH_HEIGHT, PATCH_KIND, PATCH_WIDTH, TILE_X, TILE_Y

LEAST_ROOM = 1024  # pixels; powers of two from here on, so that few kernels are compiled
_captured: list[Tensor] = []  # tables that captured graphs read again at every replay


class Round(NamedTuple):
    """Views that are made together, and the pixels of their largest patch, 0 without one."""

    views: tuple[int, ...]
    room: int


def rounds_of(params: Tensor) -> tuple[list[Round], list[int]]:
    """Views by how many others they are made from, first those of the decoded image; and the views
    that others are made from."""
    sources = params[0, :, 0].int().tolist()
    depth = []
    for view in range(len(sources)):
        steps, source = 0, view
        while (source := sources[source]) >= 0:
            steps += 1
        depth.append(steps)
    rounds = []
    for steps in range(max(depth) + 1):
        views = tuple(view for view, its in enumerate(depth) if its == steps)
        rows = params[:, list(views)]
        area = rows[..., PATCH_HEIGHT.value] * rows[..., PATCH_WIDTH.value]
        most = int((area * (rows[..., PATCH_KIND.value] != 0)).max())
        rounds.append(Round(views, most and triton.next_power_of_2(max(most, LEAST_ROOM))))
    return rounds, sorted({source for source in sources if source >= 0})


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

    Nothing synchronises. A captured graph reads `params` again at every replay if it is contiguous
    and in pinned memory, else the table as it was.
    """
    with torch.cuda.device_of(out):
        _launch(pixels, images, params, out, tuple(scales), tuple(shifts))


def _launch(pixels, images, params, out, scales, shifts) -> None:
    n_views, n, _, height, width = out.shape
    rounds, sources = rounds_of(params)
    table, places = _moved(params, out.device), _moved(images, out.device)
    identity = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    # 8 bits are too few to make further views from: then the first views, up to the last that is a
    # source, are also stored in 16.
    coarse = bool(sources) and out.dtype in (torch.uint8, torch.bfloat16)
    fine = out.new_empty(sources[-1] + 1 if coarse else 0, n, 3, height, width, dtype=torch.float16)
    target = out, out.stride(), scales, shifts
    source = (fine, fine.stride(), *identity) if coarse else target
    shape = {"n_views": n_views, "height": height, "width": width}
    for depth, (views, room) in enumerate(rounds):
        # 11, 11 and 10 bits would be the largest error of views that are adjusted strongly, as
        # those of the image are.
        packed = depth > 0 and out.dtype != torch.float32
        boxes = out.new_empty(n * len(views), 3, room, dtype=torch.float32)
        origin = source if depth else (pixels, places)
        kinds = shape | {"views": views}
        _make(table, origin, target, boxes, fine, packed, kinds)
        if not room:
            continue
        grid = (
            triton.cdiv(height, TILE_Y.value) * triton.cdiv(width, TILE.value) * boxes.shape[0],
        )
        paste[grid](boxes, room, table, *target, n_written=n_views, **kinds, num_stages=1)
        if coarse and set(views) & set(sources):
            paste[grid](boxes, room, table, *source, n_written=len(fine), **kinds, num_stages=1)


def _make(table, origin, target, boxes, fine, packed: bool, kinds: dict) -> None:
    """The views of one round but for their patches; the scratch memory ends with it."""
    out, height, width = target[0], kinds["height"], kinds["width"]
    jobs, _, room = boxes.shape
    tiles = triton.cdiv(height, TILE_Y.value) * triton.cdiv(width, TILE_X.value)
    scratch_shape = (jobs, height * width) if packed else (jobs, 3, height * width)
    scratch = out.new_empty(scratch_shape, dtype=torch.int32 if packed else torch.uint16)
    sums = out.new_empty(jobs, tiles, dtype=torch.float32)
    tiled = kinds | {"tiles": tiles, "packed": packed, "num_stages": 1}
    first = resize if len(origin) == 2 else resize_view
    first[(jobs * tiles,)](*origin, table, scratch, sums, **tiled)
    radius = height // 20
    # The compiler would rather spill a few registers than use more. Without tensor cores a thread
    # keeps more of a tile, and has to have fewer of its pixels.
    options = {"num_warps": 4, "maxnreg": 128} if has_tensor_cores() else {"num_warps": 8}
    finish[(jobs * tiles,)](
        *(scratch, sums, table, *target, boxes, room, fine, fine.stride()),
        n_fine=len(fine),
        sums_tile=triton.next_power_of_2(tiles),
        taps_tile=triton.next_power_of_2(radius + 1),
        most_radius=radius,
        **tiled,
        **options,
    )


def _moved(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. From pinned memory it is made when the stream comes to it."""
    table = table.contiguous()
    if device.type == "cuda" and not table.is_pinned():
        table = table.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _captured.append(table)
    return table.to(device, non_blocking=True)
