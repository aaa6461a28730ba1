import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from pretrain_runs import config, write_images

from spd_fast import recipes
from spd_fast.loader import ViewLoader
from spd_fast.pretrain import pretrain
from spd_fast.pretrain_config import resolved
from spd_fast.run_page import CURVES, POINTS, write_run_page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run of 6 steps, and its images."""
    data = write_images(tmp_path_factory.mktemp("data"))
    out = tmp_path_factory.mktemp("run")
    assert pretrain(config(data, out, epochs=2)) == 0
    return out, data


def polylines(page: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline class="[^"]*" points="([^"]*)"', page)
    return [[tuple(map(float, p.split(","))) for p in points.split()] for points in found]


def test_a_run_leaves_its_page(run):
    out, data = run
    page = (out / "run.html").read_text()
    assert "Pre-training: simsiam + SPD, resnet18" in page and "Step 6 of 6, on 24 images" in page
    assert all(title in page for title, *_ in CURVES if title != "Nearest neighbours")
    assert not re.search(r"(src|href)=.https?:", page)  # it needs no network
    lines = polylines(page)
    assert len(lines) == sum(len(names) for *_, names in CURVES if "knn_top1" not in names)
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    high, low = max(losses), min(losses)
    expected = [(320 * i / 5, 150 * (high - v) / (high - low)) for i, v in enumerate(losses)]
    np.testing.assert_allclose(lines[0], expected, atol=0.051)
    assert str(data) in page and "<td>0.05</td>" in page  # settings


def test_the_examples_are_the_views_of_training(run):
    out, data = run
    text = re.search(r"data:image/png;base64,([^\"]+)", (out / "run.html").read_text())[1]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    batches = ViewLoader(data, recipes.simsiam(), 8, size=32, seed=7)
    views = {int(i): v for batch in batches for i, v in zip(batch.indices, batch.views.unbind(1))}
    mean, std = (np.array(x).reshape(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    for row, index in enumerate((0, 8, 16)):
        for v in range(4):
            y, x = 8 + row * 86, 8 + (v + 1) * 128
            shown = sheet[y : y + 32, x : x + 32]
            expected = (views[index][v].numpy() * std + mean).transpose(1, 2, 0) * 255
            assert np.abs(shown - expected).max() < 1


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_curves_of_one_step_and_of_many(run, tmp_path):
    _, data = run
    settings = resolved(config(data, tmp_path, spd=False))
    loader = ViewLoader(data, recipes.simsiam(spd=False), 8, size=32)
    found = {"steps": 9000, "images": 24, "classes": 1, "device": "cpu", "processes": 2}
    (tmp_path / "run.json").write_text(json.dumps(found | {"versions": {}}))
    names = ("loss", "loss_ssl", "z_std", "lr", "images_per_s")
    seconds = {"data_s": 0.1, "forward_s": 0.3, "backward_s": 0.5, "optimizer_s": 0.1, "other_s": 0}
    for steps in (1, 9000):
        lines = [
            {"step": i + 1} | seconds | {n: float(i == 460) for n in names} for i in range(steps)
        ]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        write_run_page(tmp_path, settings, loader)
        page = (tmp_path / "run.html").read_text()
        assert f"Step {steps} of 9000" in page and "SPD" not in page
        assert "10.0% data, 30.0% forward, 50.0% backward, 10.0% optimizer, 0.0% other" in page
        curves = polylines(page)
        assert len(curves) == len(names) + len(seconds) and all(
            len(c) == min(steps, POINTS) for c in curves
        )
        assert all(0 <= x <= 320 and 0 <= y <= 150 for curve in curves for x, y in curve)
    lines = [{"step": 1, "wait_share": 0.0} | dict.fromkeys(names, 1.0)]  # of an older run
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]))
    write_run_page(tmp_path, settings, loader)
    assert "Of the time" not in (tmp_path / "run.html").read_text()
    # one step among the 45 of a point is seen
    assert [y for _, y in curves[0]] == [150.0] * 10 + [0.0] + [150.0] * 189
    assert "between 0 and 0.0222" in page
