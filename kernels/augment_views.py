"""The augmented views of a batch in Triton: what `spd_fast.reference.augment_views` defines.

A round makes the views whose sources exist: those of the decoded image first, then those made from
them. `resize` (or `resize_view`) crops, resizes, flips and adjusts colours up to contrast, which
needs the mean of the whole view: every program leaves its part of that sum. `finish` does the rest,
blurs, normalises and stores; `paste` blends patches in. Five launches make the four views of SPD.

A program makes a tile of one view. Between the launches pixels are rounded to 16 bits, or to 11, 11
and 10 in views that are made from views and end in less than float32.
"""

import triton

from spd_fast.kernels.target import has_tensor_cores
from spd_fast.kernels.views_finish import finish
from spd_fast.kernels.views_patch import TILE, paste
from spd_fast.kernels.views_resize import resize, resize_view
from spd_fast.kernels.views_table import TILE_Y


def make_round(work) -> None:
    """Launch what makes the views of a `spd_fast.ops.view_rounds.Round`."""
    n_views, _, _, height, width = work.target.views.shape
    jobs, tiles = work.sums.shape
    kinds = {"views": work.views, "n_views": n_views, "height": height, "width": width}
    tiled = kinds | {"tiles": tiles, "packed": work.packed, "num_stages": 1}
    scratch = work.scratch, work.sums
    if work.source is None:
        resize[(jobs * tiles,)](work.pixels, work.images, work.params, *scratch, **tiled)
    else:
        source = _arguments(work.source)
        resize_view[(jobs * tiles,)](*source, work.params, *scratch, **tiled)
    room, radius = work.boxes.shape[2], height // 20
    fine = work.fine.views
    # The compiler would rather spill a few registers than use more. Without tensor cores a thread
    # keeps more of a tile, and has to have fewer of its pixels.
    options = {"num_warps": 4, "maxnreg": 128} if has_tensor_cores() else {"num_warps": 8}
    finish[(jobs * tiles,)](
        *(*scratch, work.params, *_arguments(work.target), work.boxes, room, fine, fine.stride()),
        n_fine=len(fine),
        sums_tile=triton.next_power_of_2(tiles),
        taps_tile=triton.next_power_of_2(radius + 1),
        most_radius=radius,
        **tiled,
        **options,
    )
    pasted = [work.target, work.fine] if work.paste_fine else [work.target]
    for stored in pasted if room else ():
        blocks = triton.cdiv(height, TILE_Y.value) * triton.cdiv(width, TILE.value)
        paste[(jobs * blocks,)](
            *(work.boxes, room, work.params, *_arguments(stored)),
            n_written=len(stored.views),
            **kinds,
            num_stages=1,
        )


def _arguments(stored) -> tuple:
    views, scales, shifts = stored
    return views, views.stride(), scales, shifts
