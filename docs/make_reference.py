"""Write docs/methods.md, docs/localizers.md and docs/ensembles.md from the docstrings: `python docs/make_reference.py`.

A test fails when they differ from what the code says.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from locate_edit import catalog

ROOT = Path(__file__).parent
PAGES: dict[str, tuple[catalog.Kind, str, str]] = {
    "methods.md": (
        "method",
        "Edit methods",
        "Each runs restricted to any mask (or none): `edit(model, Method(...), mask, forget=..., retain=...)`, or "
        "`locate-edit edit --method NAME --set option=value`.",
    ),
    "localizers.md": (
        "localizer",
        "Localizers",
        "Each returns scores of units, of which a mask is selected: `Localizer(...)(model, prompts).top(200)`, or "
        "`locate-edit locate --method NAME --set option=value`.",
    ),
}
ENSEMBLES = "ensembles.md"
MODULES = tuple(
    f"locate_edit.{name}"
    for name in ("ensembles.shards", "ensembles.sisa", "ensembles.leave_one_out", "ensembles.fair_votes", "fusion")
)  # fmt: skip
_ATTRIBUTE = re.compile(r"^ {4}(\w+(?:, \w+)*): ")
_STATED = re.compile(r"(?:^|(?<=\. ))(Direction|Needs|Cost|Deviations): ")


def page(name: str) -> str:
    """One page as Markdown: a section for each entry of the catalogue."""
    kind, title, intro = PAGES[name]
    entries = catalog.entries(kind)
    parts = [f"# {title}", intro, "Made from the docstrings by `docs/make_reference.py`."]
    parts.append(
        "\n".join(f"- [{e.attribute}](#{e.attribute.lower()}): {e.summary}" for e in entries)
    )
    parts += [section(entry) for entry in entries]
    return "\n\n".join(parts) + "\n"


def ensembles() -> str:
    """The page of ensembles as Markdown: a section for each module, with its public classes and functions."""
    parts = [
        "# Ensembles and fused edits",
        "Several models over one base, as small changes of it: delete training rows exactly, let the models vote, "
        "forget with teachers that never saw a text, and merge the adapters of several requests. On the command line: "
        "`locate-edit ensemble train | delete | predict | forget`.",
        "Made from the docstrings by `docs/make_reference.py`.",
        "\n".join(
            f"- `{name}`: " + ", ".join(f"`{t.__name__}`" for t in public(name)) for name in MODULES
        ),
    ]
    for name in MODULES:
        parts += [f"## {name}", indented(inspect.getdoc(importlib.import_module(name)) or "")]
        for target in public(name):
            parts += described(target, "###")
            if inspect.isclass(target):
                for key, member in vars(target).items():
                    function = getattr(member, "__func__", member)
                    if inspect.isfunction(function) and (key == "__call__" or key[0] != "_"):
                        parts += described(function, "####")
    return "\n\n".join(part for part in parts if part) + "\n"


def public(module: str) -> list[Any]:
    """The public classes and functions that a module defines, in its order."""
    found = vars(importlib.import_module(module)).items()
    return [
        each
        for name, each in found
        if name[0] != "_"
        and (inspect.isclass(each) or inspect.isfunction(each))
        and each.__module__ == module
    ]


def described(target: Any, heading: str) -> list[str]:
    """Name, signature and docstring of a class or function, as parts of a page."""
    made = inspect.isclass(target) and "__dataclass_fields__" not in vars(target)
    names = list(inspect.signature(target).parameters)
    name = target.__qualname__
    shown = "" if made else "(" + ", ".join(n for n in names if n != "self") + ")"
    return [f"{heading} {name}", f"`{name}{shown}`", indented(inspect.getdoc(target) or "")]


def indented(docstring: str) -> str:
    """A Google docstring as Markdown: its sections as lists, its examples as they stand."""
    lines: list[str] = []
    within = False
    for line in docstring.splitlines():
        if line in ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:"):
            within = True
            lines += [f"**{line[:-1]}**", ""]
        elif within and line.startswith("        "):
            lines[-1] += f" {line.strip()}"
        elif within and line.startswith("    "):
            lines.append(f"- {line.strip()}")
        else:
            within = within and not line
            lines.append(line)
    return "\n".join(lines)


def section(entry: catalog.Entry) -> str:
    """What one localizer or method says about itself, with its hyperparameters and their defaults as a table."""
    target = entry.load()
    about, options = split(inspect.getdoc(target) or "")
    parts = [f"## {entry.attribute}", f"`{entry.name}`, `{entry.module}`"]
    module = inspect.getdoc(sys.modules[entry.module]) or ""
    parts += [part.replace("\n", " ") for part in module.split("\n\n") if part.startswith("Paper")]
    parts.append(about)
    rows = [
        f"| `{name}` | `{field.default!r}` | {options.get(name, '')} |".replace("\n", " ")
        for name, field in catalog.hyperparameters(target).items()
    ]
    if rows:
        parts.append("\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts)


def stated(docstring: str) -> dict[str, str]:
    """What a docstring says in paragraphs of `Direction:`, `Needs:`, `Cost:` and `Deviations:`, by these words."""
    found: dict[str, str] = {}
    for paragraph in docstring.split("\n\n"):
        before, *parts = _STATED.split(" ".join(paragraph.split()))
        if not before:
            found |= {
                word: text.strip() for word, text in zip(parts[::2], parts[1::2], strict=True)
            }
    return found


def split(docstring: str) -> tuple[str, dict[str, str]]:
    """A Google docstring's text without its sections, and what it says about each attribute."""
    text, _, rest = docstring.partition("\nAttributes:\n")
    options: dict[str, str] = {}
    names: list[str] = []
    for line in rest.splitlines():
        if match := _ATTRIBUTE.match(line):
            names = match[1].split(", ")
            options |= dict.fromkeys(names, line[match.end() :].strip())
        elif line.strip() and line.startswith("        "):
            for name in names:
                options[name] += f" {line.strip()}"
        elif line.strip():
            break
    escaped = {name: text.replace("|", "\\|") for name, text in options.items()}
    return text.split("\nRaises:\n")[0].strip(), escaped


if __name__ == "__main__":
    for file in PAGES:
        (ROOT / file).write_text(page(file), encoding="utf-8")
    (ROOT / ENSEMBLES).write_text(ensembles(), encoding="utf-8")
