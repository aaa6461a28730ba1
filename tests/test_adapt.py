import csv
import signal

import pytest
import torch
import torchvision
from pretrain_runs import signal_at, trace
from trees import small_visa

import spd_fast.adapt as module
from spd_fast import loader
from spd_fast.adapt import adapt, with_defaults
from spd_fast.choices import ADAPT
from spd_fast.cli import main
from spd_fast.errors import InputError
from spd_fast.models import load_backbone
from spd_fast.pretrain import SAVED
from spd_fast.pretrain_config import PretrainConfig, read_config, resolved

TINY = {"backbone": "resnet18", "size": 32, "batch_size": 7, "epochs": 2, "dim": 64}
TINY |= {"predictor_dim": 16, "init": "random"}


@pytest.fixture(scope="module")
def visa(tmp_path_factory):
    """Of each category the first 7 normal images are for training, 3 are for the test."""
    return small_visa(tmp_path_factory.mktemp("visa"))


def reorganised(visa, root):
    """The same images as the data set's preparation script arranges them."""
    for split, label, image, mask in rows(visa, "board"):
        kind = "good" if label == "normal" else "bad"
        for source, folder in ((image, f"{split}/{kind}"), (mask, f"ground_truth/{kind}")):
            if source:
                to = root / "1cls" / "board" / folder / source.rpartition("/")[2]
                to.parent.mkdir(parents=True, exist_ok=True)
                to.symlink_to(visa / source)
    return root


def rows(visa, category: str) -> list[tuple]:
    """split, label, image and mask, read with nothing of ours."""
    with open(visa / "split_csv" / "1cls.csv", newline="") as file:
        return [tuple(row[1:]) for row in csv.reader(file) if row[0] == category]


@pytest.mark.parametrize("layout", ["published", "reorganised"])
def test_only_the_normal_training_images_are_read(visa, layout, tmp_path, monkeypatch):
    root = visa if layout == "published" else reorganised(visa, tmp_path / "visa")
    read, read_image = [], loader.read_image
    monkeypatch.setattr(loader, "read_image", lambda path: read.append(path) or read_image(path))
    assert adapt(root, tmp_path / "out", category=["board"], **TINY) == 0
    train = [image for split, label, image, _ in rows(visa, "board") if split == "train"]
    assert len(train) == 7
    assert {path.resolve() for path in read} == {(visa / image).resolve() for image in train}


def test_a_run_is_repeated_from_its_settings(visa, tmp_path):
    assert adapt(visa, tmp_path / "out", **TINY) == 0
    for name in ("board", "nut"):
        first, again = tmp_path / "out" / name, tmp_path / "again" / name
        assert {path.name for path in first.iterdir()} >= {
            *("last.pt", "best.pt", "metrics.jsonl", "run.html", "run.json", "config.yaml")
        }
        assert main(["pretrain", "--config", str(first / "config.yaml"), "--out", str(again)]) == 0
        assert trace(again) == trace(first) and len(trace(first)) == 2
        assert f"resnet18, {name}" in (first / "run.html").read_text()
    assert trace(tmp_path / "out" / "board") != trace(tmp_path / "out" / "nut")


def test_each_category_starts_from_the_given_weights(visa, tmp_path):
    """At a rate of almost zero the backbones stay where they started."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "start.pt")
    quiet = TINY | {"init": tmp_path / "start.pt", "lr": 1e-30, "weight_decay": 0.0}
    assert adapt(visa, tmp_path / "out", **quiet) == 0
    start = load_backbone("resnet18", tmp_path / "start.pt")
    for name in ("board", "nut"):
        end = load_backbone("resnet18", tmp_path / "out" / name / "last.pt")
        for (key, before), after in zip(start.named_parameters(), end.parameters()):
            if not key.startswith("fc."):
                torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-12, msg=key)


def test_resume_leaves_what_is_finished_and_ends_what_is_not(visa, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(3, signal.SIGTERM, patch)  # the first step of the second category
        assert adapt(visa, tmp_path, **TINY) == SAVED
    board, nut = tmp_path / "board", tmp_path / "nut"
    assert (len(trace(board)), len(trace(nut))) == (2, 1)
    finished = board / "last.pt"
    before = finished.stat().st_mtime_ns, trace(board)
    with pytest.raises(InputError, match="board already holds a run"):
        adapt(visa, tmp_path, **TINY)
    assert adapt(visa, tmp_path, resume=True, **TINY) == 0
    assert (finished.stat().st_mtime_ns, trace(board)) == before
    assert len(trace(nut)) == 2
    with pytest.raises(InputError, match="cannot be resumed: it was made with eta 0.1"):
        adapt(visa, tmp_path, resume=True, eta=0.5, **TINY)


def test_the_defaults_stand_between_the_user_and_the_recipe():
    moco = with_defaults({"recipe": "moco", "epochs": 3, "lr": 1.0})
    assert moco == ADAPT | {"recipe": "moco", "epochs": 3, "lr": 1.0}
    assert "queue_size" not in with_defaults({})
    for given, rate in (
        ({}, 0.025),
        ({"batch_size": 128}, 0.05),
        ({"recipe": "moco"}, 0.03 / 8**0.5),
        ({"recipe": "simclr", "batch_size": 64}, 4.8 / 8),
    ):
        settings = with_defaults(given)
        config = resolved(PretrainConfig(["visa"], "out", category="board", **settings))
        assert config.lr * config.batch_size / 256 == pytest.approx(rate)
        assert config.epochs == 20 and config.warmup_epochs == 0


def test_the_command_line_reaches_the_run(visa, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(module, "pretrain", lambda config: given.append(config) or 0)
    out = tmp_path / "out"
    arguments = ["adapt", "--data", str(visa), "--init", "imagenet", "--out", str(out)]
    more = ["--recipe", "simclr", "--no-spd", "--eta", "0.3", "--batch-size", "4", "--resume"]
    assert main([*arguments, "--category", "nut", "--batch-size", "2"]) == 0
    assert main([*arguments, *more]) == 0
    expected = resolved(
        PretrainConfig(
            **{"data": [str(visa)], "out": out / "nut", "category": "nut", "init": "imagenet"},
            **ADAPT | {"batch_size": 2, "queue_size": None, "lr": 0.8},
        )
    )
    assert given[0] == expected
    for config, name in zip(given[1:], ("board", "nut"), strict=True):
        assert (config.category, config.out, config.recipe) == (name, out / name, "simclr")
        assert (config.spd, config.eta, config.batch_size, config.resume) == (False, 0.3, 4, True)
    with pytest.raises(SystemExit):
        main(["adapt", "--data", str(visa), "--out", str(out)])  # the weights are to be named


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category": ["screw"]}, "has no category 'screw'; it has board, nut"),
        ({"batch_size": 8}, "board has 7 normal training images, fewer than a batch of 8: give"),
        ({"recipe": "supervised"}, "nothing for the recipe supervised to learn"),
        ({"recipe": "byol"}, "recipe 'byol' is not there"),
        ({"init": "nowhere.pt"}, "there is no file nowhere.pt"),
        ({"data": "nowhere"}, "there is no directory nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(visa, changes, message, tmp_path):
    heads = {"dim": None, "predictor_dim": None} if "recipe" in changes else {}
    with pytest.raises(InputError, match=message):
        adapt(**{"data": visa, "out": tmp_path / "out"} | TINY | heads | changes)
    assert not (tmp_path / "out" / "board").exists()


def test_no_run_is_written_into_the_data_set(visa):
    with pytest.raises(InputError, match="lies in the data set"):
        adapt(visa, visa / "board", **TINY)


def test_a_category_is_of_one_data_set(visa, tmp_path):
    with pytest.raises(InputError, match="the category nut is of one data set, got 2"):
        resolved(PretrainConfig([visa, visa], tmp_path, category="nut"))
    (tmp_path / "config.yaml").write_text("data: visa\ncategory: nut\n")
    assert read_config(tmp_path / "config.yaml") == {"data": "visa", "category": "nut"}
