"""The paper's tables beside ours, figures included, as one HTML file."""

import base64
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from spd_fast import files
from spd_fast.info import versions
from spd_fast.paper import BACKBONES, PaperTable
from spd_fast.report import shown_setting, template
from spd_fast.reproduce_table import Compared, Row, notes, plain, printed, signed

TITLE = "The paper's tables, measured"
FIGURE_FILES = "figures"  # the folder of the figures, beside the page


def write_page(
    path: Path,
    config,
    warnings: list[str],
    compared: list,
    figures: list,
    reports: dict[str, str],
    failed: dict,
) -> None:
    """Write the page.

    Args:
        warnings: of `unlike_the_paper`.
        compared: (table, rows) of each table.
        figures: what `write_figures` returned; the files are in FIGURE_FILES beside `path`.
        reports: address by title of further pages.
        failed: reason by title of what failed.
    """
    page = template("reproduce.html.j2").render(
        title=TITLE,
        warnings=warnings,
        draws=any(
            c.ours and c.ours.std is not None for _, rows in compared for r in rows for c in r.cells
        ),
        tables=[_table(table, rows) for table, rows in compared],
        figures=[_figure(figure, path.parent) for figure in figures],
        reports=list(reports.items()),
        missing=_missing(config, compared, failed),
        settings=_settings(config),
    )
    files.write_text(path, page)


def _table(table: PaperTable, rows: list[Row]) -> dict:
    levels = [
        [(text, len(list(same))) for text, same in groupby(row)] for row in zip(*table.columns)
    ]
    shown, section = [], ""
    for row in rows:
        category = row.cells[0].quantity.category
        by_category = any(other.cells[0].quantity.category for other in rows)
        shown.append(
            {
                "title": row.title,
                "section": row.section if row.section != section else "",
                "mean": by_category and category is None,
                "category": category,
                "cells": [_cell(cell) for cell in row.cells],
            }
        )
        section = row.section
    return {
        "name": table.name,
        "short": f"Table {table.name.removeprefix('table')}",
        "title": table.title,
        "of": "Category" if by_category else "Pre-training",
        "levels": levels,
        "n_columns": len(table.columns),
        "rows": shown,
        "notes": [note.replace("*", "* ", 1) for note in notes(rows)],
    }


def _cell(cell: Compared) -> dict:
    ours, small = cell.ours, []
    text = plain(ours and ours.value)
    if ours:
        if ours.std is not None:
            text += f" ± {ours.std:.1f}"
        small.append("[{:.1f}, {:.1f}]".format(*ours.interval))
        if ours.gap is not None:
            low, high = ours.gap_interval
            small.append(f"SPD {ours.gap:+.1f} [{low:+.1f}, {high:+.1f}]")
    return {
        "paper": printed(cell),
        "gap": signed(cell.cell.gap) if cell.cell and cell.cell.gap is not None else "",
        "note": cell.cell.note if cell.cell else "",
        "ours": text,
        "small": small,
        "difference": signed(cell.difference),
    }


def _figure(figure, directory: Path) -> dict:
    data = (directory / FIGURE_FILES / f"{figure.name}.png").read_bytes()
    return {
        "source": "data:image/png;base64," + base64.b64encode(data).decode("ascii"),
        "alt": figure.alt,
        "title": figure.title,
        "category": figure.category,
        "files": [f"{FIGURE_FILES}/{figure.name}.{kind}" for kind in ("png", "pdf")],
    }


def _missing(config, compared: list, failed: dict) -> list[str]:
    """Which of the paper's numbers are not beside ours, and why."""
    found = [f"{title}: failed, {reason}" for title, reason in failed.items()]
    quantities = [cell.quantity for _, rows in compared for row in rows for cell in row.cells]
    for weights in dict.fromkeys(q.weights for q in quantities):
        if weights not in config.weights:
            found.append(f"{weights} ({BACKBONES[weights]}): no weights were given")
    for dataset in dict.fromkeys(q.dataset for q in quantities):
        if dataset not in config.data:
            found.append(f"{dataset}: no data set was given")
    return found


def _settings(config) -> list[tuple[str, str]]:
    given = {f"weights of {name}": source for name, source in config.weights.items()}
    given |= config.data | {"backbone": config.backbone or "the paper's"}
    fixed = ("data", "out", "protocol", "method", "backbone", "weights", "name")
    common = {k: v for k, v in asdict(config.settings).items() if k not in fixed}
    rows = given | common | versions()
    return [(name, shown_setting(value)) for name, value in rows.items()]
