"""Where the images of a TFRecord file lie, without TensorFlow.

A file is a sequence of records: length (8 bytes), its checksum (4), the record, its checksum (4).
A record is a `tf.train.Example`, a protocol buffer of three levels of maps; only what leads to an
image and its class is looked at. Checksums are not verified: a damaged image does not decode.
"""

import mmap
import os
from collections.abc import Iterator

from spd_fast.datasets.images import ImageInArchive
from spd_fast.errors import InputError

# Names as in the records of ImageNet that TensorFlow's scripts write.
IMAGE, SYNSET, LABEL = b"image/encoded", b"image/class/synset", b"image/class/label"

VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5  # wire types of a protocol buffer
Span = tuple[int, int]  # begin and end in the file


def images_of_tfrecord(archive: str) -> Iterator[tuple[ImageInArchive, str]]:
    """Each image of the file, and the name of its class.

    Raises:
        InputError: it is no TFRecord file of such examples, or is cut short.
        OSError: the system cannot read it.
    """
    with open(archive, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at, number = 0, 0
            while at < len(data):
                length = int.from_bytes(data[at : at + 8], "little")
                if at + 16 + length > len(data):
                    raise InputError(
                        f"the archive {archive} is cut short, or no TFRecord file: record {number} "
                        f"would have {length} bytes"
                    )
                yield _image_of(data, (at + 12, at + 12 + length), archive, number)
                at += 16 + length
                number += 1


def _image_of(data, record: Span, archive: str, number: int) -> tuple[ImageInArchive, str]:
    try:
        features = _features(data, record)
        begin, end = _value(data, features[IMAGE])
        if SYNSET in features:
            name = data[slice(*_value(data, features[SYNSET]))].decode()
        else:
            name = str(_whole_number(data, features[LABEL]))
    except (KeyError, ValueError, IndexError) as error:
        missing = error.args[0].decode() if isinstance(error, KeyError) else "a readable example"
        raise InputError(f"record {number} of the archive {archive} lacks {missing}") from error
    return ImageInArchive(archive, f"record {number}", begin, end - begin), name


def _features(data, record: Span) -> dict[bytes, Span]:
    """Example { Features features = 1 { map<string, Feature> feature = 1 } }: name -> Feature."""
    found = {}
    for features in _fields(data, record, 1):
        for entry in _fields(data, features, 1):
            (name,) = _fields(data, entry, 1)
            (feature,) = _fields(data, entry, 2)
            found[data[slice(*name)]] = feature
    return found


def _value(data, feature: Span) -> Span:
    """Feature { BytesList bytes_list = 1 { repeated bytes value = 1 } }: the first value."""
    (values,) = _fields(data, feature, 1)
    return next(_fields(data, values, 1), (0, 0))


def _whole_number(data, feature: Span) -> int:
    """Feature { Int64List int64_list = 3 { repeated int64 value = 1 } }: the first value, which
    stands alone or at the beginning of a packed list."""
    (values,) = _fields(data, feature, 3)
    kind, at = _varint(data, values[0])
    if kind & 7 == BYTES:
        _, at = _varint(data, at)
    return _varint(data, at)[0]


def _fields(data, message: Span, wanted: int) -> Iterator[Span]:
    """The fields of that number whose value is a string of bytes or a message."""
    at, end = message
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == VARINT:
            _, at = _varint(data, at)
        elif kind == BYTES:
            length, at = _varint(data, at)
            if at + length > end:
                raise ValueError("a field reaches past its message")
            if tag >> 3 == wanted:
                yield at, at + length
            at += length
        elif kind in (FIXED_64, FIXED_32):
            at += 8 if kind == FIXED_64 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, the lowest first; and where it ends."""
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")
