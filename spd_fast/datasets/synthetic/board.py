"""A drawn circuit board: the "complex structure" of the synthetic data set.

`pcb_scene(rng)` makes every random choice of one image and returns them as a dict;
`pcb_draw(scene)` draws it on the frame and returns the picture, float32 (H, W, 3) in [0, 1], and
the labels of the surfaces that may carry a defect, uint8 (H, W). A structural defect edits the
scene before it is drawn.
"""

from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from spd_fast.datasets.synthetic.defects import (
    FRAME,
    blend,
    cast_shadow,
    noise,
    pick_sound,
    pose_matrix,
    random_pose,
    scratch,
    spot,
)
from spd_fast.datasets.synthetic.parts import (
    GOLD,
    SILK,
    SMALL,
    ZOOM,
    Pen,
    draw_pads,
    draw_part,
    ink,
    pins,
)
from spd_fast.datasets.synthetic.product import Product

WIDTH, HEIGHT = FRAME
BOARD = (40, 34, 600, 478)
DRILLED = (0.08, 0.12, 0.1)
RESISTORS = (100, 101, 102, 103, 220, 221, 331, 472, 473, 510)  # what is printed on them
PASSIVES = [  # kind, x, y, angle in degrees
    *[("resistor", 176, 178 + 24 * k, 0) for k in range(5)],
    *[("ceramic", 338, 190 + 26 * k, 0) for k in range(4)],
    *[("ceramic", 214 + 30 * k, 146, 90) for k in range(3)],
    ("resistor", 222, 318, 90), ("resistor", 282, 318, 90),
    *[("resistor", 392 + 24 * k, 232, 90) for k in range(4)],
    *[("ceramic", 388, 76 + 24 * k, 0) for k in range(2)],
    *[("resistor", 508, 84 + 34 * k, 0) for k in range(3)],
    ("ceramic", 396, 318, 0), ("resistor", 396, 342, 0), ("resistor", 396, 366, 0),
    ("ceramic", 150, 356, 90), ("ceramic", 176, 356, 90),
]  # fmt: skip
COLUMNS = ("kind", "x", "y", "angle", "width", "height", "label")
PARTS = [
    ("qfp", 252, 232, 0, 104, 104, "SPD-401"),
    ("soic", 448, 138, 0, 50, 78, "T62"), ("soic", 470, 300, 90, 40, 60, "8A1"),
    ("can", 108, 104, 0, 64, 64, "220"), ("can", 108, 184, 0, 48, 48, "47"),
    ("crystal", 252, 356, 0, 74, 28, "16.000"),
    ("socket", 78, 300, 0, 72, 84, ""),
    ("header", 300, 432, 0, 240, 40, ""),
    *[("led", 552, 84 + 34 * k, 0, 26, 18, "") for k in range(3)],
    ("trimmer", 528, 396, 0, 56, 56, ""),
    ("coil", 456, 396, 0, 54, 54, "330"),
    *[("hole", x, y, 0, 26, 26, "") for x in (64, 576) for y in (58, 454)],
    *[(*passive, 26, 13, "") for passive in PASSIVES],
]  # fmt: skip
LARGE = {"can", "crystal", "coil", "trimmer", "soic"}
UNNAMED = {"hole", "resistor", "ceramic"}  # no name is printed beside them


def pcb_scene(rng: np.random.Generator) -> dict:
    """Every part a little off its place, with another lot number; the board in another shade."""
    lot = f"{rng.integers(20, 25)}{rng.integers(1, 53):02d}"
    parts = []
    for row in PARTS:
        part = dict(zip(COLUMNS, row, strict=True))
        loose = 1.0 if part["kind"] in SMALL else 0.4
        part["x"] += rng.normal(0, 0.6 * loose)
        part["y"] += rng.normal(0, 0.6 * loose)
        part["angle"] += rng.normal(0, 1.6 * loose**2)
        part.update(tone=rng.normal(0, 1), lot=lot, digits=int(rng.choice(RESISTORS)), shown=True)
        parts.append(part)
    return {
        "pose": random_pose(rng, 1.0, 0.01, 4),
        "parts": parts,
        "shade": (rng.normal(0, 0.018, 3) + rng.normal(0, 0.04)).tolist(),
        "seed": int(rng.integers(2**31)),
    }


def sound_part(scene: dict, rng: np.random.Generator) -> dict:
    """A part without a fault so far, a large one in one case of four."""
    kinds = LARGE if rng.uniform() < 0.25 else SMALL
    return pick_sound([p for p in scene["parts"] if p["kind"] in kinds], rng)


def pcb_missing(scene: dict, rng: np.random.Generator) -> None:
    """A part was never placed: its pads show."""
    sound_part(scene, rng).update(shown=False, fault=True)


def pcb_misplaced(scene: dict, rng: np.random.Generator) -> None:
    """A part slipped off its pads and turned."""
    part = sound_part(scene, rng)
    far, way = rng.uniform(4, 12), rng.uniform(0, 2 * np.pi)
    part["x"] += far * np.cos(way)
    part["y"] += far * np.sin(way)
    part["angle"] += rng.choice([-1, 1]) * rng.uniform(8, 60 if part["kind"] in SMALL else 25)
    part["fault"] = True


def fan_out(part: dict, rng: np.random.Generator) -> list[np.ndarray]:
    """Traces from the pads of `part` to vias: lines of four points (x, y), bent by 45 degrees."""
    if part["kind"] == "header":
        pads = [(-110 + 20 * k, -12) for k in range(12)]
    elif part["kind"] in SMALL:
        pads = [(-10, 0), (10, 0)]
    elif part["kind"] in ("qfp", "soic"):
        pads = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in pins(part)]
    else:
        pads = []
    way = np.deg2rad(part["angle"])
    turn = np.array([[np.cos(way), -np.sin(way)], [np.sin(way), np.cos(way)]])
    inner = np.array(BOARD).reshape(2, 2) + [[10], [-10]]
    lines = []
    for k, pad in enumerate(np.array(pads, dtype=float)):
        if rng.uniform() < 0.25:
            continue
        out = np.round(pad / max(np.abs(pad).max(), 1))
        if part["kind"] == "header" or abs(out[0] * out[1]) > 0:
            out = np.array([0.0, np.sign(pad[1])])
        side = rng.choice([-1, 1]) * np.array([-out[1], out[0]])
        corner = pad + out * (rng.uniform(14, 30) + 5 * (k % 4))
        bend = corner + (out + side) * rng.uniform(4, 26)
        line = np.array([pad, corner, bend, bend + out * rng.uniform(6, 34)])
        lines.append(np.clip(line @ turn.T + (part["x"], part["y"]), *inner))
    return lines


def draw_trace(image: Image.Image, points, width: float) -> None:
    points = [(ZOOM * x, ZOOM * y) for x, y in points]
    for extra, colour in ((3.2, (0.035, 0.25, 0.14)), (0, (0.1, 0.45, 0.25))):
        thick = round((width + extra) * ZOOM)
        ImageDraw.Draw(image).line(points, fill=ink(image, colour), width=thick, joint="curve")


@lru_cache(maxsize=1)
def bare_board() -> Image.Image:
    """The board without components; the same for every image."""
    rng = np.random.default_rng(401)
    image = Image.new("RGB", (WIDTH * ZOOM, HEIGHT * ZOOM))
    pen = Pen(image, 0, 0, 0)
    pen.rect(*BOARD, (0.045, 0.29, 0.165), 12)
    x0, y0, x1, y1 = BOARD
    for _ in range(9):  # copper pour shines through the solder mask
        cx, cy = rng.uniform(x0 + 40, x1 - 40), rng.uniform(y0 + 40, y1 - 40)
        w, h = rng.uniform(30, 90, 2)
        box = (max(cx - w, x0 + 8), max(cy - h, y0 + 8), min(cx + w, x1 - 8), min(cy + h, y1 - 8))
        pen.rect(*box, (0.065, 0.345, 0.19), 10)

    parts = [dict(zip(COLUMNS, row, strict=True)) for row in PARTS]
    lines = [line for part in parts for line in fan_out(part, rng)]
    for line in lines:
        draw_trace(image, line, 2.4)
    for k in range(7):  # a bus between the large chip and the connector
        x, end = 212 + 12 * k, 200 + 20 * k
        draw_trace(image, [(x, 290), (x, 388), (end, 400), (end, 420)], 3.0)
    for line in lines:
        for radius, colour in ((4.2, (0.14, 0.42, 0.24)), (2.8, GOLD * 0.85), (1.5, DRILLED)):
            pen.disc(*line[-1], radius, colour)
    for part in parts:
        draw_pads(image, part)
    for k, part in enumerate((p for p in parts if p["kind"] not in UNNAMED), 1):
        prefix = {"qfp": "U", "soic": "U", "can": "C", "crystal": "Y", "led": "D"}
        below = part["height"] / 2 + (22 if part["kind"] in ("qfp", "soic") else 11)
        name = f"{prefix.get(part['kind'], 'J')}{k}"
        pen.text(part["x"] - 18, part["y"] + below, name, 9, SILK)
    pen.text(180, 62, "SPD CONTROL", 15, SILK)
    pen.text(190, 82, "REV 2.1", 11, SILK)
    pen.text(560, 340, "+5V", 11, SILK)
    return image


def pcb_draw(scene: dict) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(scene["seed"])
    image = bare_board().copy()
    shown = [p for p in scene["parts"] if p["shown"] and p["kind"] != "hole"]
    shadow = Image.new("L", image.size)
    for part in shown:
        lift = 2.0 if part["kind"] in SMALL else 5.0
        pen = Pen(shadow, part["x"] + lift, part["y"] + 1.2 * lift, part["angle"])
        w, h = part["width"] / 2, part["height"] / 2
        corners = [pen.place(*p) for p in ((-w, -h), (w, -h), (w, h), (-w, h))]
        pen.draw.polygon(corners, fill=150)
    shadow = shadow.reduce(4).filter(ImageFilter.GaussianBlur(1.6)).resize(image.size)
    image.paste((4, 14, 10), (0, 0), shadow)
    for part in shown:
        draw_part(image, part)
    cover = Image.new("L", image.size)
    Pen(cover, 0, 0, 0).rect(*BOARD, (1, 1, 1), 12)
    matrix = (pose_matrix(scene["pose"]) * ZOOM).ravel()
    board = image.transform(FRAME, Image.AFFINE, tuple(matrix), Image.BILINEAR)
    cover = cover.transform(FRAME, Image.AFFINE, tuple(matrix), Image.BILINEAR)
    board = np.asarray(board, dtype=np.float32) / 255
    cover = np.asarray(cover, dtype=np.float32) / 255
    board = (
        board * (1 + np.float32(scene["shade"])) + 0.012 * noise(rng, cover.shape, 60)[..., None]
    )
    table = 0.5 + 0.02 * noise(rng, cover.shape, 90) + 0.012 * noise(rng, cover.shape, 3)
    table = table * (1 - 0.5 * cast_shadow(cover, 7, 6))
    picture = blend(table[..., None] * np.float32([0.94, 0.98, 1.04]), board, cover)
    return np.clip(picture, 0, 1), (cover > 0.98).astype(np.uint8)


PCB = Product(
    4,
    pcb_scene,
    pcb_draw,
    {"missing part": pcb_missing, "misplaced part": pcb_misplaced},
    {
        "scratch": partial(
            scratch, colour=(0.86, 0.66, 0.4), length=(50, 170), strength=(0.45, 1.0)
        ),
        "spot": partial(
            spot,
            colours=((0.32, 0.2, 0.06), (0.75, 0.7, 0.5)),
            radius=(10, 32),
            strength=(0.35, 0.95),
        ),
    },
)
