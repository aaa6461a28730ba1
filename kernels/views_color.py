"""Colours of one pixel, as csrc/views_color.h adjusts them."""

import triton
import triton.language as tl


@triton.jit
def clamp01(v):
    return tl.minimum(tl.maximum(v, 0.0), 1.0)


@triton.jit
def gray(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def adjust_hue(r, g, b, sixths):
    """Turn the hue by `sixths` of a circle, 0 <= sixths < 6: HSV without its divisions, with the
    hue times the chroma c running through [0, 6 c)."""
    high = tl.maximum(r, tl.maximum(g, b))
    low = tl.minimum(r, tl.minimum(g, b))
    c = high - low
    h = tl.where(high == g, 2 * c + (b - r), 4 * c + (r - g))
    h = tl.where(high == r, g - b, h) + sixths * c
    h = tl.where(h < 0, h + 6 * c, h)
    h = tl.where(h >= 6 * c, h - 6 * c, h)
    r = low + tl.minimum(tl.maximum(tl.abs(h - 3 * c) - c, 0.0), c)
    g = low + tl.minimum(tl.maximum(2 * c - tl.abs(h - 2 * c), 0.0), c)
    b = low + tl.minimum(tl.maximum(2 * c - tl.abs(h - 4 * c), 0.0), c)
    return r, g, b


@triton.jit
def jitter_ops(order):
    """The permutation number 0..23 of {0 brightness, 1 contrast, 2 saturation, 3 hue} in
    lexicographic order, two bits each, the first in the lowest."""
    second, third = order % 6 // 2, order % 2
    left = 0b11100100  # those not taken yet, in ascending order
    ops = order // 6
    left = without(left, ops)
    ops |= pair(left, second) << 2
    left = without(left, second)
    return ops | (pair(left, third) << 4) | (without(left, third) << 6)


@triton.jit
def pair(pairs, place):
    return (pairs >> (2 * place)) & 3


@triton.jit
def without(pairs, place):
    below = (1 << (2 * place)) - 1
    return (pairs & below) | (pairs >> 2 & ~below)


@triton.jit
def place_of_contrast(ops):
    found = tl.where(pair(ops, 1) == 1, 1, 0) + tl.where(pair(ops, 2) == 1, 2, 0)
    return found + tl.where(pair(ops, 3) == 1, 3, 0)


@triton.jit
def jitter(r, g, b, amounts, ops, first, last, mean):
    """Adjustments first..last-1; `amounts` points to order, brightness, contrast, saturation and
    hue of the row, `mean` is the mean gray. What changes nothing is left out."""
    hue = tl.load(amounts + 4)
    sixths = 6 * (hue - tl.floor(hue))
    for step in range(first, last):
        op = pair(ops, step)
        if op == 3:
            if sixths != 0:
                r, g, b = adjust_hue(r, g, b, sixths)
        else:
            factor = tl.load(amounts + 1 + op)
            if factor != 1:
                if op == 2:
                    rest = (1 - factor) * gray(r, g, b)
                    r = clamp01(factor * r + rest)
                    g = clamp01(factor * g + rest)
                    b = clamp01(factor * b + rest)
                else:
                    level = tl.where(op == 1, (1 - factor) * mean, 0.0)
                    r = clamp01(factor * r + level)
                    g = clamp01(factor * g + level)
                    b = clamp01(factor * b + level)
    return r, g, b
