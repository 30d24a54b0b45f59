from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from circuits import ComponentMask, MaskError, Scores, Site

A, B, H = Site(0, "neuron"), Site(1, "neuron"), Site(1, "head")


def scores(a: list[list[float]], b: list[list[float]] | None = None, **provenance: Any) -> Scores:
    values = {A: torch.tensor(a, dtype=torch.float32)}
    if b is not None:
        values[B] = torch.tensor(b, dtype=torch.float32)
    return Scores(values, provenance)


def on(mask: ComponentMask) -> list[str]:
    return [str(unit) for unit in mask.units()]


# ---- a value


def test_scores_are_float32_copies_sorted_by_site() -> None:
    values = torch.ones(2, 3, dtype=torch.float64)
    made = Scores({B: values, A: values.bfloat16()})
    values[:] = 0
    assert made.sites == (A, B)
    assert made[A].dtype == made[B].dtype == torch.float32
    assert float(made[B].sum()) == 6
    assert (made.n_prompts, made.n_units) == (2, 6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "scores need at least one site, got none"),
        ({"L0.neuron": torch.ones(1, 2)}, "the keys of scores are sites"),
        (
            {A: torch.ones(3)},
            r"L0.neuron: expected a floating tensor `prompt \*units`, got \(torch.float32, \(3,\)\)",
        ),
        ({A: torch.ones(1, 3, dtype=torch.int64)}, "expected a floating tensor"),
        ({A: 3.0}, r"expected a floating tensor `prompt \*units`, got 3.0"),
        (
            {A: torch.ones(2, 3), B: torch.ones(1, 3)},
            "L1.neuron: expected scores for 2 prompts, at least one, got 1",
        ),
        ({A: torch.ones(0, 3)}, "at least one, got 0"),
        (
            {A: torch.tensor([[1.0, float("nan"), float("inf")]])},
            "L0.neuron: 2 scores are not finite",
        ),
    ],
)
def test_what_are_no_scores(values: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        Scores(values)


def test_scores_can_be_copied() -> None:
    made = scores([[1, 2]], localizer="IG")
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert twin[A].tolist() == [[1, 2]]
        assert twin.provenance == {"localizer": "IG"}


def test_ranking_and_representations() -> None:
    made = Scores(
        {A: torch.tensor([[1.0, 4.0]]), B: torch.tensor([[[4.0, -1.0], [9.0, 0.0]]])},
        {"localizer": "IG<b>"},
    )
    ranked = [(str(u), s) for u, s in made.ranked()]
    assert ranked == [
        ("L1.neuron[1,0]", 9.0),
        ("L0.neuron[1]", 4.0),
        ("L1.neuron[0,0]", 4.0),
        ("L0.neuron[0]", 1.0),
        ("L1.neuron[1,1]", 0.0),
        ("L1.neuron[0,1]", -1.0),
    ]
    assert made.ranked(2) == made.ranked()[:2]
    assert repr(made) == "Scores(1 prompts, 2 sites, 6 units, mean -1 to 9; IG<b>)"
    assert "<td>L1.neuron[1,0]</td><td>9</td>" in made._repr_html_()
    assert "IG&lt;b&gt;" in made._repr_html_()


# ---- arithmetic


def test_arithmetic_by_hand() -> None:
    x, y = scores([[1, -2], [3, 4]]), scores([[1, 1], [2, -2]])
    assert (x + y)[A].tolist() == [[2, -1], [5, 2]]
    assert (x - y)[A].tolist() == [[0, -3], [1, 6]]
    assert (2 * x)[A].tolist() == (x * 2)[A].tolist() == [[2, -4], [6, 8]]
    assert (-x)[A].tolist() == [[-1, 2], [-3, -4]]
    assert x.abs()[A].tolist() == [[1, 2], [3, 4]]
    assert x.mean()[A].tolist() == [[2, 1]]
    assert x.sum()[A].tolist() == [[4, 2]]
    assert (x - x.mean())[A].tolist() == [[-1, -3], [1, 3]]
    assert x.prompt(1)[A].tolist() == [[3, 4]]


def test_contrast_takes_the_mean_magnitude_of_the_others() -> None:
    forget, others = scores([[4, 4], [6, 2]]), scores([[1, 2], [-3, 2], [2, 2]])
    assert forget.contrast(others)[A].tolist() == [[5 - 2, 3 - 2]]
    assert forget.contrast(others, weight=3)[A].tolist() == [[5 - 6, 3 - 6]]


def test_concatenation_over_prompts() -> None:
    joined = Scores.concat([scores([[1, 2]], [[3]]), scores([[4, 5], [6, 7]], [[8], [9]])])
    assert joined[A].tolist() == [[1, 2], [4, 5], [6, 7]]
    assert joined[B].tolist() == [[3], [8], [9]]


def test_provenance_of_arithmetic() -> None:
    x, y = (scores([[1.0]], localizer=name, architecture="abc") for name in "xy")
    assert dict((x - y).provenance) == {
        "localizer": "-",
        "of": [
            {"localizer": "x", "architecture": "abc"},
            {"localizer": "y", "architecture": "abc"},
        ],
        "architecture": "abc",
    }
    assert x.abs().mean().provenance["steps"] == [{"step": "abs"}, {"step": "mean", "over": 1}]
    assert x.top(1).provenance["selection"] == {"select": "top", "k": 1}
    assert x.top(1).provenance["architecture"] == "abc"


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (
            scores([[1]]),
            scores([[1]], [[1]]),
            "scores of different sites do not combine: L1.neuron",
        ),
        (
            scores([[1]]),
            scores([[1, 2]]),
            r"L0.neuron: scores of \(1,\) and \(2,\) units do not combine",
        ),
        (scores([[1], [2]]), scores([[1], [2], [3]]), "scores of 2 and 3 prompts do not combine"),
        (
            scores([[1]], architecture="a"),
            scores([[1]], architecture="b"),
            "scores of several models: a, b",
        ),
    ],
)
def test_scores_that_do_not_combine(one: Scores, two: Scores, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        one + two


def test_wrong_operands() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        scores([[1]]) + 1  # type: ignore[operator]
    with pytest.raises(TypeError, match="unsupported operand"):
        scores([[1]]) * scores([[1]])  # type: ignore[operator]
    with pytest.raises(MaskError, match="nothing to concatenate"):
        Scores.concat([])


# ---- selection


def test_top_is_global_and_prefers_the_lower_unit_among_equals() -> None:
    made = scores([[1, 5, 5, 0]], [[5, 7, 5]])
    assert on(made.top(1)) == ["L1.neuron[1]"]
    assert on(made.top(3)) == ["L0.neuron[1]", "L0.neuron[2]", "L1.neuron[1]"]
    assert on(made.top(4)) == ["L0.neuron[1]", "L0.neuron[2]", "L1.neuron[0]", "L1.neuron[1]"]
    assert on(made.top(0)) == []
    assert made.top(0).sites == (A, B)
    assert made.top(7).count() == 7


def test_top_of_many_equal_scores_is_the_first_ones() -> None:
    made = Scores({A: torch.zeros(2, 1000), B: torch.zeros(2, 1000)})
    assert on(made.top(3)) == ["L0.neuron[0]", "L0.neuron[1]", "L0.neuron[2]"]
    assert [u.index[0] for u in made.top_per_site(2)] == [0, 1, 0, 1]
    assert on(made.vote(above=0.0, keep=2)) == []  # nobody has a positive score


def test_top_uses_the_mean_over_prompts() -> None:
    made = scores([[9, 0, 4], [-9, 0, 4]])
    assert on(made.top(1)) == ["L0.neuron[2]"]


def test_top_per_site() -> None:
    made = scores([[1, 5, 5, 0]], [[-3, -2, -1]])
    assert on(made.top_per_site(1)) == ["L0.neuron[1]", "L1.neuron[2]"]
    assert on(made.top_per_site(2)) == [
        "L0.neuron[1]",
        "L0.neuron[2]",
        "L1.neuron[1]",
        "L1.neuron[2]",
    ]


@pytest.mark.parametrize(
    ("select", "message"),
    [
        (lambda s: s.top(5), "all sites together: expected 0 to 4, got 5"),
        (lambda s: s.top(-1), "expected 0 to 4, got -1"),
        (lambda s: s.top_per_site(4), "from L0.neuron: expected 0 to 3, got 4"),
        (
            lambda s: s.vote(share=0.0),
            "share of prompts: expected a fraction above 0 and at most 1, got 0.0",
        ),
        (lambda s: s.vote(share=1.5), "got 1.5"),
        (lambda s: s.vote(keep=-1), "from votes: expected 0, got -1"),
    ],
)
def test_selections_that_cannot_be(select: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        select(scores([[1, 2, 3]], [[4]]))


def test_threshold_absolute_and_relative() -> None:
    made = scores([[1, 5, 10]], [[4, 2, -20]])
    assert on(made.threshold(5)) == ["L0.neuron[1]", "L0.neuron[2]"]
    assert on(made.threshold(0.4, relative=True)) == [
        "L0.neuron[1]",
        "L0.neuron[2]",
        "L1.neuron[0]",
    ]
    assert on(made.threshold(11)) == []
    assert on((-1 * made.abs()).threshold(0.5, relative=True)) == []


def test_vote_by_hand() -> None:
    #                 prompt maxima: 10 (unit A2), 8 (unit B0), 4 (unit A0); bars at half: 5, 4, 2
    made = scores([[4, 5, 10], [4, 3, 1], [4, 0, 2]], [[0, 6], [8, 3], [1, 3]])
    # votes:         A0: 0+1+1=2, A1: 1+0+0=1, A2: 1+0+1=2; B0: 0+1+0=1, B1: 1+0+1=2
    assert on(made.vote(above=0.5, share=0.5)) == ["L0.neuron[0]", "L0.neuron[2]", "L1.neuron[1]"]
    assert on(made.vote(above=0.5, share=0.3)) == [
        "L0.neuron[0]", "L0.neuron[1]", "L0.neuron[2]", "L1.neuron[0]", "L1.neuron[1]",
    ]  # fmt: skip
    assert on(made.vote(above=0.5, share=1.0)) == []
    # means of the three with two votes: A0 4, A2 13/3, B1 4; the tie of A0 and B1 goes to the lower site
    assert on(made.vote(above=0.5, share=0.5, keep=1)) == ["L0.neuron[2]"]
    assert on(made.vote(above=0.5, share=0.5, keep=2)) == ["L0.neuron[0]", "L0.neuron[2]"]
    assert on(made.vote(above=0.5, share=0.5, keep=99)) == on(made.vote(above=0.5, share=0.5))


def test_more_votes_come_before_a_higher_mean() -> None:
    made = scores([[10, 5], [0, 1], [0, 1]])
    assert on(made.vote(above=0.5, share=0.3)) == ["L0.neuron[0]", "L0.neuron[1]"]
    assert on(made.vote(above=0.5, share=0.3, keep=1)) == ["L0.neuron[1]"]


def test_a_share_of_prompts_counts_whole_prompts() -> None:
    values = torch.zeros(30, 2)
    values[:, 0] = 1.0
    values[:3, 1] = 1.0
    assert on(Scores({A: values}).vote(above=0.5, share=0.1)) == ["L0.neuron[0]", "L0.neuron[1]"]
    values[2, 1] = 0.0
    assert on(Scores({A: values}).vote(above=0.5, share=0.1)) == ["L0.neuron[0]"]


def test_prompts_without_a_positive_score_have_no_vote() -> None:
    made = scores([[-1, -5], [0, 0], [2, 0]])
    assert on(made.vote(above=0.1, share=0.3)) == ["L0.neuron[0]"]
    assert on(made.vote(above=0.1, share=0.5)) == []


# ---- files


def test_save_and_load(tmp_path: Path) -> None:
    made = scores([[1.5, 2]], [[3, 4]], localizer="IG", steps=20)
    made.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert {site: loaded[site].tolist() for site in loaded.sites} == {A: [[1.5, 2]], B: [[3, 4]]}
    assert loaded.provenance == made.provenance


def test_files_that_are_no_scores(tmp_path: Path) -> None:
    ComponentMask({A: torch.tensor([True])}).save(tmp_path / "m")
    with pytest.raises(MaskError, match="expected saved scores, found mask"):
        Scores.load(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="no scores file at"):
        Scores.load(tmp_path / "none")
