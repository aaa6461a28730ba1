"""Images inside archives: tar files, as WebDataset writes them, and TFRecord files.

An archive is read through once, header by header, to learn where its images lie; from then on each
image is read from its place. So any order of visiting them costs the same as with single files.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from spd_fast.datasets.folder import ImageFolder
from spd_fast.datasets.images import ImageInArchive, is_image_name
from spd_fast.datasets.tfrecord import images_of_tfrecord
from spd_fast.errors import InputError

TFRECORD_NAME = re.compile(r"\.tfrecords?$|-\d{5}-of-\d{5}$")  # train-00000-of-01024
COMPRESSED_NAME = re.compile(r"\.(tar|tfrecords?)\.\w+$|\.tgz$")
MOST_CLASSES = 1_000_000  # when they are numbered
Member = tuple[str, int, int]  # of a tar file: name, offset and size


class ImageShards:
    """All images in one or several archives; what an ImageFolder is for directories.

    The class of an image in a tar file is what its `.cls` member says (0001.cls for 0001.jpg: a
    number or a name); without one it is the first folder in the member's name, or else the
    archive's name without .tar. In a TFRecord file it is the feature image/class/synset, or else
    the number in image/class/label, as it stands there. Members that are not images by their
    suffix, and hidden ones, are ignored.

    Attributes:
        paths: an ImageInArchive for each image, archive after archive in the order given, in the
            order in which they are stored.
        labels: the class of each image: if all classes are numbers, that number; else its position
            in `classes`.
        classes: sorted names; if all are numbers, "0", "1", ... up to the largest.

    Raises:
        InputError: an archive cannot be read, is damaged or compressed, or holds no image.
    """

    def __init__(self, archives: Iterable[str | Path]):
        self.paths: list[ImageInArchive] = []
        names: list[str] = []
        for archive in map(str, archives):
            before = len(names)
            for image, name in _images_of(archive):
                self.paths.append(image)
                names.append(name)
            if len(names) == before:
                raise InputError(f"there is no image in the archive {archive}")
        self.classes, self.labels = _numbered(names)

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def fingerprint(self) -> str:
        """Of the archives' and images' names and sizes, so that the archives may be moved."""
        whole = hashlib.sha256()
        for archive, name, _, size in self.paths:
            text = f"{os.path.basename(archive)}\0{name}\0{size}\0"
            whole.update(text.encode(errors="surrogateescape"))
        return whole.hexdigest()[:16]


Images = ImageFolder | ImageShards


def open_images(roots: str | Path | Iterable[str | Path]) -> Images:
    """The images in directories, or in archives: files named *.tar, *.tfrecord or *-00000-of-00001,
    and directories that hold such files directly (sorted by name).

    Raises:
        InputError: as ImageFolder and ImageShards; there are both kinds; or a compressed archive.
    """
    roots = [roots] if isinstance(roots, str | Path) else list(roots)
    found = [_archives_of(Path(root)) for root in roots]
    for root in roots:
        if COMPRESSED_NAME.search(str(root)):
            raise InputError(f"{root}: archives are read uncompressed, as *.tar or *.tfrecord")
    if not any(found):
        return ImageFolder(roots)
    for root, archives in zip(roots, found):
        if not archives:
            raise InputError(f"{root} holds no archive, but others of the data do: give one kind")
    return ImageShards(archive for archives in found for archive in archives)


def _archives_of(root: Path) -> list[Path]:
    """The root itself if it is an archive by its name, or the archives directly in it."""
    if root.is_dir():
        try:
            return sorted(path for path in root.iterdir() if _is_archive_name(path.name))
        except OSError:  # ImageFolder says what is wrong
            return []
    return [root] if _is_archive_name(root.name) else []


def _is_archive_name(name: str) -> bool:
    hidden = name.startswith(".")
    return not hidden and (name.endswith(".tar") or TFRECORD_NAME.search(name) is not None)


def _images_of(archive: str) -> Iterator[tuple[ImageInArchive, str]]:
    """Each image, and the name of its class."""
    try:
        read = _images_of_tar if archive.endswith(".tar") else images_of_tfrecord
        yield from read(archive)
    except OSError as error:
        raise InputError(f"cannot read the archive {archive}: {error.strerror}") from error


def _images_of_tar(archive: str) -> Iterator[tuple[ImageInArchive, str]]:
    images, classes = [], {}
    with open(archive, "rb", buffering=0) as file:
        for member, offset, size in _indexed_members(archive) or _tar_members(archive):
            folder, name = os.path.split(member.removeprefix("./"))
            key = folder, name.split(".", 1)[0]  # what belongs together, as WebDataset has it
            if name.startswith("."):
                continue
            if name.endswith(".cls"):
                text = os.pread(file.fileno(), min(size, 1024), offset)
                classes[key] = _class_name(text, archive, member)
            elif is_image_name(name):
                images.append((key, ImageInArchive(archive, member, offset, size)))
    own_name = Path(archive).stem
    for key, image in images:
        yield image, classes.get(key) or key[0].split("/", 1)[0] or own_name


def _tar_members(archive: str) -> Iterator[Member]:
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                tar.members = []  # it would keep a record of every member
                if member.isreg() and not member.issparse():
                    yield member.name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise InputError(
            f"cannot read the archive {archive}: {error}; expected a plain tar file, not compressed"
        ) from error


def _indexed_members(archive: str) -> list[Member]:
    """From an index beside the archive, 0001.idx for 0001.tar, as DALI's wds2idx writes it: after
    a first line, a line for each sample with suffix, offset, size and name of its members. Reading
    it takes a tenth of the time. Empty without one, or if it is older, damaged or ambiguous."""
    index = Path(archive).with_suffix(".idx")
    try:
        if index.stat().st_mtime < os.path.getmtime(archive):
            return []
        text = index.read_text(encoding="utf-8")
        first, *lines = text.splitlines()
        members = []
        for line in lines:
            words = line.split(" ")
            offsets, sizes, names = (words[k::4] for k in (1, 2, 3))
            members += zip(names, map(int, offsets), map(int, sizes), strict=True)
    except (OSError, ValueError):  # of the latter also what is no UTF-8
        return []
    whole = first == f"v1.2 {len(lines)}" and text.endswith("\n")
    return members if whole else []


def _class_name(text: bytes, archive: str, member: str) -> str:
    name = text.decode(errors="replace").strip()
    if not name.isprintable() or not 0 < len(name) <= 256:
        raise InputError(
            f"{archive}: the member {member} holds {text[:40]!r}, expected the number or name of a "
            "class"
        )
    return name


def _numbered(names: list[str]) -> tuple[list[str], list[int]]:
    """The classes, and the label of each name."""
    found = set(names)
    if all(name.isdecimal() for name in found):
        most = max(map(int, found))
        if most >= MOST_CLASSES:
            raise InputError(f"the largest class is {most}, expected less than {MOST_CLASSES}")
        return [str(k) for k in range(most + 1)], [int(name) for name in names]
    classes = sorted(found)
    number = {name: k for k, name in enumerate(classes)}
    return classes, [number[name] for name in names]
