"""The printed tables: checked against each other, and against cells that were typed again."""

import csv
import hashlib
import re
from pathlib import Path

import pytest

from spd_fast import InputError, paper
from spd_fast.datasets.visa import PAPER_NAMES
from spd_fast.reproduce_table import without_spd

ERRATA = {
    ("table2", "simclr+spd", "visa 1cls padim image au_pr"),
    ("table7", "simsiam+spd", "visa 1cls padim image au_pr"),
    ("table7", "supervised", "visa 1cls padim image au_roc"),
}
TYPED = {  # title of the row: its first and its last number
    "table2": {
        "Sup. pre-train": ("88.2", "94.4"),
        "Sup. pre-train+SPD": ("88.6 (+0.4)", "94.6 (+0.2)"),
    },
    "table3": {"MoCo": ("93.9", "98.0"), "SimCLR": ("93.4", "95.3")},
    "table4": {"SimSiam": ("51.9", "81.6"), "Sup. pre-train+SPD": ("59.8 (+0.6)", "81.8 (+0.0)")},
    "table5": {"+SPD w/ Xent": ("71.4", "82.6"), "SimSiam w/ WideRes50": ("80.3", "92.2")},
    "table6": {
        "Sup. pre-train": ("93.3", "97.6"),
        "Sup. pre-train+SPD": ("93.8 (+0.5)", "97.5 (-0.1)"),
    },
    "table7": {"PCB1": ("83.5", "92.7"), "Pipe fryum": ("89.9", "95.6"), "Mean": ("80.2", "87.8")},
    "table8": {"Macaroni2": ("0.3", "96.0"), "Fryum": ("11.6", "88.0")},
    "table9": {"PCB3": ("86.0", "99.9"), "Cashew": ("80.0", "99.7")},
    "table10": {"Candles": ("18.6", "98.3"), "Mean": ("53.8", "98.5")},
    "table11": {"Chewing gum": ("49.1", "87.5"), "PCB4": ("51.4", "95.9")},
    "table12": {"Capsules": ("50.2", "80.6"), "Fryum": ("98.4", "99.7")},
    "table13": {"PCB2": ("2.9", "64.7"), "Macaroni1": ("2.3", "86.4")},
    "table14": {"Cashew": ("32.0", "86.2"), "Mean": ("28.5", "81.8")},
}

DIGESTS = {  # SHA-256 of the files as they were compared, number by number, with the paper
    "errata.csv": "25db57491aac93e8",
    "table02.csv": "255828bb3a5d22c6",
    "table03.csv": "bcccf120287c47ad",
    "table04.csv": "726a7af2c06e3bd4",
    "table05.csv": "63c95e58032ea0c1",
    "table06.csv": "cc9960a430e076bc",
    "table07.csv": "2991892869bbd1c1",
    "table08.csv": "dc504afd0f11b20f",
    "table09.csv": "f4500ee545765629",
    "table10.csv": "50228e7ab12488d2",
    "table11.csv": "71270bd0b58afff1",
    "table12.csv": "2b0da00b914bbed7",
    "table13.csv": "035f3822e8d4acea",
    "table14.csv": "0f631d95a8c5da32",
}


def cells(name):
    return [cell for row in paper.table(name).rows for cell in row.cells]


def column(quantity) -> str:
    return " ".join(quantity[1:6])


@pytest.mark.parametrize("name", paper.TABLES)
def test_every_number_is_there_once(name):
    table = paper.table(name)
    shape = {2: (8, 8), 3: (8, 4), 4: (8, 8), 5: (8, 8), 6: (2, 8)}
    rows, columns = shape.get(int(name.removeprefix("table")), (13, 8))
    assert len(table.rows) == rows and len(table.columns) == columns
    assert all(len(row.cells) == columns for row in table.rows)
    found = [cell.quantity for cell in cells(name)]
    assert len(set(found)) == len(found) == rows * columns
    assert {q.weights for q in found} <= paper.BACKBONES.keys()
    if rows == 13:
        titles = {row.cells[0].quantity.category: row.title for row in table.rows}
        assert titles == {**PAPER_NAMES, None: "Mean"}
    for title, (first, last) in TYPED[name].items():
        (row,) = [row for row in table.rows if row.title == title]
        assert (row.cells[0].printed, row.cells[-1].printed) == (first, last)


def test_what_contradicts_is_what_the_errata_list():
    """Gaps are differences, means are means, and a number that is printed twice is the same."""
    wrong, listed = set(), set()
    first: dict = {}
    for name in paper.TABLES:
        by_quantity = {cell.quantity: cell for cell in cells(name)}
        for q, cell in by_quantity.items():
            key = (name, q.weights, column(q))
            if cell.note:
                listed.add(key)
                assert q.category is None
            if not re.fullmatch(r"\d+\.\d( \([+-]\d+\.\d\))?", cell.printed):
                wrong.add(key)
            if cell.gap is not None:
                base = by_quantity[q._replace(weights=without_spd(q.weights))]
                if abs(cell.value - base.value - cell.gap) > 0.101:
                    wrong.add(key)
            its = [c.value for r, c in by_quantity.items() if r._replace(category=None) == q]
            if len(its) == 13:
                mean = (sum(its) - cell.value) / 12
                if q.category is None and abs(mean - cell.value) > 0.1:
                    wrong.add(key)
            if first.setdefault(q, cell.value) != cell.value:
                wrong.add(key)
            if cell.expected is not None:
                assert cell.expected == first[q] != cell.value
    assert wrong == listed == ERRATA


def test_an_erratum_quotes_a_cell_of_its_table():
    text = Path(paper.__file__).with_name("errata.csv").read_text(encoding="utf-8")
    for line in csv.DictReader(text.splitlines()):
        noted = [cell for cell in cells(f"table{line['table']}") if cell.note == line["why"]]
        assert [cell.printed for cell in noted] == [line["printed"]]


def test_names_of_the_same_without_spd():
    assert {without_spd(name) for name in paper.BACKBONES} == {
        *("supervised", "simsiam", "moco", "simclr", "simsiam-wide", "supervised-wide")
    }
    for name in paper.BACKBONES:
        assert paper.BACKBONES[without_spd(name)] == paper.BACKBONES[name]


def test_headings_and_sections():
    assert paper.table("table4").columns[-1] == ("Segmentation", "VisA, 10-shot", "AU-ROC")
    assert paper.table("table9").columns[2] == ("SimSiam+SPD", "AU-PR")
    sections = [row.section for row in paper.table("table14").rows]
    assert sections == ["Complex structure"] * 4 + ["Multiple instances"] * 4 + [
        *["Single instance"] * 4,
        "",
    ]
    with pytest.raises(InputError, match="tables are table2, .*, table14; got 'table1'"):
        paper.table("table1")


@pytest.mark.parametrize("name", DIGESTS)
def test_no_number_has_been_touched(name):
    data = (Path(paper.__file__).parent / name).read_bytes()
    assert hashlib.sha256(data).hexdigest()[:16] == DIGESTS[name]


def test_headings_are_as_printed():
    tops = {name: list(dict.fromkeys(c[0] for c in paper.table(name).columns)) for name in TYPED}
    assert tops["table2"] == ["VisA, 1-class", "MVTec-AD, 1-class"]
    assert tops["table4"] == ["Classification", "Segmentation"]
    assert [c[1] for c in paper.table("table4").columns[::2]] == 2 * [
        "VisA, 5-shot",
        "VisA, 10-shot",
    ]
    assert tops["table7"] == ["SimSiam", "SimSiam+SPD", "Supervised", "Supervised+SPD"]
