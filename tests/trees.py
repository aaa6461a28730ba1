"""Small data sets in the three layouts, for the tests of their readers."""

import csv
import random
from pathlib import Path

import numpy as np
from PIL import Image

from spd_fast.datasets import PROTOCOLS
from spd_fast.datasets.visa import (
    draw_split,
    read_split_csv,
)


def write_visa(root, names=("candle", "widget"), normal=10, anomalous=5, classes=2):
    """VisA as published, without split files; images of 8 x 6 pixels."""
    for name in names:
        data = root / name / "Data"
        for folder in ("Images/Normal", "Images/Anomaly", "Masks/Anomaly"):
            (data / folder).mkdir(parents=True)
        rows = [["image", "label", "mask"]]
        for k in range(normal):
            Image.new("RGB", (8, 6)).save(data / f"Images/Normal/{k:04d}.JPG", "JPEG")
            rows.append([f"{name}/Data/Images/Normal/{k:04d}.JPG", "normal", ""])
        for k in range(anomalous):
            Image.new("RGB", (8, 6)).save(data / f"Images/Anomaly/{k:03d}.JPG", "JPEG")
            mask = np.zeros((6, 8), np.uint8)
            mask[1:3, 2:4] = 1 + k % classes
            Image.fromarray(mask).save(data / f"Masks/Anomaly/{k:03d}.png")
            defects = "scratch" if k else "melt,big  dent"
            rows.append(
                [f"{name}/Data/Images/Anomaly/{k:03d}.JPG", defects, f"{name}/Data/Masks/{k}.png"]
            )
        write_csv(root / name / "image_anno.csv", rows)
    return root


def write_splits(root, names=("candle", "widget"), normal=10, anomalous=5):
    """Split files as published: the rows in random order, CRLF."""
    for protocol in PROTOCOLS:
        rows = []
        for name in names:
            images = [
                [f"{name}/Data/Images/{kind}/{k:0{digits}d}.JPG" for k in range(count)]
                for kind, digits, count in (("Normal", 4, normal), ("Anomaly", 3, anomalous))
            ]
            rows += [
                [row.object, row.split, row.label, row.image, row.mask]
                for row in draw_split(name, *images, protocol)
            ]
        random.Random(1).shuffle(rows)
        header = [["object", "split", "label", "image", "mask"]]
        write_csv(root / "split_csv" / f"{protocol}.csv", header + rows, "\r\n")
    return root


def write_csv(path, rows, newline="\n"):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator=newline).writerows(rows)


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def reorganise(visa, save, protocol):
    """What the official preparation script writes."""
    for row in read_split_csv(visa / "split_csv" / f"{protocol}.csv"):
        kind = "good" if row.label == "normal" else "bad"
        base = f"{protocol}/{row.object}"
        touch(save, f"{base}/{row.split}/{kind}/{Path(row.image).name}")
        if row.mask:
            level = "" if protocol == "1cls" else f"{row.split}/"
            touch(save, f"{base}/ground_truth/{level}bad/{Path(row.mask).name}")
    return save


def write_mvtec(root):
    return touch(
        root,
        *(f"bottle/train/good/00{k}.png" for k in range(4)),
        *(f"bottle/test/{kind}/00{k}.png" for kind in ("good", "broken", "spot") for k in (0, 1)),
        *(f"bottle/ground_truth/{k}_mask.png" for k in ("broken/000", "broken/001", "spot/000")),
        "bottle/ground_truth/spot/001_mask.png",
        "license.txt",
    )


def outline(dataset):
    """What a layout does not change: part, label and file names of every image."""
    return sorted(
        (category.name, part, sample.label, sample.image.name, sample.mask and sample.mask.name)
        for category in dataset
        for part, samples in (("train", category.train), ("test", category.test))
        for sample in samples
    )


def small_visa(root, categories=("board", "nut"), normal=10, anomalous=3):
    """A data set in the official VisA layout: dark discs on gray, defects are bright squares."""
    rng = np.random.default_rng(0)
    rows = []
    for category in categories:
        base = root / category / "Data"
        for folder in ("Images/Normal", "Images/Anomaly", "Masks/Anomaly"):
            (base / folder).mkdir(parents=True)
        for kind, count in (("Normal", normal), ("Anomaly", anomalous)):
            for i in range(count):
                pixels = rng.normal(128, 12, (60, 80, 3))
                pixels[20:40, 30:50] -= 60
                relative = f"{category}/Data/Images/{kind}/{i:03d}.JPG"
                mask = ""
                if kind == "Anomaly":
                    pixels[25:33, 34:44] += 120
                    plane = np.zeros((60, 80), np.uint8)
                    plane[25:33, 34:44] = 1 + i % 2
                    mask = f"{category}/Data/Masks/Anomaly/{i:03d}.png"
                    Image.fromarray(plane).save(root / mask)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                    root / relative, "JPEG", quality=95
                )
                split = "test" if kind == "Anomaly" or i >= normal - 3 else "train"
                label = "anomaly" if kind == "Anomaly" else "normal"
                rows.append((category, split, label, relative, mask))
    (root / "split_csv").mkdir()
    with open(root / "split_csv" / "1cls.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("object", "split", "label", "image", "mask"))
        writer.writerows(rows)
    return root
