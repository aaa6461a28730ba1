"""Defects painted on a drawn or photographed object: scratch, crack, spot, dent, chip.

A picture is a float32 array (H, W, 3) in [0, 1] on the frame of `FRAME` pixels, twice as fine as
the images that are written by default. `labels` (H, W) numbers the surfaces on which a defect may
lie (0 is none): a defect chooses one of them and stays on it. Every random choice comes from the
generator that is passed, so the same generator state on the same `labels` gives the same defect.
"""

import math

import numpy as np
from PIL import Image, ImageFilter

FRAME = (640, 512)  # width and height on which everything is drawn, in pixels
LIGHT = np.array([-0.55, -0.65, 0.52], dtype=np.float32)  # towards the lamp: x right, y down, z up


def noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Smooth noise of about unit deviation, features `cell` pixels wide; float32 of `shape`."""
    height, width = shape
    grid = rng.standard_normal((int(height / cell) + 3, int(width / cell) + 3)).astype(np.float32)
    box = (1, 1, 1 + width / cell, 1 + height / cell)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC, box)) * 1.5


def smoothstep(x: np.ndarray) -> np.ndarray:
    """0 below 0, 1 above 1, a smooth rise between."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def blend(picture: np.ndarray, colour, alpha: np.ndarray) -> np.ndarray:
    """`picture` (h, w, 3) covered by `colour` (3,) or (h, w, 3) where `alpha` (h, w) is 1."""
    colour = np.asarray(colour, dtype=np.float32)
    return picture + np.asarray(alpha, dtype=np.float32)[..., None] * (colour - picture)


def pose_matrix(pose: dict) -> np.ndarray:
    """The 2 x 3 matrix that takes output pixels of the frame to drawing coordinates."""
    cos, sin = np.cos(pose["turn"]) / pose["scale"], np.sin(pose["turn"]) / pose["scale"]
    cx, cy = FRAME[0] / 2, FRAME[1] / 2
    tx, ty = cx + pose["dx"], cy + pose["dy"]
    return np.array([[cos, sin, cx - cos * tx - sin * ty], [-sin, cos, cy + sin * tx - cos * ty]])


def random_pose(rng: np.random.Generator, degrees: float, scale: float, shift: float) -> dict:
    """Turn, scale and shift about the middle of the frame, uniform within the given limits."""
    return {
        "turn": math.radians(rng.uniform(-degrees, degrees)),
        "scale": 1 + rng.uniform(-scale, scale),
        "dx": rng.uniform(-shift, shift),
        "dy": rng.uniform(-shift, shift),
    }


def blur(mask: np.ndarray, sigma: float) -> np.ndarray:
    """A wide Gaussian blur of a map in [0, 1], made at a quarter of its size."""
    small = Image.fromarray((mask * 255).astype(np.uint8)).reduce(4)
    small = small.filter(ImageFilter.GaussianBlur(sigma / 4))
    wide = small.resize(mask.shape[::-1], Image.BICUBIC)
    return np.asarray(wide, dtype=np.float32) / 255


def cast_shadow(cover: np.ndarray, sigma: float, shift: int) -> np.ndarray:
    """The soft shadow that an object of this `cover` throws away from the lamp."""
    return blur(np.roll(cover, (shift, shift), (0, 1)), sigma)


def pick_sound(items: list[dict], rng: np.random.Generator) -> dict:
    """One of the items of a scene that have no fault so far."""
    sound = [item for item in items if "fault" not in item]
    return sound[rng.integers(len(sound))]


def choose_surface(
    labels: np.ndarray, rng: np.random.Generator, margin: int, on: tuple = ()
) -> tuple:
    """One surface (of those numbered in `on`, if given) and a place on it, `margin` pixels inside
    where that is possible.

    Returns:
        (y, x) and a float32 (H, W) map that is 1 on the chosen surface, with soft edges.
    """
    names = np.array(on) if on else np.unique(labels[::4, ::4])
    names = names[names > 0]
    surface = labels == names[rng.integers(len(names))]
    soft = blur(surface, 2)
    for inset in (margin, margin // 2, 0):
        inner = blur(surface, inset) > 0.9 if inset else surface
        places = np.argwhere(inner[8:-8:4, 8:-8:4])
        if len(places):
            break
    y, x = places[rng.integers(len(places))] * 4 + 8
    return (int(y), int(x)), soft


def window(at: tuple[int, int], radius: float, shape: tuple) -> tuple:
    """The slices of a square around `at`, cut at the border, and the offsets (dy, dx) from `at`."""
    y, x = at
    radius = int(radius) + 1
    rows = slice(max(y - radius, 0), min(y + radius + 1, shape[0]))
    columns = slice(max(x - radius, 0), min(x + radius + 1, shape[1]))
    dy, dx = np.mgrid[rows, columns].astype(np.float32)
    return (rows, columns), dy - y, dx - x


def path_distance(points: np.ndarray, dy: np.ndarray, dx: np.ndarray) -> tuple:
    """Signed distance of each pixel to the polyline `points` (N, 2) as (y, x), and the share (0..1)
    of the line's length at which its nearest point lies."""
    best = np.full(dy.shape, np.inf, dtype=np.float32)
    signed, share = np.zeros_like(best), np.zeros_like(best)
    lengths = np.hypot(*np.diff(points, axis=0).T)
    total, done = lengths.sum(), 0.0
    for (y, x), (vy, vx), length in zip(points, np.diff(points, axis=0), lengths, strict=False):
        ry, rx = dy - y, dx - x
        t = np.clip((ry * vy + rx * vx) / (length * length), 0, 1)
        distance = np.hypot(ry - t * vy, rx - t * vx)
        nearer = distance < best
        best[nearer] = distance[nearer]
        side = np.where(ry * vx - rx * vy < 0, -1.0, 1.0)
        signed[nearer] = (side * distance)[nearer]
        share[nearer] = ((done + t * length) / total)[nearer]
        done += length
    return signed, share


def oval(rng: np.random.Generator, dy, dx, radius: float, flattest: float) -> np.ndarray:
    """Distance from the middle of a turned ellipse, 1 on its outline: one half-axis is `radius`,
    the other that times `flattest` to 1."""
    squeeze, turn = rng.uniform(flattest, 1.0), rng.uniform(0, np.pi)
    along, across = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    return np.hypot(along, across / squeeze) / radius


def wander(rng: np.random.Generator, length: float, steps: int, bend: float, jag: float):
    """A line of `length` pixels around (0, 0) whose direction drifts by `bend` and jumps by `jag`
    radians per step; (steps + 1, 2) points as (y, x)."""
    angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, steps))
    angle = angle + rng.normal(0, jag, steps)
    step = length / steps * rng.uniform(0.6, 1.4, steps)
    points = np.cumsum(np.stack([np.sin(angle), np.cos(angle)], 1) * step[:, None], axis=0)
    points = np.concatenate([np.zeros((1, 2)), points])
    return points - points.mean(axis=0)


def apply_on(picture: np.ndarray, painted: np.ndarray, place: tuple, surface: np.ndarray):
    """`picture` with the patch `painted` at `place`, only where `surface` is 1."""
    result = picture.copy()
    cover = surface[place][..., None]
    result[place] = picture[place] * (1 - cover) + painted * cover
    return result


def scratch(picture, labels, rng, colour=(0.95, 0.95, 0.93), length=(40, 130), strength=(0.3, 0.9)):
    """One to three parallel bent grooves of light `colour` with a dark edge."""
    at, surface = choose_surface(labels, rng, 6)
    length = rng.uniform(*length)
    place, dy, dx = window(at, length * 0.75 + 12, labels.shape)
    points = wander(rng, length, 12, 0.07, 0.0)
    patch, strength = picture[place], rng.uniform(*strength)
    for _ in range(rng.choice([1, 1, 2, 3])):
        shift = rng.normal(0, 3.5, 2)
        width = rng.uniform(0.9, 1.8)
        signed, share = path_distance(points + shift, dy, dx)
        taper = smoothstep(share * 6) * smoothstep((1 - share) * 4)
        rough = np.clip(0.75 + 0.35 * noise(rng, dy.shape, 5), 0, 1)
        core = np.exp(-((signed / width) ** 2)) * taper * rough
        edge = np.exp(-(((signed - 1.8 * width) / width) ** 2)) * taper * rough
        patch = patch * (1 - 0.45 * strength * edge[..., None])
        patch = blend(patch, colour, strength * core)
    return apply_on(picture, patch, place, surface)


def crack(picture, labels, rng, colour=(0.08, 0.07, 0.06), length=(45, 140), strength=(0.5, 0.95)):
    """A jagged dark line with up to two branches and a lit lower edge."""
    at, surface = choose_surface(labels, rng, 4)
    length = rng.uniform(*length)
    place, dy, dx = window(at, length * 0.9 + 8, labels.shape)
    trunk = wander(rng, length, 16, 0.12, 0.5)
    lines = [(trunk, rng.uniform(1.0, 2.2))]
    for _ in range(rng.integers(0, 3)):
        branch = wander(rng, length * rng.uniform(0.2, 0.45), 8, 0.1, 0.5)
        lines.append((branch - branch[0] + trunk[rng.integers(4, 13)], rng.uniform(0.7, 1.3)))
    patch, strength = picture[place], rng.uniform(*strength)
    for points, width in lines:
        signed, share = path_distance(points, dy, dx)
        width = width * (0.35 + 0.65 * smoothstep((1 - share) * 3)) * smoothstep(share * 8 + 0.3)
        core = np.exp(-((signed / width) ** 2))
        lit = np.exp(-(((signed + 2 * width) / width) ** 2))
        patch = patch * (1 + 0.22 * strength * lit[..., None])
        patch = blend(patch, colour, strength * core)
    return apply_on(picture, patch, place, surface)


def spot(picture, labels, rng, colours=((0.16, 0.1, 0.05),), radius=(7, 24), strength=(0.25, 0.85)):
    """An irregular stain with a darker rim, sometimes with satellites."""
    at, surface = choose_surface(labels, rng, 8)
    radius = np.exp(rng.uniform(*np.log(radius)))
    place, dy, dx = window(at, radius * 2.2, labels.shape)
    ragged = 0.22 * noise(rng, dy.shape, radius * 0.9) + 0.1 * noise(rng, dy.shape, radius * 0.3)
    distance = oval(rng, dy, dx, radius, 0.7) + ragged
    for _ in range(rng.integers(0, 3)):
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(1.1, 1.6) * radius
        small = np.hypot(dy - far * np.sin(angle), dx - far * np.cos(angle))
        distance = np.minimum(distance, small / (radius * rng.uniform(0.12, 0.3)))
    cover = smoothstep((1.06 - distance) / rng.uniform(0.12, 0.4))
    rim = 0.75 + 0.25 * np.exp(-(((distance - 0.85) / 0.15) ** 2))
    mottle = np.clip(0.9 + 0.12 * noise(rng, dy.shape, 6), 0, 1)
    colour = np.asarray(colours[rng.integers(len(colours))], dtype=np.float32)
    alpha = np.clip(rng.uniform(*strength) * cover * rim * mottle, 0, 1)
    # Half paint and half filter: the structure below shows through, as it does through a stain.
    patch = picture[place]
    patch = blend(patch, 0.5 * colour + 0.5 * patch * (0.25 + 0.9 * colour), alpha)
    return apply_on(picture, patch, place, surface)


def dent(picture, labels, rng, radius=(10, 26), strength=(0.25, 0.8)):
    """A hollow: shaded on the side of the lamp, lit on the other, slightly darker in the middle."""
    at, surface = choose_surface(labels, rng, 10)
    radius = rng.uniform(*radius)
    place, dy, dx = window(at, radius * 2, labels.shape)
    distance = oval(rng, dy, dx, radius, 0.55) + 0.08 * noise(rng, dy.shape, radius * 0.8)
    depth = -smoothstep(1.25 - distance)
    slope_y, slope_x = np.gradient(depth * radius)
    strength = rng.uniform(*strength)
    facing = -(slope_x * LIGHT[0] + slope_y * LIGHT[1])
    shade = 1 + strength * np.clip(0.75 * facing, -0.85, 0.9) + 0.25 * strength * depth
    return apply_on(picture, np.clip(picture[place] * shade[..., None], 0, 1), place, surface)


def chip(
    picture, labels, rng, colour=(0.5, 0.42, 0.36), radius=(8, 22), strength=(0.6, 1.0), on=()
):
    """A piece broken out: a ragged hollow of raw material, its walls lit from `LIGHT`."""
    at, surface = choose_surface(labels, rng, 4, on)
    radius = np.exp(rng.uniform(*np.log(radius)))
    place, dy, dx = window(at, radius * 2, labels.shape)
    smooth = oval(rng, dy, dx, radius, 0.5)
    ragged = 0.16 * noise(rng, dy.shape, radius * 0.5) + 0.05 * noise(rng, dy.shape, 4)
    distance = smooth + ragged
    depth = -smoothstep((1 - distance) / 0.35) + 0.06 * noise(rng, dy.shape, 5)
    slope_y, slope_x = np.gradient(depth * 6)
    light = 0.8 - 0.9 * (slope_x * LIGHT[0] + slope_y * LIGHT[1])
    raw = np.asarray(colour) * np.clip(light, 0.25, 1.5)[..., None]
    alpha = rng.uniform(*strength) * smoothstep((1 - distance) / 0.12)
    return apply_on(picture, np.clip(blend(picture[place], raw, alpha), 0, 1), place, surface)
