"""Images of a folder once more in tar shards and TFRecord files, for tests."""

import io
import struct
import tarfile
from pathlib import Path

from spd_fast.datasets.folder import ImageFolder


def write_tars(folder: ImageFolder, out: Path, shards: int = 3, labels: bool = True) -> list[Path]:
    """The folder's images in its order; their classes as numbers in .cls members, or as folders."""
    out.mkdir()
    paths = []
    for shard, places in enumerate(_shares(len(folder), shards)):
        paths.append(out / f"train-{shard:04d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for i in places:
                path = folder.paths[i]
                if labels:
                    _add(tar, f"{i:05d}{path.suffix}", path.read_bytes())
                    _add(tar, f"{i:05d}.cls", str(folder.labels[i]).encode())
                else:
                    name = f"{folder.classes[folder.labels[i]]}/{path.name}"
                    _add(tar, name, path.read_bytes())
    return paths


def _shares(n: int, shards: int) -> list[range]:
    size = -(-n // shards)
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tfrecords(
    folder: ImageFolder, out: Path, shards: int = 3, synset: bool = False
) -> list[Path]:
    """As ImageNet's are written: image/encoded, image/class/label, and the class's name if told."""
    out.mkdir()
    paths = []
    for shard, places in enumerate(_shares(len(folder), shards)):
        paths.append(out / f"train-{shard:05d}-of-{shards:05d}")
        with open(paths[-1], "wb") as file:
            for i in places:
                label = folder.labels[i]
                name = folder.classes[label].encode() if synset else None
                record = example(folder.paths[i].read_bytes(), label, name)
                file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
    return paths


def example(image: bytes, label: int, synset: bytes | None = None, packed: bool = True) -> bytes:
    """A tf.train.Example, by hand."""
    number = _field(1, _varint(label)) if packed else b"\x08" + _varint(label)
    features = {b"image/height": _field(3, _field(1, _varint(300)))}
    features |= {b"image/encoded": _field(1, _field(1, image))}
    features |= {b"image/class/label": _field(3, number)}
    if synset is not None:
        features[b"image/class/synset"] = _field(1, _field(1, synset))
    entries = (_field(1, _field(1, name) + _field(2, value)) for name, value in features.items())
    return _field(1, b"".join(entries))


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    groups = []
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])
