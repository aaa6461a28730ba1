"""The parameter table, the tiles of views, and pixels in memory."""

import triton
import triton.language as tl

# Columns of the parameter table, as in spd_fast/views.py.
COLUMNS = tl.constexpr(27)
CROP_TOP, CROP_LEFT, CROP_HEIGHT, CROP_WIDTH = map(tl.constexpr, range(1, 5))
FLIP = tl.constexpr(5)
JITTER, GRAYSCALE, BLUR_SIGMA = map(tl.constexpr, (6, 11, 12))  # JITTER: order and four amounts
PATCH_KIND, PATCH_TOP, PATCH_LEFT, PATCH_HEIGHT, PATCH_WIDTH = map(tl.constexpr, range(13, 18))
TARGET_TOP, TARGET_LEFT, PATCH_JITTER = map(tl.constexpr, range(18, 21))
ALPHA_SIGMA_Y, ALPHA_SIGMA_X = map(tl.constexpr, (25, 26))

TILE_Y, TILE_X = tl.constexpr(16), tl.constexpr(64)


@triton.jit
def nth(values, i):
    found = tl.zeros([], tl.int32) + values[0]
    for k in tl.static_range(1, len(values)):
        found = tl.where(i == k, values[k], found)
    return found


@triton.jit
def tile_of(tile, height: tl.constexpr, width: tl.constexpr):
    """Rows and columns of a tile, which are inside the view, and where in its plane."""
    across: tl.constexpr = (width + TILE_X - 1) // TILE_X
    y = (tile // across) * TILE_Y + tl.arange(0, TILE_Y)
    x = (tile % across) * TILE_X + tl.arange(0, TILE_X)
    return y, x, (y < height)[:, None] & (x < width)[None, :], y[:, None] * width + x[None, :]


@triton.jit
def from_bits(bits, unit: tl.constexpr):
    """bits * unit for bits < 2^23: they become the mantissa of 2^23 + bits, since converting
    integers takes four times as long as adding floats."""
    return ((bits | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0) * unit


@triton.jit
def keep(scratch, job, place, mask, r, g, b, plane: tl.constexpr, packed: tl.constexpr):
    if packed:
        bits = (r * 2047 + 0.5).to(tl.int32) | ((g * 2047 + 0.5).to(tl.int32) << 11)
        tl.store(scratch + job * plane + place, bits | ((b * 1023 + 0.5).to(tl.int32) << 22), mask)
    else:
        to = scratch + job * (3 * plane) + place
        tl.store(to, (r * 65535 + 0.5).to(tl.int32).to(tl.uint16), mask)
        tl.store(to + plane, (g * 65535 + 0.5).to(tl.int32).to(tl.uint16), mask)
        tl.store(to + 2 * plane, (b * 65535 + 0.5).to(tl.int32).to(tl.uint16), mask)


@triton.jit
def kept(scratch, job, place, mask, plane: tl.constexpr, packed: tl.constexpr):
    if packed:
        bits = tl.load(scratch + job * plane + place, mask, other=0)
        r = from_bits(bits & 2047, 1 / 2047)
        g = from_bits((bits >> 11) & 2047, 1 / 2047)
        b = from_bits((bits >> 22) & 1023, 1 / 1023)
    else:
        source = scratch + job * (3 * plane) + place
        r = from_bits(tl.load(source, mask, other=0).to(tl.int32), 1 / 65535)
        g = from_bits(tl.load(source + plane, mask, other=0).to(tl.int32), 1 / 65535)
        b = from_bits(tl.load(source + 2 * plane, mask, other=0).to(tl.int32), 1 / 65535)
    return r, g, b


@triton.jit
def stored(v, scale, shift, out):
    """A view's value as `out` has it."""
    v = v * scale + shift
    if out.dtype.element_ty == tl.uint8:
        return (tl.minimum(tl.maximum(v, 0.0), 255.0) + 0.5).to(tl.int32).to(tl.uint8)
    else:
        return v.to(out.dtype.element_ty)


# ---------------------------------------------------------------------------------- along one axis


@triton.jit
def reflect(i, n: tl.constexpr):
    """Mirrored about the edge pixels, as often as it takes."""
    period: tl.constexpr = 2 * n - 2 if n > 1 else 1
    i = tl.abs(i) % period
    return tl.minimum(i, period - i)


@triton.jit
def gaussian(offset, sigma):
    z = offset.to(tl.float32) / sigma
    return tl.exp(-0.5 * z * z)
