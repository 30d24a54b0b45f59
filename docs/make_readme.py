"""Rewrite the parts of README.md that come from the code: `python docs/make_readme.py`.

The tables stand between markers such as `<!-- methods -->` and `<!-- /methods -->`; a test fails when they differ from
what the code says. `--picture` also runs the demo and stores its figure.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from circuits.families import FAMILIES, Family
from docs.make_reference import attacker, control, stated
from locate_edit import catalog, datasets

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "first_edit.png"

CITATION = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars within a cell are escaped, inside code too, as GitHub wants."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in cells] for cells in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def entries_table(kind: catalog.Kind) -> str:
    """Name, what it does and its paper, for everything of one kind."""
    rows = [
        (f"`{e.attribute}`", f"`{e.name}`", e.summary, paper_link(e.paper))
        for e in catalog.entries(kind)
    ]
    return table(("class", "command line", "what it does", "paper"), rows)


def metrics_table() -> str:
    """Name and definition of every metric, and below it its direction, its precondition and its cost."""
    rows = []
    for entry in catalog.entries("metric"):
        said = stated(inspect.getdoc(entry.load()) or "")
        direction, needs, cost = (
            said[word].removesuffix(".") for word in ("Direction", "Needs", "Cost")
        )
        name = f"{entry.module.rsplit('.', 1)[-1]}.{entry.attribute}"
        rows.append(
            (
                f"[`{name}`](docs/metrics.md#{entry.attribute})",
                f"{entry.summary}<br><sub>{direction} · needs {needs} · {cost}</sub>",
            )
        )
    return table(("metric", "what it measures, direction, precondition, cost"), rows)


def attacks_table() -> str:
    """Name of every attack, what it measures, and below it what the attacker may do and where it must find answers."""
    rows = []
    for entry in catalog.entries("attack"):
        target = entry.load()
        below = f"The attacker {attacker(target)} · control: {control(target)}"
        rows.append(
            (
                f"[`{entry.attribute}`](docs/attacks.md#{entry.attribute.lower()})",
                f"`{entry.name}`",
                f"{entry.summary}<br><sub>{below}</sub>",
                paper_link(entry.paper),
            )
        )
    return table(("class", "command line", "what it measures", "paper"), rows)


def datasets_table() -> str:
    """Every module of data sets: what it holds, and its paper where it has one."""
    rows = []
    for module in pkgutil.iter_modules(datasets.__path__):
        if not module.name.startswith("_"):
            name = f"{datasets.__name__}.{module.name}"
            text = inspect.getdoc(importlib.import_module(name)) or ""
            links = ", ".join(
                f"[arXiv:{n}](https://arxiv.org/abs/{n})" for n in CITATION.findall(text)
            )
            rows.append((f"`{name}`", text.split("\n\n")[0].replace("\n", " "), links))
    return table(("module", "what it holds", "paper"), rows)


def paper_link(paper: str) -> str:
    """`Wu et al. 2023, arXiv:2310.20138`, linked where it has a number, from a citation in a docstring."""
    identifiers = CITATION.findall(paper)
    who = paper.split(",")[0]
    if not identifiers:
        return who
    return f"[{who}](https://arxiv.org/abs/{identifiers[0]})"


def families_table() -> str:
    """What is known about each family, one row per set of model types."""
    rows: dict[tuple[str, ...], Family] = {}
    for family in FAMILIES:
        rows.setdefault(family.names, family)
    ordered = sorted(rows.items(), key=lambda item: item[0])
    return table(
        ("model types", "predicts", "MLP", "queries, keys, values"),
        (
            (", ".join(names), _predicts(names), _mlp(family), _attention(family))
            for names, family in ordered
        ),
    )


def _predicts(names: tuple[str, ...]) -> str:
    targets = {"last": "next token", "mask": "masked tokens"}
    return ", ".join(
        sorted({targets[f.target] for f in FAMILIES if f.names == names}, reverse=True)
    )


def _mlp(family: Family) -> str:
    gated = "gated" if family.gate else "plain"
    return f"{gated}, experts" if any("expert" in weight.text for weight in family.down) else gated


def _attention(family: Family) -> str:
    paths = {weights[0].text.split("|")[0] for weights in (family.q, family.k, family.v)}
    stored = "fused" if len(paths) == 1 else "separate"
    return f"{stored}, grouped" if "kv_head" in family.k[0].text else stored


def rewritten(text: str) -> str:
    """The README with every generated part as the code has it now."""
    parts: dict[str, Callable[[], str]] = {
        "localizers": lambda: entries_table("localizer"),
        "methods": lambda: entries_table("method"),
        "metrics": metrics_table,
        "attacks": attacks_table,
        "datasets": datasets_table,
        "families": families_table,
    }
    if unknown := set(re.findall(r"<!-- /(\S+) -->", text)) - set(parts):
        raise ValueError(f"README.md: nothing is made for the parts {', '.join(sorted(unknown))}")
    for name, made in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.S)
        content = made()
        text, count = pattern.subn(
            lambda match, content=content: match[1] + content + match[2], text
        )
        if count != 1:
            raise ValueError(f"README.md: expected one part marked {name!r}, found {count}")
    return text


def draw_picture() -> None:
    """Run the demo and keep the figure that the README shows."""
    from rich.console import Console

    from locate_edit.demo import run_demo

    with tempfile.TemporaryDirectory() as folder:
        run_demo(Path(folder) / "demo", console=Console(stderr=True))
        shutil.copy(Path(folder) / "demo" / "summary.png", PICTURE)


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
    if "--picture" in sys.argv[1:]:
        draw_picture()
