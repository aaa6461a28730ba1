"""The 2-class models through `evaluate`, on images of 64 x 64 pixels."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from trees import small_visa

from spd_fast import twoclass
from spd_fast.cli import main
from spd_fast.evaluate import EvaluateConfig, evaluate


@pytest.fixture(autouse=True)
def _small_images(monkeypatch):
    small = replace(twoclass.PRESETS["paper"], size=64)
    monkeypatch.setitem(twoclass.PRESETS, "paper", small)


@pytest.fixture(scope="module")
def visa(tmp_path_factory):
    root = small_visa(tmp_path_factory.mktemp("visa"), ("board",), normal=30, anomalous=30)
    shutil.rmtree(root / "split_csv")  # the paper's shares are drawn
    return root


def config(visa, directory, **changes) -> EvaluateConfig:
    values = dict(data=str(visa), out=str(directory), weights="random", workers=2)
    values |= dict(lr=0.02, iterations=12, train_batch_size=6)
    return EvaluateConfig(**values | changes)


@pytest.mark.parametrize("method", ["classifier", "unet"])
def test_high_shot(visa, tmp_path, method):
    steps = {"classifier": 12, "unet": 40}[method]
    lr = {"classifier": 0.02, "unet": 0.002}[method]
    settings = dict(method=method, protocol="2cls_highshot", save_models=True)
    settings |= dict(iterations=steps, lr=lr)
    run = evaluate(config(visa, tmp_path, **settings))
    (board,) = run["categories"]
    assert (board["n_train"], board["n_test"], board["n_anomalous"]) == (36, 24, 12)
    assert board["image"]["au_roc"] > 0.8  # the defects are bright
    assert (board["pixel"] is None) == (method == "classifier")
    assert run["config"]["iterations"] == steps and run["config"]["gamma"] == 2.0
    out = tmp_path / "heat"
    model = str(tmp_path / f"categories/board/{method}.pt")
    images = str(visa / "board/Data/Images/Anomaly/000.JPG")
    assert main(["predict", "--model", model, images, "--out", str(out)]) == 0
    assert len(list(out.glob("*.png"))) == 1


def test_few_shots_are_the_mean_of_draws(visa, tmp_path):
    few = dict(method="unet", protocol="5shot", draws=3, iterations=2)
    run = evaluate(config(visa, tmp_path / "out", **few))
    (board,) = run["categories"]
    assert (board["n_train"], board["n_test"], board["n_anomalous"]) == (10, 48, 24)
    draws = [draw["pixel"]["au_pr"] for draw in board["draws"]]
    assert len(set(draws)) == 3
    assert board["pixel"]["au_pr"] == pytest.approx(np.mean(draws))
    assert board["pixel_std"]["au_pr"] == pytest.approx(np.std(draws, ddof=1))
    assert board["image"]["threshold"] == board["draws"][0]["image"]["threshold"]
    assert not (tmp_path / "out" / "unfinished").exists()
    stored = np.load(tmp_path / "out/categories/board/replicates.npz")
    assert board["intervals"].keys() == {k for k in stored.files if k != "key"}
    for name, interval in board["intervals"].items():
        assert interval == list(np.quantile(stored[name], [0.025, 0.975]))
    # draws are numbered: the first two are those of a run with two
    two = evaluate(config(visa, tmp_path / "two", **few | {"draws": 2}))
    assert [d["pixel"]["au_pr"] for d in two["categories"][0]["draws"]] == draws[:2]


def test_a_run_killed_in_the_middle_of_a_draw_goes_on(visa, tmp_path, monkeypatch):
    few = dict(method="classifier", protocol="5shot", draws=2)
    whole = evaluate(config(visa, tmp_path / "whole", **few))
    monkeypatch.setattr(twoclass, "SAVE_EVERY", 5)
    calls, loss = [], twoclass.sigmoid_focal_loss

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 12 + 9:  # in the second draw
            raise KeyboardInterrupt
        return loss(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(twoclass, "sigmoid_focal_loss", killed)
        evaluate(config(visa, tmp_path / "out", **few))
    assert len(list((tmp_path / "out/unfinished").glob("board-*/draw_0/result.json"))) == 1
    assert len(list((tmp_path / "out/unfinished").glob("board-*/draw_1.pt"))) == 1
    steps = []
    monkeypatch.setattr(
        twoclass, "sigmoid_focal_loss", lambda *a, **k: (steps.append(1), loss(*a, **k))[1]
    )
    again = evaluate(config(visa, tmp_path / "out", **few))
    assert len(steps) == 12 - 5  # the first draw, and five steps of the second, were kept
    for name in ("image", "image_std", "draws", "curves", "intervals"):
        assert again["categories"][0][name] == whole["categories"][0][name]
