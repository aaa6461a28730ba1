"""Scoring loose images with a saved detector: heat maps and a table of scores."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spd_fast.datasets.images import list_images, read_image
from spd_fast.errors import InputError
from spd_fast.files import atomic_path, make_output_dir, read_state
from spd_fast.models import pick_device
from spd_fast.padim import PaDiM
from spd_fast.patchcore import FORMAT as PATCHCORE
from spd_fast.patchcore import PatchCore
from spd_fast.preprocess import displayed_image, prepare_image
from spd_fast.sheet import example_sheet
from spd_fast.threads import in_threads
from spd_fast.twoclass import Classifier, TwoClass, UNet


def predict(
    model_path: str | Path,
    images: Iterable[str | Path],
    out: str | Path,
    device: str = "auto",
    workers: int = 4,
    skip_bad_images: bool = False,
) -> Path:
    """Score images and write `scores.csv` and one heat map per image into `out`.

    All heat maps share one colour scale, so that they can be compared with each other.

    Args:
        model_path: a file that `save` of a detector wrote.
        images: files, or directories whose images are all taken.
        out: output directory.

    Returns:
        The path of scores.csv: columns image, score, heat_map, best anomaly first.

    Raises:
        InputError: the model or an image cannot be read, or `out` cannot be written.
    """
    paths = _expand(images)
    model = load_detector(model_path, device)
    out = make_output_dir(out)
    preset = model.settings
    skipped = []

    def load(path: Path):
        try:
            return path, prepare_image(read_image(path), preset)
        except InputError as error:
            if not skip_bad_images:
                raise
            skipped.append(str(error))
            return path, None

    rows = []  # path, score, map
    with tqdm(total=len(paths), desc="score", unit="image") as progress:
        for path, image in in_threads(load, paths, workers):
            progress.update()
            if image is not None:
                maps, scores = model.score(image[None])
                score_map = maps[0].cpu().numpy().astype(np.float16)  # only to be looked at
                rows.append((path, float(scores[0]), score_map))
    if not rows:
        raise InputError(f"none of the {len(paths)} images could be read")
    scale = (
        float(min(np.quantile(row[2], 0.01) for row in rows)),
        float(max(row[2].max() for row in rows)),
    )
    table = []
    for number, (path, score, score_map) in enumerate(tqdm(rows, desc="draw", unit="image")):
        picture = displayed_image(prepare_image(read_image(path), preset))
        name = f"{number:04d}_{path.stem}.png"  # two directories may hold images of one name
        sheet = example_sheet(picture, score_map.astype(np.float32), None, scale=scale)
        with atomic_path(out / name) as temporary:
            sheet.save(temporary)
        table.append((str(path), score, name))
    with atomic_path(out / "scores.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "score", "heat_map"))
        for path, score, name in sorted(table, key=lambda row: -row[1]):
            writer.writerow((path, f"{score:.6g}", name))
    if skipped:
        print(f"skipped images: {len(skipped)} of {len(paths)}", *skipped, sep="\n  ")
    return out / "scores.csv"


def load_detector(path: str | Path, device: str = "auto") -> PaDiM | PatchCore | TwoClass:
    """The saved detector in `path`, whichever it is.

    Raises:
        InputError: the file is missing, or holds none.
    """
    state = read_state(path, "a saved detector", mmap=True)
    kinds = {PATCHCORE: PatchCore, Classifier.format: Classifier, UNet.format: UNet}
    held = state.get("format") if isinstance(state, dict) else None
    return kinds.get(held, PaDiM).load(path, pick_device(device))


def _expand(images: Iterable[str | Path]) -> list[Path]:
    paths = []
    for path in map(Path, images):
        found = list_images(path) if path.is_dir() else [path]
        if not found:
            raise InputError(f"there is no image in the directory {path}")
        paths += found
    if not paths:
        raise InputError("no image was given")
    return paths
