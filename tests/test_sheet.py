import numpy as np
import pytest
from PIL import Image

from spd_fast.errors import InputError
from spd_fast.sheet import example_sheet, write_views_sheet


def scene(height=100, width=150):
    image = np.full((height, width, 3), 128, dtype=np.uint8)
    scores = np.zeros((height, width), dtype=np.float32)
    mask = np.zeros((height, width), dtype=bool)
    mask[40:60, 60:90] = True
    scores[mask] = 10
    return image, scores, mask


CYAN, WHITE = (0, 255, 255), (255, 255, 255)


def count(picture, colour):
    return int(np.all(np.asarray(picture) == colour, axis=2).sum())


def test_example_sheet_panels_and_outlines():
    image, scores, mask = scene()
    sheet = example_sheet(image, scores, mask, 5.0, (0, 10), side=300)
    assert sheet.height == 200 and sheet.width > 3 * 300
    first, second, third = (sheet.crop((x, 0, x + 300, 200)) for x in (0, 306, 612))
    assert np.ptp(np.asarray(first)) == 0 and first.getpixel((0, 0)) == (128, 128, 128)
    outline = 2 * (60 + 40)  # of 60 x 40 pixels at the panel's scale, and corners
    assert outline <= count(second, CYAN) <= outline + 8
    assert count(third, CYAN) == count(second, CYAN)
    assert count(second, WHITE) == 0
    assert second.getpixel((150, 100)) == (128, 128, 128)  # the inside is left as it is
    assert sum(third.getpixel((150, 100))) > sum(third.getpixel((5, 5))) + 150  # hotter is brighter


def test_example_sheet_without_a_mask_shows_what_was_found():
    image, scores, _ = scene()
    sheet = example_sheet(image, scores, threshold=5.0, side=300)
    assert 2 * 300 < sheet.width < 3 * 300
    assert count(sheet.crop((0, 0, 300, 200)), WHITE) == 0
    assert count(sheet.crop((306, 0, 606, 200)), WHITE) > 150
    assert count(sheet, CYAN) == 0


def test_example_sheets_of_one_scale_compare():
    image, scores, mask = scene()
    weak, strong = (example_sheet(image, scores * f, mask, None, (0, 10)) for f in (0.5, 1.0))
    centre = (2 * 326 + 160, weak.height // 2)
    assert sum(weak.getpixel(centre)) < sum(strong.getpixel(centre)) - 100
    alone = example_sheet(image, scores * 0.5, mask)
    assert alone.getpixel(centre) == strong.getpixel(centre)


def test_example_sheet_keeps_tiny_defects_and_odd_input():
    image, scores, mask = scene(1500, 1000)
    mask[:] = False
    mask[700, 400] = True
    sheet = example_sheet(image, scores[::7, ::7], mask, 5.0, (0, 10), side=100)
    assert count(sheet, CYAN) >= 8
    flat = example_sheet(image[:1, :1], scores[:1, :1], mask[:1, :1], 0.0, side=64)
    assert flat.height == 64
    with pytest.raises(InputError, match=r"\(1500, 1000\) uint8"):
        example_sheet(image[..., 0], scores)
    with pytest.raises(InputError, match=r"mask has shape \(1500, 1000, 1\)"):
        example_sheet(image, scores, mask[..., None])
    with pytest.raises(InputError, match="NaN"):
        example_sheet(image, scores * np.nan)


@pytest.mark.parametrize(("recipe", "columns"), [("simclr", 5), ("supervised", 4)])
def test_views_sheet(tmp_path, recipe, columns):
    gradient = np.linspace(0, 255, 60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / "photo.png")
    write_views_sheet(tmp_path / "photo.png", tmp_path / "sheet.png", recipe, rows=2, size=64)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (128 * columns + 8, 118 * 2 + 8)
    views = [sheet.crop((8 + 128 * c, 8, 72 + 128 * c, 72)).tobytes() for c in range(1, columns)]
    assert len(set(views)) == len(views)
