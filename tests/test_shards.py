"""Archives of images: the same batches as from the folder that they were made of."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import example, write_tars, write_tfrecords
from test_loader import assert_same, loader, take, truncate, write_images

from spd_fast.datasets.folder import ImageFolder
from spd_fast.datasets.images import read_bytes, read_image, read_size
from spd_fast.datasets.shards import ImageShards, open_images
from spd_fast.errors import InputError

real = tarfile.open


@pytest.fixture
def folder(tmp_path) -> ImageFolder:
    return ImageFolder(write_images(tmp_path / "folder"))


WRITERS = {
    "tar": write_tars,
    "tar with folders": lambda folder, out: write_tars(folder, out, labels=False),
    "tfrecord": write_tfrecords,
    "tfrecord with names": lambda folder, out: write_tfrecords(folder, out, synset=True),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_images_labels_and_batches(folder, kind, tmp_path):
    archives = WRITERS[kind](folder, tmp_path / "archives")
    data = open_images(archives)
    assert isinstance(data, ImageShards) and len(data) == len(folder) == 22
    assert data.labels == folder.labels
    named = kind in ("tar with folders", "tfrecord with names")
    assert data.classes == (folder.classes if named else ["0", "1"])
    for ours, theirs in zip(data.paths, folder.paths):
        assert read_bytes(ours) == theirs.read_bytes()
        assert np.array_equal(read_image(ours), read_image(theirs))
        assert read_size(ours) == read_size(theirs)
    assert_same(take(loader(data), 7), take(loader(folder), 7))
    ranks = [take(loader(data, batch_size=2, rank=r, world_size=2), 3) for r in (0, 1)]
    for whole, first, second in zip(take(loader(folder), 3), *ranks):
        assert torch.equal(whole.views, torch.cat([first.views, second.views], dim=1))


def test_a_state_continues_in_archives_that_were_moved(folder, tmp_path):
    write_tars(folder, tmp_path / "one")
    source = loader(tmp_path / "one")
    take(source, 3)
    (tmp_path / "one").rename(tmp_path / "two")
    resumed = loader(tmp_path / "two", workers=1)
    resumed.load_state_dict(source.state_dict())
    assert_same(take(resumed, 4), take(loader(folder), 7)[3:])
    write_tars(folder, tmp_path / "other", shards=2)
    with pytest.raises(InputError, match="the data is not the one of the saved state"):
        loader(tmp_path / "other").load_state_dict(source.state_dict())


@pytest.mark.parametrize("write", [write_tars, write_tfrecords])
def test_a_bad_image_is_named_with_its_archive_or_skipped(folder, write, tmp_path):
    truncate(folder.paths[7])
    archives = write(folder, tmp_path / "archives", shards=2)
    member = "00007.png" if write is write_tars else "record 7"
    with pytest.raises(InputError, match=f"cannot read image {archives[0]}: {member}: .*truncated"):
        take(loader(archives, batch_size=11), 2)
    source = loader(archives, batch_size=11, skip_bad_images=True)
    skipped = take(source, 2)
    assert list(source.bad_images) == [f"{archives[0]}: {member}"]
    assert_same(skipped, take(loader(folder, batch_size=11, skip_bad_images=True), 2))


def test_roots_are_told_apart(folder, tmp_path):
    archives = write_tars(folder, tmp_path / "archives")
    assert len(open_images(tmp_path / "archives")) == 22
    assert len(open_images([archives[2], archives[0]])) == 14
    assert open_images(archives[1:2]).paths[0].archive == str(archives[1])
    assert isinstance(open_images(tmp_path / "folder"), ImageFolder)
    compressed = tmp_path / "0001.tar.gz"
    compressed.touch()
    with pytest.raises(InputError, match="0001.tar.gz: archives are read uncompressed"):
        open_images(compressed)
    with pytest.raises(InputError, match="folder holds no archive, but others of the data do"):
        open_images([tmp_path / "archives", tmp_path / "folder"])
    with pytest.raises(InputError, match="there is no directory .*nothing"):
        open_images(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot read the archive .*x.tar: No such file"):
        open_images(tmp_path / "x.tar")


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_what_else_lies_in_a_tar(tmp_path):
    path = write_tar(
        tmp_path / "n01.tar",
        {
            "./a/1.jpg": b"x",
            "b/2.seg.png": b"y",
            "b/2.cls": b" 7\n",
            "3.jpg": b"",
            "._4.jpg": b"z",
            "5.txt": b"text",
            "l" * 150 + "/6.jpg": b"long",
        },
    )
    data = open_images(path)
    assert [image.name for image in data.paths] == [
        "./a/1.jpg",
        "b/2.seg.png",
        "3.jpg",
        "l" * 150 + "/6.jpg",
    ]
    assert [data.classes[k] for k in data.labels] == ["a", "7", "n01", "l" * 150]
    with pytest.raises(InputError, match="n01.tar: 3.jpg: the file is empty"):
        read_image(data.paths[2])


def test_an_index_of_dali_is_used_if_it_fits(folder, tmp_path, monkeypatch):
    wds2idx = pytest.importorskip("wds2idx")
    (archive,) = write_tars(folder, tmp_path / "tar", shards=1)
    index = archive.with_suffix(".idx")
    creator = wds2idx.IndexCreator(str(archive), str(index), verbose=False)
    creator.create_index()
    creator.close()
    without = open_images(write_tars(folder, tmp_path / "other", shards=1))
    expected = [image[1:] for image in without.paths], without.labels
    opened = []
    monkeypatch.setattr(tarfile, "open", lambda *args: opened.append(1) or real(*args))
    data = open_images(archive)
    assert ([image[1:] for image in data.paths], data.labels) == expected and not opened
    good = index.read_text()
    for bad in (
        "",
        "v1.2 22",
        good.replace("v1.2", "v1.1"),
        good[:-3],
        good.replace(" 512 ", " x "),
    ):
        index.write_text(bad)
        data = open_images(archive)
        assert ([image[1:] for image in data.paths], data.labels) == expected and opened.pop()
    index.write_text(good)
    os.utime(index, (0, 0))  # the archive has changed since
    open_images(archive)
    assert opened


def test_damaged_archives(folder, tmp_path):
    (archive,) = write_tars(folder, tmp_path / "tar", shards=1)
    whole = archive.read_bytes()
    data = open_images(archive)
    archive.write_bytes(whole[: data.paths[-1].offset + 10])
    with pytest.raises(InputError, match="train-0000.tar: 00021.png: the archive is cut short"):
        read_image(data.paths[-1])
    with pytest.raises(InputError, match="cannot read the archive .*train-0000.tar: unexp"):
        open_images(archive)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(folder.paths[0], "1.png")
    with pytest.raises(InputError, match="expected a plain tar file, not compressed"):
        open_images(tmp_path / "packed.tar")
    for text in (b"", b"\xff\xfe\x00", b"x" * 300):
        bad = write_tar(tmp_path / "bad.tar", {"1.jpg": b"", "1.cls": text})
        with pytest.raises(InputError, match="bad.tar: the member 1.cls holds .* expected"):
            open_images(bad)
    with pytest.raises(InputError, match="no image in the archive .*none.tar"):
        open_images(write_tar(tmp_path / "none.tar", {"1.txt": b"text"}))
    huge = write_tar(tmp_path / "huge.tar", {"1.jpg": b"", "1.cls": b"99999999999"})
    with pytest.raises(InputError, match="the largest class is 99999999999, expected less than"):
        open_images(huge)


def test_damaged_tfrecords(folder, tmp_path):
    (archive,) = write_tfrecords(folder, tmp_path / "tf", shards=1)
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-300])
    with pytest.raises(InputError, match="00000-of-00001 is cut short, or no TFRecord.*record 21"):
        open_images(archive)
    path = tmp_path / "a.tfrecord"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="no image in the archive .*a.tfrecord"):
        open_images(path)
    bodies = {
        "lacks image/encoded": example(b"image", 3).replace(b"encoded", b"ancoded"),
        "lacks image/class/label": example(b"i", 3).replace(b"class/label", b"class/lahel"),
        "lacks a readable example": b"\x0f\x0f\x0f",
    }
    for reason, body in bodies.items():
        path.write_bytes(len(body).to_bytes(8, "little") + bytes(4) + body + bytes(4))
        with pytest.raises(InputError, match=f"record 0 of the archive .*a.tfrecord {reason}"):
            open_images(path)
    for packed in (True, False):
        body = example(b"image", 300, packed=packed)
        path.write_bytes(len(body).to_bytes(8, "little") + bytes(4) + body + bytes(4))
        assert open_images(path).labels == [300]
