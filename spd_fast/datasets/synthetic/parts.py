"""The components of the drawn circuit board, seen from above."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ZOOM = 2  # the board is drawn this much finer than the frame
SMALL = {"resistor", "ceramic", "led"}
METAL = np.array([0.74, 0.75, 0.76])
GOLD = np.array([0.83, 0.66, 0.3])
SILK = (0.9, 0.91, 0.88)
BLACK = np.array([0.135, 0.135, 0.145])
MASK = (0.05, 0.3, 0.17)  # solder mask


@lru_cache(maxsize=8)
def font(size: int):
    return ImageFont.load_default(size)


def ink(image: Image.Image, colour):
    """A colour in [0, 1] as Pillow wants it for the mode of `image`."""
    levels = tuple(int(round(255 * min(max(c, 0), 1))) for c in colour)
    return levels if image.mode == "RGB" else levels[0]


class Pen:
    """Draws rectangles, discs and text in the coordinates of one part."""

    def __init__(self, image: Image.Image, x: float, y: float, degrees: float):
        self.image, self.draw = image, ImageDraw.Draw(image)
        self.x, self.y, self.degrees = x, y, degrees
        self.cos, self.sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))

    def place(self, x: float, y: float) -> tuple:
        return (
            ZOOM * (self.x + self.cos * x - self.sin * y),
            ZOOM * (self.y + self.sin * x + self.cos * y),
        )

    def rect(self, x0, y0, x1, y1, colour, cut: float = 0.0) -> None:
        """A rectangle, its corners cut by `cut`."""
        c = cut
        outline = [(x0 + c, y0), (x1 - c, y0), (x1, y0 + c), (x1, y1 - c)]
        outline += [(x1 - c, y1), (x0 + c, y1), (x0, y1 - c), (x0, y0 + c)]
        self.draw.polygon([self.place(*p) for p in outline], fill=ink(self.image, colour))

    def disc(self, x, y, radius, colour) -> None:
        x, y = self.place(x, y)
        r = radius * ZOOM
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=ink(self.image, colour))

    def text(self, x, y, text, size, colour) -> None:
        """`text` centred on (x, y)."""
        letters = font(size * ZOOM)
        left, top, right, bottom = letters.getbbox(text)
        stamp = Image.new("L", (right - left + 4, bottom - top + 4))
        ImageDraw.Draw(stamp).text((2 - left, 2 - top), text, fill=255, font=letters)
        stamp = stamp.rotate(-self.degrees, Image.BICUBIC, expand=True)
        x, y = self.place(x, y)
        corner = (round(x - stamp.width / 2), round(y - stamp.height / 2))
        self.image.paste(ink(self.image, colour), corner, stamp)


def pins(part: dict) -> list[tuple]:
    """Rectangles (x0, y0, x1, y1) of a chip's legs, in its own coordinates."""
    w, h = part["width"] / 2, part["height"] / 2
    if part["kind"] == "qfp":
        steps = np.linspace(-w + 9, w - 9, 12)
        sides = [(s - 2, -h - 11, s + 2, -h + 1) for s in steps]
        sides += [(s - 2, h - 1, s + 2, h + 11) for s in steps]
        sides += [(-w - 11, s - 2, -w + 1, s + 2) for s in steps]
        return sides + [(w - 1, s - 2, w + 11, s + 2) for s in steps]
    steps = np.linspace(-h + 7, h - 7, int(part["height"] // 12))
    legs = [(-w - 11, s - 2.4, -w + 1, s + 2.4) for s in steps]
    return legs + [(w - 1, s - 2.4, w + 11, s + 2.4) for s in steps]


def draw_chip(pen: Pen, part: dict, w: float, h: float, tone: float) -> None:
    for k, (x0, y0, x1, y1) in enumerate(pins(part)):
        pen.rect(x0, y0, x1, y1, METAL * (0.82 + 0.1 * (k % 3 == 0)))
        mx, my = (x0 + x1) / 2, (y0 + y1) / 2
        pen.rect(mx - 0.8, my - 0.8, mx + 0.8, my + 0.8, (0.95, 0.95, 0.95))
    black = BLACK * tone
    pen.rect(-w, -h, w, h, black * 0.8, 3)
    pen.rect(-w + 1.5, -h + 1.5, w - 1, h - 1, black * 1.7, 3)
    pen.rect(-w + 3, -h + 3, w - 2.5, h - 2.5, black * 1.15, 2)
    pen.disc(-w + 10, -h + 10, 3.5, black * 0.7)
    size = 14 if part["kind"] == "qfp" else 10
    pen.text(0, -6, part["label"], size, (0.66, 0.66, 0.64))
    pen.text(0, 9, part["lot"], size - 3, (0.6, 0.6, 0.58))


def draw_passive(pen: Pen, part: dict, w: float, h: float, tone: float) -> None:
    resistor = part["kind"] == "resistor"
    body = (BLACK if resistor else np.array([0.66, 0.5, 0.34])) * tone
    pen.rect(-w, -h, w, h, METAL * 0.95, 1)
    pen.rect(-w + 1, -h + 1.5, w - 1, -h + 4, (0.96, 0.96, 0.96))
    pen.rect(-w + 6, -h - 0.3, w - 6, h + 0.3, body)
    pen.rect(-w + 6, -h + 0.5, w - 6, -h + 2.5, body * 1.35)
    if resistor:
        pen.text(0, 0.5, str(part["digits"]), 7, (0.82, 0.82, 0.8))


def draw_can(pen: Pen, part: dict, w: float, h: float, tone: float) -> None:
    pen.rect(-w, -w, w, w, (0.12, 0.12, 0.13), 8)
    pen.disc(0, 0, w - 2, METAL * 0.62)
    pen.disc(-1, -1, w - 3.5, METAL * 1.2)
    pen.disc(0, 0, w - 6, METAL * 1.02 * tone)
    x, y = pen.place(0, 0)
    r, turn = (w - 6) * ZOOM, part["angle"]
    black = ink(pen.image, (0.13, 0.13, 0.15))
    pen.draw.chord((x - r, y - r, x + r, y + r), 130 + turn, 230 + turn, fill=black)
    pen.text(w * 0.18, 0, part["label"], 11, (0.2, 0.2, 0.22))


def draw_crystal(pen: Pen, part: dict, w: float, h: float, tone: float) -> None:
    pen.rect(-w, -h, w, h, METAL * 0.6, 10)
    pen.rect(-w + 1.5, -h + 1.5, w - 1.5, h - 2, METAL * 1.22, 9)
    pen.rect(-w + 4, -h + 4, w - 4, h - 4, METAL * 1.02 * tone, 8)
    pen.text(0, 0, part["label"], 10, (0.3, 0.3, 0.32))


def draw_socket(pen: Pen, part: dict, w: float, h: float, tone: float) -> None:
    pen.rect(-w, -h, w, h, METAL * 0.66)
    pen.rect(-w, -h + 2, w - 2, h - 2, METAL * 1.08 * tone)
    pen.rect(-w, -h + 2, w - 2, -h + 9, METAL * 1.25)
    for y in (-h * 0.5, h * 0.5):
        pen.rect(-6, y - 5, 14, y + 5, METAL * 0.5)
        pen.rect(-4, y - 3, 12, y + 4, METAL * 0.85)


def draw_header(pen: Pen, part: dict, w: float, h: float, tone: float) -> None:
    pen.rect(-w, -h, w, h, (0.1, 0.1, 0.11))
    pen.rect(-w, -h, w, -h + 2.5, (0.3, 0.3, 0.31))
    for k in range(12):
        for y in (-9.5, 9.5):
            x = -w + 10 + k * 20
            pen.rect(x - 7, y - 7, x + 7, y + 7, (0.17, 0.17, 0.18), 2)
            pen.rect(x - 3, y - 3, x + 3, y + 3, GOLD * 0.75)
            pen.rect(x - 3, y - 3, x + 1.4, y + 1.4, GOLD * 1.15)


def draw_led(pen: Pen, part: dict, w: float, h: float, tone: float) -> None:
    pen.rect(-w, -h, w, h, METAL * 0.9)
    pen.rect(-w + 4, -h - 0.5, w - 4, h + 0.5, (0.93, 0.92, 0.88))
    pen.disc(0, 0, h - 1.5, np.array([0.9, 0.78, 0.32]) * tone)
    pen.disc(-1.5, -1.5, 2, (1.0, 0.96, 0.8))


def draw_trimmer(pen: Pen, part: dict, w: float, h: float, tone: float) -> None:
    pen.rect(-w, -h, w, h, (0.1, 0.22, 0.42))
    pen.rect(-w + 1.5, -h + 1.5, w - 2, h - 2, np.array([0.16, 0.36, 0.64]) * tone)
    pen.disc(0, 0, w * 0.56, GOLD * 0.6)
    pen.disc(-0.7, -0.7, w * 0.52, GOLD)
    slot = Pen(pen.image, part["x"], part["y"], part["angle"] + 40 * part["tone"])
    slot.rect(-w * 0.45, -2.2, w * 0.45, 2.2, GOLD * 0.45)


def draw_coil(pen: Pen, part: dict, w: float, h: float, tone: float) -> None:
    pen.rect(-w, -h, w, h, (0.1, 0.1, 0.1), 12)
    pen.rect(-w + 2, -h + 2, w - 2.5, h - 2.5, (0.3, 0.3, 0.31), 11)
    pen.rect(-w + 3.5, -h + 3.5, w - 3, h - 3, np.array([0.2, 0.2, 0.21]) * tone, 10)
    pen.text(0, 0, part["label"], 15, (0.75, 0.75, 0.73))


DRAW = {
    "qfp": draw_chip, "soic": draw_chip, "resistor": draw_passive, "ceramic": draw_passive,
    "can": draw_can, "crystal": draw_crystal, "socket": draw_socket, "header": draw_header,
    "led": draw_led, "trimmer": draw_trimmer, "coil": draw_coil,
}  # fmt: skip


def draw_part(image: Image.Image, part: dict) -> None:
    """Draw the component `part` at its place."""
    pen = Pen(image, part["x"], part["y"], part["angle"])
    DRAW[part["kind"]](pen, part, part["width"] / 2, part["height"] / 2, 1 + 0.05 * part["tone"])


def draw_pads(image: Image.Image, part: dict) -> None:
    """Copper, solder and white print that lie below a component at its nominal place."""
    pen = Pen(image, part["x"], part["y"], part["angle"])
    w, h, kind = part["width"] / 2, part["height"] / 2, part["kind"]
    if kind in ("qfp", "soic"):
        for x0, y0, x1, y1 in pins(part):
            pen.rect(x0 - 1.5, y0 - 1.5, x1 + 1.5, y1 + 1.5, GOLD)
        m = 16
        for x, y in ((-w, -h), (w, -h), (w, h), (-w, h)):
            sx, sy = np.sign(x), np.sign(y)
            pen.rect(*sorted_box(x + sx * m, y + sy * m, x + sx * (m - 9), y + sy * (m - 2)), SILK)
            pen.rect(*sorted_box(x + sx * m, y + sy * m, x + sx * (m - 2), y + sy * (m - 9)), SILK)
    elif kind in SMALL:
        pen.rect(-w - 5, -h - 3, w + 5, h + 3, SILK, 2)
        pen.rect(-w - 3.6, -h - 1.6, w + 3.6, h + 1.6, MASK)
        for side in (-1, 1):
            pen.rect(
                *sorted_box(side * (w + 2.5), -h - 0.5, side * (w - 8), h + 0.5), GOLD * 0.9, 1
            )
            pen.rect(*sorted_box(side * (w + 1), -h + 1.5, side * (w - 6), h - 2), METAL * 0.9, 2)
            pen.disc(side * (w - 3), -2, 2.2, METAL * 1.2)
    elif kind == "hole":
        pen.disc(0, 0, w, GOLD * 0.92)
        pen.disc(0, 0, w * 0.62, (0.5, 0.52, 0.55))
        pen.disc(0.8, 0.8, w * 0.54, (0.3, 0.31, 0.33))
    else:
        pen.rect(-w - 3, -h - 3, w + 3, h + 3, SILK, 3)
        pen.rect(-w - 1.5, -h - 1.5, w + 1.5, h + 1.5, MASK, 2)


def sorted_box(x0, y0, x1, y1) -> tuple:
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
