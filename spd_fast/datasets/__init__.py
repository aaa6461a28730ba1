"""Inspection data sets (VisA, MVTec-AD) as lists of samples, and folders of images."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from spd_fast.errors import InputError

# 2cls_fewshot is the pool of 20 % of the images from which the k-shot protocols draw.
PROTOCOLS = ("1cls", "2cls_highshot", "2cls_fewshot")
KINDS = ("normal", "anomalous")  # by label


@dataclass(frozen=True)
class Sample:
    """One image of an inspection data set."""

    image: Path
    label: int  # 0 normal, 1 anomalous
    mask: Path | None  # None: no anomalous pixel
    defect: str = ""  # defect type(s) where known, "" for normal


@dataclass(frozen=True)
class Category:
    """One product: its training and test images, each sorted by path."""

    name: str
    train: list[Sample]
    test: list[Sample]
    drawn: bool = False  # the split is ours, for want of the data set's own


def read_dataset(
    root: str | Path, protocol: str = "1cls", categories: Iterable[str] | None = None
) -> list[Category]:
    """Read the splits of a data set (paper section 4.2); no image is opened.

    The layout is found out: VisA as published, VisA as its preparation script reorganises it
    (`root` may hold the folders of several protocols, or be one of them), or MVTec-AD.

    Args:
        root: directory of the data set.
        protocol: one of `PROTOCOLS`; MVTec-AD has only "1cls".
        categories: names of those to read; default all.

    Returns:
        The categories, sorted by name.

    Raises:
        InputError: the directory has none of the layouts, a split file is malformed, a listed file
            or a mask is missing, a category is unknown, has no training or no test images, or lacks
            a label that the protocol needs.
    """
    # imported here because both need the classes above
    from spd_fast.datasets import mvtec, visa

    root = Path(root)
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol is one of {', '.join(PROTOCOLS)}; got {protocol!r}")
    if not root.is_dir():
        raise InputError(f"there is no directory {root}")
    if visa.object_names(root):
        dataset = visa.read_visa(root, protocol, categories)
    elif (tree := mvtec.find_tree(root, protocol)) is not None:
        dataset = mvtec.read_mvtec(tree, protocol, categories)
    else:
        raise InputError(
            f"{root} is not a data set that can be read: it holds neither <object>/Data/Images "
            "(VisA as published), nor <protocol>/<object>/train (VisA reorganised by its "
            "preparation script), nor <category>/train/good (MVTec-AD)"
        )
    for category in dataset:
        _check_labels(category, protocol)
    return dataset


def draw_shots(category: Category, k: int, run: int, seed: int = 0) -> Category:
    """The category with k normal and k anomalous training images (paper section 4.2).

    The paper's own draws were never published. These are a pure function of the seed, the names of
    category and images, k and `run`, the number of the draw: the same in every layout.

    Raises:
        InputError: there are fewer than k training images of a kind.
    """
    train = []
    for label, kind in enumerate(KINDS):
        images = [sample for sample in category.train if sample.label == label]
        if len(images) < k:
            raise InputError(
                f"category {category.name} has {len(images)} {kind} training images, too few to "
                f"draw {k}"
            )

        def order(sample: Sample, label=label) -> bytes:
            key = f"{seed}/{category.name}/{k}/{run}/{label}/{sample.image.stem}"
            return sha256(os.fsencode(key)).digest()

        train += sorted(sorted(images, key=order)[:k], key=lambda sample: sample.image)
    return replace(category, train=train)


def select_categories(known: Iterable[str], wanted: Iterable[str] | None, root: Path) -> list[str]:
    """`wanted` (default: all of `known`), sorted.

    Raises:
        InputError: one of them is not known.
    """
    known = sorted(known)
    wanted = list(wanted or known)
    for name in wanted:
        if name not in known:
            raise InputError(f"{root} has no category {name!r}; it has {', '.join(known)}")
    return sorted(set(wanted))


def _check_labels(category: Category, protocol: str) -> None:
    """Training and test images have the labels that the protocol says, no more and no fewer."""
    in_train = {0} if protocol == "1cls" else {0, 1}
    for part, samples, wanted in (
        ("train", category.train, in_train),
        ("test", category.test, {0, 1}),
    ):
        found = {sample.label for sample in samples}
        what = f"{protocol}: category {category.name} has"
        if not found:
            raise InputError(f"{what} no {part} image")
        for label in wanted - found:
            raise InputError(f"{what} no {KINDS[label]} {part} image")
        for label in found - wanted:
            raise InputError(f"{what} {KINDS[label]} {part} images, which must not be")
