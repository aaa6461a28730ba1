"""What a category of the synthetic data set consists of."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """How one category is made; the defect classes are numbered from 1, `parts` first.

    A class may be of either kind: in a photograph of one object, which has no parts that could be
    left out, a "missing part" is painted as a piece broken out.
    """

    digits: int  # zero padding of the file names of normal images, 3 or 4 as in VisA
    scene: Callable  # rng -> dict with every random choice of one image
    draw: Callable  # scene -> picture float32 (H, W, 3), surface labels uint8 (H, W)
    parts: dict[str, Callable]  # structural defects: (scene, rng) edits the scene
    marks: dict[str, Callable]  # painted defects: (picture, labels, rng) -> picture
