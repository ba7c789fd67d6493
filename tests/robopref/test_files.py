from __future__ import annotations

import errno
import os
import re

import pytest

from robopref import files


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def enter(context):
    with context:
        pass


def fail_half_way(context, name=""):
    with context as temporary:
        (temporary / name if name else temporary).write_text("half")
        raise RuntimeError("interrupted")


def test_atomic_write_makes_parents_and_keeps_the_suffix(tmp_path):
    target = tmp_path / "a" / "b" / "plot.png"
    with files.atomic_write(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".png"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["plot.png"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "notes.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="interrupted"):
        fail_half_way(files.atomic_write(target))
    assert target.read_text() == "old"
    assert names(tmp_path) == ["notes.txt"]


def test_atomic_write_gives_the_permissions_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_text("")
    with files.atomic_write(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_atomic_write_refuses_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"), files.atomic_write(tmp_path):
        pass


@pytest.mark.parametrize("helper", [files.atomic_write, files.atomic_folder])
def test_a_parent_that_is_a_file_is_one_sentence(tmp_path, helper):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^cannot write .*target: the folder .*file cannot be made \(.*\)\.$"):
        enter(helper(tmp_path / "file" / "target"))


@pytest.mark.parametrize("helper", [files.atomic_write, files.atomic_folder])
def test_a_folder_without_permission_is_one_sentence(tmp_path, monkeypatch, helper):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"^cannot write .*target: no permission to write in the folder .*\.$"):
        enter(helper(tmp_path / "target"))
    assert names(tmp_path) == []


def test_atomic_folder_appears_whole(tmp_path):
    target = tmp_path / "made" / "store"
    with files.atomic_folder(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "data").write_text("x")
        assert not target.exists()
    assert (target / "inner" / "data").read_text() == "x"
    assert names(target.parent) == ["store"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="interrupted"):
        fail_half_way(files.atomic_folder(tmp_path / "store"), "data")
    assert names(tmp_path) == []


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_text("")])
def test_atomic_folder_refuses_an_existing_target(tmp_path, make):
    make(tmp_path / "store")
    with pytest.raises(FileExistsError, match="already exists"), files.atomic_folder(tmp_path / "store"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["store"]


def test_atomic_folder_refuses_a_target_that_appears_meanwhile(tmp_path):
    with pytest.raises(FileExistsError), files.atomic_folder(tmp_path / "store"):
        (tmp_path / "store").mkdir()
    assert names(tmp_path) == ["store"]


def test_atomic_folder_overwrites_only_at_success(tmp_path):
    target = tmp_path / "store"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(RuntimeError, match="interrupted"):
        fail_half_way(files.atomic_folder(target, overwrite=True), "new")
    assert names(target) == ["old"]
    with files.atomic_folder(target, overwrite=True) as temporary:
        (temporary / "new").write_text("")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["store"]


def test_atomic_folder_never_overwrites_a_file(tmp_path):
    (tmp_path / "store").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder"):
        enter(files.atomic_folder(tmp_path / "store", overwrite=True))
    assert (tmp_path / "store").read_text() == "mine"


def test_json_round_trip(tmp_path):
    value = {"name": "Zürich", "list": [1, 2.5, None, True], "nested": {"a": []}}
    files.write_json(tmp_path / "value.json", value)
    assert files.read_json(tmp_path / "value.json") == value


@pytest.mark.parametrize("value", [float("nan"), {"x": float("inf")}, {"x": object()}])
def test_values_without_json_form_are_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"value\.json: the value has no JSON form"):
        files.write_json(tmp_path / "value.json", value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_read_json_names_the_file_and_the_reason(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path)) + " is not valid JSON: .+"):
        files.read_json(path)


def test_read_json_of_no_file_and_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist\.$"):
        files.read_json(tmp_path / "none.json")
    with pytest.raises(OSError, match=f"cannot be read: {os.strerror(errno.EISDIR)}"):
        files.read_json(tmp_path)


def test_what_is_to_be_closed_is_closed_at_the_end_of_a_block() -> None:
    class Door(files.Closing):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    with Door() as door:
        assert not door.closed
    assert door.closed == 1
    with pytest.raises(KeyError), door:
        raise KeyError
    assert door.closed == 2
