import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from spd_fast.cli import _parser

README = (Path(__file__).parents[1] / "README.md").read_text()


EXAMPLE, ANOMALIB = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_example_runs_as_printed(capsys):
    exec(EXAMPLE, {})
    expected = re.findall(r"# (torch\.Size.*)", EXAMPLE)
    assert capsys.readouterr().out.splitlines()[-1:] == expected


def test_anomalib_example_runs(tmp_path, monkeypatch):
    Padim = pytest.importorskip("anomalib.models", reason="anomalib is optional").Padim
    model = Padim(pre_trained=False, visualizer=False)
    model.model.train()(torch.rand(4, 3, 256, 256))
    model.fit()
    parts = {"hyper_parameters": dict(model.hparams), "pytorch-lightning_version": "2.5.0"}
    torch.save({"state_dict": model.state_dict()} | parts, tmp_path / "padim.ckpt")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (80, 60)).save(tmp_path / "photos" / "black.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(ANOMALIB, names)
    assert names["predictions"][0].anomaly_map.shape == (1, 256, 256)


def test_commands_are_understood():
    lines = re.findall(r"^spd-fast ([^#\n]+)", README, re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        _parser().parse_args(line.split())


def test_linked_files_exist():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / link.split("#")[0]).exists(), link
