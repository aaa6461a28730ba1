"""The paper's tables with our numbers beside the printed ones: as text, Markdown and CSV."""

import csv
import io
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spd_fast import bootstrap
from spd_fast.paper import PRINTED, Cell, PaperTable, Quantity
from spd_fast.results import difference, replicates

NO_VALUE = "–"


class Job(NamedTuple):
    """One evaluation, from which numbers of the tables come."""

    weights: str
    dataset: str
    protocol: str
    method: str

    @classmethod
    def of(cls, quantity: Quantity) -> "Job":
        return cls(*(getattr(quantity, field) for field in cls._fields))

    @property
    def name(self) -> str:
        """The same for all weights."""
        return f"{self.dataset}_{self.protocol}_{self.method}"

    @property
    def title(self) -> str:
        return ", ".join(self)

    @property
    def setting(self) -> str:
        """What all weights share, in words."""
        return ", ".join(PRINTED[word] for word in self[1:])


@dataclass(frozen=True)
class Ours:
    """What our run gives for a quantity; per cent."""

    value: float
    interval: tuple[float, float]  # 95 %, over the test images
    categories: int  # that it is the mean of
    backbone: str
    source: str  # of the weights: a file, "imagenet" or "random"
    std: float | None = None  # over the draws of a k-shot protocol
    gap: float | None = None  # to the same pre-training without SPD
    gap_interval: tuple[float, float] | None = None  # 95 %, paired


@dataclass(frozen=True)
class Compared:
    """A cell: what is printed, if it is, and what came out, if it did."""

    quantity: Quantity
    cell: Cell | None
    ours: Ours | None

    @property
    def paper(self) -> float | None:
        """Per cent: as printed, or as it must have been."""
        if self.cell is None:
            return None
        return self.cell.value if self.cell.expected is None else self.cell.expected

    @property
    def difference(self) -> float | None:
        if self.ours is None or self.paper is None:
            return None
        return self.ours.value - self.paper


@dataclass(frozen=True)
class Row:
    title: str
    section: str  # "" where the table has none
    cells: list[Compared]

    @property
    def done(self) -> bool:
        return any(cell.ours for cell in self.cells)


def compare(table: PaperTable, runs: dict[Job, dict]) -> list[Row]:
    """The rows of a table, and of a table by category those of categories that it does not have.

    Args:
        runs: what `evaluate` returned of each.
    """
    rows, base = [], ""
    for row in table.rows:
        added = row.title.startswith("+")  # as printed: "+SPD", below what it is added to
        base = base if added else row.title
        title = f"{base} {row.title}" if added else row.title
        cells = [_compared(cell.quantity, cell, runs) for cell in row.cells]
        rows.append(Row(title, row.section, cells))
    quantities = [cell.quantity for cell in rows[-1].cells]  # of the mean, in a table by category
    printed = {cell.quantity.category for row in rows for cell in row.cells}
    if printed == {None}:
        return rows
    own = {}
    for quantity in quantities:
        for found in runs.get(Job.of(quantity), {}).get("categories", ()):
            own.setdefault(found["name"], found["title"])
    extra = [
        Row(
            own[name],
            "Not in the paper",
            [_compared(q._replace(category=name), None, runs) for q in quantities],
        )
        for name in own
        if name not in printed
    ]
    return [*rows[:-1], *extra, rows[-1]]


def _compared(quantity: Quantity, cell: Cell | None, runs: dict[Job, dict]) -> Compared:
    job = Job.of(quantity)
    ours = None
    if job in runs:
        base = runs.get(job._replace(weights=without_spd(job.weights)))
        ours = _ours(quantity, runs[job], base if base is not runs[job] else None)
    return Compared(quantity, cell, ours)


def without_spd(weights: str) -> str:
    """The name of the same pre-training without SPD; the kind of backbone stays."""
    return re.sub(r"\+spd(-(?!wide)[^-]+)?", "", weights)


def _ours(quantity: Quantity, run: dict, base: dict | None) -> Ours | None:
    found = _categories(quantity, run)
    if not found:
        return None
    kind = (quantity.level, quantity.metric)
    values = [category[quantity.level][quantity.metric] for category in found.values()]
    ours = dict(
        value=100 * float(np.mean(values)),
        interval=_percent(bootstrap.interval(replicates(run, *kind, found))),
        categories=len(found),
        backbone=run["config"]["backbone"],
        source=run["config"]["weights"],
    )
    if all("draws" in category for category in found.values()):
        draws = [
            [draw[quantity.level][quantity.metric] for draw in category["draws"]]
            for category in found.values()
        ]
        ours["std"] = 100 * float(np.std(np.mean(draws, axis=0), ddof=1))
    apart = difference(run, base, *kind, found) if base else None
    if apart:
        ours |= {"gap": 100 * apart.value, "gap_interval": _percent((apart.low, apart.high))}
    return Ours(**ours)


def _categories(quantity: Quantity, run: dict) -> dict[str, dict]:
    """The categories of a run that a quantity is the mean of."""
    return {
        found["name"]: found
        for found in run["categories"]
        if quantity.category in (None, found["name"]) and found[quantity.level]
    }


def _percent(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    return 100 * low, 100 * high


# --------------------------------------------------------------------------------------------------
# As text


def signed(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:+.1f}"


def plain(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.1f}"


def printed(cell: Compared) -> str:
    """The paper's number, with a star where it contradicts others on its page."""
    if cell.cell is None:
        return NO_VALUE
    text = cell.cell.printed.split()[0]
    return f"{text}*" if cell.cell.note else text


def notes(rows: list[Row]) -> list[str]:
    """What the stars mean."""
    found = []
    for row in rows:
        for cell in row.cells:
            if cell.cell and cell.cell.note:
                found.append(f"* {row.title}, printed {cell.cell.printed}: {cell.cell.note}")
    return found


def as_text(table: PaperTable, rows: list[Row]) -> str:
    """For a terminal: of each row the paper's numbers, ours and the difference."""
    width = max(len(row.title) for row in rows) + 12
    lines = [f"{table.name}: {table.title} (per cent)"]
    for level in range(len(table.columns[0])):
        titles = [column[level] for column in table.columns]
        shown = [
            "" if i and titles[i - 1] == t and level < len(table.columns[0]) - 1 else t
            for i, t in enumerate(titles)
        ]
        lines.append(" " * width + _across(shown))
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines += [f"{section}:"] if section else []
        kinds = {}
        if any(cell.cell for cell in row.cells):
            kinds["paper"] = [printed(cell) for cell in row.cells]
        if row.done:
            kinds["ours"] = [plain(cell.ours and cell.ours.value) for cell in row.cells]
            if any(cell.ours and cell.ours.std is not None for cell in row.cells):
                kinds["std"] = [plain(cell.ours and cell.ours.std) for cell in row.cells]
            if "paper" in kinds:
                kinds["difference"] = [signed(cell.difference) for cell in row.cells]
        gaps = [cell.cell and cell.cell.gap for cell in row.cells]
        if any(gap is not None for gap in gaps):
            kinds["SPD, paper"] = [signed(gap) for gap in gaps]
        if any(cell.ours and cell.ours.gap is not None for cell in row.cells):
            kinds["SPD, ours"] = [signed(cell.ours and cell.ours.gap) for cell in row.cells]
        for number, (kind, texts) in enumerate(kinds.items()):
            title = "" if number else row.title
            lines.append((f"{title:<{width - 11}}{kind:<11}" + _across(texts)).rstrip())
    return "\n".join([*lines, *notes(rows)])


def _across(texts: list[str], width: int = 9) -> str:
    """Columns of one width; a longer title runs on over the empty ones after it."""
    line = ""
    for i, text in enumerate(texts):
        free = width
        for other in texts[i + 1 :]:
            if other:
                break
            free += width
        if text:
            line = line.ljust(width * i) + f"{text[: free - 1]:>{width - 1}} "
    return line.rstrip()


def as_markdown(table: PaperTable, rows: list[Row], warnings: list[str]) -> str:
    """One row per row of the table; a cell is "paper / ours / difference"."""
    titles = [" ".join(column) for column in table.columns]
    lines = [f"## {table.name}: {table.title}", ""]
    lines += ["Per cent: paper / ours / difference; in brackets what SPD adds.", ""]
    if warnings:
        lines += ["Not comparable with the paper:", "", *(f"- {text}" for text in warnings), ""]
    lines.append("| | " + " | ".join(titles) + " |")
    lines.append("|---|" + "---|" * len(titles))
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines += [f"| *{section}* |" + " |" * len(titles)] if section else []
        cells = [_markdown_cell(cell) for cell in row.cells]
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    stars = [f"- {note.replace('*', chr(92) + '*', 1)}" for note in notes(rows)]
    return "\n".join([*lines, "", *stars]).rstrip() + "\n"


def _markdown_cell(cell: Compared) -> str:
    paper = printed(cell).replace("*", "\\*")
    if cell.cell and cell.cell.gap is not None:
        paper += f" ({signed(cell.cell.gap)})"
    if cell.ours is None:
        return paper
    ours = plain(cell.ours.value)
    if cell.ours.std is not None:
        ours += f" ± {cell.ours.std:.1f}"
    if cell.ours.gap is not None:
        low, high = cell.ours.gap_interval
        ours += f" ({cell.ours.gap:+.1f}, 95 %: {low:+.1f} to {high:+.1f})"
    return f"{paper} / **{ours}** / {signed(cell.difference)}"


COLUMNS = (
    *("row", "section", *Quantity._fields, "printed", "paper", "expected", "paper_gap", "note"),
    *("ours", "difference", "low", "high", "std", "gap", "gap_low", "gap_high", "categories"),
    *("backbone", "source"),
)


def as_csv(table: PaperTable, rows: list[Row]) -> str:
    """One line per number, per cent: what it measures, the paper's and ours, with the 95 % interval
    over the test images (low, high), and the gap to the same weights without SPD."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for cell in row.cells:
            line = {"row": row.title, "section": row.section} | cell.quantity._asdict()
            line["category"] = cell.quantity.category or "mean"
            if cell.cell:
                line |= {"printed": cell.cell.printed, "paper": cell.cell.value}
                line |= {"expected": cell.cell.expected, "paper_gap": cell.cell.gap}
                line |= {"note": cell.cell.note}
            if cell.ours:
                line |= _csv_numbers(cell)
            writer.writerow(line)
    return text.getvalue()


def _csv_numbers(cell: Compared) -> dict:
    ours = cell.ours
    numbers = {"ours": ours.value, "difference": cell.difference, "std": ours.std, "gap": ours.gap}
    for name, interval in (("", ours.interval), ("gap_", ours.gap_interval)):
        low, high = interval or (None, None)
        numbers |= {f"{name}low": low, f"{name}high": high}
    shown = {name: "" if value is None else f"{value:.3f}" for name, value in numbers.items()}
    return shown | {name: getattr(ours, name) for name in ("categories", "backbone", "source")}
