"""From a decoded image and mask to what a detector sees, as a preset of the detector says."""

from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor

from spd_fast.errors import InputError
from spd_fast.ops.augment_views import IMAGENET_MEAN, IMAGENET_STD, augment_views
from spd_fast.views import resize_params


@dataclass(frozen=True)
class Preset:
    """How one reference system prepares images and smooths anomaly maps."""

    shorter_side: int | None  # resize to this with the aspect kept, then cut the centre out ...
    size: int  # ... of this side; without `shorter_side`, resize to this square
    resampling: Image.Resampling | None  # of 8-bit pixels; None: float pixels, antialiased bilinear
    border: str | None  # of the Gaussian on the map, see `reference.gaussian_matrix`; None: no such


def find_preset(name: str, presets: dict[str, Preset]) -> Preset:
    """The preset called `name`.

    Raises:
        InputError: there is none of that name.
    """
    if name not in presets:
        raise InputError(f"preset is one of {', '.join(presets)}; got {name!r}")
    return presets[name]


def prepare_image(image: np.ndarray, preset: Preset) -> Tensor:
    """(H, W, 3) uint8 -> (3, size, size) float32, ImageNet-normalised.

    The presets "paper" resize 8-bit pixels, PaDiM's with a Lanczos filter as its first
    implementation does, PatchCore's with a bilinear one; "anomalib" resizes float pixels.
    """
    return normalised(resized_image(image, preset))


def resized_image(image: np.ndarray, preset: Preset) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3): uint8 where the preset resizes 8-bit pixels, else float32
    in [0, 1], which our views' resize makes as torchvision's would, but sooner."""
    if preset.resampling is not None:
        return _resized_picture(Image.fromarray(image), preset, preset.resampling)
    image = np.ascontiguousarray(image)
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "threads": 1}
    x = augment_views([image], resize_params(*image.shape[:2]), preset.size, **plain)[0, 0]
    return x.permute(1, 2, 0).numpy()


def normalised(pixels: np.ndarray) -> Tensor:
    """What `resized_image` made -> (3, size, size) float32, ImageNet-normalised."""
    x = torch.from_numpy(pixels).permute(2, 0, 1)
    x = x / 255 if pixels.dtype == np.uint8 else x
    return F.normalize(x, IMAGENET_MEAN, IMAGENET_STD)


def prepare_mask(mask: np.ndarray, preset: Preset) -> np.ndarray:
    """(H, W) bool -> (size, size) bool, by nearest neighbour."""
    if preset.resampling is not None:
        picture = Image.fromarray(mask.astype(np.uint8))
        return _resized_picture(picture, preset, Image.Resampling.NEAREST).astype(bool)
    x = torch.from_numpy(mask.astype(np.uint8))[None]
    size = [preset.size, preset.size]
    return F.resize(x, size, F.InterpolationMode.NEAREST)[0].numpy().astype(bool)


def displayed_image(prepared: Tensor) -> np.ndarray:
    """(3, h, w) normalised -> (h, w, 3) uint8: what the detector saw, for looking at."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    pixels = (prepared * std[:, None, None] + mean[:, None, None]) * 255
    return pixels.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def _resized_picture(picture: Image.Image, preset: Preset, how: Image.Resampling) -> np.ndarray:
    """To a square, or the shorter side as the preset says (the longer rounds down) and the centre
    cut out.

    Only the part that remains is resized: a strip of 1 x 20,000 would become 256 x 5 million.
    """
    side = preset.size
    box = []
    for length in picture.size:  # width, height
        resized = side
        if preset.shorter_side:
            resized = int(preset.shorter_side * length / min(picture.size))
        start, scale = round((resized - side) / 2), length / resized
        box.append((start * scale, (start + side) * scale))
    (left, right), (top, bottom) = box
    return np.array(picture.resize((side, side), how, box=(left, top, right, bottom)))
