"""Images and masks from files. Everything here may be called from many threads at once; PIL lets
other threads run while it decodes."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from spd_fast.errors import InputError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)
# Only these decoders are tried: some of PIL's others start external programs.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF")

ORIENTATION_TAG = 0x0112
UPRIGHT = {  # EXIF orientation -> what brings the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageInArchive(NamedTuple):
    """An image stored in an archive, as `datasets.shards` finds them; `read_image` takes it."""

    archive: str
    name: str  # of the member
    offset: int  # bytes
    size: int

    def __str__(self) -> str:
        return f"{self.archive}: {self.name}"


def read_bytes(path: str | Path | ImageInArchive) -> bytes:
    """The encoded image.

    Raises:
        InputError: the file or the archive cannot be read, or the archive has become shorter.
    """
    inside = isinstance(path, ImageInArchive)
    try:
        with open(path.archive if inside else path, "rb", buffering=0) as file:
            if not inside:
                return file.readall()
            file.seek(path.offset)
            data = file.read(path.size)
    except OSError as error:
        raise InputError(f"cannot read image {path}: {_reason(path, error)}") from error
    if len(data) < path.size:
        raise InputError(f"cannot read image {path}: the archive is cut short")
    return data


def read_image(path: str | Path | ImageInArchive) -> np.ndarray:
    """Read an image file as RGB.

    The EXIF orientation is applied and an alpha channel dropped. 16-bit grayscale is scaled from
    0..65535 to 0..255 with rounding. Of an animation the first frame is taken. Damage inside the
    compressed data that the JPEG decoder bridges by itself is not noticed; a file cut short is.

    Returns:
        (H, W, 3) uint8, writable.

    Raises:
        InputError: the file is missing, empty, truncated, damaged, too large or not an image, or
            its pixels have no defined range (floating point, 32-bit integers above 65535).
    """
    with _decoded(path) as image:
        if image.mode == "RGB":
            return np.array(image)
        if image.mode.startswith("I"):
            return np.repeat(_to_8_bit(path, np.asarray(image))[..., None], 3, axis=2)
        if image.mode in ("F", "LAB"):
            raise InputError(
                f"cannot read image {path}: pixels of kind {image.mode!r}, expected grayscale, "
                "palette, RGB or CMYK of 8 bits, or grayscale of 16 bits"
            )
        image.info.pop("transparency", None)  # of a palette; PIL would warn that it gets lost
        return np.array(image.convert("RGB"))


def read_mask_values(path: str | Path) -> np.ndarray:
    """Read the values of a mask as stored: class indices, 0 is normal.

    Of a palette image the indices are taken, of several colour planes the largest value; an alpha
    plane is left out.

    Returns:
        (H, W), of the type in the file.

    Raises:
        InputError: as for `read_image`.
    """
    with _decoded(path) as image:
        values = np.asarray(image)
        colours = len(image.getbands()) - ("A" in image.getbands())
    return values if values.ndim == 2 else values[..., :colours].max(axis=2)


def read_mask(path: str | Path, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Read a mask of anomalous pixels: every value above 0 counts as anomalous.

    Args:
        shape: (H, W) of the image that the mask belongs to, if it shall be checked.

    Returns:
        (H, W) bool.

    Raises:
        InputError: the file cannot be read (see `read_image`), or its size is not `shape`.
    """
    mask = read_mask_values(path) > 0
    if shape is not None and mask.shape != tuple(shape):
        raise InputError(
            f"mask {path} is {mask.shape[1]} x {mask.shape[0]} pixels, but its image is "
            f"{shape[1]} x {shape[0]} (width x height)"
        )
    return mask


def read_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of what `read_image` would return; of a JPEG only the header is read.

    Raises:
        InputError: as for `read_image`, as far as the header shows it.
    """
    with _opened(path) as image:
        if image.format not in ("JPEG", "MPO"):
            image.load()  # the orientation may stand behind the pixels, or be applied in here
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def list_images(folder: str | Path) -> list[Path]:
    """The image files directly in a folder, sorted by name; hidden files are left out.

    Raises:
        InputError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    return [folder / name for name in sorted(os.listdir(folder)) if is_image_name(name)]


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden ones (._0001.JPG) are not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


@contextmanager
def _opened(path: str | Path | ImageInArchive) -> Iterator[Image.Image]:
    """The image with its header read. Whatever goes wrong in the block is a fault of the file."""
    try:
        file = BytesIO(read_bytes(path)) if isinstance(path, ImageInArchive) else path
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except (InputError, MemoryError):
        raise
    except Exception as error:  # on damaged files PIL's decoders raise almost anything
        raise InputError(f"cannot read image {path}: {_reason(path, error)}") from error


@contextmanager
def _decoded(path: str | Path | ImageInArchive) -> Iterator[Image.Image]:
    """The image with its pixels decoded and upright."""
    with _opened(path) as image:
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        yield image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1  # the metadata are damaged, which does not make the pixels unreadable
    return orientation if orientation in UPRIGHT else 1


def _to_8_bit(path: str | Path | ImageInArchive, values: np.ndarray) -> np.ndarray:
    if values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"cannot read image {path}: integers from {values.min()} to {values.max()}, "
            "expected at most 16 bits (0 to 65535)"
        )
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 257 * 255


def _reason(path: str | Path | ImageInArchive, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS} pixels"
    if isinstance(error, UnidentifiedImageError):
        size = path.size if isinstance(path, ImageInArchive) else os.path.getsize(path)
        if size == 0:
            return "the file is empty"
        return f"not an image, or not of a format that is read ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]  # no such file, is a directory, ...
    if "truncated" in str(error).lower():
        return "the file is truncated"
    return f"the file is damaged ({error})"
