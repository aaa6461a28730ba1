"""Images that are in the training and in the test set of a category."""

import os
from collections import defaultdict
from hashlib import sha256
from pathlib import Path

from spd_fast.datasets import Category
from spd_fast.errors import InputError


def refuse_leaks(category: Category) -> list[str]:
    """Refuse a category whose test set has images of its training set.

    An image is in both if it is one file, or if two files of one name have the same bytes. Two with
    the same bytes under different names may be in the data set as it was published: they are only
    told of. Files are read only where their sizes are equal.

    Returns:
        A sentence for each pair of the second kind.

    Raises:
        InputError: the first pair of the first kind.
    """
    by_size = defaultdict(lambda: ([], []))  # training and test images
    for part, samples in enumerate((category.train, category.test)):
        for sample in samples:
            by_size[os.stat(sample.image).st_size][part].append(sample.image)
    told = []
    for train, test in by_size.values():
        if not (train and test):
            continue
        known = {_digest(path): path for path in train}
        for path in test:
            twin = known.get(_digest(path))
            if twin is None:
                continue
            if path.name == twin.name or path.samefile(twin):
                raise InputError(
                    f"{category.name} has test images in its training set: {path} is {twin}"
                )
            told.append(f"test image {path} has the same bytes as training image {twin}")
    return told


def _digest(path: Path) -> bytes:
    return sha256(path.read_bytes()).digest()
