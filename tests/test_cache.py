import os

import numpy as np
import pytest
from PIL import Image

from spd_fast import InputError, padim, patchcore, twoclass
from spd_fast.datasets import Sample
from spd_fast.datasets.cache import read_resized
from spd_fast.datasets.images import read_image
from spd_fast.preprocess import normalised, prepare_image

PRESETS = [*padim.PRESETS.values(), *patchcore.PRESETS.values(), *twoclass.PRESETS.values()]


@pytest.fixture
def sample(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(tmp_path / "a.png")
    mask = np.zeros((90, 120), np.uint8)
    mask[30:60, 40:80] = 3
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return Sample(tmp_path / "a.png", 1, tmp_path / "mask.png")


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_kept_is_what_was_read(sample, preset, tmp_path):
    plain = read_resized(sample, preset)
    first = read_resized(sample, preset, tmp_path / "cache")
    kept = read_resized(sample, preset, tmp_path / "cache")
    for pixels, mask in (first, kept):
        assert pixels.dtype == plain[0].dtype and np.array_equal(pixels, plain[0])
        assert mask.dtype == bool and np.array_equal(mask, plain[1]) and mask.any()
    assert np.array_equal(normalised(kept[0]), prepare_image(read_image(sample.image), preset))


def test_the_second_time_no_image_is_decoded(sample, tmp_path, monkeypatch):
    first = read_resized(sample, PRESETS[0], tmp_path / "cache")
    monkeypatch.setattr("spd_fast.datasets.cache.read_image", None)
    again = read_resized(sample, PRESETS[0], tmp_path / "cache")
    assert np.array_equal(first[0], again[0])
    with pytest.raises(TypeError):
        read_resized(sample, PRESETS[1], tmp_path / "cache")  # another size: another file


@pytest.mark.parametrize("changed", ["a.png", "mask.png"])
def test_a_changed_file_is_read_again(sample, changed, tmp_path):
    first = read_resized(sample, PRESETS[0], tmp_path / "cache")
    picture = Image.open(tmp_path / changed).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture.crop((1, 0, 121, 90)).save(tmp_path / changed)
    os.utime(tmp_path / changed, ns=(1, 1))
    again = read_resized(sample, PRESETS[0], tmp_path / "cache")
    plain = read_resized(sample, PRESETS[0])
    place = int(changed == "mask.png")
    assert not np.array_equal(again[place], first[place])
    assert np.array_equal(again[0], plain[0]) and np.array_equal(again[1], plain[1])


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_a_damaged_file_of_the_cache_is_made_anew(sample, size, tmp_path):
    first = read_resized(sample, PRESETS[0], tmp_path / "cache")
    (path,) = (tmp_path / "cache").rglob("*.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    assert np.array_equal(read_resized(sample, PRESETS[0], tmp_path / "cache")[0], first[0])
    assert path.read_bytes() == whole


def test_errors_are_those_without_a_cache(sample, tmp_path):
    gone = Sample(tmp_path / "gone.png", 0, None)
    with pytest.raises(InputError, match="cannot read image .*gone.png"):
        read_resized(gone, PRESETS[0], tmp_path / "cache")
    Image.new("L", (9, 9)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="mask.png is 9 x 9 pixels, but its image is 120 x 90"):
        read_resized(sample, PRESETS[0], tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))
