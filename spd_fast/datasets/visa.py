"""The VisA data set in its published layout.

<object>/Data/Images/{Normal,Anomaly}/*.JPG
<object>/Data/Masks/Anomaly/*.png           class indices, 0 is background
<object>/image_anno.csv                     image,label,mask: defect types of every image
split_csv/<protocol>.csv                    object,split,label,image,mask
"""

import csv
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from spd_fast.datasets import Category, Sample, select_categories
from spd_fast.datasets.images import is_image_name
from spd_fast.errors import InputError

NORMAL, ANOMALY, MASKS = "Data/Images/Normal", "Data/Images/Anomaly", "Data/Masks/Anomaly"
SPLITS, LABELS = ("train", "test"), ("normal", "anomaly")
TRAIN_FRACTIONS = {  # of the normal and of the anomalous images (paper section 4.2)
    "1cls": (0.9, 0.0),
    "2cls_highshot": (0.6, 0.6),
    "2cls_fewshot": (0.2, 0.2),
}
SPLIT_SEED = 0  # of the splits drawn where a data set has no split files


class TableRow(NamedTuple):
    """One row of the paper's Table 1."""

    normal: int
    anomalous: int
    classes: int  # defect classes


TABLE_1 = {  # as printed, keyed by the name of the folder
    "candle": TableRow(1000, 100, 8),
    "capsules": TableRow(602, 100, 5),
    "cashew": TableRow(500, 100, 9),
    "chewinggum": TableRow(503, 100, 6),
    "fryum": TableRow(500, 100, 8),
    "macaroni1": TableRow(1000, 100, 7),
    "macaroni2": TableRow(1000, 100, 7),
    "pcb1": TableRow(1004, 100, 4),
    "pcb2": TableRow(1001, 100, 4),
    "pcb3": TableRow(1006, 100, 4),
    "pcb4": TableRow(1005, 100, 7),
    "pipe_fryum": TableRow(500, 100, 6),
}
# Where the data set's own README and class table disagree with Table 1.
OFFICIAL_CLASSES = {"pipe_fryum": 9}

PAPER_NAMES = {  # as printed in the paper's result tables
    "candle": "Candles",
    "capsules": "Capsules",
    "cashew": "Cashew",
    "chewinggum": "Chewing gum",
    "fryum": "Fryum",
    "macaroni1": "Macaroni1",
    "macaroni2": "Macaroni2",
    "pcb1": "PCB1",
    "pcb2": "PCB2",
    "pcb3": "PCB3",
    "pcb4": "PCB4",
    "pipe_fryum": "Pipe fryum",
}


class SplitRow(NamedTuple):
    """One image of a split; paths are relative to the data set, with forward slashes."""

    object: str
    split: str  # train or test
    label: str  # normal or anomaly
    image: str
    mask: str  # "" for normal images
    line: int = 0  # in the csv; 0: the split was drawn


SPLIT_COLUMNS = SplitRow._fields[:-1]  # of a split file: all but the line


def read_visa(root: Path, protocol: str, categories: Iterable[str] | None) -> list[Category]:
    """Read VisA with its split file, or without any split file with the paper's fractions.

    Raises:
        InputError: see `read_dataset`.
    """
    split_file = root / "split_csv" / f"{protocol}.csv"
    drawn = not split_file.parent.is_dir()
    if not drawn:
        rows = read_split_csv(split_file)
        names = select_categories({row.object for row in rows}, categories, root)
        rows = [row for row in rows if row.object in names]
    else:
        names = select_categories(object_names(root), categories, root)
        rows = [row for name in names for row in draw_split(*_object_images(root, name), protocol)]
    rows.sort(key=lambda row: row.image)  # the order in the csv is random
    _check_files(root, split_file, rows)
    return [
        _category(root, name, [row for row in rows if row.object == name], drawn) for name in names
    ]


def object_names(root: Path) -> list[str]:
    """Sorted names of the folders under `root` that have VisA's layout."""
    return sorted(path.name for path in root.iterdir() if (path / "Data" / "Images").is_dir())


def read_split_csv(path: str | Path) -> list[SplitRow]:
    """Read a split file, in its order; whether the listed files exist is not looked at.

    Raises:
        InputError: it is missing or malformed; the message names file, line and column.
    """
    rows = []
    lines = {}
    for line, row in _read_csv(path, SPLIT_COLUMNS):
        where = f"{path} line {line}"
        for column, allowed in (("split", SPLITS), ("label", LABELS)):
            if row[column] not in allowed:
                raise InputError(
                    f"{where}: column {column} is {row[column]!r}, expected {' or '.join(allowed)}"
                )
        for column in ("object", "image"):
            if not row[column]:
                raise InputError(f"{where}: column {column} is empty")
        if bool(row["mask"]) != (row["label"] == "anomaly"):
            raise InputError(
                f"{where}: column mask is {row['mask']!r}, expected a file for an anomaly and "
                "nothing for a normal image"
            )
        if row["image"] in lines:
            first = lines[row["image"]]
            raise InputError(f"{where}: image {row['image']} is already listed in line {first}")
        lines[row["image"]] = line
        rows.append(SplitRow(**row, line=line))
    if not rows:
        raise InputError(f"{path} lists no image")
    return rows


def read_defects(path: str | Path) -> dict[str, str]:
    """Read an `image_anno.csv`.

    Returns:
        Defect types, comma-separated, of each anomalous image; the key is the end of its path, such
        as "Anomaly/000.JPG".

    Raises:
        InputError: it is missing or malformed.
    """
    defects = {}
    for line, row in _read_csv(path, ("image", "label", "mask")):
        for column in ("image", "label"):
            if not row[column].strip():
                raise InputError(f"{path} line {line}: column {column} is empty")
        if row["label"] != "normal":
            defects[_key(row["image"])] = ", ".join(d.strip() for d in row["label"].split(","))
    return defects


def draw_split(
    name: str, normal: Iterable[str], anomalous: Iterable[str], protocol: str
) -> list[SplitRow]:
    """Split the images of an object by the paper's fractions (section 4.2).

    A pure function of the paths (which begin with the object's name) and a fixed seed. The training
    images of the few-shot pool are among those of the high-shot split, as in the official files.
    """
    rows = []
    for label, images, share in zip(LABELS, (normal, anomalous), TRAIN_FRACTIONS[protocol]):
        # a hash and not a random generator, whose stream may change between versions
        order = sorted(images, key=lambda i: sha256(os.fsencode(f"{SPLIT_SEED}/{i}")).digest())
        n_train = round(share * len(order))
        for position, image in enumerate(order):
            split = "train" if position < n_train else "test"
            mask = mask_path(name, image) if label == "anomaly" else ""
            rows.append(SplitRow(name, split, label, image, mask))
    return rows


def mask_path(name: str, image: str) -> str:
    """The mask that an anomalous image of the object `name` has."""
    return f"{name}/{MASKS}/{Path(image).stem}.png"


def file_names(folder: Path) -> set[str]:
    """Names in a folder; none when there is no such folder."""
    return set(os.listdir(folder)) if folder.is_dir() else set()


def missing_files(root: Path, paths: Iterable[str]) -> list[str]:
    """Those of the paths relative to `root` that do not exist; lists each folder once."""
    folders: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder not in folders:
            folders[folder] = file_names(root / folder)
        if name not in folders[folder]:
            missing.append(path)
    return missing


def _object_images(root: Path, name: str) -> tuple[str, list[str], list[str]]:
    """Name, normal and anomalous images (paths relative to `root`) of an object."""
    normal, anomalous = (
        [f"{name}/{part}/{file}" for file in file_names(root / name / part) if is_image_name(file)]
        for part in (NORMAL, ANOMALY)
    )
    return name, normal, anomalous


def _check_files(root: Path, split_file: Path, rows: list[SplitRow]) -> None:
    lines = {path: row.line for row in rows for path in (row.image, row.mask) if path}
    missing = missing_files(root, lines)
    if missing:
        line = lines[missing[0]]
        where = f"{split_file} line {line}" if line else f"{root}"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{where}: file {missing[0]} does not exist under {root}{more}")


def _category(root: Path, name: str, rows: list[SplitRow], drawn: bool) -> Category:
    annotation = root / name / "image_anno.csv"
    defects = read_defects(annotation) if annotation.exists() else {}
    parts: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    for row in rows:
        anomalous = row.label == "anomaly"
        mask = root / row.mask if anomalous else None
        defect = defects.get(_key(row.image), "") if anomalous else ""
        parts[row.split].append(Sample(root / row.image, int(anomalous), mask, defect))
    return Category(name, **parts, drawn=drawn)


def _key(image: str) -> str:
    """The last two parts of a path: what comes before may or may not begin with the object."""
    return "/".join(image.replace("\\", "/").split("/")[-2:])


def _read_csv(path: str | Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Line number and the given columns of every row."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            for column in columns:
                if column not in names:
                    raise InputError(
                        f"{path} line 1: there is no column {column}, expected {','.join(columns)}"
                    )
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"{path} line {reader.line_num}: expected {len(names)} columns as in line 1"
                    )
                rows.append((reader.line_num, {column: row[column] for column in columns}))
            return rows
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from error
