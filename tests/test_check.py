import shutil

import pytest
from PIL import Image
from trees import touch, write_mvtec, write_splits, write_visa

from spd_fast.datasets import check
from spd_fast.datasets.check import check_visa, format_check
from spd_fast.datasets.visa import (
    OFFICIAL_CLASSES,
    TABLE_1,
    TableRow,
)
from spd_fast.errors import InputError


def report_of(root, name):
    return next(report for report in check_visa(root) if report.name == name)


def test_check_of_a_complete_tree(tmp_path, monkeypatch):
    table = {"candle": TableRow(10, 5, 2), "pipe_fryum": TableRow(10, 5, 1)}
    monkeypatch.setattr(check, "TABLE_1", table)
    monkeypatch.setitem(OFFICIAL_CLASSES, "pipe_fryum", 2)
    names = ["candle", "pipe_fryum", "widget"]
    reports = check_visa(write_splits(write_visa(tmp_path, names), names))
    assert [(r.name, r.normal, r.anomalous, r.masks, r.classes) for r in reports] == [
        (name, 10, 5, 5, 2) for name in names
    ]
    assert all(report.ok for report in reports)
    text = format_check(reports)
    assert "Problems" not in text and "No fault found" in text
    assert "widget" in text and "not one of VisA's 12" in text
    assert "- pipe_fryum: Table 1 prints 1 defect classes, a misprint" in text


def test_check_says_what_table_1_misses(tmp_path):
    reports = check_visa(write_visa(tmp_path, ["candle"]))
    assert [report.name for report in reports] == sorted(TABLE_1)
    assert not any(report.ok for report in reports)
    text = format_check(reports)
    assert "10/1000" in text and "candle: normal images: 10, Table 1 has 1000" in text
    assert "defect classes in the masks: 2, expected 8" in text
    assert "capsules, cashew, chewinggum" in text and "the folder is missing" in text
    assert "12 of 12 objects have problems" in text and "there is no split_csv" in text


def test_check_of_another_data_set(tmp_path):
    [report] = check_visa(write_splits(write_visa(tmp_path, ["widget"]), ["widget"]))
    assert report.ok and report.expected is None
    assert "none of the objects is one of VisA's 12" in format_check([report])


CHECK_FAULTS = {  # what is done to the tree, and the sentence
    "no mask": (lambda r: (r / "Data/Masks/Anomaly/003.png").unlink(), "without a mask: 003.JPG"),
    "no image": (
        lambda r: (r / "Data/Images/Anomaly/003.JPG").unlink(),
        "masks without an anomalous image: 003.png",
    ),
    "size": (
        lambda r: Image.new("L", (6, 8), 1).save(r / "Data/Masks/Anomaly/001.png"),
        "of another size than their image: 001.png (6 x 8, image 8 x 6)",
    ),
    "empty mask": (
        lambda r: Image.new("L", (8, 6)).save(r / "Data/Masks/Anomaly/001.png"),
        "masks without an anomalous pixel: 001.png",
    ),
    "bad mask": (
        lambda r: (r / "Data/Masks/Anomaly/001.png").write_bytes(b"no"),
        "001.png: not an image",
    ),
    "listed": (
        lambda r: (r / "Data/Images/Normal/0007.JPG").unlink(),
        "2cls_highshot.csv lists missing files: widget/Data/Images/Normal/0007.JPG",
    ),
    "not listed": (
        lambda r: touch(r, "Data/Images/Normal/0010.JPG"),
        "1cls.csv does not list widget/Data/Images/Normal/0010.JPG",
    ),
    "annotation": (lambda r: (r / "image_anno.csv").write_text("image\n"), "there is no column"),
    "split file": (
        lambda r: (r.parent / "split_csv/2cls_fewshot.csv").unlink(),
        "2cls_fewshot.csv: No such file",
    ),
    "folder": (lambda r: shutil.rmtree(r), "the folder is missing"),
}


@pytest.mark.parametrize("fault", CHECK_FAULTS)
def test_check_finds(tmp_path, fault):
    damage, sentence = CHECK_FAULTS[fault]
    names = ["bolt", "widget"]
    write_splits(write_visa(tmp_path, names), names)
    assert report_of(tmp_path, "widget").ok
    damage(tmp_path / "widget")
    report = report_of(tmp_path, "widget")
    assert not report.ok and any(sentence in problem for problem in report.problems)
    assert sentence in format_check([report])
    assert report_of(tmp_path, "bolt").ok == (fault != "split file")


def test_check_of_something_else(tmp_path):
    with pytest.raises(InputError, match="there is no directory"):
        check_visa(tmp_path / "none")
    with pytest.raises(InputError, match="not VisA as published: it holds no <object>/Data/Images"):
        check_visa(write_mvtec(tmp_path))
