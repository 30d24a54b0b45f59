"""What there is to choose from: every localizer, edit method, metric and attack, found by walking the folders.

Nothing is registered: a module in `locate_edit/locate` (or `methods`, `metrics`, `attacks`) that defines a public
frozen dataclass (or, for metrics, a public function that takes predictions; dataclasses in `metrics` are statistics,
numbers about whole sets) is listed, gets a command-line name and is
picked up by the conformance tests. Listing reads the source without importing it, so it costs milliseconds and never
loads torch; only `Entry.load` imports.

A user's own object needs no place in the catalogue: `resolve` also takes `package.module:Name`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from circuits.errors import LocateEditError

Kind = Literal["localizer", "method", "metric", "statistic", "attack"]

FOLDERS: dict[str, str] = {
    "localizer": "locate",
    "method": "methods",
    "metric": "metrics",
    "statistic": "metrics",
    "attack": "attacks",
}


class CatalogError(LocateEditError):
    """A name that is not in the catalogue, or a hyperparameter its object does not have."""


@dataclass(frozen=True)
class Entry:
    """One localizer, method, metric or attack, as read from its source."""

    kind: str
    name: str
    """What the command line calls it, e.g. `privacy-neurons`."""
    module: str
    attribute: str
    summary: str
    """First sentence of its docstring."""
    paper: str
    """Citation found in the docstring of its module, or empty."""

    @property
    def path(self) -> str:
        """How to import it: `package.module:Name`."""
        return f"{self.module}:{self.attribute}"

    def load(self) -> Any:
        """Import the module and return the class or function."""
        return getattr(importlib.import_module(self.module), self.attribute)


@cache
def entries(kind: Kind) -> tuple[Entry, ...]:
    """List everything of one kind, sorted by name."""
    folder = Path(__file__).parent / FOLDERS[kind]
    files = sorted(folder.glob("[!_]*.py")) if folder.is_dir() else []
    found = [entry for file in files for entry in _read(kind, file)]
    return tuple(sorted(found, key=lambda entry: entry.name))


def resolve(kind: Kind, name: str) -> Any:
    """Return the class or function called `name`: a catalogue name or `package.module:Name`.

    Raises:
        CatalogError: there is no such name, module or attribute.
    """
    if ":" in name:
        return _resolve_path(kind, name)
    wanted = name.replace("_", "-").lower()
    for entry in entries(kind):
        if wanted in (entry.name, entry.attribute.lower()):
            return entry.load()
    names = [entry.name for entry in entries(kind)]
    close = difflib.get_close_matches(wanted, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if kind == "metric" and (call := _python_only(wanted)):
        hint = f" In Python only, because of what it takes: {call}."
    raise CatalogError(
        f"No {kind} is called {name!r}.{hint} There are: {', '.join(names) or 'none'}. "
        "Your own is given as package.module:Name."
    )


def build(kind: Kind, name: str, settings: dict[str, str] | None = None) -> Any:
    """Make the object called `name` with hyperparameters given as text.

    The hyperparameters of a metric, which is a function, are its keyword-only arguments.

    Args:
        kind: what `name` is.
        name: a catalogue name or `package.module:Name` (a class, a ready object or a function).
        settings: hyperparameter name to text, e.g. `{"beta": "0.1", "optim.clip": "1"}`; the text is read by the
            field's type.

    Raises:
        CatalogError: unknown name or hyperparameter, or text that does not fit the type.
    """
    target = resolve(kind, name)
    settings = settings or {}
    is_metric = kind == "metric" and inspect.isfunction(target)
    if not is_metric and not (inspect.isclass(target) and dataclasses.is_dataclass(target)):
        if settings:
            raise CatalogError(
                f"{name} is not a dataclass, so it has no hyperparameters to set; got "
                f"{', '.join(settings)}. Set them where {name} is defined."
            )
        return target() if inspect.isclass(target) else target
    known = hyperparameters(target)
    values: dict[str, Any] = {}
    for key, text in settings.items():
        field, dot, inner = key.replace("-", "_").partition(".")
        if field not in known:
            close = difflib.get_close_matches(field, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise CatalogError(
                f"{target.__name__} has no hyperparameter {key!r}.{hint} It has: {describe(target)}."
            )
        where = f"{target.__name__}.{field}"
        if dot:
            whole = values.get(field, known[field].default)
            values[field] = _replace(whole, inner, text, where)
        else:
            values[field] = _read_as(known[field].type, text, where)
    missing = [key for key, field in known.items() if field.required and key not in values]
    if missing:
        raise CatalogError(
            f"{target.__name__} needs a value for {', '.join(missing)}. It has: {describe(target)}."
        )
    if is_metric:
        return partial(target, **values) if values else target
    try:
        return target(**values)
    except (TypeError, ValueError) as error:
        raise CatalogError(f"{target.__name__} refuses {values}: {error}") from error


def rebuild(kind: Kind, about: Mapping[str, Any]) -> Any:
    """Make the object that a provenance describes: its name, its module and its hyperparameters as plain data.

    Args:
        kind: what it is.
        about: as `edit.json` holds it. Only objects of the catalogue are made: a file may not name code to be run.

    Raises:
        CatalogError: no such object in the catalogue, or a hyperparameter that plain data cannot hold.
    """
    place = (about.get("module"), about.get("name"))
    found = [e for e in entries(kind) if (e.module, e.attribute) == place]
    if not found:
        raise CatalogError(
            f"no {kind} of the catalogue is called {about.get('name')!r} in {about.get('module')}"
        )
    given = {key: value for key, value in about.items() if key not in ("name", "module")}
    return _from_plain(found[0].load(), given, found[0].attribute)


@dataclass(frozen=True)
class Hyperparameter:
    """Type and default of one field of a localizer or method, or of one keyword of a metric."""

    type: Any
    default: Any
    required: bool


def hyperparameters(target: Any) -> dict[str, Hyperparameter]:
    """Return the fields a dataclass can be constructed with, or the keyword-only arguments of a function, in order."""
    hints = typing.get_type_hints(target)
    result = {}
    if inspect.isfunction(target):
        for name, argument in inspect.signature(target).parameters.items():
            if argument.kind is argument.KEYWORD_ONLY:
                required = argument.default is argument.empty
                result[name] = Hyperparameter(
                    hints.get(name, Any), None if required else argument.default, required
                )
        return result
    for field in dataclasses.fields(target):
        if not field.init:
            continue
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        required = default is dataclasses.MISSING
        result[field.name] = Hyperparameter(
            hints[field.name], None if required else default, required
        )
    return result


def describe(target: Any) -> str:
    """Say what can be set, as `steps: int = 20, rule: 'midpoint' | 'left' = 'midpoint'`."""
    parts = []
    for name, field in hyperparameters(target).items():
        default = "" if field.required else f" = {field.default!r}"
        parts.append(f"{name}: {_show(field.type)}{default}")
    return ", ".join(parts) or "none"


def _read(kind: str, file: Path) -> Iterator[Entry]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    module = f"{__package__}.{FOLDERS[kind]}.{file.stem}"
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            listed = kind != "metric" and _is_frozen_dataclass(node) and _is_callable(node)
        elif isinstance(node, ast.FunctionDef):
            listed = kind == "metric" and _takes_predictions(node)
        else:
            continue
        if listed and not node.name.startswith("_"):
            yield Entry(
                kind=kind,
                name=_command_name(node.name),
                module=module,
                attribute=node.name,
                summary=_first_sentence(ast.get_docstring(node) or ""),
                paper=_paper(ast.get_docstring(tree) or ""),
            )


def _python_only(wanted: str) -> str:
    """How a function is called that stands among the metrics but takes something other than predictions; or empty."""
    for file in sorted((Path(__file__).parent / FOLDERS["metric"]).glob("[!_]*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not isinstance(node.returns, ast.Name):
                continue
            if _command_name(node.name) == wanted:
                given = ", ".join(argument.arg for argument in node.args.args)
                return f"{__package__}.{FOLDERS['metric']}.{file.stem}.{node.name}({given})"
    return ""


def _is_frozen_dataclass(node: ast.ClassDef) -> bool:
    return any(
        isinstance(decorator, ast.Call)
        and ast.unparse(decorator.func).split(".")[-1] == "dataclass"
        and any(
            keyword.arg == "frozen" and ast.unparse(keyword.value) == "True"
            for keyword in decorator.keywords
        )
        for decorator in node.decorator_list
    )


def _is_callable(node: ast.ClassDef) -> bool:
    return any(isinstance(item, ast.FunctionDef) and item.name == "__call__" for item in node.body)


def _takes_predictions(node: ast.FunctionDef) -> bool:
    arguments = [*node.args.posonlyargs, *node.args.args]
    return bool(arguments) and arguments[0].arg == "predictions"


def _command_name(name: str) -> str:
    """Turn `PrivacyNeurons` into `privacy-neurons`, `NPO` into `npo` and `exact_match` into `exact-match`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return words.replace("_", "-").lower()


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split()).replace("``", "`")
    match = re.match(r"(.+?[.!?])(?=\s|$)", paragraph)
    return match.group(1) if match else paragraph


def _paper(docstring: str) -> str:
    match = re.search(
        r"^(?:Papers?|Reference|After):\s*(.+?)(?:\n\s*\n|\Z)", docstring, re.M | re.S
    )
    return " ".join(match.group(1).split()) if match else ""


def _resolve_path(kind: str, path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise CatalogError(
            f"Cannot import {module_name!r} for the {kind} {path!r}: {error}. Expected package.module:Name, "
            "with the package installed or in the folder named by PYTHONPATH."
        ) from error
    if not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_")]
        close = difflib.get_close_matches(attribute, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise CatalogError(f"The module {module_name!r} has no {attribute!r}.{hint}")
    found = getattr(module, attribute)
    if not callable(found):
        raise CatalogError(f"{path} is a {type(found).__name__}, and a {kind} must be callable.")
    return found


def _replace(whole: Any, name: str, text: str, where: str) -> Any:
    """Return the dataclass `whole` with one field read from text."""
    if not dataclasses.is_dataclass(whole) or isinstance(whole, type):
        raise CatalogError(
            f"{where}.{name}: {where} is {whole!r}, which has no fields of its own to set."
        )
    known = hyperparameters(type(whole))
    if name not in known:
        raise CatalogError(f"{where} has no field {name!r}. It has: {describe(type(whole))}.")
    return dataclasses.replace(whole, **{name: _read_as(known[name].type, text, f"{where}.{name}")})


_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _read_as(hint: Any, text: str, where: str) -> Any:
    """Read `text` as a value of type `hint`."""
    try:
        return _parse(hint, text.strip())
    except ValueError as error:
        raise CatalogError(f"{where}: expected {_show(hint)}, got {text!r}.") from error


def _parse(hint: Any, text: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _parse_first(_by_strictness(typing.get_args(hint)), text)
    if origin is Literal:
        for choice in typing.get_args(hint):
            if str(choice) == text:
                return choice
        raise ValueError(text)
    if origin in (tuple, list, Sequence):
        inner = [argument for argument in typing.get_args(hint) if argument is not Ellipsis]
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if origin is tuple and Ellipsis not in typing.get_args(hint) and len(parts) != len(inner):
            raise ValueError(text)
        hints = inner if len(inner) == len(parts) else inner[:1] * len(parts)
        return tuple(_parse(part_hint, part) for part_hint, part in zip(hints, parts, strict=True))
    if origin is Mapping:
        return _as_mapping(text)
    if hint is type(None):
        if text.lower() != "none":
            raise ValueError(text)
        return None
    if hint is bool:
        if text.lower() not in _WORDS:
            raise ValueError(text)
        return _WORDS[text.lower()]
    if hint is int:
        number = float(text) if re.fullmatch(r"[+-]?\d+(\.0*)?[eE]\+?\d+", text) else int(text)
        return int(number)
    if hint is float:
        return float(text)
    if hint in (str, Any):
        return text
    raise ValueError(text)


def _from_plain(hint: Any, value: Any, where: str) -> Any:
    """The value of type `hint` that JSON holds as `value`."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in typing.get_args(hint):
            try:
                return _from_plain(choice, value, where)
            except CatalogError:
                continue
    elif inspect.isclass(hint) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        known = hyperparameters(hint)
        if not set(value) - set(known):
            return hint(
                **{k: _from_plain(known[k].type, v, f"{where}.{k}") for k, v in value.items()}
            )
    elif origin is Literal and value in typing.get_args(hint):
        return value
    elif origin in (tuple, list, Sequence) and isinstance(value, list):
        inner = [argument for argument in typing.get_args(hint) if argument is not Ellipsis]
        hints = inner if len(inner) == len(value) else inner[:1] * len(value)
        return tuple(_from_plain(h, v, where) for h, v in zip(hints, value, strict=True))
    elif origin is Mapping and isinstance(value, dict):
        return value
    elif hint in (str, bool, int, type(None)) and type(value) is hint:
        return value
    elif hint is float and type(value) in (int, float):
        return float(value)
    raise CatalogError(f"{where}: expected {_show(hint)}, got {value!r}")


def _as_mapping(text: str) -> dict[str, str | tuple[str, ...]]:
    """A JSON object of texts, or of lists of texts."""
    found = json.loads(text)  # its error is a ValueError
    if not isinstance(found, dict):
        raise ValueError(text)
    for value in found.values():
        if not all(isinstance(v, str) for v in (value if isinstance(value, list) else [value])):
            raise ValueError(text)
    return {key: tuple(v) if isinstance(v, list) else v for key, v in found.items()}


def _by_strictness(hints: Sequence[Any]) -> list[Any]:
    """Order the members of a union so that text, which reads everything, comes last."""
    order = [type(None), bool, int, float]
    return sorted(hints, key=lambda hint: order.index(hint) if hint in order else 9 + (hint is str))


def _parse_first(hints: Sequence[Any], text: str) -> Any:
    for hint in hints:
        try:
            return _parse(hint, text)
        except ValueError:
            continue
    raise ValueError(text)


def _show(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_show(argument) for argument in typing.get_args(hint))
    if typing.get_origin(hint) is Mapping:
        return 'a JSON object such as {"a": "b", "c": ["d", "e"]}'
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
