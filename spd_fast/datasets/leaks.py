"""Images that are in the training and in the test set of a category."""

from collections import defaultdict
from hashlib import sha256
from pathlib import Path

from spd_fast.datasets import Category
from spd_fast.errors import InputError


def find_leaks(category: Category) -> list[str]:
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
        for path in (sample.image for sample in samples):
            if path.exists():  # that it does not is said by who reads it
                by_size[path.stat().st_size][part].append(path)
    told = []
    for train, test in by_size.values():
        if not (train and test):
            continue
        known = defaultdict(list)
        for path in train:
            known[_digest(path)].append(path)
        for path in test:
            twins = known.get(_digest(path), ())
            for twin in twins:
                if path.name == twin.name or path.samefile(twin):
                    raise InputError(
                        f"{category.name} has test images in its training set: {path} is {twin}"
                    )
            if twins:
                told.append(f"test image {path} has the same bytes as training image {twins[0]}")
    return told


def _digest(path: Path) -> bytes:
    return sha256(path.read_bytes()).digest()
