import subprocess
import sys

import pytest

from spd_fast.cli import main


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_import_and_help_load_nothing_heavy():
    heavy = "{m for m in sys.modules} & {'torch', 'numpy', 'PIL', 'matplotlib', 'torchvision'}"
    assert run_python(f"import sys, spd_fast; print({heavy})").strip() == "set()"
    code = (
        "import sys\nfrom spd_fast.cli import main\n"
        "try: main(['pretrain', '--help'])\nexcept SystemExit: pass\n"
        f"print({heavy})"
    )
    assert run_python(code).strip().endswith("set()")


def test_public_names_exist():
    import spd_fast

    for name in spd_fast.__all__:
        assert getattr(spd_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spd_fast.nothing


def test_info_shows_every_backend_and_why_one_is_missing(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("augment_views", "mahalanobis_map", "native", "reference", "instruction_set"):
        assert word in printed
    without = run_python(
        "import sys\nsys.modules['spd_fast._C'] = None\n"
        "from spd_fast.cli import main\nmain(['info'])"
    )
    assert "native     cpu   the compiled module spd_fast._C cannot be imported" in without


def test_without_the_compiled_module_the_reference_runs():
    code = (
        "import sys\nsys.modules['spd_fast._C'] = None\n"
        "import torch, spd_fast\n"
        "from spd_fast import recipes, sample_view_params\n"
        "image = torch.zeros(30, 40, 3, dtype=torch.uint8)\n"
        "p = sample_view_params(recipes.simsiam(), [(30, 40)], [0], 0, 0, 32)\n"
        "print(tuple(spd_fast.augment_views([image], p, 32).shape))\n"
        "try: spd_fast.augment_views([image], p, 32, backend='native')\n"
        "except spd_fast.InputError as e: print(e)"
    )
    shape, error = run_python(code).splitlines()
    assert shape == "(4, 1, 3, 32, 32)"
    assert error.startswith("augment_views cannot run on these arguments (native: the compiled")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "check", "no/such/place"], "no/such/place"),
        (["evaluate", "--data", "nowhere", "--out", "OUT"], "nowhere"),
        (["pretrain", "--data", "nowhere", "--out", "OUT"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["views", "missing.jpg"], "missing.jpg"),
        (["views", "missing.jpg", "--out", "sheet.xyz"], "sheet.xyz"),
        (["report", "nowhere", "--out", "no/such/place.html"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_exit_status_2(arguments, message, capsys, tmp_path):
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("spd-fast: ") and message in error


@pytest.mark.parametrize(
    "arguments",
    [["--batch-size", "0"], ["--workers", "-2"], ["--seed", str(2**70)], ["--n-features", "0"]],
)
def test_numbers_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--data", "x", "--out", "y", *arguments])
    assert stop.value.code == 2
    assert f"argument {arguments[0]}: must be" in capsys.readouterr().err
