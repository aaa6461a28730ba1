"""Drawn capsules and a drawn biscuit: "multiple instances" and "single instance".

As for every object, `*_scene(rng)` makes all random choices of one image, `*_draw(scene)` draws it
(picture float32 (H, W, 3) in [0, 1]; labels uint8 (H, W) of the surfaces that may carry a defect)
and a structural defect edits the scene before it is drawn. Surfaces are heights lit from `LIGHT`.
"""

import math
from functools import partial

import numpy as np
from skimage.filters import gaussian

from spd_fast.datasets.synthetic.defects import (
    FRAME,
    LIGHT,
    blend,
    cast_shadow,
    crack,
    dent,
    noise,
    pick_sound,
    random_pose,
    scratch,
    smoothstep,
    spot,
    window,
)
from spd_fast.datasets.synthetic.product import Product

WIDTH, HEIGHT = FRAME
CELL_X, CELL_Y = WIDTH / 4, HEIGHT / 3  # one cell of the tray
GREEN, CREAM = np.float32([0.13, 0.42, 0.33]), np.float32([0.9, 0.86, 0.74])
RADIUS = 208.0  # of the biscuit
PALE, DARK, CRUMB = np.float32([[0.9, 0.72, 0.45], [0.58, 0.33, 0.14], [0.93, 0.8, 0.58]])


# --------------------------------------------------------------------------------- capsules


def capsules_scene(rng: np.random.Generator) -> dict:
    """Twelve capsules lying loosely in the cells of a sorting tray."""
    shift = rng.uniform(-4, 4, 2)
    capsules = [
        {
            "x": CELL_X * (column + 0.5) + shift[0] + rng.uniform(-8, 8),
            "y": CELL_Y * (row + 0.5) + shift[1] + rng.uniform(-8, 8),
            "turn": math.radians(rng.uniform(-27, 27) - 40),
            "length": 76 * rng.normal(1, 0.012), "radius": 31 * rng.normal(1, 0.012),
            "tone": rng.normal(0, 0.018), "split": rng.normal(0.04, 0.025),
            "slip": 0.0, "askew": 0.0, "part": "whole",
        }
        for row in range(3)
        for column in range(4)
    ]  # fmt: skip
    return {
        "capsules": capsules,
        "shift": shift.tolist(),
        "tray": rng.normal(0, 0.02, 3).tolist(),
        "seed": int(rng.integers(2**31)),
    }


def capsules_missing(scene: dict, rng: np.random.Generator) -> None:
    """The cap of one capsule is gone: an open, empty body."""
    pick_sound(scene["capsules"], rng).update(part="body", fault=True)


def capsules_misplaced(scene: dict, rng: np.random.Generator) -> None:
    """The cap of one capsule sits askew and half pulled off."""
    slip, askew = rng.uniform(6, 18), rng.choice([-1, 1]) * rng.uniform(0.12, 0.45)
    pick_sound(scene["capsules"], rng).update(slip=slip, askew=askew, fault=True)


def half_capsule(dx, dy, turn, start, end, radius, closed):
    """Cover (0..1) and unit normal of a tube from `start` to `end` along `turn`; the end `closed`
    (-1 or 1) is round, the other flat."""
    cos, sin = math.cos(turn), math.sin(turn)
    along, across = cos * dx + sin * dy, cos * dy - sin * dx
    low, high = (start + radius, end) if closed < 0 else (start, end - radius)
    beyond = np.minimum(along - low, 0) if closed < 0 else np.maximum(along - high, 0)
    distance = np.hypot(beyond, across)
    flat = along - end if closed < 0 else start - along
    cover = np.clip(0.5 + np.minimum(radius - distance, -flat), 0, 1)
    nx, ny = beyond / radius, across / radius
    nz = np.sqrt(np.clip(1 - nx**2 - ny**2, 0.01, 1))
    normal = (nx * cos - ny * sin, nx * sin + ny * cos, nz)
    return cover.astype(np.float32), normal, along, across


def gloss(colour, normal):
    """A glossy `colour` under a long lamp at `LIGHT` and the light of the room."""
    nx, ny, nz = normal
    facing = nx * LIGHT[0] + ny * LIGHT[1] + nz * LIGHT[2]
    half = LIGHT + np.float32([0, 0, 1])
    half = half / np.linalg.norm(half)
    shine = np.clip(nx * half[0] + ny * half[1] + nz * half[2], 0, 1)
    body = 0.42 + 0.5 * np.clip(facing, 0, 1) + 0.22 * nz
    bright = 0.75 * shine**90 + 0.16 * shine**12
    return colour * body[..., None] + bright[..., None]


def draw_capsule(picture: np.ndarray, labels: np.ndarray, item: dict, number: int) -> None:
    """Draw one capsule into `picture` and its number into `labels`."""
    place, dy, dx = window((round(item["y"]), round(item["x"])), 86, labels.shape)
    dx, dy = dx + round(item["x"]) - item["x"], dy + round(item["y"]) - item["y"]
    half, radius, split = item["length"] * 0.76, item["radius"], item["split"] * 76
    cream, green = CREAM + item["tone"], GREEN + item["tone"] * 0.7
    whole = item["part"] == "whole"
    seam = split if whole and not item["slip"] else split + 17  # the cap no longer hides the body
    cover, normal, along, across = half_capsule(
        dx, dy, item["turn"], -half, seam, radius * 0.955, closed=-1
    )
    patch = blend(picture[place], gloss(cream, normal), cover)
    if whole:
        edge, askew = split + item["slip"], item["turn"] + item["askew"]
        cap, normal, along, _ = half_capsule(
            dx, dy, askew, edge, half + item["slip"], radius, closed=1
        )
        shadow = np.exp(-(((along - edge + 2) / 2.2) ** 2)) * (along < edge)
        lip = np.exp(-(((along - edge - 2) / 1.6) ** 2))
        patch = patch * (1 - 0.35 * shadow * cover)[..., None]
        patch = blend(patch, gloss(green, normal) * (1 + 0.25 * lip[..., None]), cap)
    else:  # look into the open end
        mouth = np.hypot((along - seam) / 8, across / (radius * 0.93))
        cap = np.clip((1.12 - mouth) * 9, 0, 1)
        patch = blend(patch, cream * 0.97, cap)
        dark = 0.2 + 0.16 * np.clip(across / radius + 0.4, 0, 1)
        patch = blend(patch, cream * dark[..., None], np.clip((0.98 - mouth) * 9, 0, 1))
    picture[place] = patch
    labels[place][np.maximum(cover, cap) > 0.95] = number


def tray_light(dx: float, dy: float) -> np.ndarray:
    """Shading of the tray's floor and of the ridges between its cells, shifted by (dx, dy)."""
    x = np.abs((np.arange(WIDTH) - dx) / CELL_X % 1 - 0.5) * CELL_X - CELL_X / 2
    y = np.abs((np.arange(HEIGHT) - dy) / CELL_Y % 1 - 0.5) * CELL_Y - CELL_Y / 2
    ridge = np.maximum(smoothstep((x + 9) / 7), smoothstep((y + 9) / 7)[:, None])
    height = 4.5 * ridge.astype(np.float32)
    slope_y, slope_x = np.gradient(height)
    hollow = 0.88 + 0.12 * smoothstep(np.minimum(-x, -y[:, None]) / 40)
    return hollow + 0.12 * ridge - 0.45 * (slope_x * LIGHT[0] + slope_y * LIGHT[1])


def capsule_shadow(item: dict, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """How dark the shadow of a capsule is, 0..1."""
    cos, sin = math.cos(item["turn"]), math.sin(item["turn"])
    end = 0.35 * item["length"]
    axis = np.clip(cos * dx + sin * dy, -end, end if item["part"] == "whole" else 0)
    distance = np.hypot(dx - cos * axis, dy - sin * axis)
    return smoothstep(1.15 - 0.65 * distance / item["radius"])


def capsules_draw(scene: dict) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(scene["seed"])
    shape = (HEIGHT, WIDTH)
    grain = 0.011 * noise(rng, shape, 2.5) + 0.008 * noise(rng, shape, 14)
    tray = (0.33 + grain + 0.02 * noise(rng, shape, 120)) * tray_light(*scene["shift"])
    shadow = np.zeros(shape, dtype=np.float32)
    for item in scene["capsules"]:
        place, dy, dx = window((round(item["y"]) + 6, round(item["x"]) + 6), 86, shape)
        shadow[place] = np.maximum(shadow[place], capsule_shadow(item, dx, dy))
    tray = (tray * (1 - 0.6 * shadow)).astype(np.float32)
    picture = tray[..., None] * (np.float32([0.86, 0.98, 1.16]) + np.float32(scene["tray"]))
    labels = np.zeros(shape, dtype=np.uint8)
    for number, item in enumerate(scene["capsules"], 1):
        draw_capsule(picture, labels, item, number)
    return np.clip(picture, 0, 1), labels


GELCAPS = Product(
    3,
    capsules_scene,
    capsules_draw,
    {"missing part": capsules_missing, "misplaced part": capsules_misplaced},
    {
        "dent": partial(dent, radius=(14, 25), strength=(0.6, 1.0)),
        "spot": partial(
            spot,
            colours=((0.2, 0.1, 0.05), (0.05, 0.05, 0.08)),
            radius=(9, 24),
            strength=(0.45, 1.0),
        ),
        "crack": partial(crack, length=(60, 120), strength=(0.7, 1.0)),
    },
)


# ---------------------------------------------------------------------------------- biscuit


def biscuit_scene(rng: np.random.Generator) -> dict:
    """A round biscuit with a scalloped rim and rings of docking holes, roughly in the middle."""
    holes = [(0.0, 0.0)]
    for count, far in ((6, 0.3), (12, 0.56)):
        for k in range(count):
            way = 2 * np.pi * (k + 0.5 * (count == 12)) / count
            holes.append((far * np.cos(way), far * np.sin(way)))
    holes = np.array(holes) + rng.normal(0, 0.006, (len(holes), 2))
    return {
        "pose": random_pose(rng, 9, 0.025, 9),
        "wobble": (rng.normal(0, 1, (2, 6)) / np.arange(2, 8) ** 1.3 * 0.008).tolist(),
        "holes": holes.tolist(),
        "sizes": rng.normal(1, 0.08, len(holes)).tolist(),
        "bake": float(rng.normal(0, 0.05)),
        "bites": [],
        "seed": int(rng.integers(2**31)),
    }


def biscuit_missing(scene: dict, rng: np.random.Generator) -> None:
    """A piece is broken off the rim."""
    size = np.exp(rng.uniform(np.log(0.08), np.log(0.24)))
    scene["bites"].append((rng.uniform(-np.pi, np.pi), size, int(rng.integers(2**31))))


def biscuit_outline(scene: dict, dx: np.ndarray, dy: np.ndarray) -> tuple:
    """How far each pixel lies inside the rim, in pixels, and inside the edge of a broken piece."""
    turns = np.linspace(-np.pi, np.pi, 4096, endpoint=False)
    rim = 0.986 + 0.014 * np.abs(np.sin(17 * turns))
    for k, (a, b) in enumerate(zip(*scene["wobble"], strict=True)):
        rim = rim + a * np.cos((k + 2) * turns) + b * np.sin((k + 2) * turns)
    step = ((np.arctan2(dy, dx) + np.pi) * (4096 / (2 * np.pi))).astype(np.int16) % 4096
    rim, distance = rim.astype(np.float32)[step], np.hypot(dx, dy)
    inside = RADIUS * rim - distance
    broken = np.full_like(inside, np.inf)
    for way, size, seed in scene["bites"]:
        rng = np.random.default_rng(seed)
        ragged = 2.2 * noise(rng, dx.shape, 22) + 1.0 * noise(rng, dx.shape, 6)
        gone = np.hypot(dx - RADIUS * np.cos(way), dy - RADIUS * np.sin(way))
        broken = np.minimum(broken, gone - size * RADIUS + ragged)
    return inside, broken


def biscuit_height(scene: dict, inside, broken, rough) -> tuple[np.ndarray, np.ndarray]:
    """Height of the surface in pixels, and how deep each pixel lies in a docking hole (0..1)."""
    pose = scene["pose"]
    depth = np.clip(inside / RADIUS, 0, 1)
    height = rough + 15 * smoothstep(np.clip(inside, 0, 60) / 26)
    height = height - 5 * np.exp(-(((depth - 0.15) / 0.025) ** 2))
    pits = np.zeros(inside.shape, dtype=np.float32)
    cos, sin = (pose["scale"] * RADIUS * f(pose["turn"]) for f in (math.cos, math.sin))
    for (hx, hy), size in zip(scene["holes"], scene["sizes"], strict=True):
        x = WIDTH / 2 + pose["dx"] + cos * hx - sin * hy
        y = HEIGHT / 2 + pose["dy"] + sin * hx + cos * hy
        place, dy, dx = window((round(y), round(x)), 16, inside.shape)
        away = np.hypot(dx + round(x) - x, dy + round(y) - y) / (6.2 * size)
        pits[place] = np.maximum(pits[place], smoothstep(1.45 - away))
        height[place] += 2.0 * np.exp(-(((away - 1.6) / 0.45) ** 2))
    return height - 9 * pits - 10 * np.exp(-np.clip(broken, 0, 40) / 3.5), pits


def biscuit_colour(scene: dict, inside, broken, grain, lumps, patches) -> np.ndarray:
    """Baked dough: browner at the rim and in `patches`, raw where a piece is broken off."""
    depth = np.clip(inside / RADIUS, 0, 1)
    brown = 0.22 + 2 * scene["bake"] + 0.13 * patches + 0.05 * lumps + 0.05 * grain
    brown = brown + 0.55 * np.exp(-depth / 0.07) + 0.3 * np.exp(-(((depth - 0.05) / 0.03) ** 2))
    colour = PALE + np.clip(brown, 0, 1)[..., None] * (DARK - PALE)
    return blend(colour, CRUMB, np.exp(-np.clip(broken, 0, 60) / 5) * (0.85 + 0.12 * grain))


def biscuit_draw(scene: dict) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(scene["seed"])
    shape, pose = (HEIGHT, WIDTH), scene["pose"]
    x = np.arange(WIDTH, dtype=np.float32) - WIDTH / 2 - pose["dx"]
    y = np.arange(HEIGHT, dtype=np.float32)[:, None] - HEIGHT / 2 - pose["dy"]
    cos, sin = (f(pose["turn"]) / pose["scale"] for f in (math.cos, math.sin))
    inside, broken = biscuit_outline(scene, cos * x + sin * y, cos * y - sin * x)
    cover = np.clip(np.minimum(inside, broken) + 0.5, 0, 1)

    grain, lumps, patches = (noise(rng, shape, cell) for cell in (3, 11, 70))
    rough = 0.45 * grain + 1.1 * lumps + 2.5 * noise(rng, shape, 60)
    height, pits = biscuit_height(scene, inside, broken, rough)
    slope_y, slope_x = np.gradient(gaussian(height, 0.8))
    facing = LIGHT[2] - slope_x * LIGHT[0] - slope_y * LIGHT[1]
    facing = facing / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    light = (0.5 + 0.62 * np.clip(facing, 0, 1.2)) * (1 - 0.5 * pits)
    biscuit = biscuit_colour(scene, inside, broken, grain, lumps, patches) * light[..., None]

    belt = 0.2 + 0.014 * noise(rng, shape, 2.2) + 0.012 * np.sin(y / 2.4) + 0.015 * lumps
    belt = belt * (1 - 0.6 * cast_shadow(cover, 9, 11))
    picture = blend(belt[..., None] * np.float32([0.95, 1.0, 1.08]), biscuit, cover)
    return np.clip(picture, 0, 1).astype(np.float32), (cover > 0.98).astype(np.uint8)


BISCUIT = Product(
    3,
    biscuit_scene,
    biscuit_draw,
    {"missing part": biscuit_missing},
    {
        "crack": partial(crack, colour=(0.2, 0.11, 0.05), length=(60, 190)),
        "spot": partial(
            spot,
            colours=((0.14, 0.08, 0.04), (0.35, 0.42, 0.36)),
            radius=(10, 34),
            strength=(0.4, 0.95),
        ),
        "scratch": partial(scratch, colour=(0.97, 0.88, 0.7)),
        "dent": partial(dent, radius=(14, 34), strength=(0.4, 1.0)),
    },
)
