"""`locate-edit plot` and `locate-edit compare-masks` on saved values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from circuits import ComponentMask, Scores, Site, draw
from circuits.circuit import Circuit
from circuits.graph import Graph
from locate_edit.cli import app, plot, saying
from locate_edit.reports.report import Report


def on(*units: int, of: int = 40) -> torch.Tensor:
    mask = torch.zeros(of, dtype=torch.bool)
    mask[list(units)] = True
    return mask


def mask(*units: int, layer: int = 0) -> ComponentMask:
    sites = {Site(i, "neuron"): on(*(units if i == layer else ())) for i in range(2)}
    return ComponentMask(sites, {"localizer": "given", "model": "tiny"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A mask of each layer, one that shares two units with the first, scores and a circuit."""
    mask(1, 2, 3, 4).save(tmp_path / "a.safetensors")
    mask(3, 4, 5, 6).save(tmp_path / "b.safetensors")
    mask(1, 2, layer=1).save(tmp_path / "c.safetensors")
    values = torch.arange(80.0).view(1, 80)
    sites = {Site(0, "neuron"): values[:, :40], Site(1, "neuron"): values[:, 40:]}
    Scores(sites, {"localizer": "IG"}).save(tmp_path / "scores.safetensors")
    Scores({site: -v for site, v in sites.items()}).save(tmp_path / "minus.safetensors")
    Scores({Site(0, "head"): torch.tensor([[1.0, -2.0]])}).save(tmp_path / "heads.safetensors")
    graph = Graph(1, 2, 2, False)
    Circuit.of(graph, ["embed -> L0.mlp", "L0.mlp -> logits"]).save(
        tmp_path / "circuit.safetensors"
    )
    return tmp_path


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return found


# ---- plot ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "figure", "expected"),
    [
        (["a"], None, "mask-map"),
        (["a"], "histogram", "histogram"),
        (["a", "b", "c"], None, "agreement"),
        (["a", "b"], "histogram", "histogram"),
        (["scores"], None, "score-map"),
        (["heads"], "heads", "heads"),
        (["scores"], "concentration", "concentration"),
        (["scores", "minus"], None, "agreement"),
        (["circuit"], None, "circuit-graph"),
    ],
)
def test_plot_draws_what_suits_the_file(
    files: list[str],
    figure: str | None,
    expected: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []
    write = saying.draw_to

    def note(ax: Any, *more: Any) -> None:
        drawn.append(ax)
        write(ax, *more)

    monkeypatch.setattr(plot, "draw_to", note)
    given = [folder / f"{name}.safetensors" for name in files]
    more = () if figure is None else ("--figure", figure)
    out = folder / "out" / "figure.png"
    said = run_json("plot", *given, "--out", out, "--dpi", 40, "--top", 3, *more)
    assert said == {"figure": expected, "written": [str(out)]}
    assert out.read_bytes().startswith(b"\x89PNG")
    rows = draw.figure_data(drawn[0])
    if expected == "agreement":
        assert {row["row"] for row in rows} == set(files)
    if expected == "histogram":
        assert sum(row["selected"] for row in rows) == 4 * len(files)
    if expected == "concentration":
        assert [line.get_xdata()[0] for line in drawn[0].lines[1:]] == [3]


def test_plot_writes_other_formats_and_says_so(folder: Path) -> None:
    result = run("plot", folder / "a.safetensors", "--out", folder / "a.svg")
    assert "mask-map" in result.stdout
    assert (folder / "a.svg").read_text().lstrip().startswith("<?xml")


def test_plot_of_an_edit_shows_its_mask(folder: Path) -> None:
    (folder / "edit").mkdir()
    (folder / "a.safetensors").rename(folder / "edit" / "mask.safetensors")
    assert run_json("plot", folder / "edit", "--out", folder / "m.png")["figure"] == "mask-map"


def test_plot_of_a_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    made = Figure()
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text("{}")
    monkeypatch.setattr(Report, "from_json", lambda data: data)
    monkeypatch.setattr("locate_edit.cli._figures.figures", lambda _report: {"before_after": made})
    said = run_json("plot", folder / "report", "--out", folder / "r.png")
    assert said["figure"] == "before-after"
    result = run(
        *("plot", folder / "report", "--out", folder / "r.png", "--figure", "oracle-distance"),
        code=1,
    )
    assert "no figure 'oracle-distance'. It has: before-after." in result.stderr


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        (["absent.safetensors"], (), "Nothing to draw at"),
        (["text.safetensors"], (), "neither a report (.json) nor a whole safetensors file"),
        (["text.json"], (), "cannot be read as a report"),
        (["a.safetensors"], ("--figure", "score-map"), "There is: mask-map, histogram."),
        (["a.safetensors", "b.safetensors"], ("--figure", "mask-map"), "There is: "),
        (["a.safetensors", "scores.safetensors"], (), "but a is mask, scores is scores"),
        (["circuit.safetensors"] * 2, (), "A circuit is drawn by itself, got 2"),
        (["a.safetensors"], ("--out", "figure.docx"), "ends in .png, .pdf or .svg"),
        (["a.safetensors"], ("--figure", "histogramm"), "cannot be drawn as 'histogramm'"),
    ],
)
def test_what_cannot_be_drawn(
    files: list[str], more: tuple[str, ...], message: str, folder: Path
) -> None:
    for name in ("text.safetensors", "text.json"):
        (folder / name).write_text("what?")
    given = [folder / name for name in files]
    if len(given) == 2 and given[0] == given[1]:
        given[1] = folder / "other.safetensors"
        given[1].write_bytes(given[0].read_bytes())
    result = run("plot", *given, "--out", folder / "figure.png", *more, code=1)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert not (folder / "figure.png").exists()


# ---- compare-masks -------------------------------------------------------------------------------------------------


def test_masks_are_compared_beside_chance(folder: Path) -> None:
    said = run_json("compare-masks", *(folder / f"{n}.safetensors" for n in "abc"))
    assert said["masks"]["a"] == {"units": 4, "of": 80, "layers": [0], "made by": "given"}
    pairs = {(p["first"], p["second"]): p for p in said["pairs"]}
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    both = pairs["a", "b"]
    assert both["jaccard"] == pytest.approx(2 / 6)
    assert both["shared units"] == 2
    assert both["shared layers"] == [0]
    # Two masks of 4 of the 40 units of one layer share 0.4 units by chance.
    assert both["expected at random"] == pytest.approx(0.4 / 7.6)
    assert pairs["a", "c"]["jaccard"] == 0
    assert pairs["a", "c"]["expected at random"] == 0  # they are in different layers
    assert pairs["a", "c"]["shared layers"] == []


def test_the_expected_overlap_is_that_of_random_masks() -> None:
    one, two = mask(*range(20)), mask(*range(10, 40))
    drawn = [one.random_like(i).overlap(two.random_like(1000 + i)) for i in range(200)]
    expected = draw.expected_overlap(one, two)
    assert expected == pytest.approx(sum(drawn) / len(drawn), abs=0.01)


def test_recall_of_the_truth(folder: Path) -> None:
    files = [folder / "a.safetensors", folder / "c.safetensors"]
    said = run_json(
        *("compare-masks", *files, "--truth", folder / "b.safetensors"),
        *("--out", folder / "compare.png"),
    )
    assert said["truth"]["a"]["recall"] == 0.5
    assert said["truth"]["a"]["precision"] == 0.5
    assert said["truth"]["c"]["recall"] == 0
    assert said["written"] == [str(folder / "compare.png")]
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    alone = run_json("compare-masks", files[0], "--truth", folder / "b.safetensors")
    assert alone["pairs"] == []


def test_the_comparison_in_words(folder: Path) -> None:
    said = run(
        *("compare-masks", folder / "a.safetensors", folder / "b.safetensors"),
        *("--truth", folder / "b.safetensors"),
    ).stdout
    for text in ("a and b", "0.333", "0.053", "recall", "0.500", "given"):
        assert text in said


def test_masks_with_one_stem_keep_their_paths(folder: Path) -> None:
    (folder / "sub").mkdir()
    other = folder / "sub" / "a.safetensors"
    other.write_bytes((folder / "b.safetensors").read_bytes())
    said = run_json("compare-masks", folder / "a.safetensors", other)
    assert set(said["masks"]) == {str(folder / "a.safetensors"), str(other)}


def test_comparing_fails_with_a_reason(folder: Path) -> None:
    result = run("compare-masks", folder / "a.safetensors", code=2)
    assert "two masks at least" in result.stderr
    result = run("compare-masks", folder / "a.safetensors", folder / "scores.safetensors", code=1)
    assert "expected saved mask, found scores" in result.stderr
