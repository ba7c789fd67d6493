"""Files that are either whole or absent: everything is written beside its target and then renamed onto it.

And what is to be closed again, such as a file that is read.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Closing:
    """Something to be closed, which is a context manager by that."""

    def close(self) -> None:
        """Lets go of what was opened; nothing unless a subclass opened something."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the path of a temporary sibling to write to, which replaces `path` once the block succeeds.

    The sibling keeps the suffix of `path`, for writers that choose their format by it. Missing parent folders are made.
    If the block raises, the sibling is removed and `path` stays as it was.

    Raises:
        OSError: the folder cannot be written to, or `path` is itself a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder; choose the path of a file.")
    _make_parent(target)
    temporary = _sibling(target)
    try:
        yield temporary
        _synchronise(temporary)
        os.replace(temporary, target)
        _synchronise(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty temporary folder beside `path`, which takes its place once the block succeeds.

    If the block raises, the temporary folder is removed and `path` stays as it was.

    Args:
        overwrite: replace an existing folder; it is kept until the new one is complete.

    Raises:
        FileExistsError: `path` exists and may not be overwritten, or is not a folder.
        OSError: the parent folder cannot be written to.
    """
    target = Path(path)
    _refuse_existing(target, overwrite)
    _make_parent(target)
    temporary = _sibling(target)
    temporary.mkdir()
    try:
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            _synchronise(entry)
        _refuse_existing(target, overwrite)
        if target.exists():
            retired = _sibling(target)
            os.rename(target, retired)
            os.rename(temporary, target)
            shutil.rmtree(retired)
        else:
            os.rename(temporary, target)
        _synchronise(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically.

    Raises:
        ValueError: the value has no JSON form; NaN and infinity have none, because other readers refuse them.
        OSError: the folder cannot be written to.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot write {path}: the value has no JSON form ({error}).") from error
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something other than JSON.
        OSError: the file cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist.") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply.") from error


def _sibling(target: Path) -> Path:
    return target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")


def _make_parent(target: Path) -> None:
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"cannot write {target}: the folder {folder} cannot be made ({error.strerror}).") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {target}: no permission to write in the folder {folder}.")


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if os.path.lexists(target) and not (overwrite and target.is_dir() and not target.is_symlink()):
        advice = "choose another path" if overwrite else "choose another path or remove it first"
        kind = "" if target.is_dir() and not target.is_symlink() else " and is not a folder"
        raise FileExistsError(f"cannot write {target}: it already exists{kind}; {advice}.")


def _synchronise(path: Path) -> None:
    """Waits until the file or folder is on the disk, so that a rename never precedes what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
