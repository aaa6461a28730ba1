"""Pictures to look at: the views of an image, a scored image with its heat map, many pictures."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from spd_fast import recipes
from spd_fast.datasets.images import read_image
from spd_fast.errors import InputError
from spd_fast.files import atomic_path
from spd_fast.ops.augment_views import augment_views
from spd_fast.views import COLUMN, sample_view_params

NAMES = {
    1: ("x",),
    2: ("x", "x hat"),
    3: ("x", "x+ (SPD positive)", "x- (SPD negative)"),
    4: ("x", "x hat", "x+ (SPD positive)", "x- (SPD negative)"),
}
MARGIN, CAPTION, BACKGROUND = 8, 46, (250, 250, 250)
NARROWEST = 120  # pixels, room for the longest title


def write_views_sheet(
    image_path: str | Path,
    out: str | Path,
    recipe: str = "simsiam",
    rows: int = 4,
    size: int = 224,
    seed: int = 0,
) -> None:
    """Write a picture with one row of views per epoch, each labelled with its parameters.

    Raises:
        InputError: the image cannot be read, `rows` is below 1, or `out` has no picture's suffix.
    """
    if rows < 1:
        raise InputError(f"rows must be at least 1, got {rows}")
    if Path(out).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"the picture must be a .png or .jpg file, got {out}")
    image = read_image(image_path)
    views = getattr(recipes, recipe)()
    sheet = views_sheet(views, [(image, 0, epoch) for epoch in range(rows)], size, seed)
    with atomic_path(out) as temporary:
        sheet.save(temporary)


def views_sheet(
    recipe: recipes.Recipe, rows: Sequence[tuple[np.ndarray, int, int]], size: int, seed: int
) -> Image.Image:
    """A picture with one row per image, (image, its index, epoch), and its views, labelled."""
    names = NAMES[len(recipe)]
    width = max(size, NARROWEST)
    pitch_x, pitch_y = width + MARGIN, size + CAPTION + MARGIN
    sheet = Image.new(
        "RGB", (pitch_x * (len(names) + 1) + MARGIN, pitch_y * len(rows) + MARGIN), BACKGROUND
    )
    for row, (image, index, epoch) in enumerate(rows):
        params = sample_view_params(recipe, [image.shape[:2]], [index], epoch, seed, size)
        made = augment_views([image], params, size, dtype=torch.uint8)
        y = MARGIN + row * pitch_y
        original = Image.fromarray(image)
        original.thumbnail((size, size))
        text = f"{image.shape[1]} x {image.shape[0]}"
        _place(sheet, original, (MARGIN, y), y + size, "image", text, width)
        for v, name in enumerate(names):
            pixels = np.ascontiguousarray(made[v, 0].permute(1, 2, 0).numpy())
            x = MARGIN + (v + 1) * pitch_x
            text = _describe(params[0, v])
            _place(sheet, Image.fromarray(pixels), (x, y), y + size, name, text, width)
    return sheet


def _place(sheet, picture, place: tuple, bottom: int, title: str, text: str, width: int) -> None:
    """A picture, and below `bottom` its title and two lines of text."""
    sheet.paste(picture, place)
    draw = ImageDraw.Draw(sheet)
    draw.text((place[0], bottom + 2), title, fill=(20, 20, 20), font=ImageFont.load_default(13))
    small = ImageFont.load_default(10)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, small) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    for number, line in enumerate(lines[:2]):
        draw.text((place[0], bottom + 19 + 12 * number), line, fill=(90, 90, 90), font=small)


def _describe(row: torch.Tensor) -> str:
    p = {name: row[i].item() for name, i in COLUMN.items()}
    words = [f"{p['crop_width']:.0f}x{p['crop_height']:.0f}"]
    for name, short, off in (
        ("brightness", "b", 1),
        ("contrast", "c", 1),
        ("saturation", "s", 1),
        ("hue", "h", 0),
    ):
        if p[name] != off:
            words.append(f"{short}{p[name]:.2f}")
    words += ["gray"] * bool(p["grayscale"]) + ["flip"] * bool(p["flip"])
    if p["blur_sigma"]:
        words.append(f"blur {p['blur_sigma']:.1f}")
    return " ".join(words)


# --------------------------------------------------------------------------------- scored images

TRUTH_COLOUR = (0, 255, 255)  # no value of the heat colours is near cyan
FOUND_COLOUR = (255, 255, 255)
HEAT = "inferno"
GAP = 6


def example_sheet(
    image: np.ndarray,
    score_map: np.ndarray,
    mask: np.ndarray | None = None,
    threshold: float | None = None,
    scale: tuple[float, float] | None = None,
    side: int = 320,
) -> Image.Image:
    """Picture of a scored image: as it is, with the mask's outline, under its heat map.

    Cyan outlines the mask, white the region with scores >= `threshold` (on the heat map only).
    Without a mask (None; of a normal image it is all False) the second panel is left out.

    Args:
        image: (H, W, 3) uint8.
        score_map: float, of the same field of view; brought to the panel's size bilinearly.
        mask: bool, of the same field of view; no defect is too small to be outlined.
        scale: scores of the darkest and the brightest heat colour, (lo, hi), which should be the
            same for all pictures of a category; by default the range of this map.
        side: longer side of each panel in pixels.

    Raises:
        InputError: a shape or a type is not as above, or the map is not finite.
    """
    check_panel(image, score_map, mask)
    photo = resize_photo(image, side)
    lo, hi = scale or (float(score_map.min()), float(score_map.max()))
    heat = heat_overlay(photo, score_map, lo, hi)
    panels = [np.asarray(photo)]
    if threshold is not None:
        scores = _resize_plane(score_map, photo.size, Image.Resampling.BILINEAR)
        heat = outline(heat, scores >= threshold, FOUND_COLOUR)
    if mask is not None:
        covered = covered_pixels(photo, mask)
        panels.append(outline(panels[0], covered, TRUTH_COLOUR))
        heat = outline(heat, covered, TRUTH_COLOUR)
    panels += [heat, _colour_bar(photo.height, lo, hi, threshold)]
    gap = np.full((photo.height, GAP, 3), 255, dtype=np.uint8)
    return Image.fromarray(np.hstack([part for panel in panels for part in (panel, gap)][:-1]))


def check_panel(
    image: np.ndarray, score_map: np.ndarray | None = None, mask: np.ndarray | None = None
) -> None:
    """Refuse what `example_sheet` cannot draw.

    Raises:
        InputError: a shape or a type is not as there, or the map is not finite.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"image is {image.shape} {image.dtype}, expected (H, W, 3) uint8")
    for name, plane in (("score map", score_map), ("mask", mask)):
        if plane is not None and plane.ndim != 2:
            raise InputError(f"{name} has shape {plane.shape}, expected (H, W)")
    if score_map is not None and not np.isfinite(score_map).all():
        raise InputError("the score map holds NaN or infinite values, expected finite scores")


def resize_photo(image: np.ndarray, side: int) -> Image.Image:
    """The image with a longer side of `side` pixels."""
    factor = side / max(image.shape[:2])
    height, width = (max(1, round(n * factor)) for n in image.shape[:2])
    return Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)


def covered_pixels(photo: Image.Image, mask: np.ndarray) -> np.ndarray:
    """Pixels of the photo that the mask, of any size, covers at least in part."""
    return _resize_plane(mask, photo.size, Image.Resampling.BOX) > 0


def heat_overlay(photo: Image.Image, score_map: np.ndarray, lo: float, hi: float) -> np.ndarray:
    """The photo in grey under the map in heat colours, from `lo` to `hi`."""
    scores = _resize_plane(score_map, photo.size, Image.Resampling.BILINEAR)
    level = np.clip((scores - lo) / max(hi - lo, 1e-12), 0, 1)
    colours = matplotlib.colormaps[HEAT](level, bytes=True)[..., :3]
    grey = photo.convert("L").convert("RGB")
    return np.asarray(Image.blend(grey, Image.fromarray(colours), 0.55))


def _resize_plane(plane: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size, how))


def outline(picture: np.ndarray, region: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """A line just outside the region, between two dark ones, so that any background shows it."""
    square = np.ones((3, 3), dtype=bool)
    line = ndimage.binary_dilation(region, square) & ~region
    halo = ndimage.binary_dilation(line, square) & ~line
    picture = picture.copy()
    picture[halo] = picture[halo] // 4
    picture[line] = colour
    return picture


def _colour_bar(height: int, lo: float, hi: float, threshold: float | None) -> np.ndarray:
    bar, text = 16, 50
    canvas = Image.new("RGB", (bar + text, height), "white")
    ramp = matplotlib.colormaps[HEAT](np.linspace(1, 0, height), bytes=True)[:, None, :3]
    canvas.paste(Image.fromarray(np.repeat(ramp, bar, axis=1)), (0, 0))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(15)
    draw.text((bar + 5, 1), f"{hi:.3g}", "black", font, anchor="lt")
    draw.text((bar + 5, height - 2), f"{lo:.3g}", "black", font, anchor="lb")
    if threshold is not None and lo <= threshold <= hi and hi > lo:
        y = round((height - 1) * (hi - threshold) / (hi - lo))
        draw.line([(0, y), (bar + 3, y)], "white", 3)
        draw.line([(0, y), (bar + 3, y)], "black", 1)
        if 20 < y < height - 20:
            draw.text((bar + 5, y), f"{threshold:.3g}", "black", font, anchor="lm")
    return np.asarray(canvas)


# --------------------------------------------------------------------------------- many pictures

DPI = 150
LINE = 32  # pixels, height of a line of text


def grid(rows: list[tuple[str, Sequence]], side: int, titles: Sequence[str] = ()) -> Figure:
    """A figure of pictures in rows and columns, at DPI one pixel for each of theirs.

    Args:
        rows: (title, pictures) of each: RGB, or one plane from 0, black, to 1.
        side: the longest side of any picture.
        titles: of the columns, or none.
    """
    rows = [(name, [np.asarray(picture) for picture in pictures]) for name, pictures in rows]
    tall = max(picture.shape[0] for _, pictures in rows for picture in pictures)
    lines = [textwrap.wrap(name, max(tall // 15, 8)) for name, _ in rows]  # 15 pixels a letter
    left, top = MARGIN + LINE * max(map(len, lines)), MARGIN + LINE * bool(titles)
    width = left + len(rows[0][1]) * (side + MARGIN) + MARGIN
    height = top + len(rows) * (tall + MARGIN) + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    style = {"fontsize": 12, "ha": "center", "va": "center"}
    for r, (_, pictures) in enumerate(rows):
        middle = height - top - r * (tall + MARGIN) - tall / 2
        title = "\n".join(lines[r])
        figure.text(left / 2 / width, middle / height, title, rotation="vertical", **style)
        for c, picture in enumerate(pictures):
            h, w = picture.shape[:2]
            x, y = left + c * (side + MARGIN) + (side - w) // 2, round(middle - h / 2)
            axes = figure.add_axes((x / width, y / height, w / width, h / height))
            axes.imshow(picture, "gray", aspect="auto", interpolation="none", vmin=0, vmax=1)
            axes.set_axis_off()
    for c, name in enumerate(titles):
        x = left + c * (side + MARGIN) + side / 2
        figure.text(x / width, 1 - (MARGIN + LINE) / 2 / height, name, **style)
    return figure
