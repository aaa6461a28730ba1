"""SmoothBlend and CutPaste: a jittered patch of a view, blended in at another place of it."""

import triton
import triton.language as tl

from spd_fast.kernels.views_color import gray, jitter, jitter_ops, place_of_contrast
from spd_fast.kernels.views_table import (
    ALPHA_SIGMA_X,
    ALPHA_SIGMA_Y,
    COLUMNS,
    PATCH_HEIGHT,
    PATCH_JITTER,
    PATCH_KIND,
    PATCH_WIDTH,
    TARGET_LEFT,
    TARGET_TOP,
    TILE_Y,
    gaussian,
    nth,
    reflect,
    stored,
)

SMOOTH_BLEND = tl.constexpr(1)
TILE = tl.constexpr(32)  # columns
TAPS = tl.constexpr(64)  # of the alpha kernel, taken at once
BLOCK = tl.constexpr(512)  # pixels of a patch whose gray is summed at once


@triton.jit
def alpha_along(i, start, length, sigma, n: tl.constexpr):
    """The blurred interval [start, start + length) of an axis of n pixels, at places i."""
    radius = tl.ceil(4 * sigma).to(tl.int32)
    sigma = tl.maximum(sigma, 1e-6)
    inside = tl.zeros_like(i).to(tl.float32)
    total = 0.0
    for first in range(-radius, radius + 1, TAPS):
        t = first + tl.arange(0, TAPS)
        weights = tl.where(t <= radius, gaussian(t, sigma), 0.0)
        place = reflect(i[:, None] + t[None, :], n) - start
        covered = (place >= 0) & (place < length)
        inside += tl.sum(tl.where(covered, weights[None, :], 0.0), 1)
        total += tl.sum(weights, 0)
    return inside / total


@triton.jit
def paste(
    patches, room, table, out, strides, scales, shifts,
    views: tl.constexpr, n_views: tl.constexpr, n_written: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Blend the jittered patch in, where alpha is not zero: out = (1 - alpha) out + alpha patch.
    Of `out` there are the first `n_written` views."""
    down: tl.constexpr = (height + TILE_Y - 1) // TILE_Y
    across: tl.constexpr = (width + TILE - 1) // TILE
    job = (tl.program_id(0) // (down * across)).to(tl.int64)
    tile = tl.program_id(0) % (down * across)
    image = job // len(views)
    view = nth(views, job % len(views)).to(tl.int64)
    row = table + (image * n_views + view) * COLUMNS
    kind = tl.load(row + PATCH_KIND)
    patch_height = tl.load(row + PATCH_HEIGHT).to(tl.int32)
    patch_width = tl.load(row + PATCH_WIDTH).to(tl.int32)
    top, left = tl.load(row + TARGET_TOP).to(tl.int32), tl.load(row + TARGET_LEFT).to(tl.int32)
    sigma_y, sigma_x = tl.load(row + ALPHA_SIGMA_Y), tl.load(row + ALPHA_SIGMA_X)
    reach_y = tl.where(kind == SMOOTH_BLEND, tl.ceil(4 * sigma_y).to(tl.int32), 0)
    reach_x = tl.where(kind == SMOOTH_BLEND, tl.ceil(4 * sigma_x).to(tl.int32), 0)
    first_y, first_x = (tile // across) * TILE_Y, (tile % across) * TILE
    met = (first_y < top + patch_height + reach_y) & (first_y + TILE_Y > top - reach_y)
    met &= (first_x < left + patch_width + reach_x) & (first_x + TILE > left - reach_x)
    if met & (kind != 0) & (view < n_written):
        ops = jitter_ops(tl.load(row + PATCH_JITTER).to(tl.int32))
        patch = patches + job * (3 * room)
        area = tl.minimum(patch_height * patch_width, room)
        total = 0.0
        for start in range(0, area, BLOCK):  # every program again: a patch is small
            i = start + tl.arange(0, BLOCK)
            r = tl.load(patch + i, i < area, other=0.0)
            g = tl.load(patch + room + i, i < area, other=0.0)
            b = tl.load(patch + 2 * room + i, i < area, other=0.0)
            r, g, b = jitter(r, g, b, row + PATCH_JITTER, ops, 0, place_of_contrast(ops), 0.0)
            total += tl.sum(tl.where(i < area, gray(r, g, b), 0.0), 0)
        mean = total / area.to(tl.float32)
        y, x = first_y + tl.arange(0, TILE_Y), first_x + tl.arange(0, TILE)
        mask = (y < height)[:, None] & (x < width)[None, :]
        y_in, x_in = y - top, x - left
        inside = ((y_in >= 0) & (y_in < patch_height))[:, None]
        inside &= ((x_in >= 0) & (x_in < patch_width))[None, :]
        alpha = inside.to(tl.float32)
        if kind == SMOOTH_BLEND:
            a = alpha_along(y, top, patch_height, sigma_y, height)
            b = alpha_along(x, left, patch_width, sigma_x, width)
            alpha = a[:, None] * b[None, :]
        place = y_in[:, None] * patch_width + x_in[None, :]
        inside &= place < room
        r = tl.load(patch + place, inside, other=0.0)
        g = tl.load(patch + room + place, inside, other=0.0)
        b = tl.load(patch + 2 * room + place, inside, other=0.0)
        r, g, b = jitter(r, g, b, row + PATCH_JITTER, ops, 0, 4, mean)
        to = out + view * strides[0] + image * strides[1]
        to = to + (y * strides[3])[:, None] + (x * strides[4])[None, :]
        blend(to, r, alpha, inside, mask, scales[0], shifts[0])
        blend(to + strides[2], g, alpha, inside, mask, scales[1], shifts[1])
        blend(to + 2 * strides[2], b, alpha, inside, mask, scales[2], shifts[2])


@triton.jit
def blend(to, v, alpha, inside, mask, scale, shift):
    before = (tl.load(to, mask, other=0).to(tl.float32) - shift) / scale
    after = (1 - alpha) * before + tl.where(inside, alpha * v, 0.0)
    tl.store(to, stored(after, scale, shift, to), mask)
