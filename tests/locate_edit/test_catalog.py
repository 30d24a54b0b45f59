"""The catalogue lists what the folders hold, and reads hyperparameters from text by their types."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from locate_edit import catalog
from locate_edit.catalog import CatalogError

KINDS: tuple[catalog.Kind, ...] = ("localizer", "method", "metric", "attack")
ENTRIES = [entry for kind in KINDS for entry in catalog.entries(kind)]


@dataclass(frozen=True)
class Inner:
    """Settings within settings."""

    clip: float | None = None
    warmup: int = 0


@dataclass(frozen=True)
class Sample:
    """A localizer with one hyperparameter of every kind."""

    steps: int
    rate: float = 0.5
    rule: Literal["midpoint", "left"] = "midpoint"
    keep: int | None = None
    level: float | str = "auto"
    exact: bool = True
    layers: tuple[int, ...] = ()
    span: tuple[int, float] = (1, 2.0)
    words: Mapping[str, str | Sequence[str]] = dataclasses.field(default_factory=dict)
    inner: Inner = Inner()

    def __call__(self) -> int:
        return self.steps


PATH = f"{__name__}:Sample"
READY = Sample(steps=7)


def plain_function() -> str:
    return "called"


NOT_CALLABLE = 3


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.kind}-{entry.name}")
def test_what_is_listed_loads_and_is_documented(entry: catalog.Entry) -> None:
    target = entry.load()
    assert target.__name__ == entry.attribute
    assert target.__module__ == entry.module
    assert entry.summary == entry.summary.strip() != ""
    assert (inspect.getdoc(target) or "").replace("\n", " ").startswith(entry.summary[:40])
    if entry.kind in ("localizer", "method", "attack"):
        assert dataclasses.is_dataclass(target)
        assert callable(target)
        assert target.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_names_are_unique() -> None:
    names = [(entry.kind, entry.name) for entry in ENTRIES]
    assert len(names) == len(set(names))


def test_the_first_localizers_and_methods_are_there() -> None:
    assert {"privacy-neurons"} <= {entry.name for entry in catalog.entries("localizer")}
    assert {"zero-neurons", "gradient-ascent", "gradient-difference", "npo", "fine-tune"} <= {
        entry.name for entry in catalog.entries("method")
    }
    assert len(catalog.entries("metric")) >= 7


def test_listing_does_not_import_what_it_lists() -> None:
    code = (
        "import json, sys\nfrom locate_edit import catalog\n"
        "names = [e.name for k in ('localizer', 'method', 'metric') for e in catalog.entries(k)]\n"
        "print(json.dumps([len(names), 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, torch_loaded = json.loads(done.stdout)
    assert count > 5
    assert not torch_loaded


def test_a_new_file_is_listed_without_being_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locate").mkdir()
    (tmp_path / "locate" / "gradient_norms.py").write_text(
        '"""How large the gradient is.\n\nPaper: A. Author, Gradients (2020),\nequation 3.\n\nMore.\n"""\n'
        "@dataclass(frozen=True)\nclass GradientNorms:\n"
        '    """Scores units by the norm of\n    their gradient. Slowly."""\n'
        "    def __call__(self): ...\n"
        "@dataclass(frozen=True)\nclass Result:\n    '''Not callable.'''\n"
        "class Helper:\n    def __call__(self): ...\n"
        "@dataclass(frozen=True)\nclass _Private:\n    def __call__(self): ...\n"
    )
    (tmp_path / "locate" / "_shared.py").write_text("raise RuntimeError('never run')")
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "catalog.py"))
    catalog.entries.cache_clear()
    try:
        (entry,) = catalog.entries("localizer")
    finally:
        catalog.entries.cache_clear()
    assert entry.name == "gradient-norms"
    assert entry.path == "locate_edit.locate.gradient_norms:GradientNorms"
    assert entry.summary == "Scores units by the norm of their gradient."
    assert entry.paper == "A. Author, Gradients (2020), equation 3."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("PrivacyNeurons", "privacy-neurons"),
        ("NPO", "npo"),
        ("KLDistill", "kl-distill"),
        ("exact_match", "exact-match"),
    ],
)
def test_command_names(name: str, expected: str) -> None:
    assert catalog._command_name(name) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"steps": "20"}, Sample(20)),
        ({"steps": "1e2"}, Sample(100)),
        ({"steps": "1", "rate": "1e-4"}, Sample(1, rate=1e-4)),
        ({"steps": "1", "rule": "left"}, Sample(1, rule="left")),
        ({"steps": "1", "keep": "none"}, Sample(1, keep=None)),
        ({"steps": "1", "keep": "5"}, Sample(1, keep=5)),
        ({"steps": "1", "level": "2.3"}, Sample(1, level=2.3)),
        ({"steps": "1", "level": "auto"}, Sample(1, level="auto")),
        ({"steps": "1", "exact": "no"}, Sample(1, exact=False)),
        ({"steps": "1", "layers": "3, 4,5"}, Sample(1, layers=(3, 4, 5))),
        ({"steps": "1", "span": "2,0.5"}, Sample(1, span=(2, 0.5))),
        (
            {"steps": "1", "words": '{"Ann": "Bo", "Cy": ["Di", "Ed"]}'},
            Sample(1, words={"Ann": "Bo", "Cy": ("Di", "Ed")}),
        ),
        (
            {"steps": "1", "inner.clip": "0.5", "inner.warmup": "3"},
            Sample(1, inner=Inner(clip=0.5, warmup=3)),
        ),
    ],
)
def test_text_is_read_by_type(settings: dict[str, str], expected: Sample) -> None:
    made = catalog.build("localizer", PATH, settings)
    assert made == expected
    for field in dataclasses.fields(expected):
        assert type(getattr(made, field.name)) is type(getattr(expected, field.name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "many"}, r"Sample\.steps: expected int, got 'many'"),
        ({"steps": "1.5"}, r"Sample\.steps: expected int, got '1\.5'"),
        ({"steps": "1", "rate": "fast"}, r"Sample\.rate: expected float, got 'fast'"),
        ({"steps": "1", "rule": "right"}, r"expected 'midpoint' \| 'left', got 'right'"),
        ({"steps": "1", "keep": "some"}, r"expected int \| None, got 'some'"),
        ({"steps": "1", "exact": "maybe"}, "expected bool, got 'maybe'"),
        ({"steps": "1", "span": "1,2,3"}, "got '1,2,3'"),
        ({"steps": "1", "words": "Ann=Bo"}, r"Sample\.words: expected a JSON object"),
        ({"steps": "1", "words": '{"Ann": 1}'}, r"Sample\.words: expected a JSON object"),
        ({"steps": "1", "words": '["Ann"]'}, r"Sample\.words: expected a JSON object"),
        (
            {"step": "1"},
            r"has no hyperparameter 'step'\. Did you mean 'steps'\? It has: steps: int, rate: float = 0\.5",
        ),
        ({"steps": "1", "inner.clap": "1"}, r"Sample\.inner has no field 'clap'\. It has: clip"),
        ({"steps": "1", "inner.warmup": "x"}, r"Sample\.inner\.warmup: expected int, got 'x'"),
        ({"steps": "1", "rate.x": "1"}, r"Sample\.rate is 0\.5, which has no fields of its own"),
        ({}, "Sample needs a value for steps"),
    ],
)
def test_text_that_does_not_fit_is_explained(settings: dict[str, str], message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        catalog.build("localizer", PATH, settings)


def test_ready_objects_and_functions_are_taken_as_they_are() -> None:
    assert catalog.build("localizer", f"{__name__}:READY") is READY
    assert catalog.build("localizer", f"{__name__}:plain_function") is plain_function
    with pytest.raises(CatalogError, match="has no hyperparameters to set; got steps"):
        catalog.build("localizer", f"{__name__}:READY", {"steps": "3"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "privacy-neuron",
            "No localizer is called 'privacy-neuron'. Did you mean 'privacy-neurons'",
        ),
        ("no_such_module_anywhere:X", "Cannot import 'no_such_module_anywhere'"),
        (f"{__name__}:Sampel", "has no 'Sampel'. Did you mean 'Sample'"),
        (f"{__name__}:NOT_CALLABLE", "is a int, and a localizer must be callable"),
    ],
)
def test_names_that_lead_nowhere_are_explained(name: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        catalog.resolve("localizer", name)


def measure(
    predictions: Any, *, k: float = 0.2, rule: Literal["a", "b"] = "a", words: Sequence[str] = ()
) -> tuple[object, ...]:
    return predictions, k, rule, words


def test_the_keywords_of_a_metric_are_its_hyperparameters() -> None:
    path = f"{__name__}:measure"
    assert catalog.build("metric", path) is measure
    made = catalog.build("metric", path, {"k": "1", "words": "x, y"})
    assert made(7) == (7, 1.0, "a", ("x", "y"))
    with pytest.raises(CatalogError, match=r"measure has no hyperparameter 'kk'. Did you mean 'k'"):
        catalog.build("metric", path, {"kk": "1"})
    with pytest.raises(CatalogError, match=r"measure\.rule: expected 'a' \| 'b', got 'c'"):
        catalog.build("metric", path, {"rule": "c"})
    with pytest.raises(CatalogError, match="is not a dataclass, so it has no hyperparameters"):
        catalog.build("method", path, {"k": "1"})  # there they would be batch size and seed


def test_metrics_that_take_two_sets_are_for_python() -> None:
    with pytest.raises(CatalogError, match=r"In Python only.*metrics\.bias\.crows\(more, less\)"):
        catalog.resolve("metric", "crows")
    with pytest.raises(CatalogError, match=r"bias\.equalised_odds\(answers, positive\)"):
        catalog.resolve("metric", "equalised_odds")
    with pytest.raises(CatalogError, match=r"No method is called 'crows'\. There are"):
        catalog.resolve("method", "crows")


def test_a_class_that_refuses_its_values_is_explained() -> None:
    with pytest.raises(CatalogError, match=r"Picky refuses {'steps': -1}: at least one step"):
        catalog.build("localizer", f"{__name__}:Picky", {"steps": "-1"})


@dataclass(frozen=True)
class Picky:
    """Refuses."""

    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("at least one step")

    def __call__(self) -> Any: ...
