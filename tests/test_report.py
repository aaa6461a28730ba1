import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from spd_fast.errors import InputError
from spd_fast.report import format_table, write_report
from spd_fast.results import load_run

VOID = {"meta", "img", "br", "path", "line", "polyline", "wbr"}


class Page(HTMLParser):
    """Fails on tags that are not closed in order; collects text, attributes and table cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text, self.cells, self.rows = [], [], "", [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def tags(self, name):
        return [attrs for tag, attrs in self.seen if tag == name]


def numbers(**changed):
    return {
        "au_roc": 0.9,
        "au_pr": 0.8,
        "average_precision": 0.7,
        "max_f1": 0.6,
        "threshold": 3.0,
        **changed,
    }


def category(directory, name, image=None, pixel=None, title=None, n_examples=2):
    (directory / name).mkdir(parents=True, exist_ok=True)
    examples = []
    for i in range(n_examples):
        file = f"{name}/{i}.{'jpg' if i else 'png'}"
        Image.new("RGB", (20, 10), (10 * i, 0, 0)).save(directory / file)
        case = {"title": f"worst {i}", "file": file, "score": 2.5 + i, "label": i}
        examples.append(case | {"defect": "scratch" if i else "", "caption": f"{i:03d}.JPG"})
    roc, pr = [[0.0, 0.25, 1.0], [0.0, 0.75, 1.0]], [[0.0, 1.0, 1.0], [1.0, 0.5, 0.004]]
    return {
        "name": name,
        "title": title or name.title(),
        "n_train": 30,
        "n_test": 20,
        "n_anomalous": 5,
        "image": image or numbers(),
        "pixel": pixel or numbers(au_pro=0.55),
        "curves": {"image_roc": roc, "image_pr": pr, "pixel_roc": roc, "pixel_pr": pr},
        "examples": examples,
        "seconds": {"fit": 60.0, "score": 2.0},
    }


def save_run(directory, name, categories, **config):
    directory.mkdir(exist_ok=True)
    defaults = {"data": "visa", "protocol": "1cls", "method": "padim", "backbone": "resnet18"}
    run = {
        "name": name,
        "config": defaults | {"weights": "random", "preset": "paper", "seed": 0} | config,
        "versions": {"spd_fast": "0.1.0"},
        "seconds": 130.0,
        "categories": categories,
    }
    (directory / "results.json").write_text(json.dumps(run))
    return load_run(directory)


def three_runs(tmp_path):
    runs = []
    for i, name in enumerate(["random", "SimSiam", "SimSiam + SPD"]):
        directory = tmp_path / f"run{i}"
        candle = category(directory, "candle", image=numbers(au_roc=0.5 + i / 10))
        runs.append(save_run(directory, name, [candle, category(directory, "pcb1")]))
    return runs


def report(runs, tmp_path, title="A report"):
    path = tmp_path / "report.html"
    write_report(runs, path, title)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.mark.parametrize("n_runs", [1, 3])
def test_page_is_complete_and_self_contained(tmp_path, n_runs):
    runs = three_runs(tmp_path)[:n_runs]
    text, page = report(runs, tmp_path)
    assert not re.search(r"https?:|<script.+src|<link|<iframe|@import|url\(|//\w", text)
    assert all(a["href"].startswith("#") for a in page.tags("a"))
    ids = {attrs["id"] for _, attrs in page.seen if "id" in attrs}
    assert {a["href"][1:] for a in page.tags("a")} <= ids
    images = page.tags("img")
    assert len(images) == n_runs * 2 * 2
    assert {i["src"].split(",")[0] for i in images} == {
        "data:image/png;base64",
        "data:image/jpeg;base64",
    }
    assert "Pcb1, worst 1: anomalous (scratch), score 3.5" in images[-1]["alt"]
    curves = [a for a in page.tags("svg") if a.get("role") == "img"]
    assert len(curves) == 4 * 2
    assert len(page.tags("polyline")) == n_runs * 4 * 2
    assert all(label in text for label in ("false positive rate", "recall", "precision"))
    assert any(meta.get("name") == "viewport" for meta in page.tags("meta"))
    for run in runs:
        assert run["name"] in page.text
    assert "only normal images are seen" in page.text
    assert "25.0 % of the images and 0.4 % of the pixels" in " ".join(page.text.split())


def test_numbers_of_one_run(tmp_path):
    directory = tmp_path / "run"
    a = category(directory, "a", image=numbers(au_roc=0.91234))
    b = category(directory, "b", image=numbers(au_roc=0.7), pixel=numbers(au_pro=None))
    run = save_run(directory, "one", [a, b])
    _, page = report([run], tmp_path)
    assert [
        "A",
        "91.2",
        "80.0",
        "70.0",
        "60.0",
        "90.0",
        "80.0",
        "70.0",
        "60.0",
        "55.0",
    ] in page.rows
    assert ["B", "70.0", "80.0", "70.0", "60.0", "90.0", "80.0", "70.0", "60.0", "–"] in page.rows
    mean = ["Mean", "80.6", "80.0", "70.0", "60.0", "90.0", "80.0", "70.0", "60.0", "55.0"]
    assert mean in page.rows
    lines = [line.split() for line in format_table([run]).splitlines()]
    assert mean in lines and len({len(line) for line in lines[3:5]}) == 1


def test_best_run_is_marked_unless_all_are_equal(tmp_path):
    runs = three_runs(tmp_path)
    _, page = report(runs, tmp_path)
    candle = next(row for row in page.rows if row[0] == "Candle")
    assert candle[1:7] == ["50.0", "60.0", "70.0 (best)", "80.0", "80.0", "80.0"]
    assert page.text.count("(best)") == 2  # the category and the mean
    table = format_table(runs).splitlines()
    assert table.index("Candle") < table.index("Pcb1") < table.index("Mean")
    row = table[table.index("Candle") + 3]
    assert row.split()[:4] == ["SimSiam", "+", "SPD", "70.0*"] and row.count("*") == 1


def test_mean_compares_the_categories_that_all_runs_have(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    both = [category(first, "a", numbers(au_roc=0.6)), category(first, "b", numbers(au_roc=0.8))]
    one = [category(second, "b", numbers(au_roc=0.9))]
    runs = [save_run(first, "both", both), save_run(second, "one", one)]
    _, page = report(runs, tmp_path)
    assert next(r for r in page.rows if r[0] == "A")[1:3] == ["60.0 (best)", "–"]
    assert next(r for r in page.rows if r[0] == "Mean (of shared)")[1:3] == ["80.0", "90.0 (best)"]
    assert "the mean is over the categories that all runs have" in page.text


def test_names_are_escaped(tmp_path):
    evil = "<script>alert(\"x\")</script> & 'so' on"
    directory = tmp_path / "run"
    run = save_run(directory, evil, [category(directory, "a", title=evil)], weights=evil)
    run["categories"][0]["examples"][0] |= {"title": evil, "caption": evil}
    text, page = report([run, run], tmp_path, title=evil)
    assert "<script>alert" not in text and len(page.tags("script")) == 1
    assert page.text.count(evil) >= 8
    assert any(evil in image["alt"] for image in page.tags("img"))


def test_levels_and_curves_may_be_absent(tmp_path):
    directory = tmp_path / "run"
    only_images = category(directory, "a", n_examples=0) | {"pixel": None, "curves": {}}
    text, page = report([save_run(directory, "x", [only_images])], tmp_path)
    assert ["A", "90.0", "80.0", "70.0", "60.0", "–", "–", "–", "–", "–"] in page.rows
    assert 'href="#curves"' not in text


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot read .*results.json.*spd-fast evaluate"),
        ('{"name": "x", "conf', "results.json is damaged"),
        ("[1, 2]", "is a list"),
        ('{"name": "x", "config": {}}', "no valid 'categories'"),
        ('{"name": "x", "config": {}, "categories": []}', "no category"),
        ('{"name": "x", "config": {}, "categories": [{"name": "a"}]}', "category 0 .*'n_train'"),
    ],
)
def test_missing_or_damaged_results(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_run(tmp_path)


def test_a_missing_example_leaves_nothing_behind(tmp_path):
    run = three_runs(tmp_path)[0]
    (run["dir"] / "pcb1" / "1.jpg").unlink()
    with pytest.raises(InputError, match=r"pcb1.1\.jpg"):
        write_report([run], tmp_path / "report.html", "x")
    assert not list(tmp_path.glob("*.html"))
    with pytest.raises(InputError, match="no run"):
        write_report([], tmp_path / "report.html", "x")
