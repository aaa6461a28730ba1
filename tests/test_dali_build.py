"""Building the DALI operators: what is said when they cannot be built, and that they can."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spd_fast import dali_build
from spd_fast.cli import main
from spd_fast.errors import InputError

pytest.importorskip("nvidia.dali")
needs_compiler = pytest.mark.skipif(
    bool(dali_build.missing()), reason="; ".join(dali_build.missing())
)


@pytest.fixture
def nothing_built(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no nvcc."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    return tmp_path / "cache" / "spd-fast"


def fake_compiler(directory: Path, script: str) -> str:
    path = directory / "c++fake"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


# Writes its output file, and a line for each call.
COMPILES = 'echo call >> {log}; while [ "$1" != -o ]; do shift; done; echo library > "$2"'


def test_no_compiler(nothing_built, monkeypatch):
    monkeypatch.setattr(dali_build, "compiler", lambda: None)
    with pytest.raises(InputError, match="no C\\+\\+ compiler .*: install g\\+\\+, or name one in"):
        dali_build.build()
    assert "there is no C++ compiler" in dali_build.describe()["on the CPU"]
    assert not nothing_built.exists()


def test_the_compiler_that_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert dali_build.compiler() is None
    monkeypatch.setenv("CXX", f"{sys.executable} -m64")
    assert dali_build.compiler() == [sys.executable, "-m64"]
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nowhere")
    assert dali_build.compiler() is None


def test_no_headers_of_cuda(nothing_built, monkeypatch):
    monkeypatch.setattr(dali_build, "include_directories", list)
    with pytest.raises(InputError, match="no headers of CUDA .*pip install 'nvidia-cuda-runtime=="):
        dali_build.build()


def test_no_dali(nothing_built, monkeypatch):
    monkeypatch.setattr(dali_build, "DALI_PACKAGES", ("no-such-package",))
    with pytest.raises(InputError, match="DALI is not installed: pip install 'spd-fast.dali-cu13"):
        dali_build.build()


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path, nothing_built, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        InputError, match=r"cannot be built in .*file/spd-fast: Not a directory; name"
    ):
        dali_build.build()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1")
    with pytest.raises(InputError, match="cannot be built in /proc/1/spd-fast: .*XDG_CACHE_HOME"):
        dali_build.build()


@needs_compiler
def test_a_build_that_fails_shows_the_end_of_what_was_said(tmp_path, nothing_built, monkeypatch):
    script = "for i in $(seq 100); do echo line $i; done; echo error: broken >&2; exit 3"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, script))
    with pytest.raises(InputError) as caught:
        dali_build.build()
    message = str(caught.value)
    assert re.search(r"failed: c\+\+fake ended with 3; its last lines:\nline 87\n", message)
    assert "line 100\nerror: broken\n(the whole command: " in message and "line 86" not in message
    assert [path.suffix for path in nothing_built.iterdir()] == [".lock"]  # nothing half done
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, COMPILES.format(log=log)))
    assert dali_build.build().read_text() == "library\n"  # and it can be tried again


@needs_compiler
def test_a_library_that_dali_refuses(nothing_built, monkeypatch):
    monkeypatch.setattr(dali_build, "_loaded", None)
    monkeypatch.delattr("nvidia.dali.fn.spd", raising=False)
    path = dali_build.plugin(cuda=False)
    path.parent.mkdir(parents=True)
    path.write_text("damaged")
    with pytest.raises(InputError, match=f"cannot load its operators: .*; delete {path} to have"):
        dali_build.load()


@needs_compiler
def test_what_is_in_the_cache_needs_no_compiler(nothing_built, monkeypatch):
    path = dali_build.plugin(cuda=False)
    path.parent.mkdir(parents=True)
    path.write_text("library")
    monkeypatch.setattr(dali_build, "compiler", lambda: None)
    assert dali_build.build() == path and dali_build.missing() == []
    assert dali_build.missing(cuda=True) == [
        "there is no CUDA compiler (nvcc) to build its operators for a GPU with"
    ]
    with_gpu = dali_build.plugin(cuda=True)
    with_gpu.write_text("library")
    assert dali_build.build() == with_gpu and dali_build.missing(cuda=True) == []
    with_gpu.unlink()
    assert "built: " in dali_build.describe()["on the CPU"]
    assert "views are made after DALI" in dali_build.describe()["on a GPU"]
    with_gpu.write_text("library")
    state = dali_build.describe()
    assert state == {"on the CPU": f"built: {with_gpu}", "on a GPU": f"built: {with_gpu}"}


def test_another_dali_or_other_sources_are_another_build(tmp_path, monkeypatch):
    path = dali_build.plugin(cuda=False)
    shutil.copytree(dali_build.source_directory(), tmp_path / "csrc")
    monkeypatch.setattr(dali_build, "source_directory", lambda: tmp_path / "csrc")
    assert dali_build.plugin(cuda=False) == path
    for changed in ("views_blur.h", "dali/augment_views_op.cc", "dali/kept_memory.h", "philox.h"):
        before = dali_build.plugin(cuda=False)
        with open(tmp_path / "csrc" / changed, "a") as file:
            file.write("// changed\n")
        assert dali_build.plugin(cuda=False) != before
    before = dali_build.plugin(cuda=False)
    monkeypatch.setattr(dali_build, "dali_version", lambda: "9.9.9")
    assert dali_build.plugin(cuda=False).name == before.name.replace(
        before.name.split("-")[1], "9.9.9"
    )


@needs_compiler
def test_processes_that_build_at_once_build_once(tmp_path, nothing_built):
    log = tmp_path / "log"
    compiler = fake_compiler(tmp_path, "sleep 0.3; " + COMPILES.format(log=log))
    code = "from spd_fast import dali_build; print(dali_build.build().read_text())"
    env = {**os.environ, "CXX": compiler}
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    assert all(output.rstrip().endswith("library") for output in outputs)
    assert sum("built in" in output for output in outputs) == 1
    assert len(log.read_text().splitlines()) == len(dali_build.CPU_SOURCES) + 1
    assert len([p for p in nothing_built.iterdir() if p.suffix == ".so"]) == 1


@needs_compiler
def test_the_operators_compile_without_warnings(tmp_path):
    cuda = dali_build.nvcc() is not None
    for command in dali_build.commands(tmp_path, cuda):
        if command[-3].endswith(".cc"):
            done = subprocess.run(
                [*command, "-Werror", "-fsyntax-only"], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.skipif(dali_build.nvcc() is None, reason="needs nvcc")
def test_the_gpu_operator_is_built_loaded_and_registered():
    dali_build.load()
    assert dali_build.has_gpu_operator()


@needs_compiler
def test_the_command_line_builds_ahead_and_info_tells(capsys):
    assert main(["dali-build"]) == 0
    built = dali_build.build()
    assert capsys.readouterr().out.splitlines()[-1] == f"the operators for DALI are in {built}"
    assert main(["info"]) == 0
    assert f"built: {built}" in capsys.readouterr().out


def test_the_command_line_tells_what_is_missing(nothing_built, monkeypatch, capsys):
    monkeypatch.setattr(dali_build, "compiler", lambda: None)
    assert main(["dali-build"]) == 2
    assert "there is no C++ compiler" in capsys.readouterr().err
