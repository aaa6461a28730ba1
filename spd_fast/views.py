"""Drawing the parameters of views: which crop, which jitter, which patch.

All randomness of the augmentation is here. It is counter-based: row (i, v) of the table is a pure
function of `(seed, epoch, indices[i], v)`, so a sample gets the same views in whatever batch,
worker, rank or resumed run it is met.
"""

import operator
from collections.abc import Sequence

import numpy as np
import torch

from spd_fast.errors import InputError
from spd_fast.recipes import (
    FROM_IMAGE,
    PATCH_ALPHA_SIGMA,
    PATCH_AREA,
    PATCH_ASPECT,
    PATCH_JITTER,
    Jitter,
    Recipe,
    ViewSpec,
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
    indices = np.asarray(indices, dtype=np.int64).reshape(-1)
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
    rows = np.empty((len(indices), len(recipe), len(COLUMNS)), dtype=np.float32)
    for v, spec in enumerate(recipe):
        source = (
            sizes if spec.source == FROM_IMAGE else np.broadcast_to([height, width], sizes.shape)
        )
        draws = _uniform(seed, epoch, indices, v)
        rows[:, v] = _sample_view(spec, source, draws, height, width)
    return torch.from_numpy(rows)


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


def _uniform(seed: int, epoch: int, indices: np.ndarray, view: int) -> np.ndarray:
    """(N, _DRAWS) float64 in [0, 1), row i a pure function of (seed, epoch, indices[i], view)."""
    draws = np.empty((len(indices), _DRAWS))
    for row, index in zip(draws, indices.tolist(), strict=True):
        philox = np.random.Philox(key=[seed, 0], counter=[0, view, index, epoch])
        row[:] = (philox.random_raw(_DRAWS) >> np.uint64(11)) * 2.0**-53
    return draws


def _sample_view(
    spec: ViewSpec, source: np.ndarray, u: np.ndarray, height: int, width: int
) -> np.ndarray:
    rows = np.zeros((len(u), len(COLUMNS)), dtype=np.float64)

    def put(name: str, values) -> None:
        rows[:, COLUMN[name]] = values

    put("source", spec.source)
    for name, values in zip(
        ("crop_top", "crop_left", "crop_height", "crop_width"),
        _sample_crop(spec, source, u),
        strict=True,
    ):
        put(name, values)
    put("flip", u[:, _FLIP] < spec.flip)
    put("grayscale", u[:, _GRAY] < spec.grayscale)
    if spec.blur is not None:
        sigma = _between(spec.blur, u[:, _BLUR_SIGMA])
        put("blur_sigma", np.where(u[:, _BLUR] < spec.blur_probability, sigma, 0))
    _put_jitter(put, "", spec.jitter, u[:, _JITTER])
    _put_jitter(put, "patch_", PATCH_JITTER if spec.patch else None, u[:, _PATCH_JITTER])
    put("patch_kind", PATCH_KINDS[spec.patch])
    if spec.patch:
        box_height, box_width = _box(
            _between(PATCH_AREA, u[:, _PATCH_AREA]) * height * width,
            _log_between(PATCH_ASPECT, u[:, _PATCH_ASPECT]),
        )
        box_height, box_width = box_height.clip(1, height), box_width.clip(1, width)
        put("patch_height", box_height)
        put("patch_width", box_width)
        put("patch_top", _offset(u[:, _PATCH_TOP], height - box_height))
        put("patch_left", _offset(u[:, _PATCH_LEFT], width - box_width))
        put("target_top", _offset(u[:, _TARGET_TOP], height - box_height))
        put("target_left", _offset(u[:, _TARGET_LEFT], width - box_width))
    if spec.patch == "smoothblend":
        put("alpha_sigma_y", PATCH_ALPHA_SIGMA * height / 224)
        put("alpha_sigma_x", PATCH_ALPHA_SIGMA * width / 224)
    return rows


def _sample_crop(spec: ViewSpec, source: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, ...]:
    """torchvision's RandomResizedCrop rule: the first of 10 boxes that fits, else a centred one."""
    heights, widths = source[:, :1], source[:, 1:]
    tries_h, tries_w = _box(
        _between(spec.area, u[:, _CROP_AREA]) * heights * widths,
        _log_between(spec.aspect, u[:, _CROP_ASPECT]),
    )
    fits = (tries_h >= 1) & (tries_h <= heights) & (tries_w >= 1) & (tries_w <= widths)
    first = fits.argmax(1, keepdims=True)

    def pick(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, first, 1)

    # An image flatter or steeper than any allowed box is cut at its centre to the nearest aspect.
    narrow, wide = spec.aspect
    centre_h = np.where(widths / heights < narrow, np.rint(widths / narrow), heights)
    centre_w = np.where(widths / heights > wide, np.rint(heights * wide), widths)
    found = fits.any(1, keepdims=True)
    h = np.where(found, pick(tries_h), centre_h)
    w = np.where(found, pick(tries_w), centre_w)
    top = np.where(found, _offset(pick(u[:, _CROP_TOP]), heights - h), (heights - h) // 2)
    left = np.where(found, _offset(pick(u[:, _CROP_LEFT]), widths - w), (widths - w) // 2)
    return top[:, 0], left[:, 0], h[:, 0], w[:, 0]


def _put_jitter(put, prefix: str, jitter: Jitter | None, u: np.ndarray) -> None:
    names = ("brightness", "contrast", "saturation", "hue")
    neutral = (1.0, 1.0, 1.0, 0.0)
    for k, (name, off) in enumerate(zip(names, neutral, strict=True)):
        amount = getattr(jitter, name) if jitter else 0.0
        drawn = _between((off - amount, off + amount), u[:, 2 + k])
        put(prefix + name, np.where(u[:, 0] < (jitter.probability if jitter else 0), drawn, off))
    put(prefix + "jitter_order", np.floor(u[:, 1] * 24))


def _box(area: np.ndarray, aspect: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height and width, in whole pixels, of boxes of given area and aspect (width / height)."""
    return np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))


def _offset(u: np.ndarray, room: np.ndarray) -> np.ndarray:
    """A whole number in 0..room, each as likely."""
    return np.floor(u * (room + 1))


def _between(bounds: tuple[float, float], u: np.ndarray) -> np.ndarray:
    return bounds[0] + (bounds[1] - bounds[0]) * u


def _log_between(bounds: tuple[float, float], u: np.ndarray) -> np.ndarray:
    return np.exp(_between((np.log(bounds[0]), np.log(bounds[1])), u))
