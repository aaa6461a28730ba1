"""The figures of the paper, from arrays: scatter plots of pre-trainings (figures 7 and 8), curves,
attention maps (figures 1d and 11), and segmentations (figure 12)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from spd_fast import sheet
from spd_fast.errors import InputError
from spd_fast.files import atomic_path
from spd_fast.report import CURVES, METRICS

# Okabe and Ito's, which colour-blind people tell apart, without the yellow, too pale for lines
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
TITLES = {"simsiam": "SimSiam", "moco": "MoCo", "simclr": "SimCLR", "supervised": "Supervised"}
SPD = "+spd"
POINT = {"name", "classification", "segmentation", "source"}
SOURCES = {"ours": "this code", "paper": "the paper"}
Arrays = Sequence[np.ndarray]


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write path.png and path.pdf. The same figure gives the same bytes: no date is written.

    Raises:
        InputError: the directory of `path` is missing or not writable.
    """
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        with atomic_path(f"{path}{suffix}") as temporary:
            figure.savefig(temporary, dpi=sheet.DPI, metadata=metadata)


def scatter(points: dict[str, list[dict]], metric: str, title: str = "") -> Figure:
    """Classification against segmentation of pre-trainings, one plot per data set.

    An arrow goes from each pre-training to the same with SPD. Ours are filled and bold.

    Args:
        points: by title of the data set. A point has "name", such as "simsiam" or "simsiam+spd",
            "classification" and "segmentation" in per cent, and "source", "ours" or "paper".
        metric: what is measured, for the axes' labels.
        title: above all plots.

    Raises:
        InputError: there is no point, one is not as above, or one comes twice.
    """
    if not any(points.values()):
        raise InputError("there is no point to plot, expected at least one")
    every = [point for some in points.values() for point in some]
    for point in every:
        if not POINT <= point.keys() or point["source"] not in SOURCES:
            kinds = " or ".join(SOURCES)
            raise InputError(f"a point has {', '.join(sorted(POINT))}, {kinds}; got {point}")
        if not np.isfinite([point["classification"], point["segmentation"]]).all():
            raise InputError(f"the point {point} is not finite")
    bases = dict.fromkeys(point["name"].removesuffix(SPD) for point in every)
    colours = {base: COLOURS[i % len(COLOURS)] for i, base in enumerate(bases)}
    width = 4.6 * len(points)
    figure = Figure(figsize=(width, 4.9), dpi=sheet.DPI)
    figure.subplots_adjust(0.75 / width, 0.2, 1 - 0.15 / width, 0.88, wspace=0.2)
    figure.suptitle(title, fontsize=12)
    all_axes = figure.subplots(1, len(points), squeeze=False)[0]
    for axes, (data_set, some) in zip(all_axes, points.items()):
        axes.set(title=data_set, xlabel=f"classification {metric}, per cent")
        axes.set(ylabel=f"segmentation {metric}, per cent")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        _plot_points(axes, some, colours)
    styles = {"without SPD": ("o", "k"), "with SPD": ("^", "k")}
    styles |= {SOURCES["ours"]: ("s", "k"), SOURCES["paper"]: ("s", "none")}
    keys = [Line2D([], [], linestyle="", color="k", label=text) for text in styles]
    for key, (marker, fill) in zip(keys, styles.values()):
        key.set(marker=marker, markerfacecolor=fill)
    columns = 2 if len(points) == 1 else 4
    figure.legend(handles=keys, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def _plot_points(axes, points: list[dict], colours: dict[str, str]) -> None:
    places = {(p["name"], p["source"]): (p["classification"], p["segmentation"]) for p in points}
    if len(places) < len(points):
        raise InputError("a point comes twice, expected one of each name and source")
    for (name, source), place in places.items():
        colour, marker = colours[name.removesuffix(SPD)], "^" if name.endswith(SPD) else "o"
        fill = colour if source == "ours" else "white"
        axes.plot(*place, marker, color=colour, markerfacecolor=fill, label=f"{name} {source}")
    axes.margins(0.2)
    axes.autoscale_view()  # now, as labels are placed in pixels
    taken, labels = [], []
    for (name, source), place in places.items():
        base = name.removesuffix(SPD)
        taken.append(_square(axes, place, 10))
        start = places.get((base, source))
        if name == base or start is None:
            text = TITLES.get(base, base) + SPD.upper() * (name != base)
            style = {"color": colours[base], "weight": "bold" if source == "ours" else "normal"}
            labels.append((place, text, style))
            continue
        ends = axes.transData.transform((start, place))
        head = np.hypot(*(ends[1] - ends[0])) > 30  # pixels: else there is no room for it
        arrow = {"arrowstyle": "->" if head else "-", "shrinkA": 0, "shrinkB": 5 * head}
        arrow["color"] = colours[base]
        axes.annotate("", place, start, arrowprops=arrow, zorder=1.5)
        taken += [_square(axes, point, 2) for point in np.linspace(start, place, 12)]
    for label in labels:
        taken += 3 * [_label(axes, *label, taken)]  # better over an arrow than over another text


def _square(axes, place: tuple, half: float) -> Bbox:
    x, y = axes.transData.transform(place)
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _label(axes, place: tuple, text: str, style: dict, taken: list[Bbox]) -> Bbox:
    """Write a text beside a point, where it covers the fewest of `taken`; its box."""
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    label = axes.annotate(text, place, (0, 0), textcoords="offset points", fontsize=9, **style)

    def put(distance: float, dx: int, dy: int) -> Bbox:
        label.set_position((distance * dx, distance * dy))
        label.set_ha(("right", "center", "left")[dx + 1])
        label.set_va(("top", "center", "bottom")[dy + 1])
        return label.get_window_extent(renderer).padded(4)

    def covered(spot: tuple) -> int:
        box = put(*spot)
        inside = all(axes.bbox.contains(*corner) for corner in (box.min, box.max))
        return box.count_overlaps(taken) + 9 * (not inside)

    sides = [(dx, dy) for dx in (1, -1, 0) for dy in (0, 1, -1) if dx or dy]
    return put(*min(((d, *side) for d in (7, 12, 18) for side in sides), key=covered))


def curves(kind: str, lines: Sequence[tuple], title: str = "") -> Figure:
    """The curves of several runs.

    Args:
        kind: "image_roc", "image_pr", "pixel_roc" or "pixel_pr", as in `results.json`.
        lines: (name, x, y, area in per cent) of each run; a precision-recall curve ends at
            (1, prevalence), as `spd_fast.metrics.curves` makes it.
        title: instead of the kind's.

    Raises:
        InputError: another kind, no line, or x and y that are not two lists of one length.
    """
    if kind not in CURVES:
        raise InputError(f"kind is one of {', '.join(CURVES)}; got {kind!r}")
    if not lines:
        raise InputError("there is no curve to plot, expected at least one")
    heading, x_label, y_label, area_name = CURVES[kind]
    figure = Figure(figsize=(4.8, 4.8), dpi=sheet.DPI, layout="constrained")
    axes = figure.subplots()
    for i, (name, x, y, area) in enumerate(lines):
        if np.ndim(x) != 1 or np.shape(x) != np.shape(y) or not len(x):
            shapes = f"{np.shape(x)} and {np.shape(y)}"
            raise InputError(f"{name}: x and y have shapes {shapes}, expected (N,) twice")
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        axes.plot(x, y, dash, color=colour, label=f"{name}  {area:.1f}")
    chance = (0, 1) if kind.endswith("roc") else (y[-1], y[-1])
    axes.plot((0, 1), chance, ":", color="0.5", linewidth=1, label="chance")
    axes.set(xlabel=x_label, ylabel=y_label, title=title or heading)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.grid(color="0.9")
    axes.legend(title=f"{METRICS[area_name]}, per cent", fontsize=9, title_fontsize=9, loc="best")
    return figure


# ------------------------------------------------------------------------------- sheets of images

SIDE = 300  # of a panel, in pixels of the PNG


def attention_sheet(
    normals: Arrays, images: Arrays, masks: Arrays, maps: dict[str, Arrays], titles=()
) -> Figure:
    """Normal images, defective ones with the defect outlined, and attention maps over these.

    Args:
        normals, images: (H, W, 3) uint8, one of each for every column.
        masks: (H, W) bool, the defects.
        maps: by title of the weights: (H, W) float in [0, 1] for each image.
        titles: of the columns, or none.

    Raises:
        InputError: not as many of one as of another, or a shape or a type is not as above.
    """
    parts = {"normals": normals, "titles": titles or images}
    photos, covered = _prepared(images, masks, parts, maps)
    sound, _ = _prepared(normals, masks, {}, {})
    defects = [
        sheet.outline(np.asarray(photo), region, sheet.TRUTH_COLOUR)
        for photo, region in zip(photos, covered)
    ]
    rows = [("normal", sound), ("anomalous, defect outlined", defects)]
    for name, planes in maps.items():
        rows.append((name, [sheet.heat_overlay(*pair, 0, 1) for pair in zip(photos, planes)]))
    return sheet.grid(rows, SIDE, titles)


def segmentation_sheet(
    images: Arrays, masks: Arrays, maps: dict[str, Arrays], categories: list[str], scales=None
) -> Figure:
    """Images, their ground truth, and heat maps.

    Scores of different weights or categories do not compare, so each pair has its own scale.

    Args:
        images: (H, W, 3) uint8, one for every column.
        masks: (H, W) bool, all False of a normal image.
        maps: by title of the weights: (H, W) float scores for each image.
        categories: of the images, the columns' titles.
        scales: scores of the darkest and the brightest colour by (weights, category); of a pair
            that is not there, the range of its maps.

    Raises:
        InputError: not as many of one as of another, or a shape or a type is not as above.
    """
    photos, truth = _prepared(images, masks, {"categories": categories}, maps)
    rows = [("image", photos), ("ground truth", truth)]
    for name, planes in maps.items():
        row = []
        for photo, plane, category in zip(photos, planes, categories):
            alike = [p for p, other in zip(planes, categories) if other == category]
            own = min(map(np.min, alike)), max(map(np.max, alike))
            lo, hi = (scales or {}).get((name, category), own)
            row.append(sheet.heat_overlay(photo, plane, lo, hi))
        rows.append((name, row))
    return sheet.grid(rows, SIDE, categories)


def _prepared(images: Arrays, masks: Arrays, parts: dict[str, Sequence], maps: dict[str, Arrays]):
    """Photos and which of their pixels are defective, after a check of all that is given."""
    if not len(images):
        raise InputError("there is no image to show, expected at least one")
    for name, part in ({"masks": masks} | parts | maps).items():
        if len(part) != len(images):
            raise InputError(f"{name}: {len(part)} given for {len(images)} images")
    for i, image in enumerate(images):
        for planes in [[None] * len(images), *maps.values()]:
            sheet.check_panel(image, planes[i], masks[i])
    photos = [sheet.resize_photo(image, SIDE) for image in images]
    return photos, [sheet.covered_pixels(photo, mask) for photo, mask in zip(photos, masks)]
