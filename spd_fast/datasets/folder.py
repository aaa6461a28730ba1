"""Folders of images for pre-training, as ImageNet is usually stored: one sub-folder per class."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from spd_fast.datasets.images import is_image_name
from spd_fast.errors import InputError


class ImageFolder:
    """All images under one or several directories.

    The class of an image is the first folder below the root, however deep the image lies; images
    directly in a root belong to a class named after the root. A class of the same name in two roots
    is one class. A root may also be an image, of a class named after its folder. Symbolic links are
    followed, except back up to a folder that is being read. Files that are not images by their
    suffix, and hidden files and folders, are ignored.

    Attributes:
        paths: the images, root after root in the order given, sorted within each, so that an index
            means the same image wherever the data lie.
        labels: position in `classes` of the class of each image.
        classes: sorted names.

    Raises:
        InputError: a root is neither a directory nor an image, cannot be read, or holds no image.
    """

    def __init__(self, roots: str | Path | Iterable[str | Path]):
        roots = [roots] if isinstance(roots, str | Path) else list(roots)
        if not roots:
            raise InputError("no directory of images was given")
        self.paths: list[Path] = []
        names: list[str] = []
        for root in map(Path, roots):
            if is_image_name(root.name) and root.is_file():
                self.paths.append(root)
                names.append(root.resolve().parent.name)
                continue
            found = _images_of(root)
            own_name = root.resolve().name
            self.paths += (root / path for path in found)
            names += (path.split("/", 1)[0] if "/" in path else own_name for path in found)
        self.classes = sorted(set(names))
        number = {name: k for k, name in enumerate(self.classes)}
        self.labels = [number[name] for name in names]

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def fingerprint(self) -> str:
        """Of the files' names relative to their common directory, so that data may be moved."""
        paths = [os.path.abspath(path) for path in self.paths]
        common = os.path.commonpath({os.path.dirname(path) for path in paths})
        names = "\0".join(path[len(common) :] for path in paths).replace(os.sep, "/")
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]


def _images_of(root: Path) -> list[str]:
    """Sorted paths relative to `root`, with forward slashes."""
    if not root.is_dir():
        raise InputError(f"there is no directory {root}")
    try:
        found = list(_walk(str(root), "", ()))
    except OSError as error:
        raise InputError(f"cannot read the directory {error.filename}: {error.strerror}") from error
    if not found:
        raise InputError(f"there is no image in {root} or below it")
    return found


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    here = os.path.realpath(folder)
    if here in above:  # a link that leads back up
        return
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        # isdir() and not entry.is_dir() for links: a link to itself is an error for the latter
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            if not entry.name.startswith("."):
                yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, here))
        elif is_image_name(entry.name):
            yield prefix + entry.name
