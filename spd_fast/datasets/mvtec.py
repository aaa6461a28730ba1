"""MVTec-AD, and VisA as its preparation script reorganises it.

    MVTec-AD             <category>/train/good  test/<defect>       ground_truth/<defect>/*_mask.png
    VisA, 1cls           1cls/<object>/train/good  test/{good,bad}  ground_truth/bad/*.png
    VisA, two classes    2cls_highshot/<object>/{train,test}/{good,bad}
                                                        ground_truth/{train,test}/bad/*.png

anomalib's copy of the script leaves the level `1cls` out.
"""

from collections.abc import Iterable
from pathlib import Path

from spd_fast.datasets import PROTOCOLS, Category, Sample, select_categories
from spd_fast.datasets.images import list_images
from spd_fast.datasets.visa import file_names
from spd_fast.errors import InputError

NAMES = (  # of MVTec-AD's categories
    *("bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut"),
    *("pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper"),
)


def find_tree(root: Path, protocol: str) -> Path | None:
    """The folder that holds the categories of a protocol: `root`, or `root`/<protocol>.

    Returns:
        None when `root` has neither layout.

    Raises:
        InputError: it has one of them, but not this protocol.
    """
    if category_names(root / protocol):
        return root / protocol
    others = [name for name in PROTOCOLS if category_names(root / name)]
    if others:
        raise InputError(f"{root} holds the protocols {', '.join(others)}, but not {protocol}")
    names = category_names(root)
    if not names:
        return None
    if root.name in PROTOCOLS and root.name != protocol:
        raise InputError(f"{root} holds the protocol {root.name}, not {protocol}")
    two_class = any((root / name / "train" / "bad").is_dir() for name in names)
    if protocol != "1cls" and not two_class:
        raise InputError(
            f"{root} has no <category>/train/bad, as MVTec-AD: its only protocol is 1cls, "
            f"not {protocol}"
        )
    return root


def category_names(tree: Path) -> list[str]:
    """Sorted names of the folders that hold a `train` folder, if any has `train/good`."""
    if not tree.is_dir():
        return []
    folders = [path for path in tree.iterdir() if (path / "train").is_dir()]
    if not any((path / "train" / "good").is_dir() for path in folders):
        return []
    return sorted(path.name for path in folders)


def read_mvtec(tree: Path, protocol: str, categories: Iterable[str] | None) -> list[Category]:
    """Read the categories in a folder that `find_tree` found.

    Raises:
        InputError: a category is unknown, or an anomalous image has no mask.
    """
    names = select_categories(category_names(tree), categories, tree)
    return [
        Category(name, _samples(tree / name, "train"), _samples(tree / name, "test"))
        for name in names
    ]


def _samples(category: Path, part: str) -> list[Sample]:
    if not (category / part).is_dir():
        return []
    samples = []
    for folder in sorted(path for path in (category / part).iterdir() if path.is_dir()):
        images = list_images(folder)
        if folder.name == "good":
            samples += [Sample(image, 0, None) for image in images]
        else:
            defect = "" if folder.name == "bad" else folder.name  # VisA's "bad" is any defect
            masks = _masks(category, part, folder.name, images)
            samples += [Sample(image, 1, mask, defect) for image, mask in zip(images, masks)]
    return samples


def _masks(category: Path, part: str, defect: str, images: list[Path]) -> list[Path]:
    truth = category / "ground_truth"
    folders = [(folder, file_names(folder)) for folder in (truth / defect, truth / part / defect)]
    masks = []
    for image in images:
        wanted = (f"{image.stem}_mask.png", f"{image.stem}.png")
        found = [folder / name for folder, names in folders for name in wanted if name in names]
        if not found:
            tried = ", ".join(str(folder / name) for folder, _ in folders for name in wanted)
            raise InputError(f"anomalous image {image} has no mask; looked for {tried}")
        masks.append(found[0])
    return masks
