"""Interrupted writes leave the old content, finished ones the new, and nobody's files are lost."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from circuits.atomic import StorageError, atomic_file, atomic_folder


def everything(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): file.read_text()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_finished_file_appears_with_its_parents(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "new" / "mask.json") as temporary:
        temporary.write_text("one")
        assert not (tmp_path / "new" / "mask.json").exists()
    assert everything(tmp_path) == {"new/mask.json": "one"}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_file_leaves_the_old_one(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    (tmp_path / "mask.json").write_text("old")
    with pytest.raises(interruption), atomic_file(tmp_path / "mask.json") as temporary:
        temporary.write_text("half")
        raise interruption
    assert everything(tmp_path) == {"mask.json": "old"}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_folder_leaves_nothing(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    with pytest.raises(interruption), atomic_folder(tmp_path / "edit") as temporary:
        (temporary / "edit.json").write_text("half")
        raise interruption
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"Could not write .*edit: No space left on device"),
        atomic_folder(tmp_path / "edit") as temporary,
    ):
        (temporary / "delta.safetensors").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_really_full_is_explained(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with (
        pytest.raises(StorageError, match="No space left on device"),
        atomic_file(tmp_path / "mask") as temporary,
    ):
        temporary.symlink_to("/dev/full")
        temporary.write_text("does not fit")
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_keeps_its_own_message(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), atomic_folder(tmp_path / "a" / "edit"):
        Path("absent.jsonl").read_text()


def test_an_earlier_result_is_replaced(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "edit", like="edit.json") as temporary:
            (temporary / "edit.json").write_text(text)
    assert everything(tmp_path) == {"edit/edit.json": "second"}


def test_an_interrupted_replacement_leaves_the_earlier_result(tmp_path: Path) -> None:
    (tmp_path / "edit").mkdir()
    (tmp_path / "edit" / "edit.json").write_text("first")
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_folder(tmp_path / "edit", like="edit.json") as temporary,
    ):
        (temporary / "edit.json").write_text("half")
        raise KeyboardInterrupt
    assert everything(tmp_path) == {"edit/edit.json": "first"}


def test_a_folder_that_is_not_an_earlier_result_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with (
        pytest.raises(StorageError, match=r"not empty and has no edit\.json"),
        atomic_folder(tmp_path, like="edit.json"),
    ):
        pytest.fail("the block must not run")
    assert everything(tmp_path) == {"thesis.tex": "years"}


def test_a_file_of_the_users_in_an_earlier_result_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "edit"
    out.mkdir()
    (out / "edit.json").write_text("first")
    (out / "notes.txt").write_text("mine")
    with (
        pytest.raises(StorageError, match=r"notes\.txt"),
        atomic_folder(out, like="edit.json") as temporary,
    ):
        (temporary / "edit.json").write_text("second")
    assert everything(tmp_path) == {"edit/edit.json": "first", "edit/notes.txt": "mine"}


def test_files_that_an_earlier_result_may_have_had_make_way_and_others_are_refused_at_once(
    tmp_path: Path,
) -> None:
    out = tmp_path / "report"
    out.mkdir()
    (out / "report.json").write_text("first")
    (out / "relearning (2).png").write_text("a figure")
    ours = ("relearning*.png",)
    with atomic_folder(out, like="report.json", ours=ours) as temporary:
        (temporary / "report.json").write_text("second")
    assert everything(tmp_path) == {"report/report.json": "second"}
    (out / "notes.txt").write_text("mine")
    with (
        pytest.raises(StorageError, match=r"notes\.txt"),
        atomic_folder(out, like="report.json", ours=ours),
    ):
        pytest.fail("the block must not run")
    assert everything(tmp_path) == {"report/report.json": "second", "report/notes.txt": "mine"}


def test_a_file_in_the_way_of_a_folder_and_the_reverse(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with (
        pytest.raises(StorageError, match="a file of that name"),
        atomic_folder(tmp_path / "taken"),
    ):
        pytest.fail("the block must not run")
    with pytest.raises(StorageError, match="it is a folder"), atomic_file(tmp_path):
        pytest.fail("the block must not run")


def test_the_folder_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "edit"):
        pass
    assert (tmp_path / "edit").stat().st_mode == (tmp_path / "plain").stat().st_mode
