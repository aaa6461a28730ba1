import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import outline, reorganise, write_csv, write_splits, write_visa

from spd_fast.cli import main
from spd_fast.datasets import PROTOCOLS, prepare, read_dataset
from spd_fast.datasets.prepare import prepare_visa
from spd_fast.datasets.visa import draw_split
from spd_fast.errors import InputError

OFFICIAL = Path(__file__).parents[2] / "shared" / "visa" / "split_csv"


@pytest.fixture
def visa(tmp_path):
    """The images differ from each other, unlike those of `write_visa`; a mask has a palette."""
    root = write_splits(write_visa(tmp_path / "visa"))
    for number, path in enumerate(sorted(root.rglob("*.JPG"))):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(path, "JPEG")
    path = root / "candle/Data/Masks/Anomaly/001.png"
    mask = Image.open(path)
    mask.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    mask.save(path)
    return root


def names_in(root):
    """All files and folders under `root`."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


def state_of(root):
    """What any writing would change."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*")}


def originals(visa, protocol):
    """(image, mask or None, place of the image, place of the mask) of a split file's rows."""
    with open(visa / "split_csv" / f"{protocol}.csv", newline="") as file:
        for row in csv.DictReader(file):
            category = f"{protocol}/{row['object']}"
            kind = {"normal": "good", "anomaly": "bad"}[row["label"]]
            image = f"{category}/{row['split']}/{kind}/{row['image'].split('/')[-1]}"
            level = "" if protocol == "1cls" else f"/{row['split']}"
            mask = f"{category}/ground_truth{level}/bad/{row['mask'].split('/')[-1]}"
            yield visa / row["image"], row["mask"] and visa / row["mask"], image, mask


# --------------------------- what is written


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("link", [True, False])
def test_names_and_contents(visa, tmp_path, protocol, link):
    out = tmp_path / "out"
    summary = prepare_visa(visa, out, [protocol], link)
    assert summary == {"written": 2, "kept": 0, "images": 30, "masks": 10, "drawn": False}
    assert names_in(out) == names_in(reorganise(visa, tmp_path / "expected", protocol))
    for image, mask, image_out, mask_out in originals(visa, protocol):
        assert (out / image_out).read_bytes() == image.read_bytes()
        assert (out / image_out).samefile(image) == link
        if mask:
            with Image.open(mask) as old, Image.open(out / mask_out) as new:
                assert (new.mode, new.format) == ("L", "PNG")
                expected = np.where(np.asarray(old) > 0, 255, 0)
                assert expected.any() and np.array_equal(np.asarray(new), expected)
    assert outline(read_dataset(out, protocol)) == outline(read_dataset(visa, protocol))


def test_all_protocols_are_the_default(visa, tmp_path):
    out = tmp_path / "out"
    prepare_visa(visa, out)
    assert sorted(os.listdir(out)) == sorted(PROTOCOLS)
    for protocol in PROTOCOLS:
        assert outline(read_dataset(out, protocol)) == outline(read_dataset(visa, protocol))


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"no official split files at {OFFICIAL}")
def test_the_official_splits(tmp_path):
    visa, out = tmp_path / "visa", tmp_path / "out"
    shutil.copytree(OFFICIAL, visa / "split_csv")
    write_visa(tmp_path / "one", ["candle"], normal=1, anomalous=1)
    image, mask = (next((tmp_path / "one").rglob(name)) for name in ("*.JPG", "*.png"))
    folders = set()
    for image_in, mask_in, _, _ in originals(visa, "1cls"):
        for source, path in ((image, image_in), (mask, mask_in)):
            if path:
                if path.parent not in folders:
                    path.parent.mkdir(parents=True)
                    folders.add(path.parent)
                os.link(source, path)
    assert prepare_visa(visa, out, ["2cls_fewshot"])["written"] == 12
    for pattern, count in {
        "train/good": 1_924,
        "train/bad": 240,
        "test/good": 7_697,
        "test/bad": 960,
        "ground_truth/train/bad": 240,
        "ground_truth/test/bad": 960,
    }.items():
        assert sum(1 for _ in out.glob(f"2cls_fewshot/*/{pattern}/*")) == count


def test_drawn_splits(visa, tmp_path, capsys):
    shutil.rmtree(visa / "split_csv")
    assert main(["data", "prepare", str(visa), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "the splits were drawn" in printed and "6 categories, and 0 were there" in printed
    normal = [f"widget/Data/Images/Normal/{k:04d}.JPG" for k in range(10)]
    rows = draw_split("widget", normal, [], "1cls")
    train = sorted(Path(row.image).name for row in rows if row.split == "train")
    assert sorted(os.listdir(tmp_path / "out" / "1cls" / "widget" / "train" / "good")) == train


def test_command_line(visa, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    arguments = ["data", "prepare", str(visa), "--out", str(out), "--protocol", "1cls"]
    assert main([*arguments, "2cls_highshot", "--no-link", "--workers", "1"]) == 0
    assert sorted(os.listdir(out)) == ["1cls", "2cls_highshot"]
    assert all(path.stat().st_nlink == 1 for path in out.rglob("*.JPG"))
    assert "drawn" not in capsys.readouterr().out
    assert main(arguments) == 0
    assert "0 categories, and 2 were there already; 30 images, 10 masks" in capsys.readouterr().out


# --------------------------- links


def test_without_hard_links_images_are_copied(visa, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    prepare_visa(visa, tmp_path / "out", ["1cls"])
    for image, _, image_out, _ in originals(visa, "1cls"):
        assert (tmp_path / "out" / image_out).read_bytes() == image.read_bytes()
        assert not (tmp_path / "out" / image_out).samefile(image)


def test_symbolic_links_in_the_data_set(visa, tmp_path):
    """Relative ones, which would point elsewhere from the new place."""
    image = visa / "candle/Data/Images/Normal/0000.JPG"
    image.rename(image.with_name("elsewhere"))
    image.symlink_to("elsewhere")
    prepare_visa(visa, tmp_path / "out", ["1cls"])
    [made] = (tmp_path / "out/1cls/candle").glob("*/good/0000.JPG")
    assert not made.is_symlink() and made.samefile(image)
    image.with_name("elsewhere").unlink()
    with pytest.raises(InputError, match=r"Normal/0000\.JPG is not a file"):
        prepare_visa(visa, tmp_path / "other", ["1cls"])
    assert not (tmp_path / "other").exists()


# --------------------------- again, and after an interruption


@pytest.mark.parametrize("link", [True, False])
def test_a_finished_category_is_left_as_it_is(visa, tmp_path, link):
    out = tmp_path / "out"
    prepare_visa(visa, out, link=link)
    shutil.rmtree(out / "2cls_fewshot" / "widget")
    before = state_of(out / "1cls") | state_of(out / "2cls_fewshot" / "candle")
    summary = prepare_visa(visa, out, link=True)
    assert (summary["written"], summary["kept"]) == (1, 5)
    assert before.items() <= state_of(out).items()
    before = state_of(out)
    assert prepare_visa(visa, out)["written"] == 0 and state_of(out) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_an_interrupted_run_leaves_no_half_category_and_goes_on(visa, tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    write_file, calls = prepare._write_file, []

    def write_some(*arguments):
        calls.append(arguments)
        if len(calls) == 30:  # in the second category of 20 files
            raise error
        write_file(*arguments)

    monkeypatch.setattr(prepare, "_write_file", write_some)
    with pytest.raises(type(error)):
        prepare_visa(visa, out, ["1cls"])
    assert os.listdir(out) == ["1cls"] and os.listdir(out / "1cls") == ["candle"]
    before = state_of(out / "1cls" / "candle")
    monkeypatch.undo()
    summary = prepare_visa(visa, out, ["1cls"])
    assert (summary["written"], summary["kept"]) == (1, 1)
    assert state_of(out / "1cls" / "candle") == before
    assert names_in(out) == names_in(reorganise(visa, tmp_path / "expected", "1cls"))


def test_what_a_killed_run_leaves_is_not_read_as_a_category(visa, tmp_path, monkeypatch):
    out = tmp_path / "out"
    seen = []

    def look(*arguments):
        seen.append([c.name for c in read_dataset(out, "1cls")])
        write_file(*arguments)

    prepare_visa(visa, out, ["1cls"])
    shutil.rmtree(out / "1cls" / "widget")
    write_file = prepare._write_file
    monkeypatch.setattr(prepare, "_write_file", look)
    prepare_visa(visa, out, ["1cls"])
    assert seen == [["candle"]] * 20


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "train/good/more.JPG").touch(),
        lambda folder: (folder / "ground_truth/bad/000.png").unlink(),
        lambda folder: next(folder.glob("train/good/*")).write_bytes(b"other"),
        lambda folder: Image.new("L", (8, 6)).save(folder / "ground_truth/bad/000.png"),
        lambda folder: shutil.rmtree(folder) or folder.mkdir(),
    ],
    ids=["more", "fewer", "image", "mask", "empty"],
)
def test_something_else_in_the_way(visa, tmp_path, change):
    out = tmp_path / "out"
    prepare_visa(visa, out, ["1cls"], link=False)
    shutil.rmtree(out / "1cls" / "candle")
    change(out / "1cls" / "widget")
    before = state_of(out)
    with pytest.raises(InputError, match="1cls/widget is in the way: .* is not as it would be"):
        prepare_visa(visa, out, ["1cls"])
    assert state_of(out) == before


# --------------------------- errors


def test_nothing_is_written_into_the_data_set(visa):
    before = state_of(visa)
    for out in (visa, visa / "prepared"):
        with pytest.raises(InputError, match="lies in the data set"):
            prepare_visa(visa, out)
    assert state_of(visa) == before


def test_a_missing_file_is_named_before_anything_is_written(visa, tmp_path):
    (visa / "widget/Data/Masks/Anomaly/003.png").unlink()
    rows = (visa / "split_csv" / "1cls.csv").read_text().splitlines()
    [line] = [k for k, row in enumerate(rows, 1) if "widget/Data/Masks/Anomaly/003" in row]
    error = rf"1cls\.csv line {line}: file widget/Data/Masks/Anomaly/003\.png does not exist"
    with pytest.raises(InputError, match=error):
        prepare_visa(visa, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_layouts_are_refused(visa, tmp_path):
    prepare_visa(visa, tmp_path / "out", ["1cls"])
    with pytest.raises(InputError, match="not VisA as published"):
        prepare_visa(tmp_path / "out", tmp_path / "again")
    with pytest.raises(InputError, match="there is no directory"):
        prepare_visa(tmp_path / "nothing", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: path.write_bytes(b"no image"), r"cannot read image .*Anomaly/002\.png"),
        (
            lambda path: Image.new("L", (6, 8)).save(path),
            r"mask .*Anomaly/002\.png is 6 x 8 pixels, but its image is 8 x 6",
        ),
    ],
    ids=["unreadable", "another size"],
)
def test_wrong_masks(visa, tmp_path, make, error):
    make(visa / "widget/Data/Masks/Anomaly/002.png")
    with pytest.raises(InputError, match=error):
        prepare_visa(visa, tmp_path / "out", ["1cls"])
    assert os.listdir(tmp_path / "out") == ["1cls"]
    assert os.listdir(tmp_path / "out" / "1cls") == ["candle"]


def test_two_images_of_one_name(visa, tmp_path):
    first, second = "candle/Data/Images/Normal/0000.JPG", "candle/Data/Images/Other/0000.JPG"
    (visa / second).parent.mkdir()
    shutil.copy(visa / first, visa / second)
    rows = [["object", "split", "label", "image", "mask"]]
    rows += [["candle", "train", "normal", image, ""] for image in (first, second)]
    rows += [["candle", "test", "normal", "candle/Data/Images/Normal/0001.JPG", ""]]
    mask = "candle/Data/Masks/Anomaly/000.png"
    rows += [["candle", "test", "anomaly", "candle/Data/Images/Anomaly/000.JPG", mask]]
    write_csv(visa / "split_csv" / "1cls.csv", rows)
    with pytest.raises(InputError, match=r"would both be 1cls/candle/train/good/0000\.JPG"):
        prepare_visa(visa, tmp_path / "out", ["1cls"])
