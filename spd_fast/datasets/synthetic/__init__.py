"""A small synthetic inspection data set in the official VisA layout.

Six objects, at least one for each domain of VisA (paper section 4.1): a circuit board (complex
structure), gelatine capsules and coins (multiple instances), a biscuit, a cup of coffee and a brick
pavement (single instance). Board, capsules and biscuit are drawn; coins, brick and coffee are
photographs that come inside the scikit-image wheel (brick and coffee are CC0, coins has no known
copyright restrictions), shown in another pose and light in every image.

Every image is a pure function of (seed, category, normal or anomalous, index, size) for the same
versions of numpy, Pillow and scikit-image: it does not depend on how many are made.
"""

import csv
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image
from tqdm import tqdm

from spd_fast.datasets.synthetic.product import Product
from spd_fast.datasets.visa import SPLIT_COLUMNS, TRAIN_FRACTIONS, draw_split
from spd_fast.errors import InputError
from spd_fast.files import atomic_path, make_empty_dir

CATEGORIES = ("pcb", "gelcaps", "biscuit", "coins", "coffee", "brick")
VISIBLE = 6  # grey levels of 255: what a defect changes less than this is left as it was
HOLE = 0.002  # share of the image: smaller holes in a mask are filled
LEAST, MOST = 0.0006, 0.035  # share of the image that one defect may cover
ATTEMPTS = 30  # at a defect that is neither invisible nor far too large


@dataclass(frozen=True)
class Rendered:
    """One finished image, its twin without defects, and which pixels differ."""

    image: np.ndarray  # (height, width, 3) uint8
    clean: np.ndarray  # (height, width, 3) uint8, equal to `image` wherever `mask` is 0
    mask: np.ndarray  # (height, width) uint8: 0, or the class of the defect
    defects: tuple[str, ...]  # names of the defect classes in the image, () when normal


@lru_cache(maxsize=1)
def products() -> dict[str, Product]:
    """The categories by name.

    Raises:
        InputError: scikit-image is not installed.
    """
    if find_spec("skimage") is None:
        raise InputError(
            "the synthetic data set needs scikit-image, which is not installed: "
            "pip install 'spd-fast[demo]'"
        )
    from spd_fast.datasets.synthetic import board, drawn, photos

    return {
        "pcb": board.PCB,
        "gelcaps": drawn.GELCAPS,
        "biscuit": drawn.BISCUIT,
        "coins": photos.COINS,
        "coffee": photos.COFFEE,
        "brick": photos.BRICK,
    }


def defect_classes(category: str) -> list[str]:
    """Names of the defect classes of a category; the class index in a mask is the position + 1."""
    product = products()[category]
    return [*product.parts, *product.marks]


def camera(picture: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """What a camera sees: light, white balance, blur, noise. uint8 (height, width, 3)."""
    from skimage.filters import gaussian

    gain = np.float32(rng.uniform(0.93, 1.06) * (1 + rng.normal(0, 0.012, 3)))
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.07)
    planes = [Image.fromarray(np.ascontiguousarray(p)) for p in np.moveaxis(picture, 2, 0)]
    shot = np.stack([np.asarray(p.resize(size, Image.BICUBIC)) for p in planes], axis=2)
    y, x = np.linspace(-1, 1, size[1])[:, None], np.linspace(-1, 1, size[0])
    light = 1 + slope * (np.cos(angle) * x + np.sin(angle) * y) - 0.05 * (x * x + y * y)
    shot = shot * light[..., None].astype(np.float32) * gain
    shot = gaussian(shot, rng.uniform(0.3, 0.65), channel_axis=2)
    deviation = rng.uniform(0.8, 1.8) / 255 * np.sqrt(0.4 + 1.2 * np.clip(shot, 0, 1))
    shot = shot + deviation * rng.standard_normal(shot.shape, dtype=np.float32)
    return np.clip(np.rint(shot * 255), 0, 255).astype(np.uint8)


def changed_pixels(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where two shots differ visibly, small holes filled; bool (height, width)."""
    from skimage.measure import label
    from skimage.morphology import closing, disk

    levels = np.abs(after.astype(np.int16) - before).max(axis=2)
    changed = closing(levels >= VISIBLE, disk(1))
    holes = label(~changed, connectivity=1)
    return changed | (np.bincount(holes.ravel())[holes] <= HOLE * holes.size)


def choose_defects(product: Product, index: int, rng: np.random.Generator) -> list[int]:
    """Class indices of the defects of anomalous image `index`: the classes in turn, and in about
    one image of four a second one."""
    count = len(product.parts) + len(product.marks)
    chosen = [index % count]
    if rng.uniform() < 0.25:
        chosen.append((index + int(rng.integers(1, count))) % count)
    return sorted(chosen)  # parts are drawn before anything is painted on them


def render(
    category: str, anomaly: bool, index: int, seed: int = 0, size: tuple[int, int] = (320, 256)
) -> Rendered:
    """Render one image of a category; `size` is (width, height).

    A pure function of its arguments and of the versions of numpy, Pillow and scikit-image. In an
    anomalous image the mask holds the pixels that differ visibly from the twin without defects,
    small holes filled; all others are equal to it.

    Raises:
        InputError: scikit-image is not installed, or its photographs are not those expected.
        RuntimeError: no attempt gave a defect that is visible and not too large.
    """
    product = products()[category]
    key = [seed, crc32(category.encode()), int(anomaly), index]

    def take(picture):
        return camera(picture, size, np.random.default_rng([*key, 1]))

    def new_scene():
        return product.scene(np.random.default_rng([*key, 0]))

    sound, surfaces = product.draw(new_scene())
    clean = take(sound)
    if not anomaly:
        return Rendered(clean, clean, np.zeros(clean.shape[:2], np.uint8), ())

    functions = [*product.parts.values(), *product.marks.values()]
    chosen = choose_defects(product, index, np.random.default_rng([*key, 2]))
    for attempt in range(ATTEMPTS):
        scene, picture, labels, last = new_scene(), sound, surfaces, clean
        mask = np.zeros(clean.shape[:2], np.uint8)
        for k in chosen:
            rng = np.random.default_rng([*key, 3, attempt, k])
            if k < len(product.parts):
                functions[k](scene, rng)
                picture, labels = product.draw(scene)
            else:
                picture = functions[k](picture, labels, rng)
            before, last = last, take(picture)
            mask[changed_pixels(before, last)] = k + 1
        shares = [(mask == k + 1).mean() for k in chosen]
        if all(LEAST <= share <= MOST for share in shares):
            break
    else:
        raise RuntimeError(
            f"anomalous image {index} of {category}: no attempt of {ATTEMPTS} gave a visible "
            f"defect that is not too large (seed {seed}, size {size[0]} x {size[1]})"
        )
    image = np.where(mask[..., None] > 0, last, clean)
    names = defect_classes(category)
    return Rendered(image, clean, mask, tuple(names[k] for k in chosen))


def write_csv(path: Path, header: Iterable[str], rows: Iterable[list[str]], newline: str) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator=newline)
        writer.writerow(header)
        writer.writerows(rows)


def write_one(
    out: Path, category: str, anomaly: bool, index: int, seed: int, size: tuple
) -> dict[str, str]:
    """Render and write one image and its mask; its row of `image_anno.csv`."""
    made = render(category, anomaly, index, seed, size)
    stem = f"{index:03d}" if anomaly else f"{index:0{products()[category].digits}d}"
    image = f"{category}/Data/Images/{'Anomaly' if anomaly else 'Normal'}/{stem}.JPG"
    Image.fromarray(made.image).save(out / image, format="JPEG", quality=95)
    if not anomaly:
        return {"image": image, "label": "normal", "mask": ""}
    mask = f"{category}/Data/Masks/Anomaly/{stem}.png"
    Image.fromarray(made.mask).save(out / mask)
    return {"image": image, "label": ", ".join(made.defects), "mask": mask}


def write_tables(out: Path, rows: dict[str, list[dict[str, str]]]) -> None:
    """Write each category's `image_anno.csv`, then the split files."""
    for category, images in rows.items():
        table = [[r["image"], r["label"], r["mask"]] for r in images]
        write_csv(out / category / "image_anno.csv", ["image", "label", "mask"], table, "\n")
    (out / "split_csv").mkdir()
    for protocol in TRAIN_FRACTIONS:
        table = []
        for category, images in rows.items():
            normal, anomalous = (
                [r["image"] for r in images if (r["label"] == "normal") == is_normal]
                for is_normal in (True, False)
            )
            split = draw_split(category, normal, anomalous, protocol)
            table += [row[: len(SPLIT_COLUMNS)] for row in split]
        write_csv(out / "split_csv" / f"{protocol}.csv", SPLIT_COLUMNS, table, "\r\n")


def write_synthetic_visa(
    out: Path,
    seed: int = 0,
    size: tuple[int, int] = (320, 256),
    n_normal: int = 60,
    n_anomaly: int = 20,
    categories: Iterable[str] | None = None,
) -> None:
    """Write the data set under `out`, in the layout and with the split files of VisA.

    Per category `n_normal` normal and `n_anomaly` anomalous images of `size` (width, height)
    pixels, masks with class indices, `image_anno.csv`; then `split_csv/{1cls,2cls_highshot,
    2cls_fewshot}.csv` with the shares of section 4.2. The split files are written last, so a run
    that was interrupted leaves none. The same arguments give the same bytes with the same versions
    of numpy, Pillow and scikit-image.

    Everything is drawn on 640 x 512 pixels and resized: a larger `size` gives enlargements without
    more detail, another aspect ratio than 5:4 a stretched picture.

    Raises:
        InputError: scikit-image is missing or its photographs are not those expected, `out` is not
            empty or cannot be written, a category is unknown, a number is so small that a split
            would be empty, `size` is out of range, or `seed` is negative.
        RuntimeError: an image could not be given a defect that is visible and not too large.
    """
    categories = list(CATEGORIES if categories is None else dict.fromkeys(categories))
    _check_arguments(seed, size, n_normal, n_anomaly, categories)
    products()
    out = make_empty_dir(out)
    for category in categories:
        for folder in ("Images/Normal", "Images/Anomaly", "Masks/Anomaly"):
            (out / category / "Data" / folder).mkdir(parents=True)
    jobs = [
        (category, anomaly, index)
        for category in categories
        for anomaly, count in ((False, n_normal), (True, n_anomaly))
        for index in range(count)
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        made = pool.map(lambda job: write_one(out, *job, seed, tuple(size)), jobs)
        made = list(tqdm(made, total=len(jobs), desc="synthetic data", unit="image"))
    rows = {c: [r for r, job in zip(made, jobs, strict=True) if job[0] == c] for c in categories}
    write_tables(out, rows)


def _check_arguments(
    seed: int, size: tuple[int, int], n_normal: int, n_anomaly: int, categories: list[str]
) -> None:
    unknown = [c for c in categories if c not in CATEGORIES]
    if unknown or not categories:
        named = unknown[0] if unknown else "(none)"
        raise InputError(f"there is no synthetic category {named}: use {', '.join(CATEGORIES)}")
    if n_normal < 5 or n_anomaly < 3:
        raise InputError(
            f"{n_normal} normal and {n_anomaly} anomalous images per category leave a split empty: "
            "at least 5 and 3 are needed"
        )
    if min(size) < 64 or max(size) > 4096:
        raise InputError(f"image size {size[0]} x {size[1]}: each side must be 64 to 4096 pixels")
    if seed < 0:
        raise InputError(f"seed {seed}: it must not be negative")
