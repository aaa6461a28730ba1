"""Real photographs that come inside the scikit-image and scikit-learn wheels; nothing is fetched.

Licences, as stated by scikit-image for its data: astronaut (NASA), rocket (SpaceX) and
hubble_deep_field (NASA) are in the public domain; brick, grass, gravel, chelsea, coffee and retina
are CC0; coins (Brooklyn Museum) and ihc have no known copyright restrictions. china (Daniel
Buechele) and flower (vultilion) of scikit-learn are CC BY 2.0.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from spd_fast.errors import InputError
from spd_fast.files import make_empty_dir

SKIMAGE_PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SKLEARN_PHOTOGRAPHS = ("china.jpg", "flower.jpg")


def photograph_path(name: str) -> Path:
    """Where the photograph `name` (a file name of the two lists above) is installed.

    Raises:
        InputError: scikit-image or scikit-learn, whichever has it, is not installed, or this
            version does not contain the file.
    """
    package, folder = (
        ("sklearn", "datasets/images") if name in SKLEARN_PHOTOGRAPHS else ("skimage", "data")
    )
    spec = find_spec(package)
    if spec is None:
        raise InputError(
            f"{name} needs {package}, which is not installed: pip install 'spd-fast[demo]'"
        )
    path = Path(spec.origin).parent / folder / name
    if not path.is_file():
        raise InputError(f"{path} is missing: this version of {package} does not contain {name}")
    return path


def load_photograph(name: str) -> np.ndarray:
    """The photograph as uint8 (H, W, 3); grey ones have three equal planes."""
    with Image.open(photograph_path(name)) as image:
        return np.asarray(image.convert("RGB"))


def random_crop(photo: np.ndarray, rng: np.random.Generator, size: int) -> Image.Image:
    """A rectangle from a random place, stretched to a square of `size`, half of them mirrored; the
    colours are untouched. Its area is 20 to 100 % of that of the largest square in the photograph
    (less where it would not fit), its aspect 3/4 to 4/3."""
    height, width = photo.shape[:2]
    area = rng.uniform(0.2, 1.0) * min(height, width) ** 2
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w = int(min(round(np.sqrt(area * aspect)), width))
    h = int(min(round(np.sqrt(area / aspect)), height))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    crop = Image.fromarray(np.ascontiguousarray(photo[y : y + h, x : x + w]))
    crop = crop.resize((size, size), Image.BICUBIC)
    return crop.transpose(Image.FLIP_LEFT_RIGHT) if rng.uniform() < 0.5 else crop


def write_photographs(out: Path, count: int = 200, seed: int = 0, size: int = 224) -> None:
    """Write a small ImageNet-style folder, `out/<photograph>/0000.jpg`, of crops of photographs.

    Real material for a pre-training that only has to show that it works: `count` square crops of
    `size` pixels, spread evenly over the photographs of the installed scikit-image and, where it
    can be imported, scikit-learn. Crop i is the same whatever `count` is, as long as the same
    versions of these packages, numpy and Pillow are installed.

    Raises:
        InputError: scikit-image is missing, `out` is not empty or cannot be written, `count` or
            `size` is too small, or `seed` is negative.
    """
    names = SKIMAGE_PHOTOGRAPHS + (SKLEARN_PHOTOGRAPHS if find_spec("sklearn") else ())
    if count < 1 or size < 8:
        raise InputError(f"cannot write {count} photographs of {size} pixels: at least 1 of 8")
    if seed < 0:
        raise InputError(f"seed {seed}: it must not be negative")
    photos = [load_photograph(name) for name in names]
    out = make_empty_dir(out)
    for index in tqdm(range(count), desc="photographs", unit="image"):
        number, k = divmod(index, len(names))
        folder = out / Path(names[k]).stem
        folder.mkdir(exist_ok=True)
        crop = random_crop(photos[k], np.random.default_rng([seed, k, number]), size)
        crop.save(folder / f"{number:04d}.jpg", quality=92)
