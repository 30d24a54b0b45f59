"""Records of a data set, from a folder of JSON, CSV or parquet files or from the hub."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from locate_edit.errors import PromptError

Record = dict[str, Any]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def records(
    source: str | Path,
    *names: str,
    hub: str | None = None,
    split: str = "train",
    also: str = "",
) -> list[Record]:
    """The records of a data set.

    Args:
        source: a folder, which may be one downloaded from the hub, a file, or a name on the hub (``owner/name``).
        names: what the file may be called in a folder, without its suffix; the first that is there is read.
        hub: the configuration to ask the hub for; None takes the first of ``names``.
        split: the hub's split.
        also: another file that the caller looked for in vain, for the message.

    Raises:
        PromptError: no such folder, file or hub name, a file that is neither JSON lines, a JSON list of objects, CSV
            with a header nor parquet, or `datasets` is needed and not installed.
    """
    place = Path(source)
    if place.is_file():
        return read_records(place)
    if place.is_dir():
        for name in names:
            for suffix in SUFFIXES:
                if (place / f"{name}{suffix}").is_file():
                    return read_records(place / f"{name}{suffix}")
        if files := snapshot(place, hub or names[0], split):
            return [record for file in files for record in read_records(file)]
        there = sorted(p.name for p in place.iterdir() if p.suffix in SUFFIXES)
        wanted = [f"{name}.jsonl" for name in names]
        raise PromptError(
            f"{place}: expected a file called {' or '.join(wanted)} (or .json, .csv, .parquet)"
            f"{f', or {also}' if also else ''}; found {', '.join(there) or 'no such files'}."
            + (_SCRIPT if any(place.glob("*.py")) else "")
        )
    if not is_hub_name(source):
        raise PromptError(
            f"{source}: no such folder or file. Give a folder, a JSON or CSV file, or a name on the hub such as "
            "'locuslab/TOFU'."
        )
    return _from_hub(str(source), hub or names[0], split)


def is_hub_name(source: str | Path) -> bool:
    """Whether a source is no local path and has the form ``owner/name``."""
    place = Path(source)
    return str(source).count("/") == 1 and not place.is_absolute() and not place.exists()


def snapshot(place: Path, configuration: str, split: str) -> list[Path]:
    """The files of one split in a folder that was downloaded from the hub."""
    found = [*place.glob(f"{configuration}/{split}-*"), *place.glob(f"{configuration}/{split}/*")]
    if configuration == "default":
        found += [*place.glob(f"data/{split}-*"), *place.glob(f"{split}-*")]
    return sorted(file for file in found if file.suffix in SUFFIXES)


def read_records(path: Path) -> list[Record]:
    """The records of a file, which its suffix says how to read.

    Raises:
        PromptError: as `read_json`, `read_csv` and `read_parquet`.
    """
    readers = {".csv": read_csv, ".parquet": read_parquet}
    return readers.get(path.suffix, read_json)(path)


def read_parquet(path: Path) -> list[Record]:
    """The rows of a parquet file.

    Raises:
        PromptError: it is none, has no rows, or `pyarrow` is not installed.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise PromptError(
            f"{path}: reading parquet needs the package 'pyarrow', which 'datasets' brings along: pip install datasets."
        ) from error
    try:
        found: list[Record] = parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise PromptError(f"{path}: cannot be read as parquet ({error}).") from error
    if not found:
        raise PromptError(f"{path}: the file holds no records.")
    return found


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers.

    Raises:
        PromptError: not UTF-8, or no lines.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    lines = enumerate((line.strip() for line in text.split("\n")), start=1)
    found = [(number, line) for number, line in lines if line]
    if not found:
        raise PromptError(f"{path}: the file holds no lines.")
    return found


def read_csv(path: Path) -> list[Record]:
    """The lines of a CSV file under its header, every value a text.

    Raises:
        PromptError: not UTF-8, not CSV, or no line below the header.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found: list[Record] = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PromptError(f"{path}: cannot be read as UTF-8 text with commas ({error}).") from error
    for number, record in enumerate(found, start=1):
        if None in record or None in record.values():
            raise PromptError(
                f"{path}, record {number}: expected as many values as the header has names. Put a text that holds "
                "commas in quotes."
            )
    if not found:
        raise PromptError(f"{path}: the file holds no records.")
    return found


def read_json(path: Path) -> list[Record]:
    """The objects of a file of JSON lines, or of one JSON list; one object over several lines is a single record.

    Raises:
        PromptError: not UTF-8, not JSON, or not objects; names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("["):
            raise PromptError(f"{path}:{error.lineno}: not valid JSON ({error.msg}).") from error
        found, unit = _json_lines(path, text), "line"
    else:
        many = whole if isinstance(whole, list) else [whole]
        found, unit = list(enumerate(many, start=1)), "entry"
    for number, record in found:
        if not isinstance(record, dict):
            raise PromptError(
                f"{path}, {unit} {number}: expected an object, got {type(record).__name__}."
            )
    if not found:
        raise PromptError(f"{path}: the file holds no records.")
    return [record for _, record in found]


def _json_lines(path: Path, text: str) -> list[tuple[int, Any]]:
    """The value of each line that is not blank, with its number."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise PromptError(
                    f"{path}, line {number}: not valid JSON ({error.msg}). Write one object a line, or one list."
                ) from error
    return found


def read_object(path: Path) -> Record:
    """The one object of a JSON file.

    Raises:
        PromptError: it is no JSON object.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PromptError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise PromptError(f"{path}: expected an object, got {type(record).__name__}.")
    return record


def field(record: Record, name: str, index: int, source: object) -> Any:
    """One field of a record.

    Raises:
        PromptError: it is not there.
    """
    if name not in record:
        raise PromptError(
            f"{source}, record {index}: expected a field {name!r}, got {', '.join(sorted(record))}."
        )
    return record[name]


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of those there are.

    Raises:
        PromptError: with those there are.
    """
    if value not in allowed:
        raise PromptError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}.")


# Where the hub keeps as files what its owner published as a program, which nothing runs any more.
_CONVERTED = "refs/convert/parquet"
_SCRIPT = f" A data set that is a script was converted by the hub: download it with --revision {_CONVERTED}."
_DOWNLOAD = (
    "Without a network here: 'hf download {name} --repo-type dataset --local-dir FOLDER' where there is one, then give "
    "the folder."
)


def _from_hub(name: str, configuration: str, split: str) -> list[Record]:
    try:
        import datasets
    except ImportError as error:
        raise PromptError(
            f"{name!r} is no local folder, and reading it from the hub needs the package 'datasets': pip install "
            f"datasets, or give a local folder. {_DOWNLOAD.format(name=name)}"
        ) from error
    try:
        try:
            found = datasets.load_dataset(name, configuration, split=split)
        except RuntimeError as error:
            if "scripts" not in str(error):
                raise
            found = datasets.load_dataset(name, configuration, split=split, revision=_CONVERTED)
        return [dict(record) for record in found]
    except Exception as error:  # the library raises many kinds; all mean that it is not to be had
        reason = str(error).strip().partition("\n")[0]
        raise PromptError(
            f"{name!r} is no local folder, and the hub did not give it ({configuration!r}, split {split!r}): "
            f"{type(error).__name__}: {reason} {_DOWNLOAD.format(name=name)}"
        ) from error
