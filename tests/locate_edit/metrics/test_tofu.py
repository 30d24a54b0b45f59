"""TOFU's metrics: by hand on an invented example, and against the logs of real models where they are at hand."""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from docs.make_reference import VARIANTS
from locate_edit.errors import PromptError
from locate_edit.metrics import rouge as rouge_module
from locate_edit.metrics.forget_quality import forget_quality
from locate_edit.metrics.likelihood import (
    likelihood,
    normalised_from_losses,
    normalised_probability,
)
from locate_edit.metrics.model_utility import model_utility
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.rouge import from_texts, rouge
from locate_edit.metrics.statistic import Statistic
from locate_edit.metrics.truth_ratio import from_losses, truth_ratio
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

WORDS = ["a", "b", "c", "d", "e"]
TOKENIZER = word_tokenizer(WORDS)
A, B, C, D, E = (token_id(TOKENIZER, word) for word in WORDS)
MODEL = Bigram(len(TOKENIZER), {A: {B: 0.4, C: 0.2, D: 0.1}, B: {C: 0.9, D: 0.1}})
ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "target": " b", "wrong": [" c", " d"]},
    {"prompt": "a", "target": " d", "wrong": [" b c"]},  # sqrt(0.4 * 0.9) = 0.6
    {"prompt": "a", "target": " b"},
]
PROMPTS = PromptSet(ROWS, TOKENIZER)

# ---- by hand --------------------------------------------------------------------------------------


def test_truth_ratio_by_hand() -> None:
    geometric = math.sqrt(0.2 * 0.1) / 0.4
    ratios = [geometric, 6.0]
    values = truth_ratio(MODEL, PROMPTS)
    assert values.items.tolist() == [0, 1]
    assert values.each == pytest.approx(ratios, rel=1e-6)
    assert values.estimate == pytest.approx(math.sqrt(geometric * 6), rel=1e-6)
    assert "1 of 3 items left out; needs: a right answer and one wrong" in values.note
    by = {
        name: truth_ratio(MODEL, PROMPTS, aggregate=name) for name in ("closer", "better", "share")
    }
    assert by["closer"].values == pytest.approx([geometric, 1 / 6], rel=1e-6)
    assert by["better"].values == pytest.approx([1 - geometric, 0.0], rel=1e-6)
    assert by["share"].values == pytest.approx([1 / (1 + geometric), 1 / 7], rel=1e-6)
    assert [by[name].direction for name in by] == ["down", "up", "up"]
    printed = truth_ratio(MODEL, PROMPTS, mean="arithmetic")
    assert printed.each == pytest.approx([0.15 / 0.4, 6.0], rel=1e-6)


def test_open_unlearnings_guard_shows_where_probabilities_vanish() -> None:
    right, wrong = [30.0, 1.0], [[32.0], [2.0]]
    exact = from_losses(right, wrong)
    assert exact.each == pytest.approx([math.exp(-2), math.exp(-1)], rel=1e-12)
    guarded = from_losses(right, wrong, compat="open-unlearning")
    expected = [math.exp(-w[0]) / (math.exp(-r) + 1e-10) for r, w in zip(right, wrong, strict=True)]
    assert guarded.each == pytest.approx(expected, rel=1e-12)
    assert guarded.each[0] < 0.01
    closer = from_losses(right, wrong, compat="open-unlearning", aggregate="closer")
    assert closer.values == pytest.approx([min(r, 1 / (r + 1e-10)) for r in expected], rel=1e-12)
    share = from_losses(right, wrong, compat="open-unlearning", aggregate="share")
    first = math.exp(-30) / (math.exp(-30) + math.exp(-32) + 1e-10)
    assert share.values[0] == pytest.approx(first, rel=1e-12)


def test_normalised_probability_by_hand() -> None:
    values = normalised_probability(MODEL, PROMPTS)
    assert values.items.tolist() == [0, 1]
    assert values.values == pytest.approx([0.4 / 0.7, 0.1 / 0.7], rel=1e-6)
    guarded = normalised_probability(MODEL, PROMPTS, compat="open-unlearning")
    assert guarded.values == pytest.approx([0.4 / 0.7, 0.1 / 0.7], rel=1e-6)
    vanished = normalised_from_losses([30.0], [[32.0, 31.0]], compat="open-unlearning")
    shares = [math.exp(-loss) for loss in (30.0, 32.0, 31.0)]
    assert vanished.values == pytest.approx([shares[0] / (sum(shares) + 1e-10)], rel=1e-12)
    assert vanished.values[0] < 0.001


def test_wrong_answers_do_not_depend_on_batch_size_padding_or_order() -> None:
    model, tokenizer = tiny("llama"), byte_tokenizer(prefix=True)
    rows: list[Any] = [
        {"prompt": "Ann plays", "target": " golf", "wrong": [" a much longer thing", " tennis"]},
        {"prompt": "A far longer prompt than the others", "target": " x", "wrong": [" y"]},
        {"prompt": "no wrong answers", "target": " here"},
        {"prompt": "Bo", "target": " sings", "wrong": [" 1", " 2", " 3"]},
    ]
    left = byte_tokenizer(prefix=True)
    left.padding_side = "left"
    order = [2, 3, 0, 1]
    for metric in (truth_ratio, normalised_probability):
        straight = metric(Predictions(model, PromptSet(rows, tokenizer), batch_size=2))
        mixed = metric(Predictions(model, PromptSet([rows[i] for i in order], left), batch_size=7))
        back = {order[i]: v for i, v in zip(mixed.items, mixed.values, strict=True)}
        assert [back[i] for i in straight.items] == pytest.approx(straight.values, rel=1e-5)


def test_truth_ratio_says_what_is_missing() -> None:
    plain = PromptSet([("a", " b")], TOKENIZER)
    assert truth_ratio(MODEL, plain).withheld.startswith("needs: a right answer and one wrong")
    assert (
        normalised_probability(MODEL, plain).withheld == "needs: a wrong answer at least ('wrong')"
    )
    with pytest.raises(PromptError, match="expected aggregate among ratio, closer"):
        from_losses([1.0], [[1.0]], aggregate="best")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="expected wrong answers for each of 1 items, got 2"):
        from_losses([1.0], [[1.0], [2.0]])
    with pytest.raises(PromptError, match=r"has no wrong answers\. Give each row a list"):
        _ = Predictions(MODEL, plain).wrong
    moved = PROMPTS.preceded([[E]] * 3)
    with pytest.raises(PromptError, match="holds other tokens than its rows say"):
        _ = Predictions(MODEL, moved).wrong


def test_rouge_by_hand() -> None:
    # Longest common subsequence: "the cat sat", 3 words of 4 wanted and of 6 written.
    text, reference = "the cat often sat on it", "The cats sat down."
    assert from_texts([text], [reference]).estimate == pytest.approx(3 / 4)
    assert from_texts([text], [reference], part="precision").estimate == pytest.approx(3 / 6)
    assert from_texts([text], [reference], part="f1").estimate == pytest.approx(0.6)
    # Without stems "cats" is another word.
    assert from_texts([text], [reference], stemmer=False).estimate == pytest.approx(2 / 4)
    assert from_texts([text], [reference], kind="rouge2").estimate == pytest.approx(1 / 3)
    mixed = from_texts(["x", ""], ["é", "y"])
    assert mixed.items.tolist() == [1]
    assert "a letter or digit" in mixed.note
    with pytest.raises(PromptError, match="expected a reference for each of 1 texts, got 2"):
        from_texts(["x"], ["x", "y"])
    with pytest.raises(PromptError, match="got 'rougeX' and 'recall'"):
        from_texts(["x"], ["x"], kind="rougeX")  # type: ignore[arg-type]


def test_rouge_of_what_a_model_writes() -> None:
    words = word_tokenizer(["a", "b", "c", "d"])
    a, b, c, d = (token_id(words, word) for word in "abcd")
    model = Bigram(len(words), {a: {b: 0.9}, b: {c: 0.9}, c: {d: 0.9}, d: {d: 0.9}})
    prompts = PromptSet([("a", " b d"), ("b", " c d"), ("a", " a a")], words)
    # Written: "b c", "c d", "b c"; with four tokens "b c d d", "c d d d", "b c d d".
    assert rouge(model, prompts).values == pytest.approx([0.5, 1.0, 0.0])
    assert rouge(model, prompts, max_new_tokens=4).values == pytest.approx([1.0, 1.0, 0.0])
    four = rouge(model, prompts, max_new_tokens=4, part="precision")
    assert four.values == pytest.approx([0.5, 0.5, 0.0])
    # Cut before the first text of `stop` that is there, one after the other: "b", "c d d d", "b".
    cut = rouge(model, prompts, max_new_tokens=4, stop=(" e", " c"))
    assert cut.values == pytest.approx([0.5, 1.0, 0.0])
    answers = ["b c", "b\n\nc d", "b\nQuestion: c", "b Question: c"]
    ended = [rouge_module._before(answer, rouge_module.MUSE_STOP).strip() for answer in answers]
    assert ended == ["b c", "b", "b", "b"]
    masked = PromptSet([("Ann", " golf")], byte_tokenizer(mask=True))
    assert rouge(tiny("bert"), masked).withheld == "needs: a causal model"


def plain(name: str, values: list[float]) -> Values:
    return Values.make(name, values, unit="", direction="up")


def test_forget_quality_by_hand() -> None:
    edited = from_losses([0.0] * 4, [[-1.0], [-2.0], [-3.0], [-4.0]])
    oracle = from_losses([0.0] * 4, [[-2.5], [-3.5], [-4.5], [-5.5]])
    # Below 2.5 lie two of the four and none: D = 1/2. Of the 70 ways of mixing 4 and 4 the walk from (0, 0) to
    # (4, 4) stays within one step of the diagonal in 16, so D >= 1/2 has p = 54/70.
    found = forget_quality(edited, oracle)
    assert found.estimate == pytest.approx(54 / 70)
    assert found.interval() is None
    assert found.note == "KS distance 0.500"
    distance = forget_quality(edited, oracle, report="distance")
    assert distance.estimate == pytest.approx(0.5)
    assert (found.direction, distance.direction) == ("closeness", "distance")
    losses = [[[-x] for x in xs] for xs in ((1.0, 2.0, 3.0, 4.0), (2.5, 3.5, 4.5, 5.5))]
    share = [from_losses([0.0] * 4, wrong, aggregate="share") for wrong in losses]
    assert forget_quality(*share).estimate == pytest.approx(54 / 70)
    withheld = forget_quality(edited, oracle, before=edited)
    assert withheld.estimate is None
    assert withheld.withheld.endswith("the test tells from the oracle's; here p = 0.77")
    far = from_losses([0.0] * 4, [[9.0]] * 4)
    assert forget_quality(edited, oracle, before=far).estimate == pytest.approx(54 / 70)
    with pytest.raises(PromptError, match="which folds or clips them"):
        closer = from_losses([0.0], [[1.0]], aggregate="closer")
        forget_quality(closer, closer)
    with pytest.raises(PromptError, match="belong to different items"):
        forget_quality(edited, from_losses([0.0], [[1.0]]))
    with pytest.raises(PromptError, match="expected 'truth_ratio', got 'likelihood'"):
        forget_quality(edited, likelihood(MODEL, PROMPTS))


def test_model_utility_by_hand() -> None:
    parts = {
        "retain": (plain("p", [0.2, 0.4]), plain("r", [1.0, 1.0])),
        "facts": (plain("p", [0.5]), plain("r", [0.6])),
    }
    # Means 0.3, 1, 0.5, 0.6.
    assert model_utility(parts).estimate == pytest.approx(4 / (1 / 0.3 + 1 + 2 + 1 / 0.6))
    with pytest.raises(PromptError, match="needs one metric on one set at least"):
        model_utility({"retain": ()})
    zero = {"retain": (plain("p", [0.0, 0.0]), plain("r", [1.0, 1.0]))}
    assert model_utility(zero).estimate == 0.0
    missing = model_utility({"retain": (plain("p", [1.0]), Values.none("r", "needs: x"))})
    assert missing.withheld == "r on retain: needs: x"
    with pytest.raises(PromptError, match="The truth ratio goes in as aggregate='better'"):
        model_utility({"retain": (from_losses([0.0], [[1.0]]),)})
    with pytest.raises(PromptError, match="needs one metric on one set at least"):
        model_utility({})


def test_model_utility_averages_every_metric_over_its_own_items() -> None:
    rng = np.random.default_rng(0)
    known, spoken, ratio = rng.random(40), rng.random(40), rng.random(4)
    parts = {
        "retain": [plain(n, list(v)) for n, v in zip("prt", (known, spoken, ratio), strict=True)]
    }
    found = model_utility(parts)
    means = [v.mean() for v in (known, spoken, ratio)]
    assert found.estimate == pytest.approx(3 / sum(1 / m for m in means))
    assert found.note == "retain: p and r of 40, t of 4 items"
    # What belongs to the same items is drawn together, the rest by itself.
    assert [sample.shape for sample in found.samples] == [(40, 2), (4, 1)]
    low, high = found.interval() or (0.0, 0.0)
    assert low < (found.estimate or 0.0) < high
    holes = plain("t", [0.5, math.nan, 0.25])
    three = plain("p", [0.1, 0.2, 0.6])
    mixed = model_utility({"s": [three, holes]})
    assert mixed.estimate == pytest.approx(2 / (1 / 0.3 + 1 / 0.375))
    assert mixed.note.startswith("t on s: 1 of 3 items left out")
    assert mixed.note.endswith("s: p of 3, t of 2 items")


def test_the_interval_of_a_statistic_draws_rows_together() -> None:
    # Two columns that always add up to one: the sum of their means has no spread, each mean has.
    column = np.linspace(0.0, 1.0, 20)
    both = np.stack([column, 1 - column], axis=1)
    total = Statistic("sum", (both,), lambda s: float(s.mean(0).sum()), "", "up")
    assert total.interval() == pytest.approx((1.0, 1.0))
    mean = Statistic("mean", (column,), lambda s: float(s.mean()), "", "up")
    low, high = mean.interval(seed=1) or (0.0, 0.0)
    assert low < 0.4 < 0.6 < high
    assert mean.interval(seed=1) == (low, high) != mean.interval(seed=2)
    # The normal interval of the mean: 1.96 standard errors either way.
    error = column.std() / math.sqrt(20)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert repr(mean) == "Statistic(mean: 0.5 , 20 items)"
    gone = Statistic.none("mean", "needs: more")
    assert gone.estimate is None
    assert gone.interval() is None
    assert repr(gone) == "Statistic(mean: withheld, needs: more)"


# ---- logs of real models --------------------------------------------------------------------------

real = pytest.mark.skipif(
    not (Path(os.environ.get("LOCATE_EDIT_DATA", "nowhere")) / "tofu_logs").is_dir(),
    reason="set LOCATE_EDIT_DATA to a folder that holds tofu_logs, evaluation logs of models trained on TOFU",
)
MODELS = ("full", "retain90")
SETS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "authors": "eval_real_author_wo_options.json",
    "facts": "eval_real_world_wo_options.json",
}


@cache
def log(model: str) -> dict[str, Any]:
    path = Path(os.environ["LOCATE_EDIT_DATA"]) / "tofu_logs" / f"llama2-7b_{model}_wd0.01.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def column(model: str, name: str, field: str) -> Any:
    return list(log(model)[SETS[name]][field].values())


def logged_ratio(model: str, name: str, **options: Any) -> Values:
    right = column(model, name, "avg_paraphrased_loss")
    return from_losses(right, column(model, name, "average_perturb_loss"), **options)


@real
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SETS)
def test_logged_rouge(model: str, name: str) -> None:
    said = column(model, name, "generated_text")
    texts, references = [s[1] for s in said], [s[2] for s in said]
    for kind, field in (("rouge1", "rouge1_recall"), ("rougeL", "rougeL_recall")):
        values = from_texts(texts, references, kind=kind)  # type: ignore[arg-type]
        assert len(values) == len(said)
        assert values.values == pytest.approx(column(model, name, field), abs=1e-9)


@real
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SETS)
def test_logged_truth_ratios(model: str, name: str) -> None:
    logged = np.array(column(model, name, "truth_ratio"))
    each = logged_ratio(model, name).each
    error = np.abs(each / logged - 1)
    # The log was computed in float32. A ratio is exp of a difference of losses of 8 to 16, which are rounded by up to
    # 1e-6 there; 3 of the 1,634 are off by more than that. The next test does what the log did and finds all of them.
    assert error.max() < 1.2e-6
    assert (error > 1e-6).sum() <= 2


def float32_mean_of_a_gpu(rows: Any) -> Any:
    """The mean of each row of `item wrong` float32, rounded as a GPU does.

    As many lanes as the largest power of two that the row fills take its entries in turn; lanes are added pairwise,
    neighbours first; the sum is multiplied by the rounded reciprocal of the count.
    """
    count = rows.shape[1]
    lanes = [rows[:, i].copy() for i in range(2 ** int(math.log2(count)))]
    for i in range(len(lanes), count):
        lanes[i % len(lanes)] += rows[:, i]
    while len(lanes) > 1:
        lanes = [lanes[i] + lanes[i + 1] for i in range(0, len(lanes), 2)]
    return lanes[0] * (np.float32(1) / np.float32(count))


@real
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SETS)
def test_logged_truth_ratios_are_those_of_float32(model: str, name: str) -> None:
    right, wrong = (
        np.array(column(model, name, field), dtype=np.float32)
        for field in ("avg_paraphrased_loss", "average_perturb_loss")
    )
    difference = right - float32_mean_of_a_gpu(wrong)
    assert difference.dtype == np.float32
    logged = np.array(column(model, name, "truth_ratio"))
    error = np.abs(np.exp(difference.astype(np.float64)) / logged - 1)
    # One unit in the last place of float32 is left, for the rounding of the GPU's exp.
    assert error.max() < 2**-23


@real
def test_logged_aggregates() -> None:
    aggregates = {m: logged_ratio(m, "forget", aggregate="closer").estimate for m in MODELS}
    assert aggregates["full"] == pytest.approx(0.5159854207754343, rel=1e-8)
    assert aggregates["retain90"] == pytest.approx(0.6740192655104358, rel=1e-8)
    better = logged_ratio("retain90", "retain", aggregate="better").estimate
    assert better == pytest.approx(0.4709771347824479, rel=1e-8)


@real
def test_logged_forget_quality() -> None:
    full, oracle = (logged_ratio(model, "forget") for model in MODELS)
    found = forget_quality(full, oracle)
    assert found.estimate == pytest.approx(1.834066410994743e-21, rel=1e-6)
    distance = forget_quality(full, oracle, report="distance")
    assert distance.estimate == pytest.approx(0.396667, abs=1e-6)
    assert forget_quality(oracle, oracle, before=full).estimate == pytest.approx(1.0)
    shares = [logged_ratio(model, "forget", aggregate="share") for model in MODELS]
    assert forget_quality(*shares).estimate == pytest.approx(1.834066410994743e-21, rel=1e-6)


@real
def test_published_numbers_are_of_paraphrased_answers() -> None:
    # The answers themselves give another p-value by far, so the recipes have to say which.
    fields = ("average_perturb_loss", "avg_gt_loss")
    wrong, right = ([column(m, "forget", field) for m in MODELS] for field in fields)
    plain_answers = [from_losses(r, w) for r, w in zip(right, wrong, strict=True)]
    assert (forget_quality(*plain_answers).estimate or 0.0) < 1e-100
    calls = [call for who, _, call in VARIANTS if who in ("TOFU", "open-unlearning")]
    assert sum("truth_ratio(q" in call for call in calls) == 10
    assert not any("truth_ratio(p" in call for call in calls)


def logged_probability(model: str, name: str) -> Values:
    losses = column(model, name, "avg_gt_loss")
    if name == "retain":
        return plain("likelihood", [math.exp(-loss) for loss in losses])
    return normalised_from_losses(losses, column(model, name, "average_perturb_loss"))


@real
@pytest.mark.parametrize(("model", "utility"), [("full", 0.622677), ("retain90", 0.613745)])
def test_logged_model_utility(model: str, utility: float) -> None:
    parts = {
        name: (
            logged_probability(model, name),
            plain("rougeL_recall", column(model, name, "rougeL_recall")),
            logged_ratio(model, name, aggregate="better"),
        )
        for name in ("retain", "authors", "facts")
    }
    found = model_utility(parts)
    assert found.estimate == pytest.approx(utility, abs=5e-7)
    low, high = found.interval(n_bootstrap=200) or (0.0, 0.0)
    assert utility - 0.05 < low < utility < high < utility + 0.05
    if model == "full":
        means = [values.estimate for several in parts.values() for values in several]
        expected = [0.9895, 0.9857, 0.4747, 0.4555, 0.933, 0.5962, 0.4186, 0.8825, 0.5390]
        assert means == pytest.approx(expected, abs=5e-5)


def test_the_module_of_rouge_is_named_like_its_metric() -> None:
    assert rouge_module.rouge is rouge
