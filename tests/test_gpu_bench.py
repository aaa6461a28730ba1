"""bench/gpu.py, which nothing here can run on a GPU: the program itself, on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("anomalib")
import gpu  # noqa: E402

from spd_fast.ops import augment_views as views  # noqa: E402

README = Path(__file__).parents[1] / "README.md"


def test_whole_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small"])
    monkeypatch.setattr(gpu, "gpu_peers", lambda *_: ())  # they are slow, or not installed
    gpu.main()
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if "| native |" in line]
    assert len(rows) == 5 + 2 * 2  # formats of views; batches and factors
    assert "fit of 32 images" in table and "anomalib" in table


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu, "gpu_peers", lambda *_: ())
    monkeypatch.setattr(views.native, "augment_views", lambda *arguments: None)
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    try:
        with pytest.raises(AssertionError, match="native, float32"):
            list(gpu.views_rows("cpu", small=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_table_goes_into_the_readme_and_info(monkeypatch, tmp_path):
    (tmp_path / "README.md").write_text(README.read_text())
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "MEASURED", tmp_path / "measured.txt")
    rows = [gpu.Row("four views", "cuda", 1.25, 1.5e12, "")]
    for title in ("GPU one", "GPU two"):
        gpu.write_down(title, gpu.as_markdown(rows, 3e12))
    text = (tmp_path / "README.md").read_text()
    assert "GPU two" in text and "GPU one" not in text and "measured there in parts" not in text
    assert "| four views | cuda | 1.25 | 1500 | 50% |  |" in text
    assert (tmp_path / "measured.txt").read_text() == "GPU two\n"
    assert text.count("# ") == README.read_text().count("# ")  # the rest is there


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments, message",
    [([], "finds no GPU"), (["--write", "--device", "cpu"], "whole runs on a GPU")],
)
def test_what_it_refuses(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit):
        gpu.main()
    assert message in capsys.readouterr().err
