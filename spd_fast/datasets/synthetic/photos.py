"""Objects made from real photographs: coins on felt, a brick pavement and a cup of coffee.

The photographs come inside the scikit-image wheel (`spd_fast.datasets.photos`; coins: no known
copyright restrictions; brick and coffee: CC0). Each image shows one of them in another pose and
light. `*_scene`, `*_draw` and the structural defects work as in `drawn`.
"""

from functools import lru_cache, partial

import numpy as np
import skimage
from PIL import Image, ImageDraw
from skimage.filters import gaussian, sobel
from skimage.measure import label, regionprops
from skimage.segmentation import watershed

from spd_fast.datasets.photos import load_photograph
from spd_fast.datasets.synthetic.defects import (
    FRAME,
    blend,
    blur,
    chip,
    crack,
    noise,
    pick_sound,
    pose_matrix,
    random_pose,
    scratch,
    smoothstep,
    spot,
)
from spd_fast.datasets.synthetic.product import Product
from spd_fast.errors import InputError

WIDTH, HEIGHT = FRAME
EDGE = 48  # pixels around the frame, so that a turned picture has no empty corner


# ----------------------------------------------------------------------------------- coins

HALF = 72  # half the side of the square cut around one coin
N_COINS = 24  # in the photograph


@lru_cache(maxsize=1)
def cut_coins() -> tuple[list[dict], np.ndarray]:
    """The coins of the photograph, each with its soft outline, and the felt without them, on the
    frame enlarged by `EDGE`.

    Raises:
        InputError: the installed photograph, or scikit-image, gives another number of coins.
    """
    photo = load_photograph("coins.png")[..., 0]
    seeds = np.where(photo < 35, 1, np.where(photo > 150, 2, 0))
    coin = Image.fromarray((watershed(sobel(photo), seeds) == 2).astype(np.uint8) * 255)
    size = (round(photo.shape[1] * HEIGHT / photo.shape[0]), HEIGHT)
    large = np.asarray(Image.fromarray(photo).resize(size, Image.LANCZOS), dtype=np.float32) / 255
    solid = gaussian(np.asarray(coin.resize(size, Image.BICUBIC)) > 127, 3) > 0.5
    wide, around = np.pad(large, EDGE, mode="reflect"), np.pad(solid, EDGE, mode="reflect")

    coins = []
    for region in regionprops(label(solid)):
        if not 1500 < region.area_bbox < 20000:  # the border of the photograph, dust
            continue
        y, x = (round(c) + EDGE for c in region.centroid)
        top, left = region.bbox[0] + EDGE - y + HALF, region.bbox[1] + EDGE - x + HALF
        outline = np.zeros((2 * HALF, 2 * HALF), dtype=np.float32)
        hull = region.image_convex
        outline[top : top + hull.shape[0], left : left + hull.shape[1]] = hull
        cut = wide[y - HALF : y + HALF, x - HALF : x + HALF]
        coins.append({"x": x, "y": y, "picture": cut, "cover": gaussian(outline, 1.2)})
    if len(coins) != N_COINS:
        raise InputError(
            f"coins.png has {N_COINS} coins, but the installed scikit-image {skimage.__version__} "
            f"finds {len(coins)} in its own: install another version"
        )

    felt = ((blur(around, 6) < 0.02) & (wide > 0.13)).astype(np.float32)  # corners are black
    smooth = gaussian(wide * felt, 30) / (gaussian(felt, 30) + 1e-6)
    rng = np.random.default_rng(0)
    smooth = smooth + 0.014 * noise(rng, wide.shape, 2.5) + 0.006 * noise(rng, wide.shape, 9)
    weight = gaussian(felt, 3) ** 2
    return coins, (wide * weight + smooth * (1 - weight)).astype(np.float32)


def coins_scene(rng: np.random.Generator) -> dict:
    """Every coin slightly turned and shifted on its place, with its own tarnish."""
    places = [
        {
            "turn": rng.normal(0, 5), "dx": rng.normal(0, 1.6), "dy": rng.normal(0, 1.6),
            "gain": rng.normal(1, 0.035), "warm": rng.normal(0.035, 0.012), "shown": True,
        }
        for _ in range(N_COINS)
    ]  # fmt: skip
    return {
        "pose": random_pose(rng, 1.5, 0.015, 6),
        "places": places,
        "seed": int(rng.integers(2**31)),
    }


def coins_missing(scene: dict, rng: np.random.Generator) -> None:
    """One coin is not on its place."""
    pick_sound(scene["places"], rng).update(shown=False, fault=True)


def coins_misplaced(scene: dict, rng: np.random.Generator) -> None:
    """One coin lies beside its place, turned."""
    sound = [p for p in scene["places"] if "fault" not in p]
    place = sound[rng.integers(N_COINS - 1)]  # one may be missing; len(sound) would change images
    far, way = rng.uniform(8, 20), rng.uniform(0, 2 * np.pi)
    place["dx"] += far * np.cos(way)
    place["dy"] += far * np.sin(way)
    place["turn"] += rng.uniform(30, 330)
    place["fault"] = True


def coins_draw(scene: dict) -> tuple[np.ndarray, np.ndarray]:
    coins, felt = cut_coins()
    rng = np.random.default_rng(scene["seed"])
    cool = np.float32([0.97, 1.0, 1.04])
    canvas = felt[..., None] * cool
    numbers = np.zeros(felt.shape, dtype=np.uint8)
    for number, (coin, place) in enumerate(zip(coins, scene["places"], strict=True), 1):
        if not place["shown"]:
            continue
        x, y = round(coin["x"] + place["dx"]), round(coin["y"] + place["dy"])
        rows = slice(max(y - HALF, 0), min(y + HALF, felt.shape[0]))
        columns = slice(max(x - HALF, 0), min(x + HALF, felt.shape[1]))
        inner = (
            slice(rows.start - y + HALF, rows.stop - y + HALF),
            slice(columns.start - x + HALF, columns.stop - x + HALF),
        )
        shift = (coin["x"] + place["dx"] - x, coin["y"] + place["dy"] - y)
        turned = [
            Image.fromarray(layer).rotate(place["turn"], Image.BICUBIC, translate=shift)
            for layer in (coin["picture"], coin["cover"].astype(np.float32))
        ]
        picture, cover = (np.asarray(layer)[inner] for layer in turned)
        metal = picture[..., None] * place["gain"]
        metal = metal * (1 + np.float32([place["warm"], 0.2 * place["warm"], -1.6 * place["warm"]]))
        canvas[rows, columns] = blend(canvas[rows, columns], metal, np.clip(cover, 0, 1))
        numbers[rows, columns][cover > 0.9] = number
    canvas = np.clip(np.rint(canvas * 255), 0, 255).astype(np.uint8)
    picture = unit(pose_photo(canvas, scene["pose"]))
    picture = picture * (1 + 0.01 * noise(rng, (HEIGHT, WIDTH), 80)[..., None])
    labels = pose_photo(numbers, scene["pose"], Image.NEAREST)
    return np.clip(picture, 0, 1), labels


def pose_photo(canvas: np.ndarray, pose: dict, resample=Image.BICUBIC) -> np.ndarray:
    """The frame cut from the uint8 `canvas`, which is larger by `EDGE` on every side, in a pose."""
    matrix = pose_matrix(pose)
    matrix[:, 2] += EDGE
    image = Image.fromarray(canvas)
    return np.asarray(image.transform(FRAME, Image.AFFINE, tuple(matrix.ravel()), resample))


def unit(levels: np.ndarray) -> np.ndarray:
    """uint8 levels as float32 in [0, 1]."""
    return levels.astype(np.float32) / 255


COINS = Product(
    4,
    coins_scene,
    coins_draw,
    {"missing part": coins_missing, "misplaced part": coins_misplaced},
    {
        "scratch": partial(scratch, length=(30, 80), strength=(0.45, 1.0)),
        "spot": partial(spot, colours=((0.2, 0.42, 0.34), (0.3, 0.16, 0.08))),
    },
)


# -------------------------------------------------------------------------- brick, coffee

# Outlines on the photograph of the cup, in half pixels (x, y): what may carry a defect.
SAUCER, RIM, OPENING = (155, 142, 957, 776), (347, 37, 815, 415), (390, 64, 774, 384)
LIQUID = (404, 184, 744, 396)
BODY = [(350, 250), (356, 330), (400, 440), (470, 545), (570, 570), (660, 545), (740, 470),
        (790, 380), (812, 260)]  # fmt: skip
HANDLE = [(455, 440), (525, 480), (530, 570), (470, 622), (400, 610), (385, 560), (410, 490)]
SPOON = [(792, 135), (852, 135), (832, 250), (775, 470), (816, 520), (812, 600), (760, 655),
         (690, 650), (645, 590), (625, 490), (700, 470), (745, 460), (790, 330)]  # fmt: skip


def cut_window(photo: np.ndarray, box: tuple, resample=Image.BICUBIC) -> np.ndarray:
    """The window `box` (x0, y0, x1, y1) of a photograph enlarged to the frame, with `EDGE`."""
    x0, y0, x1, _ = box
    zoom = WIDTH / (x1 - x0)
    reach = round(EDGE / zoom) + 2
    padded = np.pad(photo, [(reach, reach)] * 2 + [(0, 0)] * (photo.ndim - 2), mode="reflect")
    size = (WIDTH + 2 * EDGE, HEIGHT + 2 * EDGE)
    left, top = x0 + reach - EDGE / zoom, y0 + reach - EDGE / zoom
    area = (left, top, left + size[0] / zoom, top + size[1] / zoom)
    return np.asarray(Image.fromarray(padded).resize(size, resample, area))


@lru_cache(maxsize=1)
def coffee_canvas() -> tuple[np.ndarray, np.ndarray]:
    """Picture and labels (1 saucer, 2 rim of the cup, 3 inner wall, 4 outer wall)."""
    photo = load_photograph("coffee.png")
    surfaces = Image.new("L", (2 * photo.shape[1], 2 * photo.shape[0]))
    draw = ImageDraw.Draw(surfaces)
    draw.ellipse(SAUCER, fill=1)
    draw.polygon(BODY, fill=4)
    draw.polygon(HANDLE, fill=0)
    draw.polygon(SPOON, fill=0)
    draw.ellipse(RIM, fill=2)
    draw.ellipse(OPENING, fill=3)
    draw.ellipse(LIQUID, fill=0)
    surfaces = np.asarray(surfaces)[::2, ::2]
    box = (48, 14, 508, 382)
    return cut_window(photo, box), cut_window(surfaces, box, Image.NEAREST)


def coffee_scene(rng: np.random.Generator) -> dict:
    return {
        "pose": random_pose(rng, 1.6, 0.02, 5),
        "seed": int(rng.integers(2**31)),
    }


def coffee_draw(scene: dict) -> tuple[np.ndarray, np.ndarray]:
    picture, labels = coffee_canvas()
    return unit(pose_photo(picture, scene["pose"])), pose_photo(
        labels, scene["pose"], Image.NEAREST
    )


COFFEE = Product(
    3,
    coffee_scene,
    coffee_draw,
    {},
    {
        "missing part": partial(chip, colour=(0.86, 0.72, 0.56), radius=(11, 28), on=(1, 2, 2)),
        "crack": partial(crack, colour=(0.16, 0.08, 0.05), length=(60, 160), strength=(0.6, 1.0)),
        "spot": partial(
            spot,
            colours=((0.22, 0.1, 0.03), (0.85, 0.8, 0.72)),
            radius=(10, 32),
            strength=(0.35, 0.95),
        ),
        "scratch": partial(
            scratch, colour=(0.95, 0.85, 0.78), length=(50, 160), strength=(0.4, 1.0)
        ),
    },
)


@lru_cache(maxsize=1)
def brick_photo() -> np.ndarray:
    """The grey photograph toned as fired clay with light joints."""
    grey = unit(load_photograph("brick.png")[..., :1])
    clay, mortar = grey * np.float32([1.5, 0.95, 0.78]), grey * np.float32([1.06, 1.0, 0.92])
    toned = blend(clay, mortar, smoothstep((grey[..., 0] - 0.4) / 0.2))
    return (np.clip(toned, 0, 1) * 255).astype(np.uint8)


def brick_scene(rng: np.random.Generator) -> dict:
    """A window of the pavement, 400 x 320 pixels of the photograph, near its middle."""
    return {
        "pose": random_pose(rng, 1.5, 0.03, 8),
        "window": (rng.integers(-6, 7, 2) + (56, 96)).tolist(),
        "fired": (rng.normal(0, 0.012, 3) + rng.normal(0, 0.02)).tolist(),
        "seed": int(rng.integers(2**31)),
    }


def brick_draw(scene: dict) -> tuple[np.ndarray, np.ndarray]:
    x, y = scene["window"]
    picture = unit(pose_photo(cut_window(brick_photo(), (x, y, x + 400, y + 320)), scene["pose"]))
    rng = np.random.default_rng(scene["seed"])
    damp = 1 + 0.02 * noise(rng, (HEIGHT, WIDTH), 120)[..., None] + np.float32(scene["fired"])
    return np.clip(picture * damp, 0, 1), np.ones((HEIGHT, WIDTH), dtype=np.uint8)


BRICK = Product(
    4,
    brick_scene,
    brick_draw,
    {},
    {
        "missing part": partial(chip, colour=(0.42, 0.27, 0.21), radius=(12, 30)),
        "crack": partial(crack, length=(60, 190)),
        "spot": partial(spot, colours=((0.9, 0.88, 0.84), (0.1, 0.09, 0.09))),
        "scratch": partial(scratch, colour=(0.85, 0.68, 0.58)),
    },
)
