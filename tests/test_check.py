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
    assert "expected is Table 1 of the VisA paper, its misprint corrected" in text
    assert reports[1].expected_classes == 2 and "2/2  ok" in text and "2/1" not in text


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


def edit(path, old, new):
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new).encode())


def link_to_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere")


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
    "label": (
        lambda r: edit(
            r.parent / "split_csv/1cls.csv",
            "anomaly,widget/Data/Images/Anomaly/002.JPG,widget/Data/Masks/Anomaly/002.png",
            "normal,widget/Data/Images/Anomaly/002.JPG,",
        ),
        "1cls.csv labels images wrongly: widget/Data/Images/Anomaly/002.JPG",
    ),
    "label of a normal image": (
        lambda r: edit(
            r.parent / "split_csv/1cls.csv",
            "normal,widget/Data/Images/Normal/0004.JPG,",
            "anomaly,widget/Data/Images/Normal/0004.JPG,widget/Data/Masks/Anomaly/004.png",
        ),
        "1cls.csv labels images wrongly: widget/Data/Images/Normal/0004.JPG",
    ),
    "mask of another": (
        lambda r: edit(
            r.parent / "split_csv/2cls_fewshot.csv",
            "001.JPG,widget/Data/Masks/Anomaly/001.png",
            "001.JPG,widget/Data/Masks/Anomaly/002.png",
        ),
        "2cls_fewshot.csv gives images other masks: widget/Data/Images/Anomaly/001.JPG",
    ),
    "empty image": (
        lambda r: (r / "Data/Images/Normal/0007.JPG").write_bytes(b""),
        "normal images without content: 0007.JPG",
    ),
    "link": (
        lambda r: link_to_nowhere(r / "Data/Images/Normal/0007.JPG"),
        "normal images without content: 0007.JPG",
    ),
    "annotation": (lambda r: (r / "image_anno.csv").write_text("image\n"), "there is no column"),
    "empty annotation": (
        lambda r: (r / "image_anno.csv").write_text("image,label,mask\n"),
        "image_anno.csv does not name the defects of Anomaly/000.JPG, Anomaly/001.JPG, ",
    ),
    "annotation of another": (
        lambda r: edit(r / "image_anno.csv", "Anomaly/003.JPG", "Anomaly/033.JPG"),
        "image_anno.csv names defects of other images: Anomaly/033.JPG",
    ),
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


def test_an_annotation_need_not_list_the_normal_images(tmp_path):
    write_splits(write_visa(tmp_path, ["widget"]), ["widget"])
    path = tmp_path / "widget/image_anno.csv"
    path.write_text("".join(ln for ln in path.open() if ",normal," not in ln))
    assert path.read_text().count("\n") == 6
    assert report_of(tmp_path, "widget").ok


def test_check_of_something_else(tmp_path):
    with pytest.raises(InputError, match="there is no directory"):
        check_visa(tmp_path / "none")
    with pytest.raises(InputError, match="not VisA as published: it holds no <object>/Data/Images"):
        check_visa(write_mvtec(tmp_path))
