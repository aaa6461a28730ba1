"""VisA in the layout that its preparation script writes; `mvtec.py` shows and reads it."""

import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from spd_fast.datasets import PROTOCOLS, Category, read_dataset
from spd_fast.datasets.images import read_mask, read_mask_values, read_size
from spd_fast.datasets.visa import object_names
from spd_fast.errors import InputError
from spd_fast.files import link_or_copy, make_output_dir, refuse_inside
from spd_fast.threads import in_threads


class File(NamedTuple):
    """One file to write."""

    name: str  # under the category's folder, with forward slashes
    source: Path
    image: Path | None = None  # of a mask: the image that it belongs to


def prepare_visa(
    data: str | Path,
    out: str | Path,
    protocols: Iterable[str] = PROTOCOLS,
    link: bool = True,
    workers: int = 4,
) -> dict[str, int | bool]:
    """Write VisA as its preparation script does: out/<protocol>/<object>/...

    Images keep their names and bytes. Masks keep their names and are 0 and 255. A category appears
    when it is complete. One that is there already is compared with the data set, contents
    included, and left as it is. Before anything is written, this is done and all files are looked
    for; masks are read when their turn comes.

    Args:
        data: VisA as published. Without split files, splits are drawn.
        out: directory to write in, not in the data set.
        protocols: some of `PROTOCOLS`.
        link: images are hard links where the file system has them, which take no space and share
            their bytes with the data set; otherwise copies.
        workers: threads that read and write.

    Returns:
        Numbers of categories `written` and `kept`, of `images` and `masks` in both, and whether the
        splits were `drawn`.

    Raises:
        InputError: as `read_dataset`; `data` has another layout; a file is missing, or two would
            have the same name; a mask or its image cannot be read, or their sizes differ; `out`
            is in the data set or not writable, or holds something else where a category belongs.
    """
    data, out = Path(data), Path(out)
    refuse_inside(out, data)
    if data.is_dir() and not object_names(data):
        raise InputError(f"{data} is not VisA as published: it holds no <object>/Data/Images")
    plan = {
        out / protocol / category.name: _files(category, protocol)
        for protocol in protocols
        for category in read_dataset(data, protocol)
    }
    done = [folder for folder in plan if folder.exists()]
    with tqdm(total=sum(map(len, plan.values())), desc="prepare", unit="file") as bar:
        for folder in done:
            _compare(folder, plan[folder], workers, bar)
        for folder in plan:
            if folder not in done:
                _write(folder, plan[folder], link, workers, bar)
    masks = sum(file.image is not None for files in plan.values() for file in files)
    return {
        "written": len(plan) - len(done),
        "kept": len(done),
        "images": sum(map(len, plan.values())) - masks,
        "masks": masks,
        "drawn": not (data / "split_csv").is_dir(),
    }


def _files(category: Category, protocol: str) -> list[File]:
    """What belongs in the folder of a category."""
    files: dict[str, File] = {}
    for part, samples in (("train", category.train), ("test", category.test)):
        truth = "ground_truth" if protocol == "1cls" else f"ground_truth/{part}"
        for sample in samples:
            folder = f"{part}/{'bad' if sample.label else 'good'}"
            wanted = [File(f"{folder}/{sample.image.name}", sample.image)]
            if sample.label:
                wanted.append(File(f"{truth}/bad/{sample.mask.name}", sample.mask, sample.image))
            for file in wanted:
                if not file.source.is_file():  # a link to nowhere
                    raise InputError(f"{file.source} is not a file")
                first = files.setdefault(file.name, file)
                if first.source != file.source:
                    raise InputError(
                        f"{first.source} and {file.source} would both be "
                        f"{protocol}/{category.name}/{file.name}"
                    )
    return list(files.values())


def _write(folder: Path, files: list[File], link: bool, workers: int, bar: tqdm) -> None:
    tree = make_output_dir(folder.parent)
    # In a hidden folder of `out`: beside the category, a reader would take it for one.
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix=".prepare.") as temporary:
        new = Path(temporary) / folder.name
        for parent in {(new / file.name).parent for file in files}:
            parent.mkdir(parents=True, exist_ok=True)
        for _ in in_threads(partial(_write_file, new, link), files, workers):
            bar.update()
        os.replace(new, folder)


def _write_file(folder: Path, link: bool, file: File) -> None:
    if file.image is not None:
        Image.fromarray(_mask(file)).save(folder / file.name, "PNG")
    elif link:
        # resolved, as a hard link to a symbolic link is one too, and may point elsewhere
        link_or_copy(file.source.resolve(), folder / file.name)
    else:
        shutil.copyfile(file.source, folder / file.name)


def _compare(folder: Path, files: list[File], workers: int, bar: tqdm) -> None:
    """Raises InputError if `folder` does not hold what would be written there."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    different = sorted(found ^ {file.name for file in files})
    if not different:
        for file, same in zip(files, in_threads(partial(_is_same, folder), files, workers)):
            bar.update()
            if not same:
                different.append(file.name)
                break
    if different:
        raise InputError(
            f"{folder} is in the way: {different[0]} is not as it would be written from this data "
            "set; delete the folder, or give another output directory"
        )


def _is_same(folder: Path, file: File) -> bool:
    path = folder / file.name
    if file.image is not None:
        return np.array_equal(read_mask_values(path), _mask(file))
    return path.samefile(file.source) or filecmp.cmp(path, file.source, shallow=False)


def _mask(file: File) -> np.ndarray:
    return read_mask(file.source, read_size(file.image)).astype(np.uint8) * 255
