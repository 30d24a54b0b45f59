"""`compare`: what is taken up again, what failed, the random row, the front and the figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from circuits.draw import figure_data
from locate_edit import EditError, PromptError
from locate_edit.draw.comparison import heat_map, trade_off
from locate_edit.engine import Run
from locate_edit.locate.magnitude import Magnitude
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.gradient_ascent import GradientAscent
from locate_edit.methods.rome import ROME
from locate_edit.methods.selective import SelectiveForgetting
from locate_edit.metrics.likelihood import likelihood
from locate_edit.reports.comparison import RANDOM, Cell, Comparison, compare, pareto
from tests.locate_edit.engine_setting import differing, model, prompts, state

TUNE = FineTune(steps=2, lr=1e-2)


@dataclass(frozen=True)
class Breaks:
    """A method that cannot do it."""

    how: type[BaseException] = ValueError

    def __call__(self, run: Run) -> None:
        raise self.how("no way")


def run(net: Any, folder: Path | None = None, **changes: Any) -> Comparison:
    forget, retain = prompts("gpt2")
    options: dict[str, Any] = {
        "localizers": [Magnitude()], "methods": [TUNE], "budgets": [2, 5],
    }  # fmt: skip
    return compare(net, forget=forget, retain=retain, folder=folder, **(options | changes))


def test_every_combination_beside_a_random_mask_and_the_model_is_as_it_was() -> None:
    net, oracle = model("gpt2"), model("gpt2")
    before = state(net)
    found = run(net, methods=[TUNE, GradientAscent(steps=2, lr=1e-2)], seeds=(0, 1), oracle=oracle)
    assert not differing(net, before)
    places = [(c.localizer, c.method, c.budget, c.seed) for c in found.cells]
    assert len(set(places)) == len(places) == 2 * 2 * 2 * 2
    assert {c.localizer for c in found.cells} == {"Magnitude", RANDOM}
    assert not found.failures
    assert found.original["forget/oracle_kl"] == pytest.approx(0.0, abs=1e-9)
    assert all((c.values["forget/oracle_kl"] or 0.0) > 0 for c in found.cells)
    located, chance = found.cells[:8], found.cells[8:]
    for one, other in zip(located, chance, strict=True):
        assert (one.method, one.budget, one.seed) == (other.method, other.budget, other.seed)
        assert one.values != other.values
    again = run(net, methods=[TUNE, GradientAscent(steps=2, lr=1e-2)], seeds=(0, 1), oracle=oracle)
    assert [c.values for c in again.cells] == [c.values for c in found.cells]


def test_finished_cells_are_taken_up_and_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model("gpt2")
    first = run(net, tmp_path, budgets=[2])
    calls: list[int] = []
    original = FineTune.__call__

    def counted(self: FineTune, given: Run) -> None:
        calls.append(1)
        original(self, given)

    monkeypatch.setattr(FineTune, "__call__", counted)
    assert run(net, tmp_path, budgets=[2]) == first
    assert not calls
    assert len(run(net, tmp_path, budgets=[2, 5]).cells) == 4
    assert len(calls) == 2
    run(net, tmp_path, budgets=[2], methods=[FineTune(steps=2, lr=2e-2)])
    assert len(calls) == 4  # another rate is another cell


def test_a_failing_cell_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    net = model("gpt2")
    before = state(net)
    found = run(net, tmp_path, methods=[Breaks(), TUNE], budgets=[2, 10**6])
    reasons = {(c.method, c.budget): c.failed for c in found.cells if c.localizer == "Magnitude"}
    assert reasons["Breaks", 2] == "ValueError: no way"
    assert reasons["FineTune", 2] is None
    assert "1000000" in (reasons["FineTune", 10**6] or "").replace(",", "")
    assert "ValueError: no way" in found.markdown()
    assert not differing(net, before)


def test_an_interruption_keeps_what_is_finished(tmp_path: Path) -> None:
    net = model("gpt2")
    before = state(net)
    with pytest.raises(KeyboardInterrupt):
        run(net, tmp_path, methods=[TUNE, Breaks(KeyboardInterrupt)], budgets=[2])
    assert not differing(net, before)
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("cell-*.json")]
    assert [(cell["method"], cell["failed"]) for cell in kept] == [("FineTune", None)]


def test_other_prompts_are_measured_and_seen_by_nothing_else(tmp_path: Path) -> None:
    net = model("gpt2")
    forget, retain = prompts("gpt2")
    plain = run(net, tmp_path)
    found = run(net, tmp_path, others={"unseen": forget[:1]})
    assert [c.values["unseen/likelihood"] for c in found.cells] != [None] * len(found.cells)
    for one, other in zip(plain.cells, found.cells, strict=True):  # edits are what they were
        assert one.values.items() <= other.values.items()
    again = run(net, tmp_path, others={"unseen": forget[:1]})
    assert again == found
    changed = run(net, tmp_path, others={"unseen": retain[:1]})  # other prompts, other cells
    for one, two in zip(found.cells, changed.cells, strict=True):
        assert one.values["unseen/likelihood"] != two.values["unseen/likelihood"]
    net_values = run(net, others={"unseen": forget}).cells[0].values
    assert net_values["unseen/likelihood"] == net_values["forget/likelihood"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": []}, "at least one localizer"),
        ({"seeds": ()}, "at least one localizer"),
        ({"methods": [TUNE, TUNE]}, "two things to compare are called"),
        ({"budgets": [2, 2]}, "the budget 2 is given twice"),
        ({"seeds": (1, 0, 1)}, "the seed 1 is given twice"),
        ({"budgets": [3, 0]}, "at least 1, got 0"),
        ({"others": {"retain": prompts("gpt2")[0]}}, "cannot be called 'retain'"),
        ({"others": {"a/b": prompts("gpt2")[0]}}, "cannot be called 'a/b'"),
        ({"metrics": (likelihood, likelihood)}, "two metrics are called 'likelihood'"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EditError, match=message):
        run(model("gpt2"), **changes)


def test_an_oracle_is_another_model_that_reads_the_same_tokens(tmp_path: Path) -> None:
    net = model("gpt2")
    with pytest.raises(EditError, match="the oracle is the model that is edited"):
        run(net, oracle=net)
    with pytest.raises(PromptError, match="vocabular"):
        run(net, tmp_path, oracle=model("gpt2", vocab_size=512))
    assert not list(tmp_path.iterdir())  # found before the first cell


def test_a_method_that_lacks_data_says_so_in_its_cell_and_the_others_go_on() -> None:
    forget, retain = prompts("gpt2")
    bare = forget.reread([{k: v for k, v in row.items() if k != "spans"} for row in forget.rows])
    found = compare(
        model("gpt2"), localizers=[Magnitude()], methods=[SelectiveForgetting(steps=1), TUNE],
        budgets=[2], forget=bare, retain=retain,
    )  # fmt: skip
    reasons = {c.method: c.failed for c in found.cells if c.localizer == "Magnitude"}
    assert "spans" in (reasons["SelectiveForgetting"] or "")
    assert reasons["FineTune"] is None


def test_a_mask_without_anything_the_method_can_change_says_so_in_its_cell() -> None:
    found = run(model("gpt2"), localizers=[Magnitude(kinds=("head",))], methods=[ROME(), TUNE])
    assert all(c.failed and "neuron" in c.failed for c in found.cells if c.method == "ROME")
    assert not any(c.failed for c in found.cells if c.method == "FineTune")


def test_the_table_has_the_range_over_seeds_and_the_columns_asked_for() -> None:
    table = made_up().markdown()
    assert "| A | NPO | 8 | 0.3 (0.2 to 0.4) | 0.9 (0.8 to 1) |" in table
    assert "| C | NPO | 8 | - | - |" in table
    assert made_up().ranges("forget/likelihood") == {
        ("A", "NPO", 8): (0.2, 0.4),
        ("B", "NPO", 8): (0.5, 0.5),
    }
    one = made_up().markdown(["retain/likelihood"])
    assert "| localizer | method | units | retain/likelihood |" in one
    assert "| original |  |  | 1 |" in one
    with pytest.raises(EditError, match="nothing was measured as 'forget/nll'; there is forget/"):
        made_up().markdown(["forget/nll"])


def test_the_front_by_hand() -> None:
    points = [(0.5, 0.9), (0.1, 0.5), (0.2, 0.4), (0.6, 0.9), (0.9, 1.0)]
    # (0.2, 0.4) is beaten by (0.1, 0.5), and (0.6, 0.9) by (0.5, 0.9).
    assert pareto(points) == [1, 0, 4]
    assert pareto([(0.5, 0.5), (0.5, 0.5)]) == [0, 1]  # neither is better


def made_up() -> Comparison:
    def cell(name: str, seed: int, forget: float, retain: float) -> Cell:
        return Cell(
            name, "NPO", 8, seed, {"forget/likelihood": forget, "retain/likelihood": retain}, 1.0
        )

    cells = (
        cell("A", 0, 0.2, 0.8),
        cell("A", 1, 0.4, 1.0),
        cell("B", 0, 0.5, 0.5),
        Cell("C", "NPO", 8, 0, {}, 1.0, "ValueError: no"),
    )
    original = {"forget/likelihood": 1.0, "retain/likelihood": 1.0}
    oracle = {"forget/likelihood": 0.1, "retain/likelihood": 1.0}
    return Comparison(cells, original, oracle)


def front(axes: Any) -> Any:
    """The line of the points that no other beats."""
    (line,) = [line for line in axes.get_lines() if line.get_label() == "not beaten"]
    return line


def test_the_sizes_of_one_place_and_method_are_joined_in_rising_order() -> None:
    cells = tuple(
        Cell("A", "NPO", budget, 0, {"forget/likelihood": x, "retain/likelihood": x}, 1.0)
        for budget, x in ((80, 0.2), (20, 0.6), (40, 0.4))
    )
    axes = trade_off(Comparison(cells, {"forget/likelihood": 1.0, "retain/likelihood": 1.0}))
    paths = [np.asarray(line.get_xdata()).tolist() for line in axes.get_lines()]
    assert [0.6, 0.4, 0.2] in paths


def test_figures_show_the_means_the_front_and_the_references(tmp_path: Path) -> None:
    found = made_up()
    axes = heat_map(found, "forget/likelihood")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "B", "C"]
    assert [text.get_text() for text in axes.texts] == ["0.3", "0.5"]  # C has no value
    axes = trade_off(found)
    assert np.asarray(front(axes).get_xydata()) == pytest.approx(np.array([[0.9, 0.3]]))
    assert figure_data(axes) == [
        {"localizer": "A", "method": "NPO", "units": 8, "keep": 0.9, "forget": pytest.approx(0.3), "not beaten": True,
         "beyond oracle": False},
        {"localizer": "B", "method": "NPO", "units": 8, "keep": 0.5, "forget": 0.5, "not beaten": False,
         "beyond oracle": False},
    ]  # fmt: skip
    legend = axes.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["A", "B", "NPO", "not beaten", "original", "oracle", "beyond the oracle"]
    with pytest.raises(EditError, match="no cell has 'forget/exposure'"):
        heat_map(found, "forget/exposure")
    far = Comparison(
        tuple(
            Cell(name, "NPO", 8, 0, {"forget/oracle_kl": x, "others/oracle_kl": y}, 1.0)
            for name, x, y in (("A", 1.0, 0.3), ("B", 2.0, 0.1), ("C", 3.0, 0.2))
        ),
        {"forget/oracle_kl": 7.0, "others/oracle_kl": 0.0},
    )
    axes = trade_off(far, "oracle_kl", keep="others")
    # Of distances less is better on both; B beats C.
    assert np.asarray(front(axes).get_xydata()) == pytest.approx(np.array([[0.3, 1.0], [0.1, 2.0]]))
    assert axes.get_xlabel() == "oracle kl, others prompts (nats a token); left: better kept"
    found.save(tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text())["cells"][0]["budget"] == 8
    assert "| A | NPO | 8 | 0.3 (" in (tmp_path / "comparison.md").read_text()


def test_forgetting_more_than_a_model_that_never_knew_is_no_merit() -> None:
    def cell(name: str, forget: float, retain: float) -> Cell:
        return Cell(name, "NPO", 8, 0, {"forget/m": forget, "retain/m": retain}, 1.0)

    # C went further beyond the oracle than B, which kept more: there only keeping counts.
    cells = (cell("A", 0.5, 0.95), cell("B", 0.1, 0.9), cell("C", 0.0, 0.5))
    oracle = {"forget/m": 0.2, "retain/m": 1.0}
    about = {
        "model": "tiny",
        "prompts": {"forget": 4, "retain": 9},
        "metrics": {"m": {"unit": "fraction", "direction": "up"}},
    }
    found = Comparison(cells, {"forget/m": 1.0, "retain/m": 1.0}, oracle, about)
    axes = trade_off(found, "m")
    rows = {row["localizer"]: row for row in figure_data(axes)}
    assert [rows[name]["not beaten"] for name in "ABC"] == [True, True, False]
    assert [rows[name]["beyond oracle"] for name in "ABC"] == [False, True, True]
    assert axes.get_ylabel() == "m, forget prompts (fraction)\ndown: forgotten"
    said = " ".join(text.get_text() for text in axes.texts).replace("\n", " ")
    assert "model: tiny | prompts: 4 forget, 9 retain | units: 8" in said
    # Where a metric rises as texts are forgotten, so do its merits.
    turned = {**about, "metrics": {"m": {"unit": "tokens", "direction": "down"}}}
    cells = (cell("A", 5.0, 1.0), cell("B", 9.0, 2.0), cell("C", 4.0, 3.0))
    axes = trade_off(Comparison(cells, {"forget/m": 1.0, "retain/m": 1.0}, None, turned), "m")
    assert [row["not beaten"] for row in figure_data(axes)] == [True, True, False]
    assert "left: better kept" in axes.get_xlabel()
    assert "up: forgotten" in axes.get_ylabel()
