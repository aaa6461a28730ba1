"""PaDiM's distances in Triton: what `spd_fast.reference.mahalanobis_map` defines, on a GPU.

Two kernels, for a block of positions at a time. `center` gathers the kept channels from the layers
and subtracts the means; `distances` multiplies every position's packed triangle with the batch.
Every element of the factor is read once for each tile of up to 32 images.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spd_fast.kernels.target import has_tensor_cores

SCRATCH = 32 << 20  # bytes of centred features: they are read back from a large GPU's L2 cache
MOST_POSITIONS = 1 << 15  # at a time: an axis of a launch has at most 65,535 blocks
CHANNELS_TILE = 64
POSITIONS_TILE = 32


@triton.jit(do_not_specialize=["first", "last", "batch"])
def center(
    layers,
    shapes,
    channels,
    mean,
    high,
    low,
    first,
    last,
    grid_height,
    grid_width,
    batch,
    d,
    padded: tl.constexpr,
    positions_tile: tl.constexpr,
    channels_tile: tl.constexpr,
    channels_last: tl.constexpr,
    split: tl.constexpr,
):
    """x - mean of positions first..last-1, as (position, image, channel), zero from channel d on.

    layers: a pointer for each layer; shapes: of each its first channel in the concatenation, number
    of channels, height, width, and strides of image, channel, row and column.
    split: what `high` rounds away goes to `low`.
    """
    tiles = tl.cdiv(last - first, positions_tile)
    position = tl.program_id(0) % tiles * positions_tile + tl.arange(0, positions_tile) + first
    image = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(1) * channels_tile + tl.arange(0, channels_tile)
    channel = tl.load(channels + k, mask=k < d, other=-1)
    row = position // grid_width
    column = position % grid_width
    # Neighbouring lanes read along the axis whose elements lie side by side.
    if channels_last:
        x = tl.zeros([positions_tile, channels_tile], tl.float32)
    else:
        x = tl.zeros([channels_tile, positions_tile], tl.float32)
    for i in tl.static_range(len(layers)):
        start, count, height, width, image_stride, channel_stride, row_stride, column_stride = (
            shapes[i]
        )
        own = (channel >= start) & (channel < start + count)
        # Channels in order: those of a tile are mostly of one layer.
        if tl.max(own.to(tl.int32), 0) > 0:
            place = (row * height // grid_height).to(tl.int64) * row_stride
            place += (column * width // grid_width).to(tl.int64) * column_stride
            plane = image * image_stride + (channel - start) * channel_stride
            if channels_last:
                at = place[:, None] + plane[None, :]
                mask = (position < last)[:, None] & own[None, :]
            else:
                at = plane[:, None] + place[None, :]
                mask = own[:, None] & (position < last)[None, :]
            x += tl.load(layers[i] + at, mask=mask, other=0.0).to(tl.float32)
    if not channels_last:
        x = tl.trans(x)
    valid = (position < last)[:, None]
    wanted = valid & (k < d)[None, :]
    place = position.to(tl.int64)[:, None] * d + k[None, :]
    x = tl.where(wanted, x - tl.load(mean + place, mask=wanted, other=0.0), 0.0)
    at = ((position - first).to(tl.int64)[:, None] * batch + image) * padded + k[None, :]
    rounded = x.to(high.dtype.element_ty)
    tl.store(high + at, rounded, mask=valid)
    if split:
        rest = x - rounded.to(tl.float32)
        tl.store(low + at, rest.to(low.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["batch"])
def distances(
    high,
    low,
    factor,
    out,
    batch,
    positions,
    panels: tl.constexpr,
    padded: tl.constexpr,
    images_tile: tl.constexpr,
    rows_tile: tl.constexpr,
    columns_tile: tl.constexpr,
    split: tl.constexpr,
):
    """Norm of W (x - mean) of one position and a tile of images.

    factor: panels of 8 rows, (i, k) at 32 r (r + 1) + 8 k + i % 8 with r = i // 8, of the block's
    first position; out: (image, position), likewise.
    """
    tl.static_assert(padded % rows_tile == 0)  # x is read without a mask
    position = tl.program_id(1).to(tl.int64)
    image = tl.program_id(0) * images_tile + tl.arange(0, images_tile)
    present = (image < batch)[:, None]
    x_row = (position * batch + image)[:, None] * padded
    w = factor + position * (32 * panels * (panels + 1))
    total = tl.zeros([images_tile], tl.float32)
    # A bfloat16 factor is widened to what x is, float32.
    for first_row in range(0, 8 * panels, rows_tile):
        if split:
            panel = first_row // 8 + tl.arange(0, rows_tile // 8)
            start = w + 32 * panel * (panel + 1)
            end = tl.where(panel < panels, 64 * (panel + 1), 0)
        else:
            i = first_row + tl.arange(0, rows_tile)
            panel = i // 8  # divisions, not shifts: from them Triton sees 8 rows side by side
            start = w + (32 * panel * (panel + 1) + i % 8)
            end = tl.where(i < 8 * panels, 8 * (panel + 1), 0)
        product = tl.zeros([images_tile, rows_tile], tl.float32)
        for first_column in range(0, first_row + rows_tile, columns_tile):
            k = first_column + tl.arange(0, columns_tile)
            if split:
                # Lanes read along a panel, and tiles are turned over for the tensor cores: on an
                # H200 two thirds of the time. For float32, which uses none, that is slower.
                at = 8 * first_column + tl.arange(0, 8 * columns_tile)
                tile = tl.load(
                    start[:, None] + at[None, :], mask=at[None, :] < end[:, None], other=0.0
                )
                tile = tl.reshape(tile, [rows_tile // 8, columns_tile, 8])
                tile = tl.reshape(tl.permute(tile, [1, 0, 2]), [columns_tile, rows_tile])
            else:
                at = start[None, :] + 8 * k[:, None]
                tile = tl.load(at, mask=k[:, None] < end[None, :], other=0.0)
            tile = tile.to(high.dtype.element_ty)
            x = tl.load(high + x_row + k[None, :], mask=present, other=0.0)
            # "ieee": tensor cores would round float32 to 10 bits (TF32).
            product = tl.dot(x, tile, product, input_precision="ieee")
            if split:
                rest = tl.load(low + x_row + k[None, :], mask=present, other=0.0)
                product = tl.dot(rest, tile, product, input_precision="ieee")
        total += tl.sum(product * product, 1)
    tl.store(out + image.to(tl.int64) * positions + position, tl.sqrt(total), mask=image < batch)


def tiles_of(dtype: torch.dtype, batch: int) -> dict:
    """How `distances` is launched for a factor of this dtype."""
    images = 16 if batch <= 16 else 32
    split = dtype == torch.float16
    columns = (64 if has_tensor_cores() else 32) if split else 16
    warps = 2 if dtype == torch.float32 and images == 16 else 4
    tiles = {"images_tile": images, "rows_tile": CHANNELS_TILE, "columns_tile": columns}
    return tiles | {"split": split, "num_warps": warps, "num_stages": 3}


def mahalanobis_map(
    features: list[Tensor], channels: Tensor, mean: Tensor, factor: Tensor
) -> Tensor:
    """(B, h, w) float32 distances; arguments as `spd_fast.mahalanobis_map` has checked them, all on
    one GPU, or on the CPU under Triton's interpreter. Nothing synchronises.

    A float16 factor meets x - mean as the sum of two float16: tensor cores take nothing finer, and
    one alone would double the error.
    """
    batch, _, height, width = features[0].shape
    if not batch:
        return mean.new_empty(0, height, width)
    with torch.cuda.device_of(factor):
        return _launch(features, channels, mean, factor).view(batch, height, width)


def _launch(features: list[Tensor], channels: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    batch, _, height, width = features[0].shape
    positions, d = mean.shape
    padded = triton.cdiv(d, CHANNELS_TILE) * CHANNELS_TILE
    tiles = tiles_of(factor.dtype, batch)
    step = SCRATCH // (batch * padded * 4) // POSITIONS_TILE * POSITIONS_TILE
    step = min(max(step, POSITIONS_TILE), MOST_POSITIONS, positions)
    x_dtype = torch.float16 if tiles["split"] else torch.float32
    high = mean.new_empty(step, batch, padded, dtype=x_dtype)
    low = torch.empty_like(high) if tiles["split"] else high
    out = mean.new_empty(batch, positions)
    starts = [0]
    for layer in features:
        starts.append(starts[-1] + layer.shape[1])
    shapes = tuple((start, *f.shape[1:], *f.stride()) for start, f in zip(starts, features))
    for first in range(0, positions, step):
        last = min(first + step, positions)
        center[triton.cdiv(last - first, POSITIONS_TILE) * batch, padded // CHANNELS_TILE](
            *(tuple(features), shapes, channels, mean, high, low),
            *(first, last, height, width, batch, d, padded),
            positions_tile=POSITIONS_TILE,
            channels_tile=CHANNELS_TILE,
            channels_last=features[0].stride(1) == 1,
            split=tiles["split"],
            num_warps=8,
        )
        distances[triton.cdiv(batch, tiles["images_tile"]), last - first](
            *(high, low, factor[first:], out[:, first:]),
            *(batch, positions, triton.cdiv(d, 8), padded),
            **tiles,
        )
    return out
