import csv
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from trees import outline, reorganise, touch, write_csv, write_mvtec, write_splits, write_visa

from spd_fast.datasets import PROTOCOLS, Category, Sample, check, draw_shots, read_dataset
from spd_fast.datasets.leaks import find_leaks
from spd_fast.datasets.visa import (
    PAPER_NAMES,
    TABLE_1,
    draw_split,
    read_split_csv,
)
from spd_fast.errors import InputError

OFFICIAL = Path(__file__).parents[2] / "shared" / "visa" / "split_csv"
needs_official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason=f"the official split files are not at {OFFICIAL}"
)
COUNTS = {  # normal images for training and test, per protocol; 100 anomalous images each
    "candle": ((900, 100), (600, 400), (200, 800)),
    "capsules": ((542, 60), (361, 241), (120, 482)),
    "cashew": ((450, 50), (300, 200), (100, 400)),
    "chewinggum": ((453, 50), (302, 201), (101, 402)),
    "fryum": ((450, 50), (300, 200), (100, 400)),
    "macaroni1": ((900, 100), (600, 400), (200, 800)),
    "macaroni2": ((900, 100), (600, 400), (200, 800)),
    "pcb1": ((904, 100), (602, 402), (201, 803)),
    "pcb2": ((901, 100), (601, 400), (200, 801)),
    "pcb3": ((905, 101), (604, 402), (201, 805)),
    "pcb4": ((904, 101), (603, 402), (201, 804)),
    "pipe_fryum": ((450, 50), (300, 200), (100, 400)),
}
ANOMALOUS = ((0, 100), (60, 40), (20, 80))  # for training and test, per protocol


def expected_counts(name, protocol):
    which = PROTOCOLS.index(protocol)
    normal, anomalous = COUNTS[name][which], ANOMALOUS[which]
    counts = {
        ("train", "normal"): normal[0],
        ("test", "normal"): normal[1],
        ("train", "anomaly"): anomalous[0],
        ("test", "anomaly"): anomalous[1],
    }
    return {key: count for key, count in counts.items() if count}


def counts_of(rows):
    return Counter((row.split, row.label) for row in rows)


# --------------------------- official split files


@needs_official
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_official_split_files(protocol):
    rows = read_split_csv(OFFICIAL / f"{protocol}.csv")
    assert len(rows) == 10_821 and {row.object for row in rows} == set(COUNTS)
    for name in COUNTS:
        of_name = [row for row in rows if row.object == name]
        assert counts_of(of_name) == expected_counts(name, protocol)
    assert rows[0].line == 2 and rows[0].mask == "" and rows[0].image.startswith("candle/Data/")
    mask = next(row.mask for row in rows if row.label == "anomaly")
    assert mask.endswith(".png") and "\r" not in mask
    assert all(check._label_fits(row) and check._mask_fits(row) for row in rows)


@needs_official
def test_official_tree(tmp_path):
    shutil.copytree(OFFICIAL, tmp_path / "split_csv")
    rows = [r for r in read_split_csv(OFFICIAL / "1cls.csv") if r.object == "pcb3"]
    touch(tmp_path, *(path for row in rows for path in (row.image, row.mask) if path))
    for protocol in PROTOCOLS:
        [category] = read_dataset(tmp_path, protocol, ["pcb3"])
        train, test = COUNTS["pcb3"][PROTOCOLS.index(protocol)]
        bad_train, bad_test = ANOMALOUS[PROTOCOLS.index(protocol)]
        assert (len(category.train), len(category.test)) == (train + bad_train, test + bad_test)
        assert sum(sample.label for sample in category.train) == bad_train
    with pytest.raises(InputError, match=r"1cls\.csv line \d+: file candle/.* \(and 1199 more\)"):
        read_dataset(tmp_path, "1cls", ["candle"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", COUNTS)
def test_drawn_splits_have_the_official_sizes(name, protocol):
    normal = [f"{name}/Data/Images/Normal/{k:04d}.JPG" for k in range(TABLE_1[name].normal)]
    anomalous = [f"{name}/Data/Images/Anomaly/{k:03d}.JPG" for k in range(100)]
    rows = draw_split(name, normal, anomalous, protocol)
    assert counts_of(rows) == expected_counts(name, protocol)
    assert draw_split(name, normal[::-1], anomalous[::-1], protocol) == rows
    assert sorted(row.image for row in rows) == sorted(normal + anomalous)
    assert all((row.mask != "") == (row.label == "anomaly") for row in rows)


def test_drawn_splits_are_nested_and_differ_between_categories():
    def train(name, protocol):
        images = [f"{name}/Data/Images/Normal/{k:04d}.JPG" for k in range(200)]
        rows = draw_split(name, images, [], protocol)
        return {Path(row.image).name for row in rows if row.split == "train"}

    assert train("a", "2cls_fewshot") < train("a", "2cls_highshot") < train("a", "1cls")
    assert train("a", "2cls_fewshot") != train("b", "2cls_fewshot")
    first = ["0000.JPG", "0009.JPG", "0022.JPG", "0025.JPG"]
    assert sorted(train("a", "2cls_fewshot"))[:4] == first  # the splits must never change


def test_table_1():
    assert sum(row.normal for row in TABLE_1.values()) == 9_621
    assert sum(row.anomalous for row in TABLE_1.values()) == 1_200
    assert set(TABLE_1) == set(PAPER_NAMES) == set(COUNTS)


# --------------------------- reading VisA


def test_visa_samples(tmp_path):
    write_splits(write_visa(tmp_path))
    candle, widget = read_dataset(tmp_path)
    assert (candle.name, widget.name) == ("candle", "widget")
    assert [sample.label for sample in candle.train] == [0] * 9
    images = tmp_path / "candle/Data/Images"
    masks = tmp_path / "candle/Data/Masks/Anomaly"
    first, second = candle.test[:2]
    assert first == Sample(images / "Anomaly/000.JPG", 1, masks / "000.png", "melt, big  dent")
    assert second == Sample(images / "Anomaly/001.JPG", 1, masks / "001.png", "scratch")
    assert candle.test[-1].mask is None and candle.test[-1].defect == ""
    for samples in (candle.train, candle.test):
        assert samples == sorted(samples, key=lambda sample: str(sample.image))
        assert all(sample.image.is_file() for sample in samples)
    assert not {s.image for s in candle.train} & {s.image for s in candle.test}


def test_order_of_rows_and_columns_does_not_matter(tmp_path):
    write_splits(write_visa(tmp_path))
    expected = read_dataset(tmp_path)
    path = tmp_path / "split_csv" / "1cls.csv"
    header, *rows = csv.reader(path.read_text().splitlines())
    rows = [[*row[::-1], "more"] for row in sorted(rows)]
    write_csv(path, [[*header[::-1], "comment"], *rows])
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")  # as spreadsheets write it
    assert read_dataset(tmp_path) == expected


def test_categories(tmp_path):
    write_splits(write_visa(tmp_path))
    shutil.rmtree(tmp_path / "candle")  # what is not asked for need not be there
    assert [c.name for c in read_dataset(tmp_path, categories=["widget", "widget"])] == ["widget"]
    with pytest.raises(InputError, match="no category 'nut'; it has candle, widget"):
        read_dataset(tmp_path, categories=["widget", "nut"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_split_files_the_fractions_are_used(tmp_path, protocol):
    drawn = read_dataset(write_visa(tmp_path), protocol)
    assert all(category.drawn for category in drawn)
    listed = [replace(category, drawn=False) for category in drawn]
    assert read_dataset(write_splits(tmp_path), protocol) == listed


def test_without_annotation_there_is_no_defect_name(tmp_path):
    write_visa(tmp_path, ["candle"])
    (tmp_path / "candle" / "image_anno.csv").unlink()
    [candle] = read_dataset(tmp_path)
    assert {sample.defect for sample in candle.test} == {""}


SPLIT_FAULTS = {  # what is replaced in a split file by what, and the error
    "column": ("object,split,label", "object,split,kind", "there is no column label"),
    "split": ("candle,test", "candle,Test", "column split is 'Test', expected train or"),
    "label": ("test,anomaly", "test,bad", "column label is 'bad', expected normal or anomaly"),
    "file": ("Anomaly/001.JPG", "Anomaly/999.JPG", "file candle/Data/Images/Anomaly/999.JPG does"),
    "mask": ("Anomaly/002.png", "Anomaly/888.png", "file candle/Data/Masks/Anomaly/888.png does"),
    "no mask": ("candle/Data/Masks/Anomaly/002.png", "", "column mask is '', expected a file"),
    "no image": ("candle/Data/Images/Anomaly/001.JPG", "", "column image is empty"),
    "short row": (",candle/Data/Masks/Anomaly/002.png", "", "expected 5 columns"),
    "twice": ("Anomaly/002.JPG", "Anomaly/001.JPG", "image candle/.* is already listed in line"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPLIT_FAULTS)
def test_faults_of_a_split_file(tmp_path, fault):
    old, new, error = SPLIT_FAULTS[fault]
    write_splits(write_visa(tmp_path, ["candle"]), ["candle"])
    path = tmp_path / "split_csv" / "1cls.csv"
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())
    with pytest.raises(InputError, match=rf"1cls\.csv line \d+: {error}") as caught:
        read_dataset(tmp_path)
    line = int(str(caught.value).split("line ")[1].split(":")[0])
    assert line == 1 or new in path.read_text().splitlines()[line - 1]


def test_split_file_that_is_missing_empty_or_binary(tmp_path):
    write_splits(write_visa(tmp_path))
    path = tmp_path / "split_csv" / "1cls.csv"
    path.write_bytes(b"object,split,label,image,mask\r\n")
    with pytest.raises(InputError, match=r"1cls\.csv lists no image"):
        read_dataset(tmp_path)
    path.write_bytes(b"\xff\xfe\x00\x01" * 9)
    with pytest.raises(InputError, match=r"1cls\.csv is not a CSV file in UTF-8"):
        read_dataset(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*1cls\.csv: No such file"):
        read_dataset(tmp_path)


def test_faults_of_an_annotation(tmp_path):
    write_splits(write_visa(tmp_path))
    path = tmp_path / "candle" / "image_anno.csv"
    good = path.read_text()
    path.write_text(good.replace("image,label,mask", "image,mask"))
    with pytest.raises(InputError, match=r"image_anno\.csv line 1: there is no column label"):
        read_dataset(tmp_path)
    path.write_text(good.replace("scratch", " ", 1))
    with pytest.raises(InputError, match=r"image_anno\.csv line 13: column label is empty"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    "keep, error",
    [
        (lambda row: row["split"] == "test", "1cls: category candle has no train image"),
        (lambda row: row["split"] == "train", "1cls: category candle has no test image"),
        (lambda row: "train,normal" in row["key"] or row["label"] == "anomaly", "no normal test"),
        (lambda row: row["label"] == "normal", "category candle has no anomalous test image"),
    ],
)
def test_empty_parts(tmp_path, keep, error):
    write_splits(write_visa(tmp_path, ["candle"]), ["candle"])
    path = tmp_path / "split_csv" / "1cls.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    kept = [r for r in rows if keep(r | {"key": f"{r['split']},{r['label']}"})]
    write_csv(path, [list(rows[0]), *(list(row.values()) for row in kept)])
    with pytest.raises(InputError, match=error):
        read_dataset(tmp_path)


def test_labels_that_a_protocol_does_not_allow(tmp_path):
    write_splits(write_visa(tmp_path, ["candle"]), ["candle"])
    splits = tmp_path / "split_csv"
    os.replace(splits / "1cls.csv", splits / "one")
    shutil.copy(splits / "2cls_highshot.csv", splits / "1cls.csv")
    os.replace(splits / "one", splits / "2cls_highshot.csv")
    with pytest.raises(InputError, match="1cls: category candle has anomalous train images"):
        read_dataset(tmp_path, "1cls")
    with pytest.raises(InputError, match="2cls_highshot: .* candle has no anomalous train image"):
        read_dataset(tmp_path, "2cls_highshot")


def test_not_a_data_set(tmp_path):
    with pytest.raises(InputError, match="there is no directory .*none"):
        read_dataset(tmp_path / "none")
    touch(tmp_path, "cat/0.jpg", "dog/1.jpg", "file.txt")
    with pytest.raises(InputError, match="neither <object>/Data/Images .* nor <category>/train"):
        read_dataset(tmp_path)
    with pytest.raises(InputError, match="protocol is one of 1cls, .*; got '3shot'"):
        read_dataset(tmp_path, "3shot")


# --------------------------- MVTec-AD and reorganised VisA


def test_mvtec(tmp_path):
    [bottle] = read_dataset(write_mvtec(tmp_path))
    assert [sample.image.name for sample in bottle.train] == [f"00{k}.png" for k in range(4)]
    broken = tmp_path / "bottle/test/broken/000.png"
    mask = tmp_path / "bottle/ground_truth/broken/000_mask.png"
    assert bottle.test[0] == Sample(broken, 1, mask, "broken")
    assert Counter(s.defect for s in bottle.test) == {"broken": 2, "": 2, "spot": 2}
    assert [s.label for s in bottle.test] == [1, 1, 0, 0, 1, 1]
    assert bottle.test == sorted(bottle.test, key=lambda sample: str(sample.image))


def test_faults_of_mvtec(tmp_path):
    write_mvtec(tmp_path)
    with pytest.raises(InputError, match="its only protocol is 1cls, not 2cls_highshot"):
        read_dataset(tmp_path, "2cls_highshot")
    with pytest.raises(InputError, match="no category 'nut'; it has bottle"):
        read_dataset(tmp_path, categories=["nut"])
    mask = tmp_path / "bottle/ground_truth/spot/001_mask.png"
    mask.unlink()
    error = r"test/spot/001\.png has no mask; looked for .*spot/001_mask\.png, .*spot/001\.png"
    with pytest.raises(InputError, match=error):
        read_dataset(tmp_path)
    mask.touch()
    shutil.rmtree(tmp_path / "bottle/test")
    with pytest.raises(InputError, match="category bottle has no test image"):
        read_dataset(tmp_path)
    touch(tmp_path, "cable/train/readme.txt", "cable/test/good/0.png")
    with pytest.raises(InputError, match="category cable has no train image"):
        read_dataset(tmp_path, categories=["cable"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reorganised_visa_is_the_same_data_set(tmp_path, protocol):
    visa = write_splits(write_visa(tmp_path / "visa"))
    save = reorganise(visa, tmp_path / "save", protocol)
    expected = outline(read_dataset(visa, protocol))
    assert outline(read_dataset(save, protocol)) == expected
    assert outline(read_dataset(save / protocol, protocol)) == expected
    samples = [s for category in read_dataset(save, protocol) for s in category.test]
    assert {sample.defect for sample in samples} == {""}  # "bad" says nothing of the type
    (save / protocol).rename(tmp_path / "visa_pytorch")
    assert outline(read_dataset(tmp_path / "visa_pytorch", protocol)) == expected


def test_reorganised_visa_has_only_the_protocols_that_were_prepared(tmp_path):
    visa = write_splits(write_visa(tmp_path / "visa"))
    save = reorganise(visa, tmp_path / "save", "2cls_fewshot")
    with pytest.raises(InputError, match="holds the protocols 2cls_fewshot, but not 1cls"):
        read_dataset(save, "1cls")
    with pytest.raises(InputError, match="holds the protocol 2cls_fewshot, not 2cls_highshot"):
        read_dataset(save / "2cls_fewshot", "2cls_highshot")
    (save / "2cls_fewshot").rename(tmp_path / "other")
    with pytest.raises(InputError, match="1cls: category candle has anomalous train images"):
        read_dataset(tmp_path / "other", "1cls")


def test_draws_of_a_few_images(tmp_path):
    root = write_splits(
        write_visa(tmp_path / "visa", normal=40, anomalous=40), normal=40, anomalous=40
    )
    category = read_dataset(root, "2cls_fewshot")[0]
    assert Counter(sample.label for sample in category.train) == {0: 8, 1: 8}
    draws = [draw_shots(category, 5, run) for run in range(5)]
    for draw in draws:
        assert draw.test == category.test and draw.name == category.name
        assert Counter(sample.label for sample in draw.train) == {0: 5, 1: 5}
        assert set(draw.train) <= set(category.train)
        assert not set(draw.train) & set(draw.test)
    assert len({tuple(draw.train) for draw in draws}) == 5
    assert draw_shots(category, 5, 1) == draws[1]
    assert draw_shots(category, 5, 1, seed=1) != draws[1]
    # the other layout has the same images under other paths
    reorganise(root, tmp_path / "other", "2cls_fewshot")
    other = draw_shots(read_dataset(tmp_path / "other", "2cls_fewshot")[0], 5, 1)
    names = [[(s.label, s.image.name) for s in draw.train] for draw in (other, draws[1])]
    assert sorted(names[0]) == sorted(names[1])
    with pytest.raises(InputError, match="has 8 normal training images, too few to draw 10"):
        draw_shots(category, 10, 0)


def test_every_image_is_drawn_about_equally_often(tmp_path):
    train = [Sample(Path(f"{i:03d}.JPG"), i % 2, None) for i in range(40)]
    counts = Counter()
    for run in range(400):
        counts.update(s.image for s in draw_shots(Category("pcb1", train, []), 5, run).train)
    # 400 draws of 5 out of 20: 100 each, with a standard deviation of 8.7
    assert len(counts) == 40 and min(counts.values()) > 60 and max(counts.values()) < 140


def small_mvtec(root):
    """Every image has other bytes, but train and test have files of the same names."""
    for number, part in enumerate(("train/good", "test/good", "test/hole", "ground_truth/hole")):
        folder = root / "nut" / part
        folder.mkdir(parents=True)
        for i in range(3):
            name = f"{i:03d}_mask.png" if "truth" in part else f"{i:03d}.png"
            (folder / name).write_bytes(bytes([number, i]))
    return root


def test_images_in_training_and_test_are_refused(tmp_path):
    root = small_mvtec(tmp_path / "mvtec")
    (category,) = read_dataset(root)
    assert find_leaks(category) == []
    train, test = root / "nut/train/good", root / "nut/test/good"
    shutil.copy(train / "001.png", test / "009.png")
    (told,) = find_leaks(read_dataset(root)[0])
    assert told.endswith("009.png has the same bytes as training image " + str(train / "001.png"))
    (test / "009.png").unlink()
    for leak in (shutil.copy, os.link):
        (test / "001.png").unlink()
        leak(train / "001.png", test / "001.png")
        with pytest.raises(InputError, match="nut has test images in its training set: .*001.png"):
            find_leaks(read_dataset(root)[0])
    (test / "001.png").unlink()
    (test / "007.png").symlink_to(train / "001.png")
    with pytest.raises(InputError, match="007.png is .*train/good/001.png"):
        find_leaks(read_dataset(root)[0])
