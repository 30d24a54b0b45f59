"""Write files and folders so that an interruption leaves either the old content or the new one.

Both context managers write beside the target and rename at the end. When the block raises (an error,
a full disk, Ctrl-C), what was written is removed and the target is as it was before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from circuits.errors import LocateEditError


class StorageError(LocateEditError):
    """A file or folder could not be written where it was asked for."""


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes `path` when the block ends without error.

    Args:
        path: the file to create or replace. Its folder is created when missing.

    Yields:
        A path in the same folder, with the same suffix as `path`. The block must create that file.

    Raises:
        StorageError: `path` is a folder, or the disk refuses the write.
    """
    target = Path(path)
    if target.is_dir():
        raise StorageError(f"Cannot write {target}: it is a folder, and a file was expected.")
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary = folder / target.name
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def atomic_folder(
    path: str | Path, *, like: str | None = None, ours: Sequence[str] = ()
) -> Iterator[Path]:
    """Give an empty folder to write to, which becomes `path` when the block ends without error.

    A folder that is already there is replaced only when nothing of the user's can be lost: it is empty,
    or it holds the file `like` (an earlier result of the same kind) and no file that the new one lacks, other
    than `ours`.

    Args:
        path: the folder to create or replace. Its parents are created when missing.
        like: name of the file by which an earlier result is recognised, e.g. `edit.json`.
        ours: names (or patterns, such as `relearning*.png`) of files that an earlier result may have had besides.

    Yields:
        An empty folder beside `path`.

    Raises:
        StorageError: `path` is a file or somebody else's folder, or the disk refuses the write.
    """
    target = Path(path)
    check_folder(target, like=like, ours=ours)
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            _put_in_place(temporary, target, ours)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_folder(path: str | Path, *, like: str | None = None, ours: Sequence[str] = ()) -> None:
    """Check that `atomic_folder` would accept a folder, so that long work need not start in vain.

    Where ``ours`` names all files of a result, others among them are refused at once.

    Raises:
        StorageError: `path` is a file, or a folder with content that is no earlier result.
    """
    target = Path(path)
    if target.is_dir():
        if not any(target.iterdir()):
            return
        if like is not None and (target / like).is_file():
            if ours:
                _check_lost(target, [f for f in _files(target) if f.name != like], ours)
            return
        known = f" and has no {like}" if like is not None else ""
        raise StorageError(
            f"Will not replace the folder {target}: it is not empty{known}, so it is not an earlier "
            "result of this command. Give a new folder, or move this one away."
        )
    if target.exists():
        raise StorageError(f"Cannot write the folder {target}: a file of that name is in the way.")


def _files(folder: Path) -> list[Path]:
    return [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]


def _check_lost(target: Path, gone: Sequence[Path], ours: Sequence[str]) -> None:
    lost = sorted(str(f) for f in gone if not any(fnmatch(str(f), pattern) for pattern in ours))
    if lost:
        raise StorageError(
            f"Will not replace the folder {target}: it holds files that the new result lacks "
            f"({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}). Move them away, or give a new folder."
        )


def _put_in_place(temporary: Path, target: Path, ours: Sequence[str]) -> None:
    temporary.chmod(0o777 & ~_umask())  # mkdtemp makes folders private
    if not target.is_dir():
        temporary.replace(target)
        return
    _check_lost(target, [f for f in _files(target) if not (temporary / f).is_file()], ours)
    # A folder with content cannot be replaced in one step: the old one steps aside and is put back on failure.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.replace(aside / target.name)
    try:
        temporary.replace(target)
    except BaseException:
        (aside / target.name).replace(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    """Read the process's umask, which the standard library can only do by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(file: Path) -> None:
    """Wait until the content is on the disk: some file systems report a full disk only here."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Only failures to write are explained here: an error about another file keeps its own message.
        place = error.filename if error.filename is not None else target
        if error.filename is not None and target.parent not in Path(str(place)).parents:
            raise
        raise StorageError(
            f"Could not write {target}: {error.strerror or error}. Nothing was left behind. "
            "Free some space or choose another place, then run it again."
        ) from error
    except SafetensorError as error:
        if "I/O error" not in str(error):  # a wrong tensor is the caller's to explain
            raise
        raise StorageError(
            f"Could not write {target}: {error}. Nothing was left behind. "
            "Free some space or choose another place, then run it again."
        ) from error
