import csv
import json
import resource
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from trees import small_visa

from spd_fast import InputError
from spd_fast.cli import main
from spd_fast.evaluate import EvaluateConfig, evaluate, settings_of
from spd_fast.files import locked
from spd_fast.padim import PaDiM
from spd_fast.threads import in_threads


@pytest.fixture(scope="module")
def visa(tmp_path_factory):
    return small_visa(tmp_path_factory.mktemp("visa"))


def config(visa, directory, **changes) -> EvaluateConfig:
    values = dict(data=str(visa), out=str(directory), weights="random", n_features=20)
    return EvaluateConfig(**values | dict(batch_size=4, workers=2) | changes)


def test_evaluate_writes_table_results_and_report(visa, tmp_path, capsys):
    run = evaluate(config(visa, tmp_path, name="small", save_models=True))
    printed = capsys.readouterr().out
    assert "board" in printed and "Mean" in printed and "report.html" in printed
    stored = json.loads((tmp_path / "results.json").read_text())
    assert [c["name"] for c in stored["categories"]] == ["board", "nut"]
    assert stored["config"]["n_features"] == 20 and stored["versions"]["torch"]
    board = stored["categories"][0]
    assert (board["n_train"], board["n_test"], board["n_anomalous"]) == (7, 6, 3)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg;base64") == sum(
        len(c["examples"]) for c in stored["categories"]
    )
    assert run["dir"] == tmp_path

    # the numbers are those of the saved model, by scikit-learn
    from spd_fast.datasets import read_dataset
    from spd_fast.datasets.images import read_image, read_mask
    from spd_fast.padim import PRESETS
    from spd_fast.preprocess import prepare_image, prepare_mask

    model = PaDiM.load(tmp_path / "categories/board/padim.pt")
    category = read_dataset(visa)[0]
    maps, scores, masks, labels = [], [], [], []
    for sample in category.test:
        image = read_image(sample.image)
        score_map, score = model.score(prepare_image(image, PRESETS["paper"])[None])
        mask = read_mask(sample.mask) if sample.mask else np.zeros(image.shape[:2], bool)
        maps.append(score_map[0].numpy())
        scores.append(float(score))
        masks.append(prepare_mask(mask, PRESETS["paper"]))
        labels.append(sample.label)
    assert board["image"]["au_roc"] == pytest.approx(roc_auc_score(labels, scores))
    truth, values = np.ravel(masks), np.ravel(maps)
    assert board["pixel"]["au_roc"] == pytest.approx(roc_auc_score(truth, values), abs=1e-4)
    assert board["pixel"]["average_precision"] == pytest.approx(
        average_precision_score(truth, values), abs=1e-3
    )


def test_compile_reaches_the_network(visa, tmp_path, monkeypatch):
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, images):
            seen.append(len(images))
            return self.network(images)

    monkeypatch.setattr(torch, "compile", Watched)
    evaluate(config(visa, tmp_path, category=("board",), compile=True))
    assert sum(seen) == 7 + 6  # train and test


def test_an_interrupted_evaluation_goes_on(visa, tmp_path, capsys):
    evaluate(config(visa, tmp_path, category=("board",)))
    before = (tmp_path / "categories/board/result.json").stat().st_mtime_ns
    assert not (tmp_path / "unfinished").exists()
    evaluate(config(visa, tmp_path))
    assert (tmp_path / "categories/board/result.json").stat().st_mtime_ns == before
    assert (tmp_path / "categories/nut/result.json").exists()
    touched = visa / "board/Data/Images/Normal/001.JPG"
    touched.write_bytes(touched.read_bytes())  # other data, for all one can see from outside
    evaluate(config(visa, tmp_path))
    assert (tmp_path / "categories/board/result.json").stat().st_mtime_ns != before


def test_each_category_has_its_own_weights(visa, tmp_path):
    for seed, name in enumerate(("board", "nut")):
        (tmp_path / name).mkdir()
        torch.save(new_weights(seed), tmp_path / name / "last.pt")
    each = config(visa, tmp_path / "each", weights=str(tmp_path / "{category}" / "last.pt"))
    run = evaluate(each)
    assert run["config"]["weights"] == each.weights
    for found in run["categories"]:
        weights = str(tmp_path / found["name"] / "last.pt")
        one = config(visa, tmp_path / "one", weights=weights, category=[found["name"]])
        (expected,) = evaluate(one)["categories"]
        for name in ("image", "pixel", "curves"):
            assert found[name] == expected[name]
    # had the first category's weights been used for both, the second's numbers would be these
    other = config(visa, tmp_path / "other", weights=str(tmp_path / "board" / "last.pt"))
    assert evaluate(other)["categories"][1]["curves"] != run["categories"][1]["curves"]

    times = [path.stat().st_mtime_ns for path in results(tmp_path / "each")]
    torch.save(new_weights(2), tmp_path / "nut" / "last.pt")
    again = evaluate(each)
    after = [path.stat().st_mtime_ns for path in results(tmp_path / "each")]
    assert after[0] == times[0] and after[1] != times[1]
    assert again["categories"][0] == run["categories"][0]
    assert again["categories"][1]["curves"] != run["categories"][1]["curves"]


def test_all_weights_are_looked_for_first(visa, tmp_path):
    (tmp_path / "board").mkdir()
    torch.save(new_weights(0), tmp_path / "board" / "last.pt")
    weights = str(tmp_path / "{category}" / "last.pt")
    with pytest.raises(InputError, match="category nut has no weights: .* file .*nut/last.pt"):
        evaluate(config(visa, tmp_path / "out", weights=weights))
    assert not results(tmp_path / "out")
    evaluate(config(visa, tmp_path / "out", weights=weights, category=("board",)))


def results(out) -> list:
    return sorted(out.glob("categories/*/result.json"))


def new_weights(seed: int) -> dict:
    torch.manual_seed(seed)
    return torchvision.models.resnet18().state_dict()


def test_another_method_does_not_replace_results(visa, tmp_path):
    run = evaluate(config(visa, tmp_path, category=("board",)))
    with pytest.raises(InputError, match="board holds results of padim: give patchcore another"):
        evaluate(config(visa, tmp_path, category=("nut",), method="patchcore"))
    assert evaluate(config(visa, tmp_path, category=("board",)))["categories"] == run["categories"]


def test_metrics_of_the_published_script(visa, tmp_path):
    exact = evaluate(config(visa, tmp_path / "exact", category=("board",)))
    rounded = evaluate(config(visa, tmp_path / "rounded", category=("board",), compat="spot-diff"))
    for name in ("au_roc", "au_pr"):
        theirs, ours = (run["categories"][0]["pixel"][name] for run in (rounded, exact))
        assert theirs == round(theirs, 4) != ours and theirs == pytest.approx(ours, abs=0.05)
    assert rounded["config"]["compat"] == "spot-diff"


def test_bad_images_stop_or_are_skipped(tmp_path, capsys):
    root = small_visa(tmp_path / "visa", ("board",))
    bad = root / "board/Data/Images/Normal/002.JPG"
    bad.write_bytes(bad.read_bytes()[:500])
    with pytest.raises(InputError, match="002.JPG"):
        evaluate(config(root, tmp_path / "out"))
    assert not (tmp_path / "out" / "results.json").exists()
    run = evaluate(config(root, tmp_path / "out", skip_bad_images=True))
    assert run["categories"][0]["n_train"] == 6
    assert list(run["categories"][0]["skipped"]) == [str(bad)]
    assert "skipped images: 1" in capsys.readouterr().out
    again = evaluate(config(root, tmp_path / "out", skip_bad_images=True))  # results are kept
    assert again["categories"] == run["categories"]
    assert "skipped images: 1" in capsys.readouterr().out


def test_a_mask_of_another_size_is_named(tmp_path):
    root = small_visa(tmp_path / "visa", ("board",))
    mask = root / "board/Data/Masks/Anomaly/001.png"
    Image.fromarray(np.ones((9, 9), np.uint8)).save(mask)
    with pytest.raises(InputError, match="001.png"):
        evaluate(config(root, tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(method="magic"), "method is one of padim"),
        (dict(category=("screw",)), "screw"),
        (dict(backbone="resnet999"), "resnet999"),
        (dict(weights="nowhere.pt"), "nowhere.pt"),
        (dict(preset="mine"), "preset is one of"),
        (dict(device="tpu9"), "device"),
        (dict(out="/proc/spd-fast"), "/proc/spd-fast: "),
        (dict(protocol="2cls_highshot"), "padim learns normal images only: protocol 1cls, got"),
        (
            dict(method="unet"),
            "unet learns normal and anomalous .* 2cls_highshot or 5shot or 10shot",
        ),
        (dict(lr=0.0), "lr must be above 0"),
        (dict(epochs=1, iterations=1), "epochs or iterations, not both"),
        (dict(compat="mine"), "compat is 'spot-diff' or not given, got 'mine'"),
        (dict(batch_size=0), "batch_size must be at least 1"),
    ],
)
def test_wrong_configuration_is_one_sentence(visa, tmp_path, changes, message, capsys):
    with pytest.raises(InputError, match=message):
        evaluate(config(visa, tmp_path / "out", **changes))


def test_the_data_set_is_never_the_output(visa, tmp_path):
    before = sorted(visa.rglob("*"))
    for out in (visa, visa / "board"):
        with pytest.raises(InputError, match="lies in the data set"):
            evaluate(config(visa, out))
    foreign = tmp_path / "categories" / "board"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("ten years of work")
    with pytest.raises(InputError, match="in the way"):
        evaluate(config(visa, tmp_path))
    assert (foreign / "thesis.txt").exists() and sorted(visa.rglob("*")) == before


@pytest.mark.parametrize("limit", [4000, 400_000])  # in a picture, in the model
def test_a_full_disk_leaves_the_old_results(visa, tmp_path, limit):
    """A limit on file size stands in for a full disk: the write fails half-way."""
    evaluate(config(visa, tmp_path, category=("board",)))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    arguments = ["evaluate", "--data", str(visa), "--weights", "random", "--n-features", "20"]
    arguments += ["--category", "board", "--batch-size", "4", "--seed", "7", "--out", str(tmp_path)]
    arguments += ["--save-models"]
    done = subprocess.run(
        [sys.executable, "-m", "spd_fast.cli", *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("spd-fast: ")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_predict(visa, tmp_path, capsys):
    evaluate(config(visa, tmp_path / "run", category=("board",), save_models=True))
    arguments = ["predict", "--model", str(tmp_path / "run/categories/board/padim.pt")]
    images = visa / "board/Data/Images"
    out = tmp_path / "heat"
    arguments += [str(images / "Anomaly"), str(images / "Normal/008.JPG"), "--out", str(out)]
    assert main(arguments) == 0
    rows = list(csv.DictReader(open(out / "scores.csv", newline="")))
    assert list(rows[0]) == ["image", "score", "heat_map"] and len(rows) == 4
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert rows[-1]["image"].endswith("Normal/008.JPG")
    assert all(Image.open(out / row["heat_map"]).width > 600 for row in rows)
    assert main(["predict", "--model", "none.pt", *arguments[3:]]) == 2
    assert "none.pt" in capsys.readouterr().err


def test_in_threads_keeps_the_order_and_reads_ahead_only_a_little():
    started = []

    def work(i):
        started.append(i)
        return i * i

    results = in_threads(work, range(1000), workers=3)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(started) <= 5 + 6
    results.close()
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda i: 1 // i, [1, 0, 2], workers=2))


def test_a_category_that_fails_does_not_stop_the_others(tmp_path, capsys):
    root = small_visa(tmp_path / "visa", ("board", "nut"))
    bad = root / "board/Data/Images/Normal/002.JPG"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:500])
    run = evaluate(config(root, tmp_path / "out"))
    assert [found["name"] for found in run["categories"]] == ["nut"]
    assert list(run["failed"]) == ["board"] and "002.JPG" in run["failed"]["board"]
    assert "board failed: cannot read image" in capsys.readouterr().out
    assert "board failed: cannot read image" in (tmp_path / "out" / "report.html").read_text()
    arguments = ["evaluate", "--data", str(root), "--weights", "random", "--n-features", "20"]
    assert main([*arguments, "--out", str(tmp_path / "other")]) == 1
    bad.write_bytes(whole)
    run = evaluate(config(root, tmp_path / "out"))
    assert [found["name"] for found in run["categories"]] == ["board", "nut"] and not run["failed"]


RANKS = """
import sys
from pathlib import Path
from spd_fast import evaluate, evaluate_category
from spd_fast.cli import main
from spd_fast.distributed import rank
from spd_fast.errors import InputError
fit, new = evaluate_category._fit, evaluate._new_detector
def told(model, category, *arguments):
    Path(f"{sys.argv[-1]}_{category.name}_{rank()}").touch()
    if "second" in sys.argv[1] and rank():
        raise InputError("a category of the second process")
    return fit(model, category, *arguments)
def failing(*arguments):
    if "first" in sys.argv[1] and rank():
        raise InputError("the second process alone")
    return new(*arguments)
evaluate_category._fit, evaluate._new_detector = told, failing
sys.exit(main(sys.argv[2:]))
"""


def two_processes(kind, visa, out) -> subprocess.CompletedProcess:
    script = out.with_suffix(".py")
    script.write_text(RANKS)
    arguments = ["evaluate", "--data", str(visa), "--weights", "random", "--n-features", "20"]
    arguments += ["--batch-size", "4", "--out", str(out)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, str(script), kind, *arguments], capture_output=True, text=True, timeout=300
    )


def test_processes_share_the_categories(visa, tmp_path):
    done = two_processes("sound", visa, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.glob("two_*")) == ["two_board_0", "two_nut_1"]
    assert done.stdout.count("report:") == 1
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    one = evaluate(config(visa, tmp_path / "one"))
    for a, b in zip(one["categories"], two["categories"], strict=True):
        for level, name in (("image", "au_roc"), ("image", "au_pr"), ("pixel", "au_pr")):
            assert b[level][name] == pytest.approx(a[level][name], rel=1e-3)


def test_what_one_process_finds_wrong_ends_all(visa, tmp_path):
    done = two_processes("first", visa, tmp_path / "out")
    assert done.returncode != 0
    assert done.stderr.count("spd-fast: the second process alone") == 2
    assert not list(tmp_path.glob("out_*")) and not (tmp_path / "out" / "results.json").exists()


def test_a_category_that_fails_in_one_process(visa, tmp_path):
    done = two_processes("second", visa, tmp_path / "out")
    assert done.returncode != 0 and "nut failed: a category of the second process" in done.stdout
    run = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [found["name"] for found in run["categories"]] == ["board"]
    assert run["failed"] == {"nut": "a category of the second process"}


def test_two_runs_in_one_directory(visa, tmp_path):
    with locked(tmp_path):
        with pytest.raises(InputError, match="another process is writing to"):
            evaluate(config(visa, tmp_path))
    evaluate(config(visa, tmp_path, category=("board",)))


NOT_RESULTS = {"out", "name", "batch_size", "workers", "cache", "device", "compile", "save_models"}


@pytest.mark.parametrize("method", ["padim", "unet"])
def test_every_setting_that_changes_numbers_makes_them_anew(method):
    protocol = {"padim": "1cls", "unet": "5shot"}[method]
    plain = EvaluateConfig("data", "out", protocol=protocol, method=method, iterations=3)
    other = {str: "other", int: 7, float: 0.3, bool: True, tuple: ("x",), type(None): 9}
    without = set(NOT_RESULTS)
    if method == "padim":
        without |= {"iterations", "lr", "train_batch_size", "flips", "draws"}
    for field in fields(EvaluateConfig):
        if field.name in ("method", "protocol", "epochs"):  # epochs: instead of iterations
            continue
        value = getattr(plain, field.name)
        new = not value if isinstance(value, bool) else other[type(value)]
        changed = settings_of(replace(plain, **{field.name: new})) != settings_of(plain)
        assert changed == (field.name not in without) or field.name in (
            "protocol",
            "method",
            "epochs",
        )


def test_intervals_and_replicates(visa, tmp_path):
    run = evaluate(config(visa, tmp_path, category=("board",)))
    (board,) = run["categories"]
    stored = np.load(tmp_path / "categories/board/replicates.npz")
    assert board["intervals"].keys() == {
        f"{level}_{name}" for level in ("image", "pixel") for name in ("au_pr", "au_roc")
    }
    for name, interval in board["intervals"].items():
        assert interval == list(np.quantile(stored[name], [0.025, 0.975]))
        assert stored[name].shape == (1000,)
    assert 0 < board["intervals"]["pixel_au_pr"][0] < board["pixel"]["au_pr"]
    page = (tmp_path / "report.html").read_text()
    assert "[{:.1f}, {:.1f}]".format(*(100 * x for x in board["intervals"]["pixel_au_pr"])) in page
    other = evaluate(config(visa, tmp_path / "other", category=("board",), seed=3))
    assert other["categories"][0]["test_set"] == board["test_set"]


def test_resized_images_are_kept_for_other_runs(visa, tmp_path, monkeypatch):
    cached = dict(cache=str(tmp_path / "cache"), category=("board",))
    plain = evaluate(config(visa, tmp_path / "plain", category=("board",)))
    first = evaluate(config(visa, tmp_path / "first", **cached))
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 13
    again = evaluate(config(visa, tmp_path / "again", **cached))
    for run in (first, again):
        for name in ("image", "pixel", "curves"):
            assert run["categories"][0][name] == plain["categories"][0][name]
    with pytest.raises(InputError, match="lies in the data set"):
        evaluate(config(visa, tmp_path / "x", cache=str(visa / "cache")))


def test_a_leak_is_refused_before_anything_is_fitted(tmp_path):
    root = small_visa(tmp_path / "visa", ("board",))
    images = root / "board/Data/Images"
    (images / "Normal/009.JPG").unlink()
    (images / "Normal/009.JPG").symlink_to(images / "Normal/001.JPG")
    with pytest.raises(InputError, match="has test images in its training set: .*009.JPG"):
        evaluate(config(root, tmp_path / "out"))
    assert not (tmp_path / "out" / "unfinished").exists()


def test_defects_out_of_sight_do_not_fail_a_category(tmp_path):
    """Of most anomalous images the centre that is cut out has no defect."""
    root = small_visa(tmp_path / "visa", ("board",), anomalous=12)
    for number in range(1, 12):
        mask = np.zeros((60, 80), np.uint8)
        mask[30, 0] = 1
        Image.fromarray(mask).save(root / f"board/Data/Masks/Anomaly/{number:03d}.png")
    (board,) = evaluate(config(root, tmp_path / "out"))["categories"]
    replicates = np.load(tmp_path / "out/categories/board/replicates.npz")["pixel_au_pr"]
    assert 0.2 < np.isnan(replicates).mean() < 0.5  # (11 / 12)^12 = 0.35
    low, high = board["intervals"]["pixel_au_pr"]
    assert 0 <= low <= high <= 1
