"""Crop, resize, flip, and the colours up to contrast: a tile of one view a program."""

import triton
import triton.language as tl

from spd_fast.kernels.views_color import clamp01, gray, jitter, jitter_ops, place_of_contrast
from spd_fast.kernels.views_table import (
    COLUMNS,
    CROP_HEIGHT,
    CROP_LEFT,
    CROP_TOP,
    CROP_WIDTH,
    FLIP,
    JITTER,
    TILE_X,
    TILE_Y,
    from_bits,
    keep,
    nth,
    tile_of,
)


@triton.jit
def crop_of(row):
    top, left = tl.load(row + CROP_TOP).to(tl.int32), tl.load(row + CROP_LEFT).to(tl.int32)
    height = tl.load(row + CROP_HEIGHT).to(tl.int32)
    return top, left, height, tl.load(row + CROP_WIDTH).to(tl.int32)


@triton.jit
def up_to_contrast(
    r, g, b, row, scratch, sums, job, tile, place, mask,
    tiles: tl.constexpr, plane: tl.constexpr, packed: tl.constexpr,
):  # fmt: skip
    """Adjust up to contrast, keep the pixels, and leave the tile's sum of gray."""
    ops = jitter_ops(tl.load(row + JITTER).to(tl.int32))
    r, g, b = jitter(r, g, b, row + JITTER, ops, 0, place_of_contrast(ops), 0.0)
    keep(scratch, job, place, mask, r, g, b, plane, packed)
    total = tl.sum(tl.sum(tl.where(mask, gray(r, g, b), 0.0), 1), 0)
    tl.store(sums + job * tiles + tile, total)


@triton.jit
def taps_of(i, size_in, size_out: tl.constexpr):
    """Of output i: the centre in the source, the first tap, how many, and 1 / support."""
    scale = size_in.to(tl.float32) / size_out
    support = tl.maximum(scale, 1.0)
    taps = tl.minimum(size_in, tl.ceil(2 * support).to(tl.int32))
    taps = tl.where(size_in == size_out, 1, taps)
    centre = (i.to(tl.float32) + 0.5) * scale
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    return centre, tl.minimum(first, size_in - taps), taps, 1 / support


@triton.jit
def triangle(k, centre, slope):
    return tl.maximum(1 - tl.abs(k.to(tl.float32) + 0.5 - centre) * slope, 0.0)


@triton.jit
def resize(
    pixels, images, table, scratch, sums,
    views: tl.constexpr, n_views: tl.constexpr, tiles: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, packed: tl.constexpr,
):  # fmt: skip
    """From the decoded images; `images`: of each where it begins in `pixels`, height and width."""
    job = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    image = job // len(views)
    row = table + (image * n_views + nth(views, job % len(views))) * COLUMNS
    y, x, mask, place = tile_of(tile, height, width)
    top, left, crop_height, crop_width = crop_of(row)
    # Lanes past the view's end do as its last pixel does, so that nothing need be masked. Flipping
    # commutes with all that comes before the patch.
    y_in = tl.minimum(y, height - 1)
    x_in = tl.minimum(x, width - 1)
    x_in = tl.where(tl.load(row + FLIP) != 0, width - 1 - x_in, x_in)
    centre_y, first_y, taps_y, slope_y = taps_of(y_in, crop_height, height)
    centre_x, first_x, taps_x, slope_x = taps_of(x_in, crop_width, width)
    across = tl.load(images + image * 3 + 2).to(tl.int32)
    corner = pixels + tl.load(images + image * 3) + 3 * (top.to(tl.int64) * across + left)
    r = tl.zeros([TILE_Y, TILE_X], tl.float32)
    g = tl.zeros([TILE_Y, TILE_X], tl.float32)
    b = tl.zeros([TILE_Y, TILE_X], tl.float32)
    sum_y = tl.zeros([TILE_Y], tl.float32)
    sum_x = tl.zeros([TILE_X], tl.float32)
    for j in range(taps_x):
        weight_x = triangle(first_x + j, centre_x, slope_x)
        sum_x += weight_x
        column_r = tl.zeros([TILE_Y, TILE_X], tl.float32)
        column_g = tl.zeros([TILE_Y, TILE_X], tl.float32)
        column_b = tl.zeros([TILE_Y, TILE_X], tl.float32)
        sum_y = tl.zeros([TILE_Y], tl.float32)
        for i in range(taps_y):
            weight = triangle(first_y + i, centre_y, slope_y)
            sum_y += weight
            source = corner + 3 * ((first_y + i)[:, None] * across + (first_x + j)[None, :])
            weight = weight[:, None]
            column_r += weight * from_bits(tl.load(source).to(tl.int32), 1)
            column_g += weight * from_bits(tl.load(source + 1).to(tl.int32), 1)
            column_b += weight * from_bits(tl.load(source + 2).to(tl.int32), 1)
        r += weight_x[None, :] * column_r
        g += weight_x[None, :] * column_g
        b += weight_x[None, :] * column_b
    gain = (1 / (255 * sum_y))[:, None] * (1 / sum_x)[None, :]
    r, g, b = clamp01(r * gain), clamp01(g * gain), clamp01(b * gain)
    plane: tl.constexpr = height * width
    up_to_contrast(r, g, b, row, scratch, sums, job, tile, place, mask, tiles, plane, packed)


@triton.jit
def resize_view(
    source, strides, scales, shifts, table, scratch, sums,
    views: tl.constexpr, n_views: tl.constexpr, tiles: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, packed: tl.constexpr,
):  # fmt: skip
    """From finished views. A crop of a view is never larger than a view: two taps are enough."""
    # The views of one tile follow each other, so that the second finds its source in the cache.
    job = (tl.program_id(0) // (tiles * len(views)) * len(views)).to(tl.int64)
    job += tl.program_id(0) % len(views)
    tile = tl.program_id(0) // len(views) % tiles
    image = job // len(views)
    row = table + (image * n_views + nth(views, job % len(views))) * COLUMNS
    y, x, mask, place = tile_of(tile, height, width)
    top, left, crop_height, crop_width = crop_of(row)
    x_in = tl.where(tl.load(row + FLIP) != 0, width - 1 - x, x)
    y_in = (y.to(tl.float32) + 0.5) * (crop_height.to(tl.float32) / height) - 0.5
    x_in = (x_in.to(tl.float32) + 0.5) * (crop_width.to(tl.float32) / width) - 0.5
    first_y, first_x = tl.floor(y_in), tl.floor(x_in)
    weight_y, weight_x = (y_in - first_y)[:, None], (x_in - first_x)[None, :]
    y0 = tl.minimum(tl.maximum(first_y.to(tl.int32), 0), crop_height - 1)
    y1 = tl.minimum(tl.maximum(first_y.to(tl.int32) + 1, 0), crop_height - 1)
    x0 = tl.minimum(tl.maximum(first_x.to(tl.int32), 0), crop_width - 1)
    x1 = tl.minimum(tl.maximum(first_x.to(tl.int32) + 1, 0), crop_width - 1)
    view = tl.load(row).to(tl.int64)
    corner = source + view * strides[0] + image * strides[1]
    corner = corner + top * strides[3] + left * strides[4]
    # Offsets in a view fit into 32 bits, and take half of the registers that addresses do.
    upper, lower = (y0 * strides[3])[:, None], (y1 * strides[3])[:, None]
    near, far = (x0 * strides[4])[None, :], (x1 * strides[4])[None, :]
    green, blue = corner + strides[2], corner + 2 * strides[2]
    r = between(corner, upper, lower, near, far, weight_y, weight_x, mask)
    g = between(green, upper, lower, near, far, weight_y, weight_x, mask)
    b = between(blue, upper, lower, near, far, weight_y, weight_x, mask)
    r = clamp01((r - shifts[0]) / scales[0])
    g = clamp01((g - shifts[1]) / scales[1])
    b = clamp01((b - shifts[2]) / scales[2])
    plane: tl.constexpr = height * width
    up_to_contrast(r, g, b, row, scratch, sums, job, tile, place, mask, tiles, plane, packed)


@triton.jit
def between(corner, upper, lower, near, far, weight_y, weight_x, mask):
    a = tl.load(corner + (upper + near), mask, other=0).to(tl.float32)
    b = tl.load(corner + (upper + far), mask, other=0).to(tl.float32)
    above = a + weight_x * (b - a)
    c = tl.load(corner + (lower + near), mask, other=0).to(tl.float32)
    d = tl.load(corner + (lower + far), mask, other=0).to(tl.float32)
    return above + weight_y * (c + weight_x * (d - c) - above)
