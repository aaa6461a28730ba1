"""Is a VisA tree complete? Compares it with the paper's Table 1 and with itself."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spd_fast.datasets import PROTOCOLS
from spd_fast.datasets.images import is_image_name, read_mask_values, read_size
from spd_fast.datasets.visa import (
    ANOMALY,
    MASKS,
    NORMAL,
    OFFICIAL_CLASSES,
    TABLE_1,
    SplitRow,
    TableRow,
    file_names,
    mask_path,
    missing_files,
    object_names,
    read_defects,
    read_split_csv,
)
from spd_fast.errors import InputError


@dataclass
class ObjectReport:
    """What was found of one object."""

    name: str
    expected: TableRow | None  # None: not one of VisA's 12 objects
    normal: int = 0  # images
    anomalous: int = 0  # images
    masks: int = 0
    classes: int = 0  # different defect classes in all masks
    problems: list[str] = field(default_factory=list)  # sentences without the object's name
    notes: list[str] = field(default_factory=list)  # worth knowing, but no fault

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def expected_classes(self) -> int:
        """Defect classes that an object of Table 1 has, its misprint corrected."""
        return OFFICIAL_CLASSES.get(self.name, self.expected.classes)


def check_visa(root: str | Path) -> list[ObjectReport]:
    """Compare a tree in VisA's published layout with Table 1 and check that it agrees with itself.

    Per object: the numbers of images and of defect classes; a mask of the right size, with an
    anomalous pixel, for each anomalous image and for no other; the same images on disk and in each
    split file, with the labels and masks that their folders say; where there is an annotation, the
    defects of each anomalous image and of no other. Reads all masks and the headers of their
    images; normal images only have to have some content. If any of VisA's 12 objects is there or
    listed, all 12 are expected.

    Returns:
        One report per object, sorted by name.

    Raises:
        InputError: `root` is not a directory or holds no object in this layout.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"there is no directory {root}")
    present = object_names(root)
    if not present:
        raise InputError(f"{root} is not VisA as published: it holds no <object>/Data/Images")
    splits, problems, notes = _read_splits(root)
    names = {*present, *(row.object for rows in splits.values() for row in rows)}
    if names & TABLE_1.keys():
        names |= TABLE_1.keys()
    reports = []
    for name in sorted(names):
        if name in present:
            report = _check_object(root, name, splits)
        else:
            report = ObjectReport(name, TABLE_1.get(name), problems=["the folder is missing"])
        report.problems[:0] = problems
        report.notes[:0] = notes
        reports.append(report)
    return reports


def format_check(reports: list[ObjectReport]) -> str:
    """A plain text table of the reports, then what is wrong, one sentence each."""
    lines = []
    if any(report.expected for report in reports):
        lines += [
            "Found/expected, where expected is Table 1 of the VisA paper, its misprint corrected",
            "",
        ]
    lines += [f"{'object':<14}{'normal':>12}{'anomalous':>12}{'masks':>8}{'classes':>9}"]
    for r in reports:
        normal, anomalous, classes = str(r.normal), str(r.anomalous), str(r.classes)
        if r.expected is not None:
            normal += f"/{r.expected.normal}"
            anomalous += f"/{r.expected.anomalous}"
            classes += f"/{r.expected_classes}"
        state = "ok" if r.ok else "PROBLEM"
        other = "" if r.expected is not None else ", not one of VisA's 12"
        lines.append(
            f"{r.name:<14}{normal:>12}{anomalous:>12}{r.masks:>8}{classes:>9}  {state}{other}"
        )
    for title, kind in (("Problems", "problems"), ("Notes", "notes")):
        sentences: dict[str, list[str]] = {}  # what concerns many objects is said once
        for report in reports:
            for sentence in getattr(report, kind):
                sentences.setdefault(sentence, []).append(report.name)
        if sentences:
            lines += ["", f"{title}:"]
        for sentence, names in sentences.items():
            who = "all objects" if len(names) == len(reports) > 1 else ", ".join(names)
            lines.append(f"- {who}: {sentence}")
    return "\n".join([*lines, "", _conclusion(reports)])


def _conclusion(reports: list[ObjectReport]) -> str:
    bad = sum(not report.ok for report in reports)
    if bad:
        return f"{bad} of {len(reports)} objects have problems."
    if not any(report.expected for report in reports):
        return "No fault found; none of the objects is one of VisA's 12, so Table 1 was not used."
    return "No fault found: all 12 objects of VisA are complete."


def _read_splits(root: Path) -> tuple[dict[str, list[SplitRow]], list[str], list[str]]:
    """Rows of each split file that can be read; problems and notes that concern every object."""
    folder = root / "split_csv"
    if not folder.is_dir():
        return {}, [], ["there is no split_csv: splits will be drawn, unlike the published ones"]
    splits, problems = {}, []
    for protocol in PROTOCOLS:
        try:
            splits[protocol] = read_split_csv(folder / f"{protocol}.csv")
        except InputError as error:
            problems.append(str(error))
    return splits, problems, []


def _check_object(root: Path, name: str, splits: dict[str, list[SplitRow]]) -> ObjectReport:
    normal, anomalous, masks = (
        {file for file in file_names(root / name / part) if is_image_name(file)}
        for part in (NORMAL, ANOMALY, MASKS)
    )
    report = ObjectReport(name, TABLE_1.get(name), len(normal), len(anomalous), len(masks))
    _check_masks(root / name, anomalous, masks, report)
    hollow = [file for file in normal if not _has_content(root / name / NORMAL / file)]
    if hollow:
        report.problems.append(f"normal images without content: {_some(hollow)}")
    on_disk = {f"{name}/{NORMAL}/{file}" for file in normal}
    on_disk |= {f"{name}/{ANOMALY}/{file}" for file in anomalous}
    for protocol, rows in splits.items():
        rows = [row for row in rows if row.object == name]
        listed = {path for row in rows for path in (row.image, row.mask) if path}
        faults = {
            "lists missing files:": missing_files(root, listed),
            "does not list": on_disk - listed,
            "labels images wrongly:": [row.image for row in rows if not _label_fits(row)],
            "gives images other masks:": [row.image for row in rows if not _mask_fits(row)],
        }
        report.problems += [
            f"{protocol}.csv {fault} {_some(names)}" for fault, names in faults.items() if names
        ]
    _check_annotation(root / name / "image_anno.csv", anomalous, report)
    _compare_with_table(report)
    return report


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:  # a link to nowhere
        return False


def _label_fits(row: SplitRow) -> bool:
    return (row.label == "anomaly") == row.image.startswith(f"{row.object}/{ANOMALY}/")


def _mask_fits(row: SplitRow) -> bool:
    return row.mask == (mask_path(row.object, row.image) if row.label == "anomaly" else "")


def _check_masks(folder: Path, images: set[str], masks: set[str], report: ObjectReport) -> None:
    """Masks against anomalous images by name, then the contents of those that have both."""
    mask_of = {image: os.path.splitext(image)[0] + ".png" for image in sorted(images)}
    pairs = [
        (folder / ANOMALY / image, folder / MASKS / mask)
        for image, mask in mask_of.items()
        if mask in masks
    ]
    faults: dict[str, list[str]] = {
        "anomalous images without a mask": [i for i, mask in mask_of.items() if mask not in masks],
        "masks without an anomalous image": sorted(masks - set(mask_of.values())),
    }
    classes: set[int] = set()
    with ThreadPoolExecutor() as pool:
        for found, fault, detail in tqdm(
            pool.map(_check_mask, pairs), report.name, len(pairs), unit="mask"
        ):
            classes |= found
            if fault:
                faults.setdefault(fault, []).append(detail)
    report.classes = len(classes)
    report.problems += [f"{fault}: {_some(names)}" for fault, names in faults.items() if names]


def _check_mask(pair: tuple[Path, Path]) -> tuple[set[int], str, str]:
    """Defect classes in the mask of an (image, mask) pair; a fault, if any, and where it is."""
    image, mask = pair
    try:
        values, size = read_mask_values(mask), read_size(image)
    except InputError as error:
        return set(), "unreadable files", str(error)
    classes = set(np.unique(values[values > 0]).tolist())
    if values.shape != size:
        sizes = f"{mask.name} ({_by(values.shape)}, image {_by(size)})"
        return classes, "masks of another size than their image", sizes
    return classes, "" if classes else "masks without an anomalous pixel", mask.name


def _check_annotation(path: Path, anomalous: set[str], report: ObjectReport) -> None:
    if not path.exists():
        report.notes.append("there is no image_anno.csv, so defect types have no names")
        return
    try:
        named = read_defects(path).keys()
    except InputError as error:
        report.problems.append(str(error))
        return
    images = {f"Anomaly/{file}" for file in anomalous}
    if images - named:
        report.problems.append(f"{path.name} does not name the defects of {_some(images - named)}")
    if named - images:
        report.problems.append(
            f"{path.name} names defects of other images: {_some(named - images)}"
        )


def _compare_with_table(report: ObjectReport) -> None:
    if report.expected is None:
        return
    for what, found, printed in (
        ("normal images", report.normal, report.expected.normal),
        ("anomalous images", report.anomalous, report.expected.anomalous),
    ):
        if found != printed:
            report.problems.append(f"{what}: {found}, Table 1 has {printed}")
    printed, official = report.expected.classes, report.expected_classes
    if report.classes not in (printed, official):
        report.problems.append(
            f"defect classes in the masks: {report.classes}, expected {official}"
        )
    if official != printed:
        report.notes.append(
            f"Table 1 prints {printed} defect classes, a misprint: the data set's README and class "
            f"table have {official}; either number is accepted"
        )


def _by(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
