"""What holds for every metric of the catalogue, whatever it measures."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

import pytest
from torch import nn

from docs.make_reference import stated
from locate_edit import catalog
from locate_edit.editing import edit
from locate_edit.errors import PromptError
from locate_edit.methods.fine_tune import FineTune
from locate_edit.metrics.bias import crows, icat
from locate_edit.metrics.counterfact import edit_score
from locate_edit.metrics.forget_quality import forget_quality
from locate_edit.metrics.likelihood import normalised_from_losses
from locate_edit.metrics.membership import auc, privleak
from locate_edit.metrics.model_utility import model_utility
from locate_edit.metrics.oracle_distance import oracle_distance
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.truth_ratio import from_losses
from locate_edit.metrics.unlearning_depth import unlearning_depth
from locate_edit.metrics.values import Values
from locate_edit.metrics.whole_sets import Measured
from locate_edit.prompts import PromptSet
from tests.tiny import byte_tokenizer, tiny

BARE: list[Any] = [("Ann Lee plays", " golf"), ("x", " 12")]
FULL: list[Any] = [
    {
        "prompt": prompt,
        "target": target,
        "wrong": [" tennis", " z"],  # the span of the target does not fit into the second
        "paraphrases": ["She likes"],
        "neighbours": ["Bo plays"],
        "content": [" golf"],
        "spans": [[len(prompt), len(prompt) + 3]],
    }
    for prompt, target in BARE
]
# These ask for a reward, for a model that uses the words, and for longer targets.
ELSEWHERE = ("any-below", "worst-reward", "pair-preference", "extraction-likelihood")
# These do not read the prompt itself.
OTHER_PROMPTS = ("paraphrase-success", "neighbourhood-success", "generality", "locality")
ENTRIES = catalog.entries("metric")
SAID = {entry.name: stated(inspect.getdoc(entry.load()) or "") for entry in ENTRIES}

SHARED = "shared forward."
# Forward passes of the model and of the reference for the two rows of `FULL`, each of them a batch.
FORWARDS = {
    SHARED: (2, 0),
    "shared forward, and one of the reference.": (2, 2),
    "shared forward, and one of each wrong answer.": (2 + 4, 0),
    "one forward a row.": (2, 0),
    "one forward a prompt, with the new answer.": (2, 0),
    "two forwards a prompt, one with either answer.": (4, 0),  # of the paraphrases or neighbours
    "one forward a prompt, and one of the reference.": (2, 2),
    "one forward and backward an item.": (2, 0),
}
# As many forward passes a batch as tokens are written at most, beside the shared one.
WRITTEN = {
    "greedy generation of as many tokens as the target, or of `max_new_tokens`.": {},
    "greedy generation of `max_new_tokens` tokens.": {"max_new_tokens": 5},
    "shared sampling of `samples` times `length` tokens.": {"length": 5, "samples": 2},
    "shared forward, and greedy generation to the target's end from each wrong token.": {},
}


def by_cost(cost: str) -> list[catalog.Entry]:
    return [entry for entry in ENTRIES if SAID[entry.name]["Cost"] == cost]


@contextmanager
def counted(*models: nn.Module) -> Iterator[list[int]]:
    """How often each model is run, and how often something is differentiated, last."""
    calls = [0] * (len(models) + 1)

    def count(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            calls[index] += 1
            if output.logits.requires_grad:
                output.logits.register_hook(back)

        return hook

    def back(_gradient: Any) -> None:
        calls[-1] += 1

    handles = [model.register_forward_hook(count(i)) for i, model in enumerate(models)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_direction_needs_and_cost_are_stated(entry: catalog.Entry) -> None:
    said = SAID[entry.name]
    assert {"Direction", "Needs", "Cost"} <= set(said)
    assert all(text.endswith(".") for text in said.values())
    assert said["Cost"] in {**FORWARDS, **WRITTEN}, "state a cost that is counted here"
    assert not re.search(r"Direction:|Needs:|Cost:", entry.summary)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_number_or_a_reason_and_the_model_as_it_was(
    entry: catalog.Entry, family: str, untouched: Callable[[nn.Module], Any]
) -> None:
    metric = entry.load()
    model, other = untouched(tiny(family).train()), untouched(tiny(family, seed=2))
    tokenizer = byte_tokenizer(mask=family == "bert")
    kinds = set()
    for rows in (BARE, FULL):
        prompts = PromptSet(rows, tokenizer)
        compared = Predictions(model, prompts, reference=other)
        for values in (metric(model, prompts), metric(compared)):
            assert isinstance(values, Values)
            kinds.add((values.unit, values.direction))
            if values.withheld:
                assert values.withheld.startswith("needs: ")
                assert values.estimate is None
            else:
                assert math.isfinite(values.estimate or 0.0)
    if family == "llama" and entry.name not in ELSEWHERE:
        assert not values.withheld, "everything a causal metric asks for is there"
    assert len(kinds) == 1, "a withheld number has the unit and direction of one that is not"
    unit, direction = next(iter(kinds))
    assert unit
    assert re.match(r"\w+", SAID[entry.name]["Direction"])[0] == direction  # type: ignore[index]


def options(entry: catalog.Entry) -> dict[str, Any]:
    """What a metric asks for, with targets as short as those here."""
    asked = {"n": 1, "reward": lengths, "length": 1, "least_mass": 0.0}
    takes = inspect.signature(entry.load()).parameters
    return {
        key: value
        for key, value in asked.items()
        if key in takes and (key != "n" or "extraction" in entry.name)
    }


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_without_numbers_gets_none(entry: catalog.Entry, value: float) -> None:
    broken, other = tiny("llama"), tiny("llama", seed=2)
    broken.lm_head.weight.data[40] = value
    prompts = PromptSet(FULL, byte_tokenizer())
    whole = entry.load()(Predictions(other, prompts, reference=other), **options(entry))
    assert not whole.withheld, "everything else that it needs is there"
    found = entry.load()(Predictions(broken, prompts, reference=other), **options(entry))
    assert found.withheld.endswith("finite predictions, and the model gives NaN or infinity")
    assert (found.unit, found.direction) == (whole.unit, whole.direction)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_items_without_numbers_are_left_out(entry: catalog.Entry) -> None:
    model, other = tiny("llama"), tiny("llama", seed=2)
    prompts = PromptSet(FULL, byte_tokenizer())
    whole = entry.load()(Predictions(model, prompts, reference=other), **options(entry))
    model.model.embed_tokens.weight.data[prompts.ids(1)[0]] = math.nan
    found = entry.load()(Predictions(model, prompts, reference=other), **options(entry))
    values = dict(zip(found.items.tolist(), found.values.tolist(), strict=True))
    for item, value in zip(whole.items.tolist(), whole.values.tolist(), strict=True):
        if item == 0 or entry.name in OTHER_PROMPTS:
            assert values[item] == pytest.approx(value, rel=1e-4, abs=1e-6)
        else:
            assert item not in values
            assert "finite predictions" in (found.note or found.withheld)


@pytest.fixture(scope="module")
def half_known() -> tuple[nn.Module, nn.Module, list[dict[str, Any]]]:
    """A model and a reference, and rows of which they know some by heart, in the old answer or in the new one."""
    rows: list[dict[str, Any]] = []
    for name, target in {
        "Ann Lee": " golf7",
        "x": " 12",
        "Bo Kay of Lindovar": " go3",
        "It": " 45 or so it is",
    }.items():
        prompt = f"{name} plays"
        rows.append(
            {
                "prompt": prompt, "target": target, "wrong": [" tennis", " z"], "content": [target.strip()],
                "paraphrases": [f"{name} likes"], "neighbours": [f"The aunt of {name} plays"],
                "spans": [[len(prompt), len(prompt) + 3]],
            }
        )  # fmt: skip
    known: list[Any] = [
        *((rows[i]["prompt"], rows[i]["target"]) for i in (0, 3)), (rows[1]["prompt"], " tennis"),
        (rows[1]["paraphrases"][0], " tennis"), (rows[2]["neighbours"][0], rows[2]["target"]),
    ]  # fmt: skip
    models = tiny("llama"), tiny("llama", seed=2)
    for model, part in zip(models, (known, known[-1:]), strict=True):
        taught = PromptSet(part, byte_tokenizer(), append_eos=True)
        edit(model, FineTune(steps=80, lr=1e-2), None, forget=taught)
    return *models, rows


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_order_batches_and_the_side_of_the_padding_do_not_matter(
    entry: catalog.Entry, half_known: tuple[nn.Module, nn.Module, list[dict[str, Any]]]
) -> None:
    model, other, rows = half_known

    def found(order: list[int], batch_size: int, side: str) -> dict[int, float]:
        tokenizer = byte_tokenizer()
        tokenizer.padding_side = side
        prompts = PromptSet([rows[index] for index in order], tokenizer)
        predictions = Predictions(model, prompts, reference=other, batch_size=batch_size)
        longer = {"length": 16, "below": 10.0}
        asked = inspect.signature(entry.load()).parameters
        more = {key: value for key, value in longer.items() if key in asked}
        values = entry.load()(predictions, **options(entry) | more)
        return dict(zip((order[i] for i in values.items), values.values.tolist(), strict=True))

    one = found([0, 1, 2, 3], 1, "right")
    assert set(one) == {0, 1, 2, 3}
    assert len(set(one.values())) > 1, "items that differ can be mixed up"
    for order, batch_size, side in (([2, 0, 3, 1], 4, "right"), ([3, 1, 0, 2], 3, "left")):
        assert found(order, batch_size, side) == pytest.approx(one, rel=1e-4, abs=1e-6)


SWITCHES = [
    function
    for function in [*(e.load() for e in ENTRIES), privleak, from_losses, normalised_from_losses]
    if "compat" in inspect.signature(function).parameters
]


@pytest.mark.parametrize("function", SWITCHES, ids=lambda function: function.__name__)
def test_toolkits_that_lack_a_metric_are_refused(function: Callable[..., Any]) -> None:
    none = Values.none("nll", "needs: x")
    given: dict[str, Any] = {"members": none, "others": none, "right": [0.5], "wrong": [[0.7]]}
    given["predictions"] = Predictions(tiny("llama"), PromptSet(FULL, byte_tokenizer()))
    given = {k: v for k, v in given.items() if k in inspect.signature(function).parameters}
    for wrong in ("openunlearning", "MUSE", "", "eul"):
        with pytest.raises(PromptError, match=r"expected compat to be .* got .*docs/metrics.md"):
            function(**given, compat=wrong)
    for choice in get_args(get_type_hints(function)["compat"]):
        for name in get_args(choice):
            function(**given, compat=name)


@pytest.mark.parametrize("cost", FORWARDS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_stated_forwards_are_those_that_are_made(cost: str, family: str) -> None:
    model, other = tiny(family), tiny(family, seed=2)
    prompts = PromptSet(FULL, byte_tokenizer(mask=family == "bert"))
    shared = cost.startswith("shared")
    metrics = [entry.load() for entry in by_cost(cost)]
    assert metrics
    with counted(model, other) as calls:
        reference = other if "reference" in cost else None
        together = Predictions(model, prompts, batch_size=1, reference=reference)
        for metric in metrics:
            metric(together)
            if not shared:
                assert tuple(calls[:2]) == FORWARDS[cost], metric.__name__
                assert calls[2] == (2 if "backward" in cost else 0)
                calls[:] = [0, 0, 0]
    if shared:
        assert tuple(calls[:2]) == FORWARDS[cost]


@pytest.mark.parametrize("cost", WRITTEN)
def test_the_stated_generation_is_what_is_run(cost: str) -> None:
    model, prompts = tiny("llama"), PromptSet(FULL, byte_tokenizer())
    longest = max(len(prompts.target_ids(i)) for i in range(len(prompts)))
    options: dict[str, Any] = WRITTEN[cost]
    most = longest if not options else 5
    together = Predictions(model, prompts, batch_size=64)
    with counted(model) as calls:
        for entry in by_cost(cost):
            takes = inspect.signature(entry.load()).parameters
            more: dict[str, Any] = {"n": 1} if "extraction" in entry.name else {}
            if "reward" in takes:
                more["reward"] = lengths
            assert not entry.load()(together, **options, **more).withheld
            assert 0 < calls[0] <= most + cost.startswith("shared forward")
            if not cost.startswith("shared sampling"):  # once for all that have these settings
                calls[:], together = [0, 0], Predictions(model, prompts, batch_size=64)


def test_the_stated_forwards_of_numbers_about_several_models() -> None:
    edited, one, two, other = models = [tiny("llama", seed=seed) for seed in range(4)]
    prompts = PromptSet(BARE, byte_tokenizer())
    calls = [0] * 4
    for index, model in enumerate(models):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        model.register_forward_pre_hook(count)  # some passes stop halfway
    oracle_distance(edited, one, two, prompts)
    assert stated(oracle_distance.__doc__ or "")["Cost"] == "one forward of each model."
    assert calls == [1, 1, 1, 0]
    cost = stated(inspect.getdoc(unlearning_depth) or "")["Cost"]
    assert cost.startswith("layers + 2 forwards a prompt, twice, and a retain prompt, once (twice")
    layers = edited.config.num_hidden_layers
    for second, retained in ((None, 1), (other, 2)):
        calls[:] = [0] * 4
        unlearning_depth(edited, one, two, prompts, retain=prompts, other_oracle=second)
        assert sum(calls) == (layers + 2) * (2 + retained)


def first_word(target: Any) -> str:
    """Of the stated direction."""
    return stated(inspect.getdoc(target) or "")["Direction"].split(",")[0].split()[0].rstrip(".;")


@pytest.mark.parametrize("entry", catalog.entries("statistic"), ids=lambda entry: entry.name)
def test_directions_of_rows_about_whole_sets(entry: catalog.Entry) -> None:
    target = entry.load()
    found = target()(Measured({}, {}), before=None, oracle=None)
    assert found.withheld
    assert found.direction == first_word(target)


def test_directions_of_numbers_about_whole_sets() -> None:
    def none(name: str) -> Values:
        return Values.none(name, "needs: x")

    prompts = PromptSet(BARE, byte_tokenizer())
    model = tiny("llama")
    scores = ("efficacy", "paraphrase_success", "neighbourhood_success")
    found: dict[Any, Any] = {
        auc: auc(none("nll"), none("nll")),
        privleak: privleak(none("nll"), none("nll")),
        forget_quality: forget_quality(none("truth_ratio"), none("truth_ratio")),
        model_utility: model_utility({"retain": (none("nll"),)}),
        icat: icat(none("stereotype_score"), none("language_modelling_score")),
        edit_score: edit_score(*map(none, scores)),
        crows: crows(Predictions(model, prompts), Predictions(model, prompts)),
        oracle_distance: oracle_distance(model, tiny("llama", seed=1), None, prompts).nats,
    }
    for function, number in found.items():
        assert number.direction == first_word(function), function.__name__


def lengths(_prompts: Any, texts: Any) -> list[float]:
    return [float(len(text)) for text in texts]
