"""The result tables 2 to 14 of Zou et al. (ECCV 2022), every number as printed.

A CSV file per table: `table02.csv` to `table06.csv` have a row per pre-training, and columns that
are called "<data set> <protocol> <method> <level> <metric>"; `table07.csv` to `table14.csv` a row
per category of VisA, and columns "<weights> <metric>". `errata.csv` lists the numbers that
contradict others in the paper.
"""

import csv
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

from spd_fast.errors import InputError

BACKBONES = {  # by the name of the weights
    "supervised": "resnet50",
    "simsiam": "resnet50",
    "simsiam+spd": "resnet50",
    "moco": "resnet50",
    "moco+spd": "resnet50",
    "simclr": "resnet50",
    "simclr+spd": "resnet50",
    "supervised+spd": "resnet50",
    # of the ablations in table 5
    "simsiam+spd-eta0.5": "resnet50",
    "simsiam+spd-eta1.0": "resnet50",
    "simsiam+spd-cutpaste": "resnet50",
    "simsiam+spd-xent": "resnet50",
    "simsiam-wide": "wide_resnet50_2",
    "simsiam+spd-wide": "wide_resnet50_2",
    # of PatchCore, table 6
    "supervised-wide": "wide_resnet50_2",
    "supervised+spd-wide": "wide_resnet50_2",
}
TITLES = {
    "table2": "1-class, PaDiM",
    "table3": "2-class, high-shot",
    "table4": "2-class, 5 and 10 shots",
    "table5": "ablations: 1-class, PaDiM",
    "table6": "1-class, PatchCore",
    "table7": "classification by category, 1-class, PaDiM",
    "table8": "segmentation by category, 1-class, PaDiM",
    "table9": "classification by category, 2-class, high-shot",
    "table10": "segmentation by category, 2-class, high-shot",
    "table11": "classification by category, 5 shots",
    "table12": "classification by category, 10 shots",
    "table13": "segmentation by category, 5 shots",
    "table14": "segmentation by category, 10 shots",
}
TABLES = tuple(TITLES)
# What the tables by category measure; with the weights of a column they give the quantity.
BY_CATEGORY = {
    "table7": "visa 1cls padim image",
    "table8": "visa 1cls padim pixel",
    "table9": "visa 2cls_highshot classifier image",
    "table10": "visa 2cls_highshot unet pixel",
    "table11": "visa 5shot classifier image",
    "table12": "visa 10shot classifier image",
    "table13": "visa 5shot unet pixel",
    "table14": "visa 10shot unet pixel",
}
DATASETS = ("visa", "mvtec")
PRINTED = {  # the words of the tables' headings, and what their methods are called
    "visa": "VisA",
    "mvtec": "MVTec-AD",
    "1cls": "1-class",
    "2cls_highshot": "2-class, high-shot",
    "5shot": "5-shot",
    "10shot": "10-shot",
    "padim": "PaDiM",
    "patchcore": "PatchCore",
    "classifier": "ResNet classifier",
    "unet": "U-Net",
    "image": "Classification",
    "pixel": "Segmentation",
    "au_pr": "AU-PR",
    "au_roc": "AU-ROC",
    "simsiam": "SimSiam",
    "simsiam+spd": "SimSiam+SPD",
    "supervised": "Supervised",
    "supervised+spd": "Supervised+SPD",
}


class Quantity(NamedTuple):
    """What a number measures."""

    weights: str  # a key of BACKBONES
    dataset: str  # visa or mvtec
    protocol: str  # 1cls, 2cls_highshot, 5shot or 10shot
    method: str  # padim, patchcore, classifier or unet
    level: str  # image (the paper's classification) or pixel (its segmentation)
    metric: str  # au_pr or au_roc
    category: str | None  # the folder's name; None: the mean over all of the data set


@dataclass(frozen=True)
class Cell:
    """One number of a table, per cent."""

    quantity: Quantity
    printed: str  # such as "82.8 (+2.6)"
    value: float
    gap: float | None  # to the same pre-training without SPD
    expected: float | None  # what it must have been, where other numbers tell
    note: str  # how it contradicts others, "" if it does not


@dataclass(frozen=True)
class PaperRow:
    title: str
    section: str  # heading above it, "" if there is none
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class PaperTable:
    name: str
    title: str
    columns: tuple[tuple[str, ...], ...]  # of each column its headings, from the top
    rows: tuple[PaperRow, ...]


@lru_cache
def table(name: str) -> PaperTable:
    """The table "table2" to "table14".

    Raises:
        InputError: there is no such table.
    """
    if name not in TITLES:
        raise InputError(f"the paper's tables are {', '.join(TITLES)}; got {name!r}")
    number = int(name.removeprefix("table"))
    errata = {
        (line["row"], line["column"]): line
        for line in _read("errata.csv")
        if int(line["table"]) == number
    }
    lines = _read(f"table{number:02d}.csv")
    first = "category" if name in BY_CATEGORY else "weights"
    columns = [column for column in lines[0] if column not in (first, "title", "section")]
    rows = []
    for line in lines:
        cells = [
            _cell(
                _quantity(name, line[first], column),
                line[column],
                errata.get((line[first], column)),
            )
            for column in columns
        ]
        rows.append(PaperRow(line["title"], line.get("section", ""), tuple(cells)))
    headings = tuple(_headings(name, column) for column in columns)
    return PaperTable(name, TITLES[name], headings, tuple(rows))


def _read(name: str) -> list[dict[str, str]]:
    text = (files(__package__) / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _quantity(name: str, row: str, column: str) -> Quantity:
    if name not in BY_CATEGORY:
        return Quantity(row, *column.split(), None)
    weights, metric = column.split()
    return Quantity(weights, *BY_CATEGORY[name].split(), metric, None if row == "mean" else row)


def _headings(name: str, column: str) -> tuple[str, ...]:
    if name in BY_CATEGORY:
        return tuple(PRINTED[word] for word in column.split())
    dataset, protocol, _, level, metric = column.split()
    place = f"{PRINTED[dataset]}, {PRINTED[protocol]}"
    if name == "table4":  # as printed: what is done on top, and below it the shots
        return PRINTED[level], place, PRINTED[metric]
    return place, PRINTED[level], PRINTED[metric]


def _cell(quantity: Quantity, printed: str, erratum: dict | None) -> Cell:
    value, gap = re.fullmatch(r"([\d.]+)(?: \(([+-][\d.]+)\))?", printed).groups()
    expected = float(erratum["expected"]) if erratum and erratum["expected"] else None
    return Cell(
        quantity,
        printed,
        float(value),
        float(gap) if gap else None,
        expected,
        erratum["why"] if erratum else "",
    )
