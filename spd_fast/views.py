"""Drawing the parameters of views: which crop, which jitter, which patch.

All randomness of the augmentation is here. It is counter-based: row (i, v) of the table is a pure
function of `(seed, epoch, indices[i], v)`, so a sample gets the same views in whatever batch,
worker, rank or resumed run it is met.
"""

import operator
from collections.abc import Sequence
from dataclasses import astuple
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from spd_fast.errors import InputError
from spd_fast.ops.backends import native
from spd_fast.recipes import (
    FROM_IMAGE,
    PATCH_ALPHA_SIGMA,
    PATCH_AREA,
    PATCH_ASPECT,
    PATCH_JITTER,
    Recipe,
)

# One row of the table, in this order; `csrc/augment_views.h` declares the same struct.
COLUMNS = (
    "source",  # -1: the decoded image; k: view k of the same image, before normalisation
    "crop_top",  # box in the source's pixels
    "crop_left",
    "crop_height",
    "crop_width",
    "flip",  # 0 or 1
    "jitter_order",  # which of JITTER_ORDERS
    "brightness",  # factors, 1 = off
    "contrast",
    "saturation",
    "hue",  # turns, 0 = off
    "grayscale",  # 0 or 1
    "blur_sigma",  # pixels of the view, 0 = off
    "patch_kind",  # 0 none, 1 SmoothBlend, 2 CutPaste
    "patch_top",  # box that is cut, in the view's pixels after crop and flip
    "patch_left",
    "patch_height",
    "patch_width",
    "target_top",  # where it is pasted
    "target_left",
    "patch_jitter_order",
    "patch_brightness",
    "patch_contrast",
    "patch_saturation",
    "patch_hue",
    "alpha_sigma_y",  # of the Gaussian on SmoothBlend's mask, pixels
    "alpha_sigma_x",
)
COLUMN = {name: i for i, name in enumerate(COLUMNS)}
INTEGER_COLUMNS = (
    "source",
    *("crop_top", "crop_left", "crop_height", "crop_width", "flip", "jitter_order", "grayscale"),
    *("patch_kind", "patch_top", "patch_left", "patch_height", "patch_width"),
    *("target_top", "target_left", "patch_jitter_order"),
)
PATCH_KINDS = {None: 0, "smoothblend": 1, "cutpaste": 2}
CROP_TRIES = 10

# The uniform numbers in [0, 1) that one row is made from. Each has its fixed place in the row's
# stream, so that a new kind of draw is appended and never shifts the others.
_CROP_AREA = slice(0, 10)
_CROP_ASPECT = slice(10, 20)
_CROP_TOP = slice(20, 30)
_CROP_LEFT = slice(30, 40)
_FLIP, _GRAY, _BLUR, _BLUR_SIGMA = 40, 41, 42, 43
_JITTER = slice(44, 50)
_PATCH_JITTER = slice(50, 56)
_PATCH_AREA, _PATCH_ASPECT, _PATCH_TOP, _PATCH_LEFT, _TARGET_TOP, _TARGET_LEFT = range(56, 62)
_DRAWS = 64


def sample_view_params(
    recipe: Recipe,
    sizes: Sequence[tuple[int, int]] | np.ndarray | torch.Tensor,
    indices: Sequence[int] | np.ndarray | torch.Tensor,
    epoch: int,
    seed: int,
    size: int | tuple[int, int] = 224,
) -> torch.Tensor:
    """Draw one row of view parameters per (image, view).

    Args:
        recipe: the views to make, from `spd_fast.recipes`.
        sizes: (N, 2) heights and widths of the decoded images, pixels.
        indices: (N,) index of each image in its data set, at least 0.
        epoch: at least 0.
        seed: at least 0.
        size: height and width of the views, pixels.

    Returns:
        (N, V, 27) float32 on the CPU, columns as in `COLUMNS`.

    Raises:
        InputError: sizes, indices, epoch, seed or size are out of range.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    indices = np.ascontiguousarray(indices, dtype=np.int64).reshape(-1)
    height, width = view_size(size)
    if sizes.size == 0:
        sizes = sizes.reshape(0, 2)
    if sizes.ndim != 2 or sizes.shape[1] != 2:
        raise InputError(f"sizes must be (N, 2) heights and widths, got shape {sizes.shape}")
    if len(sizes) != len(indices):
        raise InputError(f"sizes has {len(sizes)} rows but indices has {len(indices)}")
    if (sizes < 1).any():
        raise InputError(f"image sizes must be at least 1 x 1, got {sizes.min(0).tolist()}")
    if not (0 <= epoch < 2**63 and 0 <= seed < 2**63) or (indices < 0).any():
        raise InputError(f"seed {seed}, epoch {epoch} and indices must be in 0..2^63 - 1")
    if native is not None:  # numpy takes as long for a few images as making some of their views
        rows = np.empty((len(indices), len(recipe), len(COLUMNS)), np.float32)
        table = range_table(tuple(recipe), height, width)
        sizes = np.ascontiguousarray(sizes)
        native.draw_view_rows(table, sizes, indices, epoch, seed, height, width, rows)
        return torch.from_numpy(rows)
    draws = _uniform(seed, epoch, indices, np.arange(len(recipe)))
    rows = _sample_rows(_ranges(tuple(recipe)), sizes, draws, height, width)
    return torch.from_numpy(rows.astype(np.float32))


def view_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width, from one number for both or from a pair.

    Raises:
        InputError: not one or two whole numbers of at least 1.
    """
    try:
        height, width = (operator.index(side) for side in np.broadcast_to(size, 2))
    except (TypeError, ValueError):
        raise InputError(f"size must be one or two whole numbers, got {size!r}") from None
    if min(height, width) < 1:
        raise InputError(f"size must be at least 1, got {size}")
    return height, width


def _uniform(seed: int, epoch: int, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
    """(N, V, _DRAWS) float64 in [0, 1), each row a function of (seed, epoch, index, view) alone.

    It is the beginning of the stream that numpy's Philox gives for a key and counter of its own.
    """
    draws = np.empty((len(indices), len(views), _DRAWS))
    for n, index in enumerate(indices.tolist()):
        for v, view in enumerate(views.tolist()):
            philox = np.random.Philox(key=[seed, 0], counter=[0, view, index, epoch])
            draws[n, v] = (philox.random_raw(_DRAWS) >> np.uint64(11)) * 2.0**-53
    return draws


class _Ranges(NamedTuple):
    """The specs of a recipe's V views, each field an array over the views."""

    source: np.ndarray
    area: tuple[np.ndarray, np.ndarray]  # lower and upper bounds
    aspect: tuple[np.ndarray, np.ndarray]
    flip: np.ndarray
    grayscale: np.ndarray
    blur: tuple[np.ndarray, np.ndarray]
    blur_probability: np.ndarray
    jitter: np.ndarray  # (5, V): the amounts, then the probability
    patch_jitter: np.ndarray
    patch_kind: np.ndarray


@lru_cache
def _ranges(recipe: Recipe) -> _Ranges:
    def bounds(pairs) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        return low, high

    def amounts(jitters) -> np.ndarray:
        rows = [astuple(jitter) if jitter else (0,) * 5 for jitter in jitters]
        return np.array(rows, dtype=np.float64).reshape(-1, 5).T

    def each(values) -> np.ndarray:
        return np.array(list(values), dtype=np.float64)

    return _Ranges(
        source=each(spec.source for spec in recipe),
        area=bounds([spec.area for spec in recipe]),
        aspect=bounds([spec.aspect for spec in recipe]),
        flip=each(spec.flip for spec in recipe),
        grayscale=each(spec.grayscale for spec in recipe),
        blur=bounds([spec.blur or (0, 0) for spec in recipe]),
        blur_probability=each(spec.blur_probability if spec.blur else 0 for spec in recipe),
        jitter=amounts([spec.jitter for spec in recipe]),
        patch_jitter=amounts([PATCH_JITTER if spec.patch else None for spec in recipe]),
        patch_kind=each(PATCH_KINDS[spec.patch] for spec in recipe),
    )


@lru_cache
def range_table(recipe: Recipe, height: int, width: int) -> np.ndarray:
    """(V, 29) float64: the recipe's ranges for views of this size, as `csrc/view_params.h` takes
    them. It draws the same rows as `_sample_rows`."""
    ranges = _ranges(recipe)
    smooth = ranges.patch_kind == PATCH_KINDS["smoothblend"]
    columns = [ranges.source, *ranges.area, *ranges.aspect, *np.log(ranges.aspect), ranges.flip]
    columns += [ranges.grayscale, *ranges.blur, ranges.blur_probability, *ranges.jitter]
    columns += [*ranges.patch_jitter, ranges.patch_kind, *PATCH_AREA, *np.log(PATCH_ASPECT)]
    columns += [smooth * PATCH_ALPHA_SIGMA * side / 224 for side in (height, width)]
    return np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.float64)


def _sample_rows(
    ranges: _Ranges, sizes: np.ndarray, u: np.ndarray, height: int, width: int
) -> np.ndarray:
    """(N, V, 27) rows from the uniform numbers u (N, V, _DRAWS)."""
    rows = np.zeros((*u.shape[:2], len(COLUMNS)))

    def put(name: str, values) -> None:
        rows[..., COLUMN[name]] = values

    put("source", ranges.source)
    from_image = (ranges.source == FROM_IMAGE)[:, None]
    source = np.where(from_image, sizes[:, None], [height, width])  # (N, V, 2)
    crop = _sample_crop(ranges, source, u)
    for name, values in zip(("crop_top", "crop_left", "crop_height", "crop_width"), crop):
        put(name, values)
    put("flip", u[..., _FLIP] < ranges.flip)
    put("grayscale", u[..., _GRAY] < ranges.grayscale)
    sigma = _between(ranges.blur, u[..., _BLUR_SIGMA])
    put("blur_sigma", np.where(u[..., _BLUR] < ranges.blur_probability, sigma, 0))
    _put_jitter(put, "", ranges.jitter, u[..., _JITTER])
    _put_jitter(put, "patch_", ranges.patch_jitter, u[..., _PATCH_JITTER])
    if ranges.patch_kind.any():
        _put_patch(put, ranges.patch_kind, u, height, width)
    return rows


def _put_patch(put, kind: np.ndarray, u: np.ndarray, height: int, width: int) -> None:
    box_height, box_width = _box(
        _between(PATCH_AREA, u[..., _PATCH_AREA]) * height * width,
        _log_between(PATCH_ASPECT, u[..., _PATCH_ASPECT]),
    )
    box_height, box_width = box_height.clip(1, height), box_width.clip(1, width)
    sigma_y, sigma_x = (PATCH_ALPHA_SIGMA * side / 224 for side in (height, width))
    put("patch_kind", kind)
    for name, values in (
        ("patch_height", box_height),
        ("patch_width", box_width),
        ("patch_top", _offset(u[..., _PATCH_TOP], height - box_height)),
        ("patch_left", _offset(u[..., _PATCH_LEFT], width - box_width)),
        ("target_top", _offset(u[..., _TARGET_TOP], height - box_height)),
        ("target_left", _offset(u[..., _TARGET_LEFT], width - box_width)),
    ):
        put(name, np.where(kind > 0, values, 0))
    smooth = kind == PATCH_KINDS["smoothblend"]
    put("alpha_sigma_y", np.where(smooth, sigma_y, 0))
    put("alpha_sigma_x", np.where(smooth, sigma_x, 0))


def _sample_crop(ranges: _Ranges, source: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, ...]:
    """torchvision's RandomResizedCrop rule: the first of 10 boxes that fits, else a centred one."""
    heights, widths = source[..., :1], source[..., 1:]
    area = _between(_over_tries(ranges.area), u[..., _CROP_AREA]) * heights * widths
    tries_h, tries_w = _box(area, _log_between(_over_tries(ranges.aspect), u[..., _CROP_ASPECT]))
    fits = (tries_h >= 1) & (tries_h <= heights) & (tries_w >= 1) & (tries_w <= widths)
    first = fits.argmax(-1)[..., None]

    def pick(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, first, -1)

    # An image flatter or steeper than any allowed box is cut at its centre to the nearest aspect.
    narrow, wide = _over_tries(ranges.aspect)
    centre_h = np.where(widths / heights < narrow, np.rint(widths / narrow), heights)
    centre_w = np.where(widths / heights > wide, np.rint(heights * wide), widths)
    found = pick(fits)
    h = np.where(found, pick(tries_h), centre_h)
    w = np.where(found, pick(tries_w), centre_w)
    top = np.where(found, _offset(pick(u[..., _CROP_TOP]), heights - h), (heights - h) // 2)
    left = np.where(found, _offset(pick(u[..., _CROP_LEFT]), widths - w), (widths - w) // 2)
    return top[..., 0], left[..., 0], h[..., 0], w[..., 0]


def _over_tries(bounds: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return bounds[0][:, None], bounds[1][:, None]


def _put_jitter(put, prefix: str, jitter: np.ndarray, u: np.ndarray) -> None:
    *amounts, probability = jitter
    on = u[..., 0] < probability
    names, neutral = ("brightness", "contrast", "saturation", "hue"), (1.0, 1.0, 1.0, 0.0)
    for k, (name, off, amount) in enumerate(zip(names, neutral, amounts)):
        drawn = _between((off - amount, off + amount), u[..., 2 + k])
        put(prefix + name, np.where(on, drawn, off))
    put(prefix + "jitter_order", np.floor(u[..., 1] * 24))


def _box(area: np.ndarray, aspect: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height and width, in whole pixels, of boxes of given area and aspect (width / height)."""
    return np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))


def _offset(u: np.ndarray, room: np.ndarray) -> np.ndarray:
    """A whole number in 0..room, each as likely."""
    return np.floor(u * (room + 1))


def _between(bounds, u: np.ndarray) -> np.ndarray:
    return bounds[0] + (bounds[1] - bounds[0]) * u


def _log_between(bounds, u: np.ndarray) -> np.ndarray:
    return np.exp(_between((np.log(bounds[0]), np.log(bounds[1])), u))


def resize_params(height: int, width: int) -> torch.Tensor:
    """(1, 1, 27): one view that is the whole image, resized and nothing else."""
    row = torch.zeros(1, 1, len(COLUMNS))
    values = {"source": FROM_IMAGE, "crop_height": height, "crop_width": width}
    factors = ("brightness", "contrast", "saturation")
    values |= {f"{prefix}{name}": 1 for prefix in ("", "patch_") for name in factors}
    for name, value in values.items():
        row[0, 0, COLUMN[name]] = value
    return row
