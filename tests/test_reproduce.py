"""The paper's tables from a small VisA, with two weights."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from trees import small_visa, write_mvtec

from spd_fast import InputError, figures, paper
from spd_fast.cli import main
from spd_fast.evaluate import EvaluateConfig, evaluate
from spd_fast.reproduce import ReproduceConfig, _jobs, _settings_of, reproduce
from spd_fast.reproduce_figures import FIGURES
from spd_fast.reproduce_table import Job
from spd_fast.results import load_run

SPD_GAP = ("simsiam+spd", "visa", "1cls", "padim", "image", "au_pr", "mean")
NAMES = ("pcb1", "nut")  # one of VisA's categories, and one that the paper does not have


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict:
    """What `reproduce` is given: a data set, and weights of a ResNet-18."""
    root = tmp_path_factory.mktemp("given")
    weights = {}
    for seed, name in enumerate(("simsiam", "simsiam+spd")):
        torch.manual_seed(seed)
        weights[name] = str(root / f"{name}.pt")
        torch.save(torchvision.models.resnet18().state_dict(), weights[name])
    return {"weights": weights, "data": {"visa": str(small_visa(root / "visa", NAMES))}}


def config(given, out, *targets, **changes) -> ReproduceConfig:
    settings = EvaluateConfig(data="", out="", n_features=20, workers=2, batch_size=4, **changes)
    return ReproduceConfig(targets, out=str(out), settings=settings, backbone="resnet18", **given)


def lines(path) -> dict[tuple, dict]:
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    return {tuple(row[field] for field in paper.Quantity._fields): row for row in rows}


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    """Tables 2 and 7, made once."""
    out = tmp_path_factory.mktemp("done")
    assert reproduce(config(given, out, "table2", "table7")) == {}
    return out


def test_numbers_are_those_of_evaluate(given, done, tmp_path):
    found = lines(done / "table2.csv") | lines(done / "table7.csv")
    means = {}
    for weights, source in given["weights"].items():
        run = evaluate(
            EvaluateConfig(
                data=given["data"]["visa"],
                out=str(tmp_path / weights),
                weights=source,
                n_features=20,
                batch_size=4,
            )
        )
        for level in ("image", "pixel"):
            for metric in ("au_pr", "au_roc"):
                key = (weights, "visa", "1cls", "padim", level, metric)
                each = {c["name"]: 100 * c[level][metric] for c in run["categories"]}
                means[key] = np.mean(list(each.values()))
                line = found[(*key, "mean")]
                assert float(line["ours"]) == pytest.approx(means[key], abs=1e-2)
                assert line["categories"] == "2"
                if level == "image":  # table 7
                    for name, value in each.items():
                        assert float(found[(*key, name)]["ours"]) == pytest.approx(value, abs=1e-2)
    line = found["simsiam+spd", "visa", "1cls", "padim", "pixel", "au_pr", "mean"]
    assert (line["printed"], line["paper"], line["paper_gap"]) == ("9.4 (+0.3)", "9.4", "0.3")
    keys = [(w, "visa", "1cls", "padim", "pixel", "au_pr") for w in ("simsiam+spd", "simsiam")]
    assert float(line["difference"]) == pytest.approx(means[keys[0]] - 9.4, abs=1e-2)
    assert float(line["gap"]) == pytest.approx(means[keys[0]] - means[keys[1]], abs=1e-2)
    assert float(line["gap_low"]) <= float(line["gap"]) <= float(line["gap_high"])
    assert float(line["low"]) < float(line["ours"]) < float(line["high"])
    assert found["moco", "visa", "1cls", "padim", "image", "au_pr", "mean"]["ours"] == ""
    assert found["simsiam", "mvtec", "1cls", "padim", "image", "au_pr", "mean"]["ours"] == ""
    nut = found["simsiam", "visa", "1cls", "padim", "image", "au_pr", "nut"]
    assert nut["paper"] == "" and nut["section"] == "Not in the paper"


def test_what_contradicts_is_compared_with_what_it_must_have_been(given, tmp_path, capsys):
    weights = {"supervised": given["weights"]["simsiam"]}
    reproduce(config(given | {"weights": weights}, tmp_path, "table7"))
    line = lines(tmp_path / "table7.csv")[
        "supervised", "visa", "1cls", "padim", "image", "au_roc", "mean"
    ]
    assert (line["printed"], line["paper"], line["expected"]) == ("7.80", "7.8", "87.8")
    assert float(line["difference"]) == pytest.approx(float(line["ours"]) - 87.8, abs=1e-2)
    assert "7.80*" in capsys.readouterr().out
    assert "7.80\\* / **" in (tmp_path / "table7.md").read_text()


def test_the_same_again_and_after_a_kill(given, done, tmp_path, monkeypatch):
    made = {p.relative_to(done): p.read_bytes() for p in done.rglob("*") if p.is_file()}
    kept = {p: p.stat().st_mtime_ns for p in done.rglob("result.json")}
    reproduce(config(given, done, "table2", "table7"))
    assert {p: p.stat().st_mtime_ns for p in done.rglob("result.json")} == kept
    text = """
import os, sys
from spd_fast import evaluate_category
from spd_fast.cli import main
score, calls = evaluate_category._score, []
def killed(*arguments):
    calls.append(1)
    if len(calls) == 4:  # the last of two weights and two categories
        os.kill(os.getpid(), 9)
    return score(*arguments)
evaluate_category._score = killed
main(sys.argv[1:])
"""
    weights = ",".join(f"{name}={source}" for name, source in given["weights"].items())
    arguments = ["reproduce", "table2", "table7", "--visa", given["data"]["visa"]]
    arguments += ["--weights", weights, "--backbone", "resnet18", "--n-features", "20"]
    arguments += ["--workers", "2", "--batch-size", "4", "--out", str(tmp_path)]
    killed = subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True)
    assert killed.returncode == -9
    assert len(list(tmp_path.rglob("result.json"))) == 3 and not (tmp_path / "table2.csv").exists()
    assert main(arguments) == 0
    for out in (done, tmp_path):
        now = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        assert now.keys() == made.keys()
        for path, data in made.items():
            if path.suffix in (".csv", ".md", ".png", ".pdf"):
                assert now[path] == data, path
    page = (done / "reproduce.html").read_text()
    assert page.replace(str(done), "") == (tmp_path / "reproduce.html").read_text().replace(
        str(tmp_path), ""
    )


def test_processes_give_the_same_table(given, done, tmp_path):
    weights = ",".join(f"{name}={source}" for name, source in given["weights"].items())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command += ["--nproc-per-node=2", sys.executable, "-m", "spd_fast.cli", "reproduce", "table2"]
    command += ["--visa", given["data"]["visa"], "--weights", weights, "--backbone", "resnet18"]
    command += ["--n-features", "20", "--batch-size", "4", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    one, two = lines(done / "table2.csv"), lines(tmp_path / "table2.csv")
    assert one.keys() == two.keys()
    for key, line in one.items():
        if line["ours"]:
            assert float(two[key]["ours"]) == pytest.approx(float(line["ours"]), abs=0.05)


def test_two_class_tables_have_deviations(given, tmp_path, monkeypatch, capsys):
    from spd_fast import twoclass

    small = replace(twoclass.PRESETS["paper"], size=64)
    monkeypatch.setitem(twoclass.PRESETS, "paper", small)
    visa = small_visa(tmp_path / "visa", ("pcb1",), normal=50, anomalous=50)
    shutil.rmtree(visa / "split_csv")
    changed = given | {"data": {"visa": str(visa)}, "weights": {"simsiam": "random"}}
    quick = dict(epochs=1, iterations=2, draws=2)  # high-shot takes the first, k-shot the second
    assert reproduce(config(changed, tmp_path / "out", "table4", "table9", **quick)) == {}
    found = lines(tmp_path / "out" / "table4.csv")
    for protocol, method, level in (("5shot", "classifier", "image"), ("10shot", "unet", "pixel")):
        line = found["simsiam", "visa", protocol, method, level, "au_pr", "mean"]
        run = json.loads(
            (tmp_path / f"out/runs/simsiam/visa_{protocol}_{method}/results.json").read_text()
        )
        draws = [100 * draw[level]["au_pr"] for draw in run["categories"][0]["draws"]]
        assert float(line["ours"]) == pytest.approx(np.mean(draws), abs=1e-2)
        assert float(line["std"]) == pytest.approx(np.std(draws, ddof=1), abs=1e-2)
    assert " ± " in (tmp_path / "out" / "table4.md").read_text()
    page = (tmp_path / "out" / "reproduce.html").read_text()
    for text in (
        "ResNet classifier, 2-class, high-shot, epochs: 1, not 80.",
        "ResNet classifier, 5-shot, iterations: 2, not 1000.",
        "U-Net, 10-shot, draws: 2, not 5.",
        "simsiam: the backbone is resnet18, not resnet50.",
        "simsiam: the weights are random.",
        "VisA, 2-class, high-shot: means are over pcb1, not over the paper&#39;s 12 categories.",
        "VisA, 5-shot: the split was drawn, for want of the data set&#39;s split files.",
    ):
        assert text in page
    for text in ("lr: ", "flips: ", "high-shot, iterations: ", "shot, epochs: –"):
        assert text not in page
    warned = (tmp_path / "out" / "table9.md").read_text()
    assert "- ResNet classifier, 2-class, high-shot, epochs: 1, not 80." in warned
    assert "5-shot" not in warned and "U-Net" not in warned
    assert "std" in capsys.readouterr().out


def test_a_job_that_fails_leaves_the_others(given, tmp_path, monkeypatch):
    def evaluated(settings):
        if settings.name == "moco":
            raise InputError("there is no file nowhere.pt")
        return evaluate(settings)

    monkeypatch.setattr("spd_fast.reproduce.evaluate", evaluated)
    weights = given["weights"] | {"moco": "random"}
    failed = reproduce(config(given | {"weights": weights}, tmp_path / "out", "table2"))
    assert list(failed) == [Job("moco", "visa", "1cls", "padim").title]
    assert "nowhere.pt" in failed["moco, visa, 1cls, padim"]
    found = lines(tmp_path / "out" / "table2.csv")
    assert found["simsiam", "visa", "1cls", "padim", "image", "au_pr", "mean"]["ours"]
    page = (tmp_path / "out" / "reproduce.html").read_text()
    assert "moco, visa, 1cls, padim: failed, there is no file" in page
    assert "simclr (resnet50): no weights were given" in page
    assert "mvtec: no data set was given" in page


def test_figures_can_be_asked_for_alone(given, tmp_path):
    out = tmp_path / "out"
    reproduce(config(given, out, "figure11", "figure7", "curves", category=("pcb1",)))
    names = {path.name for path in (out / "figures").iterdir()}
    assert {"figure11.png", "figure11.pdf", "image_roc_visa_1cls_padim_pcb1.pdf"} <= names
    assert "figure8.png" not in names
    assert not list(out.glob("*.csv"))
    page = (out / "reproduce.html").read_text()
    assert page.count("<img") == 2 + 4 and page.count('alt="') == 2 + 4
    assert "Pixels: ROC. PCB1, VisA, 1-class, PaDiM" in page


def test_attention_maps_need_no_evaluation(given, tmp_path):
    """And the weights may be each category's own."""
    for name in NAMES:
        shutil.copy(given["weights"]["simsiam"], tmp_path / f"{name}.pt")
    weights = {"simsiam": str(tmp_path / "{category}.pt"), "moco": given["weights"]["simsiam"]}
    out = tmp_path / "out"
    assert reproduce(config(given | {"weights": weights}, out, "figure11")) == {}
    assert (out / "figures" / "figure11.png").exists() and not (out / "runs").exists()
    page = (out / "reproduce.html").read_text()
    assert "GradCAM of an anomalous image of nut, PCB1, with simsiam, moco" in page
    (tmp_path / "mvtec").mkdir()
    data = {"mvtec": str(tmp_path / "mvtec")}
    failed = reproduce(config(given | {"data": data}, tmp_path / "none", "figure11"))
    assert failed == {"figure11": "it is drawn from VisA, and no VisA was given"}


def test_axes_of_the_scatter_plots(given, done, monkeypatch):
    found = lines(done / "table2.csv")
    runs = {
        Job(weights, "visa", "1cls", "padim"): load_run(done / f"runs/{weights}/visa_1cls_padim")
        for weights in given["weights"]
    }
    drawn = {}
    monkeypatch.setattr(figures, "scatter", lambda points, metric, title: drawn.update(points))
    for figure, metric in (("figure7", "au_pr"), ("figure8", "au_roc")):
        list(FIGURES[figure].draw(None, runs))
        for source in ("ours", "paper"):
            points = {p["name"]: p for p in drawn["VisA"] if p["source"] == source}
            for weights in given["weights"]:
                for level, axis in (("image", "classification"), ("pixel", "segmentation")):
                    line = found[weights, "visa", "1cls", "padim", level, metric, "mean"]
                    assert points[weights][axis] == pytest.approx(float(line[source]), abs=1e-3)


def test_what_spd_adds_is_shown(given, done, tmp_path, capsys):
    shutil.copytree(done, tmp_path / "again")
    reproduce(config(given, tmp_path / "again", "table2"))
    text = capsys.readouterr().out
    gap = float(lines(done / "table2.csv")[SPD_GAP]["gap"])
    for source, value in (("paper", 2.6), ("ours", gap)):  # SimSiam's is the first
        found = [line.split() for line in text.splitlines() if f"SPD, {source}" in line]
        assert found[0][:3] == ["SPD,", source, f"{value:+.1f}"]
    for name, printed in (("table2.md", "82.8 (+2.6)"), ("reproduce.html", "SPD +2.6")):
        shown = (done / name).read_text()
        assert f"{gap:+.1f}" in shown and printed in shown


def test_categories_of_two_data_sets(given, tmp_path):
    both = given | {"data": given["data"] | {"mvtec": str(write_mvtec(tmp_path / "mvtec"))}}
    for wanted in ({"visa": ("pcb1",)}, {"visa": ("pcb1",), "mvtec": ("bottle",)}):
        names = tuple(name for own in wanted.values() for name in own)
        settings = config(both, tmp_path / "out", "table2", category=names)
        found = _settings_of(settings, _jobs(settings))
        assert {job.dataset: its.category for job, its in found.items()} == wanted


def test_a_data_set_given_as_the_other(given, tmp_path):
    mvtec, visa = write_mvtec(tmp_path / "mvtec"), small_visa(tmp_path / "visa", ("pcb1",))
    for data, found in (({"visa": str(mvtec)}, "MVTec-AD"), ({"mvtec": str(visa)}, "VisA")):
        with pytest.raises(InputError, match=f"holds categories of {found}: "):
            reproduce(config(given | {"data": data}, tmp_path / "out", "table2"))


def test_a_figure_that_fails_leaves_the_rest(given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    out = tmp_path / "out"
    failed = reproduce(config(given, out, "table2", "figure11", category=("pcb1",)))
    assert list(failed) == ["figure11"] and "spd-fast[paper]" in failed["figure11"]
    assert (out / "figures" / "figure7.png").exists() and lines(out / "table2.csv")
    assert "figure11: failed, attention maps need" in (out / "reproduce.html").read_text()


@pytest.mark.parametrize(
    ("targets", "changes", "message"),
    [
        (("table1",), {}, "'table1' is none of table2, .*, figure7"),
        (("table2",), {"weights": {"mine": "random"}}, "the paper has no weights 'mine'; it has"),
        (
            ("table6",),
            {},
            "nothing to do: for table6 give --visa or --mvtec, and weights for one of",
        ),
        (("table2",), {"data": {}}, "nothing to do"),
        (("table2",), {"data": {"visa": "/nowhere"}}, "there is no directory /nowhere"),
        (("curves",), {}, "curves: give a table as well"),
        (("table2",), {"weights": {"moco": "nowhere.pt"}}, "there is no file nowhere.pt"),
        (("table2",), {"backbone": "resnet19"}, "resnet19"),
        (("table2",), {"category": ("pcb9",)}, "no category 'pcb9'; there are nut, pcb1"),
    ],
)
def test_wrong_use(given, tmp_path, targets, changes, message):
    with pytest.raises(InputError, match=message):
        settings = {name: changes[name] for name in changes.keys() & {"category"}}
        changed = {name: changes[name] for name in changes.keys() & given.keys()}
        wrong = config(given | changed, tmp_path / "out", *targets, **settings)
        reproduce(replace(wrong, backbone=changes.get("backbone", "resnet18")))
    assert not (tmp_path / "out").exists()


def test_wrong_arguments(capsys):
    for text, message in (
        ("simsiam", "--weights takes NAME=SOURCE,..., got 'simsiam'"),
        ("moco=a,moco=b", "--weights names moco twice"),
    ):
        assert main(["reproduce", "table2", "--visa", "x", "--weights", text, "--out", "y"]) == 2
        assert message in capsys.readouterr().err
