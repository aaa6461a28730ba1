"""Contrast and what follows it, and the blur: a tile of one view a program."""

import triton
import triton.language as tl

from spd_fast.kernels.views_color import clamp01, gray, jitter, jitter_ops, place_of_contrast
from spd_fast.kernels.views_table import (
    BLUR_SIGMA,
    COLUMNS,
    GRAYSCALE,
    JITTER,
    PATCH_HEIGHT,
    PATCH_KIND,
    PATCH_LEFT,
    PATCH_TOP,
    PATCH_WIDTH,
    TILE_X,
    TILE_Y,
    gaussian,
    kept,
    nth,
    reflect,
    stored,
    tile_of,
)

BLUR_Y, BLUR_X = tl.constexpr(16), tl.constexpr(32)  # source pixels that are taken at once
NEGLIGIBLE_TAP = tl.constexpr(1e-6)


@triton.jit
def band(source, output, sigma, radius, norm):
    """A blur along one axis as a matrix: the taps, rounded to half precision."""
    offset = tl.abs(source - output)
    return tl.where(offset <= radius, gaussian(offset, sigma) * norm, 0.0).to(tl.float16)


@triton.jit
def from_contrast(
    scratch, job, place, mask, row, ops, mean, plane: tl.constexpr, packed: tl.constexpr
):
    """The kept pixels, adjusted from contrast on."""
    r, g, b = kept(scratch, job, place, mask, plane, packed)
    r, g, b = jitter(r, g, b, row + JITTER, ops, place_of_contrast(ops), 4, mean)
    if tl.load(row + GRAYSCALE) != 0:
        r = gray(r, g, b)
        g = r
        b = r
    return r, g, b


@triton.jit
def finish(
    scratch, sums, table, out, strides, scales, shifts, patches, room, fine, fine_strides,
    n_fine: tl.constexpr, views: tl.constexpr, n_views: tl.constexpr, tiles: tl.constexpr,
    sums_tile: tl.constexpr, taps_tile: tl.constexpr, most_radius: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr, packed: tl.constexpr,
):  # fmt: skip
    """Contrast and what follows it, blur, and the view as it will be. A patch's source box, which
    `paste` may overwrite, also goes to `patches`, (job, 3, room), and the first `n_fine` views to
    `fine`, for those that are made from them."""
    plane: tl.constexpr = height * width
    job = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    image = job // len(views)
    view = nth(views, job % len(views)).to(tl.int64)
    row = table + (image * n_views + view) * COLUMNS
    y, x, mask, place = tile_of(tile, height, width)
    ops = jitter_ops(tl.load(row + JITTER).to(tl.int32))
    i = tl.arange(0, sums_tile)
    mean = tl.sum(tl.load(sums + job * tiles + i, i < tiles, other=0.0), 0) / plane

    # Taps that no rounding would notice are left out: radius 0 is no blur at all.
    sigma = tl.load(row + BLUR_SIGMA)
    t = tl.arange(0, taps_tile)
    weights = tl.where(t <= most_radius, gaussian(t, tl.maximum(sigma, 1e-6)), 0.0)
    norm = 1 / (2 * tl.sum(weights, 0) - 1)
    radius = tl.sum(((t > 0) & (weights * norm >= NEGLIGIBLE_TAP)).to(tl.int32), 0)
    if radius > 0:
        # Rounded taps do not sum to 1: dividing by their sum keeps an even area as it is. Colours
        # are centred about 0, where half precision is finest.
        rounded = tl.where(t <= radius, (weights * norm).to(tl.float16).to(tl.float32), 0.0)
        gain = 1 / (2 * tl.sum(rounded, 0) - tl.sum(tl.where(t == 0, rounded, 0.0), 0))
        r = tl.zeros([TILE_Y, TILE_X], tl.float32)
        g = tl.zeros([TILE_Y, TILE_X], tl.float32)
        b = tl.zeros([TILE_Y, TILE_X], tl.float32)
        across: tl.constexpr = (width + TILE_X - 1) // TILE_X
        top, left = (tile // across) * TILE_Y, (tile % across) * TILE_X
        bottom = tl.minimum(top + TILE_Y, height) + radius
        right = tl.minimum(left + TILE_X, width) + radius
        for x_start in range(left - radius, right, BLUR_X):
            x_in = x_start + tl.arange(0, BLUR_X)
            column_r = tl.zeros([TILE_Y, BLUR_X], tl.float32)
            column_g = tl.zeros([TILE_Y, BLUR_X], tl.float32)
            column_b = tl.zeros([TILE_Y, BLUR_X], tl.float32)
            for y_start in range(top - radius, bottom, BLUR_Y):
                y_in = y_start + tl.arange(0, BLUR_Y)
                inside = (y_in < bottom)[:, None] & (x_in < right)[None, :]
                source = reflect(y_in, height)[:, None] * width + reflect(x_in, width)[None, :]
                p, q, s = from_contrast(scratch, job, source, inside, row, ops, mean, plane, packed)
                along_y = band(y_in[None, :], y[:, None], sigma, radius, norm)
                column_r = tl.dot(along_y, (p - 0.5).to(tl.float16), column_r)
                column_g = tl.dot(along_y, (q - 0.5).to(tl.float16), column_g)
                column_b = tl.dot(along_y, (s - 0.5).to(tl.float16), column_b)
            along_x = band(x_in[:, None], x[None, :], sigma, radius, norm)
            r = tl.dot((column_r * gain).to(tl.float16), along_x, r)
            g = tl.dot((column_g * gain).to(tl.float16), along_x, g)
            b = tl.dot((column_b * gain).to(tl.float16), along_x, b)
        r, g, b = clamp01(r * gain + 0.5), clamp01(g * gain + 0.5), clamp01(b * gain + 0.5)
    else:
        r, g, b = from_contrast(scratch, job, place, mask, row, ops, mean, plane, packed)

    if tl.load(row + PATCH_KIND) != 0:
        y_in = y - tl.load(row + PATCH_TOP).to(tl.int32)
        x_in = x - tl.load(row + PATCH_LEFT).to(tl.int32)
        across_patch = tl.load(row + PATCH_WIDTH).to(tl.int32)
        inside = (y_in >= 0) & (y_in < tl.load(row + PATCH_HEIGHT).to(tl.int32))
        inside = inside[:, None] & ((x_in >= 0) & (x_in < across_patch))[None, :]
        at = y_in[:, None] * across_patch + x_in[None, :]
        inside = mask & inside & (at < room)
        box = patches + job * (3 * room) + at
        tl.store(box, r, inside)
        tl.store(box + room, g, inside)
        tl.store(box + 2 * room, b, inside)
    to = out + view * strides[0] + image * strides[1]
    to = to + (y * strides[3])[:, None] + (x * strides[4])[None, :]
    tl.store(to, stored(r, scales[0], shifts[0], out), mask)
    tl.store(to + strides[2], stored(g, scales[1], shifts[1], out), mask)
    tl.store(to + 2 * strides[2], stored(b, scales[2], shifts[2], out), mask)
    if n_fine > 0:
        if view < n_fine:
            half = fine + view * fine_strides[0] + image * fine_strides[1] + place
            tl.store(half, r.to(tl.float16), mask)
            tl.store(half + plane, g.to(tl.float16), mask)
            tl.store(half + 2 * plane, b.to(tl.float16), mask)
