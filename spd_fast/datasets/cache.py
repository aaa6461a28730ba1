"""Samples as a detector sees them, optionally kept on disk: resized, not yet normalised."""

import os
from hashlib import sha256
from pathlib import Path

import numpy as np

from spd_fast.datasets import Sample
from spd_fast.datasets.images import read_image, read_mask
from spd_fast.errors import InputError
from spd_fast.files import atomic_path
from spd_fast.preprocess import Preset, prepare_mask, resized_image

VERSION = 1  # of what a file holds


def read_resized(
    sample: Sample, preset: Preset, cache: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (size, size, 3) as `resized_image` makes them, and the mask (size, size) bool.

    In `cache`, a directory, they are kept for the next time: one file per image, found by the path,
    size and time of image and mask and by the preset. A damaged file there is made anew;
    nothing is lost by deleting the directory, nor where it cannot be written to.

    Raises:
        InputError: the image or its mask cannot be read, or they differ in size.
    """
    if cache is None:
        return _resize(sample, preset)
    path = _place(sample, preset, cache)
    try:
        planes = np.load(path)
        return planes[..., :3], planes[..., 3] > 0
    except (OSError, ValueError, EOFError):  # not there, cut off, not one of ours
        pass
    pixels, mask = _resize(sample, preset)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.save(file, np.concatenate([pixels, mask[..., None].astype(pixels.dtype)], axis=2))
    except (OSError, InputError):  # the disk is full: no fault of the image
        pass
    return pixels, mask


def _resize(sample: Sample, preset: Preset) -> tuple[np.ndarray, np.ndarray]:
    image = read_image(sample.image)
    mask = np.zeros(image.shape[:2], bool)
    if sample.mask is not None:
        mask = read_mask(sample.mask, image.shape[:2])
    return resized_image(image, preset), prepare_mask(mask, preset)


def _place(sample: Sample, preset: Preset, cache: Path) -> Path:
    parts = [VERSION, preset.shorter_side, preset.size, preset.resampling]
    for file in (sample.image, sample.mask):
        if file is not None and file.exists():  # what is missing is told by reading it
            stat = file.stat()
            parts += [file.resolve(), stat.st_size, stat.st_mtime_ns]
    name = sha256(os.fsencode("\n".join(map(str, parts)))).hexdigest()
    return cache / name[:2] / f"{name[2:]}.npy"
