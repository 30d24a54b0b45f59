"""What `locate-edit plot` and `locate-edit compare-masks` do: read saved values, draw them, and compare masks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from circuits import ComponentMask, Scores, draw
from circuits.circuit import Circuit
from locate_edit.draw.report import figures
from locate_edit.errors import LocateEditError
from locate_edit.reports.report import Report

FIGURES: Mapping[str, tuple[str, ...]] = {
    "mask": ("mask-map", "histogram", "agreement"),
    "scores": ("score-map", "heads", "concentration", "agreement"),
    "circuit": ("circuit-graph",),
    "report": ("before-after", "oracle-distance"),
}
"""Figures of each kind of file; the first is drawn unless another is asked for."""
SEVERAL = ("agreement", "histogram")
"""Figures of several files at once; the first is drawn unless another is asked for."""


def read(path: Path) -> tuple[str, Any]:
    """What a saved file or folder is ("mask", "scores", "circuit" or "report"), and its value.

    Raises:
        LocateEditError: it is damaged, or none of these.
    """
    file = path / "report.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        file = path / "mask.safetensors"
    if not file.is_file():
        raise LocateEditError(
            f"Nothing to draw at {path}: expected a file of a mask, scores or a circuit, or the folder of a report or "
            "an edit."
        )
    if file.suffix == ".json":
        try:
            return "report", Report.from_json(json.loads(file.read_text("utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LocateEditError(
                f"{file} cannot be read as a report: {error!r}. Expected the report.json that evaluate writes."
            ) from None
    what = _says_it_is(file)
    if what == "mask":
        return what, ComponentMask.load(file)
    if what == "scores":
        return what, Scores.load(file)
    if what == "circuit":
        return what, Circuit.load(file)
    raise LocateEditError(
        f"{file} holds {what or 'tensors of something else'}: expected a mask, scores or a circuit."
    )


def draw_files(paths: Sequence[Path], figure: str | None, top: int) -> tuple[str, Any]:
    """Draw one figure of some files; what was drawn, and the axes or figure.

    Args:
        paths: files of one kind.
        figure: which figure; None takes the usual one.
        top: how many units, heads or edges are marked or drawn; for the agreement of scores they become masks.

    Raises:
        LocateEditError: files of several kinds, or a figure they do not have.
    """
    found = {name: read(path) for name, path in named(paths).items()}
    kinds = {what for what, _ in found.values()}
    if len(kinds) != 1:
        listed = ", ".join(f"{name} is {what}" for name, (what, _) in found.items())
        raise LocateEditError(f"Files of one kind are drawn together, but {listed}.")
    what = kinds.pop()
    values = {name: value for name, (_, value) in found.items()}
    possible = [f for f in FIGURES[what] if len(values) == 1 or f in SEVERAL]
    if len(values) == 1:
        possible = [f for f in possible if f != "agreement"]
    if not possible:
        raise LocateEditError(f"A {what} is drawn by itself, got {len(values)} of them.")
    usual = possible[0] if len(values) == 1 else "agreement"
    chosen = figure or usual
    if chosen not in possible:
        raise LocateEditError(
            f"{len(values)} {what} file{'' if len(values) == 1 else 's'} cannot be drawn as {chosen!r}. "
            f"There is: {', '.join(possible)}."
        )
    return chosen, _draw(chosen, values, top)


def _draw(figure: str, values: Mapping[str, Any], top: int) -> Any:
    one = next(iter(values.values()))
    if figure == "mask-map":
        return draw.mask_map(one)
    if figure == "histogram":
        kinds = [site.kind for site in one.sites if site.layer is not None]
        kind = max(kinds, key=kinds.count, default="neuron")
        return draw.neuron_histogram(one if len(values) == 1 else values, kind)
    if figure == "score-map":
        return draw.score_map(one, top=top)
    if figure == "heads":
        return draw.head_map(one, top=top)
    if figure == "concentration":
        return draw.concentration(one, at=(top,))
    if figure == "circuit-graph":
        return draw.circuit_graph(one, top=top)
    if figure == "agreement":
        return draw.agreement_map(values)
    drawn = figures(one)
    name = figure.replace("-", "_")
    if name not in drawn:
        raise LocateEditError(
            f"This report has no figure {figure!r}. It has: {', '.join(drawn).replace('_', '-') or 'none'}."
        )
    return drawn[name]


def compare(masks: Mapping[str, ComponentMask], truth: ComponentMask | None) -> dict[str, Any]:
    """Sizes of masks, and for every pair what they share and what random masks of the same sizes would."""
    about: dict[str, Any] = {
        "masks": {
            name: {
                "units": len(mask),
                "of": mask.total(),
                "layers": sorted(_layers(mask)),
                "made by": mask.provenance.get("localizer"),
            }
            for name, mask in masks.items()
        },
        "pairs": [
            {
                "first": a,
                "second": b,
                "jaccard": masks[a].overlap(masks[b]),
                "expected at random": draw.expected_overlap(masks[a], masks[b]),
                "shared units": (masks[a] & masks[b]).count(),
                "shared layers": sorted(_layers(masks[a]) & _layers(masks[b])),
            }
            for a, b in combinations(masks, 2)
        ],
    }
    if truth is not None:
        about["truth"] = {
            name: {
                "recall": draw.recall(mask, truth),
                "precision": (mask & truth).count() / len(mask) if len(mask) else None,
                "jaccard": mask.overlap(truth),
                "expected at random": draw.expected_overlap(mask, truth),
            }
            for name, mask in masks.items()
        }
    return about


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Short names of files: their stems, or their paths where stems are alike."""
    stems = [path.stem for path in paths]
    return {
        stem if stems.count(stem) == 1 else str(path): path
        for stem, path in zip(stems, paths, strict=True)
    }


def _layers(mask: ComponentMask) -> set[int]:
    return {site.layer for site, n in mask.counts().items() if n and site.layer is not None}


def _says_it_is(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("locate-edit")
    except SafetensorError as error:
        raise LocateEditError(
            f"{file} is neither a report (.json) nor a whole safetensors file: {error}"
        ) from None
