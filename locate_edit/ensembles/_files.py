"""Folders of safetensors files and one JSON file that knows their checksums, written all or nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from circuits.atomic import atomic_folder
from locate_edit.errors import EditError


def write(
    folder: str | Path,
    index: str,
    kind: str,
    about: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Tensor]],
) -> Path:
    """Write ``files`` (tensors by name, by file name) and ``index`` with ``about`` and their checksums.

    Args:
        folder: where; an earlier result of the same kind is replaced, and its files that are not needed any more
            are left without content.
        index: name of the JSON file.
        kind: what it holds, with a version, such as "soft-labels/1".
        about: everything else to keep, as JSON knows it.
        files: the tensors; a name ends in ".safetensors".
    """
    stale: dict[str, dict[str, Tensor]] = {
        name: {} for name in _named(Path(folder) / index) if name not in files
    }
    files = {**files, **stale}
    with atomic_folder(folder, like=index) as place:
        for name, tensors in files.items():
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, place / name)  # fmt: skip
        whole = {
            **about,
            "format": kind,
            "files": {name: _sha256((place / name).read_bytes()) for name in files},
        }
        text = json.dumps({**whole, "digest": _digest(whole)}, indent=1)
        (place / index).write_text(text, encoding="utf-8")
    return Path(folder)


def read(
    folder: str | Path, index: str, kind: str
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What `write` wrote: the contents of ``index`` and the tensors by name, by file name.

    Raises:
        EditError: something else is there, or its files are truncated or were changed.
    """
    path = Path(folder) / index
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise EditError(
            f"{path} cannot be read: {problem}. Give the folder that was saved"
        ) from problem
    found = about.get("format") if isinstance(about, dict) else type(about).__name__
    if found != kind:
        raise EditError(f"{path}: expected format {kind}, found {found!r}")
    if about.pop("digest", None) != _digest(about):
        raise EditError(
            f"{path} was changed after it was written: its digest does not fit its contents"
        )
    files = {}
    for name, checksum in about["files"].items():
        file = Path(folder) / name
        if not file.is_file():
            raise EditError(f"{folder} is not whole: {name} is missing")
        if _sha256(file.read_bytes()) != checksum:
            raise EditError(
                f"{file} is truncated or was changed: its checksum is not the one in {index}"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                files[name] = {key: opened.get_tensor(key) for key in opened.keys()}
        except SafetensorError as problem:
            raise EditError(f"{file} cannot be read: {problem}") from problem
    return about, files


def _named(index: Path) -> list[str]:
    """The files that an earlier result lists, or none where there is no such result."""
    try:
        return list(json.loads(index.read_text(encoding="utf-8"))["files"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        return []


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(about: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(about, sort_keys=True).encode())
