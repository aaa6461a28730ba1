"""Writing files so that nothing already written is ever lost."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

from spd_fast.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an exception.

    The bytes reach the disk before the rename, so after a crash `path` holds either the old
    contents or the new, never a part. On an exception the temporary file is removed.

    Raises:
        InputError: the directory of `path` is missing or not writable.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no directory {path.parent}")
    try:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix
        )
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def make_output_dir(path: str | Path) -> Path:
    """Create `path` and prove that it can be written to, before any long work starts.

    Raises:
        InputError: the directory cannot be made or is not writable (the reason is in the message).
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to the output directory {path}: {error.strerror}"
        ) from error
    return path


@contextmanager
def locked(directory: str | Path) -> Iterator[None]:
    """While the block runs, no other process gets past this for the same directory. The system lets
    go when the process ends, however it does. (Not on Windows.)

    Raises:
        InputError: another process is in there.
    """
    if fcntl is None:
        yield
        return
    with open(Path(directory) / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing to {directory}") from None
        except OSError:  # a file system that cannot
            pass
        yield


def refuse_inside(out: str | Path, data: str | Path) -> None:
    """Nothing is ever written into a data set.

    Raises:
        InputError: `out` is the data set's directory `data` or lies in it.
    """
    inner, outer = Path(out).resolve(), Path(data).resolve()
    if inner == outer or outer in inner.parents:
        raise InputError(f"the output directory {out} lies in the data set {data}")


def make_empty_dir(path: str | Path) -> Path:
    """`make_output_dir` for an output that must not mix with what is already there.

    Raises:
        InputError: as `make_output_dir`, or there is something in the directory.
    """
    path = make_output_dir(path)
    if any(path.iterdir()):
        raise InputError(f"{path} is not empty: give a new directory, or delete this one first")
    return path


def read_json(path: str | Path):
    """Read a JSON file.

    Raises:
        InputError: it is missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error


def refuse_foreign(path: str | Path, mark: str) -> None:
    """What `atomic_directory` does first, for a look ahead of long work."""
    path = Path(path)
    if path.exists() and not (path / mark).exists():
        raise InputError(f"{path} is in the way: it is not a result of an earlier run (no {mark})")


@contextmanager
def atomic_directory(path: str | Path, mark: str) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place when the block ends well.

    What `path` held before is gone then, and only then; on an exception it stays untouched.

    Args:
        mark: a file that the block writes. An existing directory without it is not ours to replace.

    Raises:
        InputError: `path` exists and does not hold `mark`.
    """
    path = Path(path)
    refuse_foreign(path, mark)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp makes it private
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def link_or_copy(path: str | Path, other: str | Path) -> None:
    """Give a file a second name, which must be new: a hard link, which takes no space, or a copy
    where the file system has none."""
    try:
        os.link(path, other)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(path, other)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@contextmanager
def torch_path(path: str | Path) -> Iterator[Path]:
    """`atomic_path` for what torch writes.

    Raises:
        InputError: the disk refuses; what was at `path` before is unchanged.
    """
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except (OSError, RuntimeError) as error:  # torch's own writer raises the second, unexplained
        reason = error.strerror if isinstance(error, OSError) else "is the disk full?"
        raise InputError(
            f"{path} cannot be written ({reason}); what was there before is unchanged"
        ) from error


def save_state(path: str | Path, state: dict) -> None:
    """torch.save, atomically.

    Raises:
        InputError: as `torch_path`.
    """
    import torch

    with torch_path(path) as temporary:
        torch.save(state, temporary)


def read_state(path: str | Path, what: str, mmap: bool = False):
    """What `save_state` or torch.save wrote, on the CPU; `what` it should be, for the message.

    With `mmap` tensors are read from the disk only when they are used; files in torch's format of
    before 1.6 are read at once.

    Raises:
        InputError: the file is missing, damaged, or not one of torch's.
    """
    import torch

    if not Path(path).exists():
        raise InputError(f"there is no file {path}, expected {what}")
    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=mmap and is_zipfile(path)
        )
    except Exception as error:  # torch raises many kinds for files that are not its own
        # A directory, no permission; but EINVAL is of a file that was cut off: torch then seeks to
        # a negative offset.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        raise InputError(f"{path} is not {what}, or is damaged ({type(error).__name__})") from error


def read_marked(path: str | Path, what: str, mark: str, version: int, mmap: bool = False) -> dict:
    """A dictionary with a mark, as "format", and a version; `what` it should be, for the message.

    Raises:
        InputError: the file is missing, damaged, something else, or of another version.
    """
    state = read_state(path, what, mmap)
    if not isinstance(state, dict) or state.get("format") != mark:
        raise InputError(f"{path} is not {what}: it lacks the mark {mark!r}")
    if state.get("version") != version:
        raise InputError(
            f"{path} has version {state.get('version')}, this spd-fast reads {version}"
        )
    return state
