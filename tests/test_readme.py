import re
from pathlib import Path

from spd_fast.cli import _parser

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_example_runs_as_printed(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, {})
    expected = re.findall(r"# (torch\.Size.*)", code)
    assert capsys.readouterr().out.splitlines()[-1:] == expected


def test_commands_are_understood():
    lines = re.findall(r"^spd-fast ([^#\n]+)", README, re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        _parser().parse_args(line.split())


def test_linked_files_exist():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link
