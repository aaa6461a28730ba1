"""The synthetic VisA and the folder of photographs: layout, splits, masks, determinism, errors."""

import csv

import numpy as np
import pytest
from PIL import Image

from spd_fast.datasets import photos, read_dataset, synthetic
from spd_fast.datasets.photos import write_photographs
from spd_fast.datasets.synthetic import CATEGORIES, LEAST, MOST, render, write_synthetic_visa
from spd_fast.datasets.synthetic.photos import cut_coins
from spd_fast.errors import InputError
from spd_fast.files import make_empty_dir

SIZE = (120, 96)
FAST = ("coffee", "brick")  # the quickest to draw
HEADER = "object,split,label,image,mask"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "visa"
    write_synthetic_visa(out, seed=3, size=SIZE, n_normal=5, n_anomaly=5)
    return out


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_categories_are_those_that_can_be_made():
    assert tuple(synthetic.products()) == CATEGORIES


def test_layout(tree):
    assert {p.name for p in tree.iterdir()} == {*CATEGORIES, "split_csv"}
    for category in CATEGORIES:
        digits = synthetic.products()[category].digits
        folder = tree / category / "Data"
        normal = {p.name for p in (folder / "Images/Normal").iterdir()}
        assert normal == {f"{i:0{digits}d}.JPG" for i in range(5)}
        anomaly = {p.name for p in (folder / "Images/Anomaly").iterdir()}
        assert anomaly == {f"{i:03d}.JPG" for i in range(5)}
        masks = {p.stem for p in (folder / "Masks/Anomaly").glob("*.png")}
        assert masks == {f"{i:03d}" for i in range(5)}
        with Image.open(folder / "Images/Anomaly/000.JPG") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", SIZE)


def test_masks_hold_the_classes_named_in_the_annotation(tree):
    for category in CATEGORIES:
        classes = synthetic.defect_classes(category)
        assert len(classes) >= 3
        rows = read_rows(tree / category / "image_anno.csv")
        assert [r["label"] for r in rows[:5]] == ["normal"] * 5
        assert all(r["mask"] == "" for r in rows[:5])
        seen = set()
        for row in rows[5:]:
            with Image.open(tree / row["mask"]) as image:
                assert (image.mode, image.size) == ("L", SIZE)
                values = set(np.unique(image).tolist()) - {0}
            assert {classes[v - 1] for v in values} == set(row["label"].split(", "))
            seen |= values
        assert seen == set(range(1, len(classes) + 1))


@pytest.mark.parametrize(
    "name, train_normal, train_anomaly",
    [("1cls", 4, 0), ("2cls_highshot", 3, 3), ("2cls_fewshot", 1, 1)],
)
def test_split_files(tree, name, train_normal, train_anomaly):
    raw = (tree / "split_csv" / f"{name}.csv").read_bytes()
    assert raw.startswith(HEADER.encode() + b"\r\n")
    assert raw.count(b"\n") == raw.count(b"\r\n") == 1 + 10 * len(CATEGORIES)
    rows = read_rows(tree / "split_csv" / f"{name}.csv")
    assert len({r["image"] for r in rows}) == len(rows)
    for category in CATEGORIES:
        own = [r for r in rows if r["object"] == category]
        train = [r["label"] for r in own if r["split"] == "train"]
        assert len(own) == 10
        assert train.count("normal") == train_normal and train.count("anomaly") == train_anomaly
    for row in rows:
        kind = {"normal": "Normal", "anomaly": "Anomaly"}[row["label"]]
        assert row["image"].startswith(f"{row['object']}/Data/Images/{kind}/")
        assert (tree / row["image"]).is_file()
        assert (row["mask"] == "") == (row["label"] == "normal")
        assert row["mask"] == "" or (tree / row["mask"]).is_file()


def test_the_reader_understands_it(tree):
    for protocol, n_train in (("1cls", 4), ("2cls_highshot", 6)):
        categories = read_dataset(tree, protocol)
        assert [c.name for c in categories] == sorted(CATEGORIES)
        for category in categories:
            assert len(category.train) == n_train and len(category.test) == 10 - n_train
            for sample in category.train + category.test:
                assert (sample.label == 1) == (sample.mask is not None)


@pytest.mark.parametrize("category", CATEGORIES)
def test_an_anomalous_image_differs_from_its_twin_only_in_the_mask(category):
    for index in range(3):
        made = render(category, True, index, size=(160, 128))
        assert made.image.shape == made.clean.shape == (128, 160, 3)
        differs = (made.image != made.clean).any(axis=2)
        assert not differs[made.mask == 0].any()
        assert differs[made.mask > 0].mean() > 0.5
        names = synthetic.defect_classes(category)
        classes = np.unique(made.mask[made.mask > 0])
        assert {names[k - 1] for k in classes} == set(made.defects)
        for k in classes:
            assert LEAST <= (made.mask == k).mean() <= MOST
    normal = render(category, False, 0, size=(160, 128))
    assert normal.defects == () and not normal.mask.any()
    assert (normal.image != made.clean).mean() > 0.3  # another pose and light


def test_a_second_run_gives_the_same_bytes_and_more_images_change_none(tree, tmp_path):
    again, more = tmp_path / "again", tmp_path / "more"
    write_synthetic_visa(again, seed=3, size=SIZE, n_normal=5, n_anomaly=5, categories=FAST)
    write_synthetic_visa(more, seed=3, size=SIZE, n_normal=7, n_anomaly=6, categories=FAST[:1])
    files = [
        p.relative_to(again)
        for p in again.rglob("*")
        if p.is_file() and p.relative_to(again).parts[0] != "split_csv"
    ]
    assert len(files) == len(FAST) * 16
    assert all((again / f).read_bytes() == (tree / f).read_bytes() for f in files)
    shared = [f for f in files if f.parts[0] == FAST[0] and f.suffix != ".csv"]
    assert all((again / f).read_bytes() == (more / f).read_bytes() for f in shared)
    lines = (tree / "split_csv/1cls.csv").read_text().splitlines()
    wanted = [line for line in lines if line.startswith(FAST)]
    assert (again / "split_csv/1cls.csv").read_text().splitlines() == [HEADER, *wanted]


def test_another_seed_gives_other_images():
    first, second = (render("brick", False, 0, seed, SIZE).image for seed in (0, 1))
    assert (first != second).mean() > 0.5


def test_a_defect_that_never_succeeds_is_an_error(monkeypatch):
    monkeypatch.setattr(synthetic, "LEAST", 1.0)  # of the image
    monkeypatch.setattr(synthetic, "ATTEMPTS", 2)
    with pytest.raises(RuntimeError, match="anomalous image 3 of brick: no attempt of 2 gave"):
        render("brick", True, 3, size=SIZE)


def test_other_photographs_are_an_error(monkeypatch):
    monkeypatch.setattr("spd_fast.datasets.synthetic.photos.N_COINS", 23)
    with pytest.raises(InputError, match=r"23 coins, but .* scikit-image [\d.]+ finds 24"):
        cut_coins.__wrapped__()


def test_make_empty_dir(tmp_path):
    assert make_empty_dir(tmp_path / "a" / "b").is_dir()
    assert make_empty_dir(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    with pytest.raises(InputError, match="a is not empty: give a new directory"):
        make_empty_dir(tmp_path / "a")


def test_bad_input(tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="full is not empty.*new directory"):
        write_synthetic_visa(full)
    assert [p.name for p in full.iterdir()] == ["note.txt"]
    new = tmp_path / "new"
    with pytest.raises(InputError, match="no synthetic category screws: use pcb, gelcaps"):
        write_synthetic_visa(new, categories=["screws"])
    with pytest.raises(InputError, match="4 normal and 3 anomalous"):
        write_synthetic_visa(new, n_normal=4, n_anomaly=3)
    with pytest.raises(InputError, match="image size 16 x 100"):
        write_synthetic_visa(new, size=(16, 100))
    with pytest.raises(InputError, match="seed -1"):
        write_synthetic_visa(new, seed=-1)
    with pytest.raises(InputError, match="cannot write to the output directory"):
        write_synthetic_visa(full / "note.txt")
    monkeypatch.setattr(synthetic, "find_spec", lambda name: None)
    synthetic.products.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'spd-fast\[demo\]'"):
        write_synthetic_visa(new)
    assert not new.exists()


def test_an_interrupted_run_leaves_no_split_file(tmp_path, monkeypatch):
    def fail(category, anomaly, index, *args):
        if anomaly:
            raise KeyboardInterrupt
        return render(category, anomaly, index, *args)

    monkeypatch.setattr(synthetic, "render", fail)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic_visa(tmp_path / "out", 0, (64, 64), 5, 3, FAST[:1])
    assert not list((tmp_path / "out").rglob("*.csv"))


def test_photographs(tmp_path):
    write_photographs(tmp_path / "a", count=30, seed=1, size=48)
    write_photographs(tmp_path / "b", count=30, seed=1, size=48)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.jpg"))
    assert len(files) == 30
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    per_photo = [len(list(folder.iterdir())) for folder in (tmp_path / "a").iterdir()]
    assert len(per_photo) >= len(photos.SKIMAGE_PHOTOGRAPHS)
    assert max(per_photo) - min(per_photo) <= 1
    for file in files:
        with Image.open(tmp_path / "a" / file) as image:
            assert (image.mode, image.size) == ("RGB", (48, 48))
    with pytest.raises(InputError, match="not empty"):
        write_photographs(tmp_path / "a")
    with pytest.raises(InputError, match="cannot write 0 photographs"):
        write_photographs(tmp_path / "c", count=0)
    assert not (tmp_path / "c").exists()


def test_a_crop_keeps_the_colours():
    photo = photos.load_photograph("coffee.png")
    crop = np.asarray(photos.random_crop(photo, np.random.default_rng(0), 64), dtype=float)
    ratio = crop.reshape(-1, 3).mean(0) / photo.reshape(-1, 3).mean(0)
    assert ratio.max() / ratio.min() < 1.3 and crop.std() > 20


def test_missing_photograph_is_named(monkeypatch):
    with pytest.raises(InputError, match="does not contain none.png"):
        photos.photograph_path("none.png")
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs skimage.*pip install 'spd-fast\[demo\]'"):
        photos.photograph_path("coffee.png")
