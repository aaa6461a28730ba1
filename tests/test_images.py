import io
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from spd_fast.datasets.images import (
    IMAGE_SUFFIXES,
    list_images,
    read_image,
    read_mask,
    read_mask_values,
    read_size,
)
from spd_fast.errors import InputError


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def smooth(height, width):
    """(H, W, 3) uint8, smooth enough that JPEG keeps it nearly as it is."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [255 * x / (width - 1), 255 * y / (height - 1), 60 + 2 * x - y]
    return np.stack(planes, axis=2).clip(0, 255).astype(np.uint8)


def encode(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def assert_reads_as(path, expected):
    image = read_image(path)
    assert image.dtype == np.uint8 and image.flags.writeable and image.flags.c_contiguous
    np.testing.assert_array_equal(image, expected)


# --------------------------- kinds of pixels


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm"])
def test_rgb(tmp_path, suffix):
    pixels = noise(13, 17, 3)
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options)
    assert_reads_as(tmp_path / f"a.{suffix}", pixels)


def test_jpeg_is_what_pil_decodes(tmp_path):
    path = tmp_path / "a.JPG"
    Image.fromarray(noise(31, 22, 3)).save(path, "JPEG")
    assert_reads_as(path, np.asarray(Image.open(path)))


def test_grayscale_and_bilevel(tmp_path):
    gray = noise(13, 17)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert_reads_as(tmp_path / "gray.png", np.stack([gray] * 3, axis=2))
    Image.fromarray(gray > 100).save(tmp_path / "bilevel.png")
    assert_reads_as(tmp_path / "bilevel.png", np.stack([255 * np.uint8(gray > 100)] * 3, axis=2))


@pytest.mark.parametrize("options", [{}, {"transparency": 3}, {"transparency": bytes(range(16))}])
def test_palette(tmp_path, options):
    colours, indices = noise(16, 3), noise(13, 17) % 16
    image = Image.fromarray(indices)
    image.putpalette(colours.ravel().tolist())
    image.save(tmp_path / "a.png", **options)
    assert Image.open(tmp_path / "a.png").mode == "P"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_reads_as(tmp_path / "a.png", colours[indices])


def test_alpha_is_dropped(tmp_path):
    rgba, la = noise(13, 17, 4), noise(13, 17, 2)
    Image.fromarray(rgba, "RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(la, "LA").save(tmp_path / "la.png")
    assert_reads_as(tmp_path / "rgba.png", rgba[..., :3])
    assert_reads_as(tmp_path / "la.png", np.repeat(la[..., :1], 3, axis=2))


def test_16_bit_grayscale_is_scaled(tmp_path):
    values = noise(40, 50, dtype=np.uint16)
    values[0, :6] = [0, 128, 129, 300, 65406, 65535]
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.pgm")
    tifffile.imwrite(tmp_path / "little.tif", values, byteorder="<")
    tifffile.imwrite(tmp_path / "big.tif", values, byteorder=">")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "int32.tif")
    modes = set()
    for path in list_images(tmp_path):
        modes.add(Image.open(path).mode)
        assert_reads_as(path, np.stack([np.rint(values / 257).astype(np.uint8)] * 3, axis=2))
    assert {"I;16", "I;16B", "I"} <= modes


def test_16_bit_rgb_is_scaled(tmp_path):
    values = noise(20, 30, 3, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    assert np.abs(read_image(tmp_path / "a.tif") - values / 257).max() <= 1


def test_pixels_without_a_defined_range(tmp_path):
    Image.fromarray(np.full((3, 3), 70_000, np.int32)).save(tmp_path / "int32.tif")
    Image.fromarray(np.full((3, 3), -1, np.int32)).save(tmp_path / "negative.tif")
    Image.fromarray(np.full((3, 3), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"int32\.tif: integers from 70000 to 70000, .*16 bits"):
        read_image(tmp_path / "int32.tif")
    with pytest.raises(InputError, match=r"negative\.tif: integers from -1"):
        read_image(tmp_path / "negative.tif")
    with pytest.raises(InputError, match=r"float\.tif: pixels of kind 'F'"):
        read_image(tmp_path / "float.tif")


def adobe_transform(jpeg, transform):
    """The same JPEG with another colour transform in its Adobe marker: 0 CMYK, 2 YCCK."""
    place = jpeg.index(b"Adobe") + 11
    return jpeg[:place] + bytes([transform]) + jpeg[place + 1 :]


@pytest.mark.parametrize("transform", [0, 2])
def test_cmyk_jpeg(tmp_path, transform):
    planes = np.concatenate([smooth(40, 48), smooth(48, 40).transpose(1, 0, 2)[..., :1] // 2], 2)
    jpeg = adobe_transform(encode(Image.fromarray(planes, "CMYK"), "JPEG", quality=98), transform)
    (tmp_path / "a.jpg").write_bytes(jpeg)
    ink = planes[..., :3].astype(float)
    if transform == 2:  # the stored planes (inverted, as Adobe does) are luma and chroma of the ink
        y, cb, cr = np.moveaxis(255 - ink - [0, 128, 128], 2, 0)
        ink = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 2)
    expected = (255 - ink.clip(0, 255)) * (255.0 - planes[..., 3:]) / 255
    assert np.ptp(expected) > 200
    assert np.abs(read_image(tmp_path / "a.jpg") - expected).max() <= 8


def test_cmyk_inks(tmp_path):
    inks = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]])
    image = Image.fromarray(np.repeat(inks.astype(np.uint8), 16, 0).repeat(16, 0)[None], "CMYK")
    image = image.resize((image.width, 16), Image.Resampling.NEAREST)
    image.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    image.save(tmp_path / "a.tif")
    white, cyan, magenta, yellow, black = np.array(
        [[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
    )
    for path in list_images(tmp_path):
        found = read_image(path)[8, 128::256]
        assert np.abs(found - np.stack([white, cyan, magenta, yellow, black])).max() <= 2, path


# --------------------------- geometry


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(smooth(20, 31))
    for name in ("a.jpg", "a.png", "a.tif", "a.webp"):
        image.save(tmp_path / name, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / name)))
        assert expected.shape[:2] == ((31, 20) if orientation >= 5 else (20, 31))
        assert_reads_as(tmp_path / name, expected)
        assert read_size(tmp_path / name) == expected.shape[:2]
    Image.fromarray(noise(20, 31, dtype=np.uint16)).save(tmp_path / "gray16.png", exif=exif)
    assert read_image(tmp_path / "gray16.png").shape == expected.shape


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_matter(tmp_path, exif):
    pixels = noise(5, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert_reads_as(tmp_path / "a.png", pixels)
    assert read_size(tmp_path / "a.png") == (5, 6)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_one_pixel(tmp_path, suffix):
    Image.fromarray(np.full((1, 1, 3), 77, np.uint8)).save(tmp_path / f"a.{suffix}")
    assert_reads_as(tmp_path / f"a.{suffix}", np.full((1, 1, 3), 77))


def test_reading_the_size_decodes_no_jpeg(tmp_path):
    jpeg = encode(Image.fromarray(noise(64, 80, 3)), "JPEG")
    (tmp_path / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    assert read_size(tmp_path / "half.jpg") == (64, 80)


# --------------------------- bad files


def bad_files():
    jpeg = encode(Image.fromarray(noise(64, 80, 3)), "JPEG")
    png = encode(Image.fromarray(noise(64, 80, 3)), "PNG")
    damaged = bytearray(png)
    damaged[200:260] = bytes(60)
    return {
        "half.jpg": (jpeg[: len(jpeg) // 2], "the file is truncated"),
        "head.jpg": (jpeg[:30], "the file is truncated"),
        "half.png": (png[: len(png) // 2], "the file is truncated"),
        "damaged.png": (bytes(damaged), "the file is damaged"),
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"no image at all\n", "not an image, or not of a format"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_file(tmp_path, name):
    contents, reason = bad_files()[name]
    (tmp_path / name).write_bytes(contents)
    for read in (read_image, read_mask):
        with pytest.raises(InputError, match=f"cannot read image .*{name}: {reason}"):
            read(tmp_path / name)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(InputError, match=r"none\.jpg: no such file"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(InputError, match=f"{tmp_path}: is a directory"):
        read_image(tmp_path)


def test_too_many_pixels(tmp_path, monkeypatch):
    Image.fromarray(noise(20, 20, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    with pytest.raises(InputError, match=r"a\.png: it has more than 300 pixels"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp", "ppm"])
@pytest.mark.filterwarnings("ignore")
def test_random_damage_gives_an_image_or_one_kind_of_error(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a damaged size must not cost memory
    path, rng, errors = tmp_path / f"a.{suffix}", np.random.default_rng(0), 0
    Image.fromarray(noise(30, 40, 3)).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(100):
        damaged = whole.copy()
        damaged[rng.integers(0, min(len(damaged), 400), 6)] = rng.integers(0, 256, 6)
        path.write_bytes(damaged.tobytes()[: rng.integers(len(damaged) // 2, len(damaged) + 1)])
        try:
            image = read_image(path)
        except InputError as error:
            errors += 1
            assert path.name in str(error)
        else:
            assert image.ndim == 3 and image.shape[2] == 3 and image.size > 0
    assert errors > 0


# --------------------------- masks, lists, threads


def test_mask_counts_every_value_above_zero(tmp_path):
    values = noise(9, 11) % 4
    expected = values > 0
    Image.fromarray(values).save(tmp_path / "index.png")
    Image.fromarray(values * 60).save(tmp_path / "bright.bmp")
    Image.fromarray(expected).save(tmp_path / "bilevel.png")
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "gray16.png")
    zero, opaque = np.zeros_like(values), np.full_like(values, 255)
    Image.fromarray(np.stack([zero, values, zero], 2)).save(tmp_path / "green.png")
    Image.fromarray(np.stack([values, values, zero, opaque], 2)).save(tmp_path / "rgba.png")
    Image.fromarray(np.stack([values, opaque], 2), "LA").save(tmp_path / "la.png")
    palette = Image.fromarray(values)
    palette.putpalette([200, 10, 10] * 256)  # every index has the same, bright colour
    palette.save(tmp_path / "palette.png")
    for path in list_images(tmp_path):
        mask = read_mask(path, (9, 11))
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected, err_msg=path.name)
    for name in ("index.png", "palette.png"):
        np.testing.assert_array_equal(read_mask_values(tmp_path / name), values)


def test_mask_of_another_size(tmp_path):
    Image.fromarray(np.zeros((9, 11), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=r"mask .*m\.png is 11 x 9 pixels, but its .* 9 x 11"):
        read_mask(tmp_path / "m.png", (11, 9))


def test_list_images(tmp_path):
    for name in ("b.JPG", "a.jpeg", "c.png", "notes.txt", "._b.JPG", "10.png", "9.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    found = list_images(tmp_path)
    assert [path.name for path in found] == ["10.png", "9.png", "a.jpeg", "b.JPG", "c.png"]
    assert found[0].parent == tmp_path and all(s == s.lower() for s in IMAGE_SUFFIXES)
    with pytest.raises(InputError, match="there is no folder .*none"):
        list_images(tmp_path / "none")


def test_many_threads_read_the_same(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = []
    for k in range(24):
        paths.append(tmp_path / f"{k}.{('jpg', 'png', 'tif', 'webp')[k % 4]}")
        Image.fromarray(np.roll(smooth(60, 70), k, axis=0)).save(paths[-1], exif=exif)
    expected = [read_image(path) for path in paths]
    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8, initializer=barrier.wait) as pool:
        for image, truth in zip(pool.map(read_image, paths * 4), expected * 4, strict=True):
            np.testing.assert_array_equal(image, truth)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to count open files")
def test_no_file_stays_open(tmp_path):
    Image.fromarray(noise(9, 11, 3)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    before = len(os.listdir("/proc/self/fd"))
    read_image(tmp_path / "a.png")
    read_mask(tmp_path / "a.png")
    for _ in range(3):
        with pytest.raises(InputError):
            read_image(tmp_path / "b.png")
    assert len(os.listdir("/proc/self/fd")) == before
