"""`evaluate` on a model worked out by hand (every number known) and on real edits of a tiny transformer."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from circuits import ComponentMask, describe
from locate_edit.editing import Edit, edit
from locate_edit.errors import EditError, PromptError
from locate_edit.methods.zero_neurons import ZeroNeurons
from locate_edit.metrics import exposure as exposure_module
from locate_edit.metrics import likelihood as likelihood_module
from locate_edit.metrics import memorization as memorization_module
from locate_edit.metrics.divergence import jensen_shannon, kl_divergence
from locate_edit.metrics.exposure import exposure
from locate_edit.metrics.likelihood import likelihood, nll
from locate_edit.metrics.membership import min_k
from locate_edit.metrics.perplexity import perplexity
from locate_edit.metrics.perplexity_shift import perplexity_rose
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet
from locate_edit.reports.controls import Editable
from locate_edit.reports.evaluation import evaluate
from locate_edit.reports.side_effects import side_effects
from tests.locate_edit.metrics.bigram import Bigram, token_id
from tests.tiny import byte_tokenizer, tiny, word_tokenizer

TOKENIZER = word_tokenizer(["a", "b", "c"])
A, B, C = (token_id(TOKENIZER, word) for word in "abc")
V = len(TOKENIZER)
FORGET = PromptSet([("a", " b"), ("c", " a b")], TOKENIZER, name="f")
RETAIN = PromptSet([("b", " c"), ("b", " c c"), ("b", " c")], TOKENIZER, name="r")


class FakeMask:
    """As much of a mask as the random control needs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def random_like(self, seed: int) -> FakeMask:
        return FakeMask(f"random {seed}")


class FakeEdit:
    """An edit of a bigram model: p(b|a) is 0.9 in the base, 0.1 with the edit, and by mask name in a control."""

    def __init__(self, controls: dict[str, float]) -> None:
        self.model: Any = Bigram(V, {A: {B: 0.1}, B: {C: 0.8}})
        self.base = Bigram(V, {A: {B: 0.9}, B: {C: 0.8}})
        self.mask: Any = FakeMask("mine")
        self.forget: Any = FORGET
        self.retain: Any = RETAIN
        self.provenance: Any = {"method": {"name": "Fake"}}
        self.controls = controls
        self.log: list[str] = []

    @contextmanager
    def off(self) -> Iterator[nn.Module]:
        with self._weights(self.base):
            yield self.model

    @contextmanager
    def rerun(self, mask: FakeMask) -> Iterator[Any]:
        self.log.append(mask.name)
        with self._weights(Bigram(V, {A: {B: self.controls[mask.name]}, B: {C: 0.8}})):
            yield SimpleNamespace(model=self.model)

    @contextmanager
    def _weights(self, other: Bigram) -> Iterator[None]:
        mine = self.model.head.weight.data.clone()
        self.model.head.weight.data.copy_(other.head.weight.data)
        try:
            yield
        finally:
            self.model.head.weight.data.copy_(mine)


def test_the_four_columns() -> None:
    fake = FakeEdit({"random 6": 0.8})
    assert isinstance(fake, Editable)
    oracle = Bigram(V, {A: {B: 0.2}, B: {C: 0.8}})
    report = evaluate(fake, [likelihood], oracle=oracle, seed=5)
    assert report.columns == ("before", "after", "random", "oracle")
    line = report.line("likelihood", "forget")
    # Item 0 is b after a; item 1 is a after c (uniform) and b after a.
    for column, p in {"before": 0.9, "after": 0.1, "random": 0.8, "oracle": 0.2}.items():
        assert line.value(column) == pytest.approx((p + math.sqrt(p / V)) / 2, rel=1e-5), column
        assert line.cells[column].items == 2
    kept = report.line("likelihood", "retain")
    assert kept.value("before") == kept.value("after") == kept.value("random")
    assert fake.log == ["random 6"]


def test_the_oracle_distance_in_every_column() -> None:
    fake = FakeEdit({"random 1": 0.9})
    oracle = Bigram(V, {A: {B: 0.2}, B: {C: 0.8}})
    other = Bigram(V, {A: {B: 0.3}, B: {C: 0.7}})
    report = evaluate(fake, [likelihood], oracle=oracle, other_oracle=other)

    def kl(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    line = report.line("oracle_distance", "forget")
    # Both items score one b after a; in the second it is half of the tokens. The ratio does not see that.
    assert line.value("before") == pytest.approx(kl(0.2, 0.9) / kl(0.2, 0.3), rel=1e-4)
    assert line.value("after") == pytest.approx(kl(0.2, 0.1) / kl(0.2, 0.3), rel=1e-4)
    assert line.value("random") == pytest.approx(line.value("before"), rel=1e-6)
    assert line.value("oracle") == pytest.approx(1.0)
    raw = report.line("oracle_kl", "forget")
    assert raw.value("after") == pytest.approx(0.75 * kl(0.2, 0.1), rel=1e-4)
    assert report.value("oracle_distance", "retain") == pytest.approx(0.0, abs=1e-5)


def test_without_a_second_oracle_the_distance_is_withheld_and_says_why() -> None:
    report = evaluate(FakeEdit({"random 1": 0.9}), [nll], oracle=Bigram(V, {A: {B: 0.2}}))
    assert report.value("oracle_distance") is None
    assert report.value("oracle_kl") is not None
    reasons = {(key, column): why for key, column, why in report.withheld()}
    assert reasons["forget.oracle_distance", "after"].startswith("needs: a second oracle")


def test_forward_passes_are_shared() -> None:
    fake = FakeEdit({})
    oracle, other = Bigram(V, {A: {B: 0.2}}), Bigram(V, {A: {B: 0.3}})
    evaluate(
        fake,
        [likelihood, nll, perplexity, memorization_module.exact_memorization],
        oracle=oracle,
        other_oracle=other,
        random=False,
        examples=0,
    )
    # Two sets, one batch each: the edited model once on, once off; the second oracle once; the first beside each of
    # these (for the divergence) and once for its own column.
    assert fake.model.n_calls == 2 * 2
    assert other.n_calls == 2
    assert oracle.n_calls == 2 * (2 + 1 + 1)


def test_what_is_measured_from_the_model_before_is_not_measured_from_the_oracle() -> None:
    fake = FakeEdit({"random 1": 0.9})
    oracle = Bigram(V, {A: {B: 0.2}, B: {C: 0.8}})
    chosen = [kl_divergence, perplexity_rose, jensen_shannon]
    report = evaluate(fake, chosen, oracle=oracle)
    kl = 0.9 * math.log(0.9 / 0.1) + 0.1 * math.log(0.1 / 0.9)
    # Both items score one b after a; in the second it is half of the tokens.
    assert report.value("kl_divergence") == pytest.approx(0.75 * kl, rel=1e-4)
    assert report.value("kl_divergence", column="before") == pytest.approx(0.0, abs=1e-6)
    assert report.value("kl_divergence", column="random") == pytest.approx(0.0, abs=1e-6)
    never = report.value("kl_divergence", column="oracle")
    assert never is not None
    assert never > 0.1
    assert report.value("perplexity_rose") == 1.0
    assert report.value("perplexity_rose", column="before") == 0.0
    from_oracle = report.value("jensen_shannon", column="before")
    assert from_oracle is not None
    assert from_oracle > 0.1
    says = {line.metric: line.definition for line in report.lines}
    assert says["kl_divergence"].endswith("The reference is the model before the edit.")
    assert says["jensen_shannon"].endswith("The reference is the oracle.")
    alone = evaluate(fake, chosen)
    assert alone.value("kl_divergence") == report.value("kl_divergence")
    assert alone.value("jensen_shannon") is None


def test_a_metric_with_settings_is_called_by_them() -> None:
    report = evaluate(FakeEdit({}), [functools.partial(min_k, k=0.5)], random=False)
    assert report.lines[0].title == "min k (k=0.5)"
    assert evaluate(FakeEdit({}), [exposure], random=False).lines[0].title == "exposure"
    assert report.line("min_k(k=0_5)").value("after") is not None


def test_without_an_oracle_one_pass_serves_what_is_measured_from_the_model_before_too() -> None:
    fake = FakeEdit({})
    chosen = [likelihood, nll, perplexity, kl_divergence, perplexity_rose, jensen_shannon]
    evaluate(fake, chosen, random=False, examples=0)
    # two sets of one batch each, with the edit and without it
    assert fake.model.n_calls == 2 * 2


def test_oracles_are_looked_at() -> None:
    fake = FakeEdit({"random 1": 0.9})
    knows, other = (Bigram(V, {A: {B: 0.9}, B: {C: p}}) for p in (0.8, 0.01))
    assert "knows the forget prompts" in evaluate(fake, [likelihood], oracle=knows).notes[0]
    assert "hardly knows the retain" in evaluate(fake, [likelihood], oracle=other).notes[1]
    good = Bigram(V, {A: {B: 0.1}, B: {C: 0.8}})
    assert evaluate(fake, [likelihood], oracle=good).notes == ()
    with pytest.raises(EditError, match="expected 10 tokens as in Bigram, got 12"):
        evaluate(fake, [likelihood], oracle=Bigram(V + 2, {A: {B: 0.1}}))
    with pytest.raises(EditError, match="give the first as oracle="):
        evaluate(fake, [likelihood], other_oracle=good)
    with pytest.raises(EditError, match="one of the other models"):
        evaluate(fake, [likelihood], oracle=fake.model)


def test_several_random_masks_are_averaged_item_by_item() -> None:
    fake = FakeEdit({"random 1": 0.8, "random 2": 0.4})
    report = evaluate(fake, [nll], random=2)
    cell = report.line("nll").cells["random"]
    first = [-(math.log(p) + math.log(p / V) / 2) / 2 for p in (0.8, 0.4)]
    assert cell.value == pytest.approx(sum(first) / 2, rel=1e-5)
    assert cell.note.startswith("mean of 2 runs from ")
    assert report.settings["random_masks"] == 2


def test_controls_can_be_given_as_masks_or_models() -> None:
    fake = FakeEdit({"own": 0.7})
    masks: Any = [FakeMask("own")]
    by_mask = evaluate(fake, [nll], random=masks)
    by_model = evaluate(fake, [nll], random=[Bigram(V, {A: {B: 0.7}, B: {C: 0.8}})])
    assert by_mask.value("nll", column="random") == by_model.value("nll", column="random")
    assert by_mask.value("nll", column="random") is not None


def test_a_control_that_cannot_be_made_is_named_or_refused() -> None:
    fake = FakeEdit({})
    fake.mask = None
    report = evaluate(fake, [nll])
    assert "random" not in report.columns
    assert report.notes == (
        "no random control: the edit has no mask, so there is nothing to draw at random",
    )
    with pytest.raises(EditError, match="a random control was asked for, but the edit has no mask"):
        evaluate(fake, [nll], random=True)
    assert evaluate(fake, [nll], random=False).notes == ()


def test_a_plain_model_has_one_column() -> None:
    model = Bigram(V, {A: {B: 0.5}})
    report = evaluate(model, forget=FORGET, others={"more": RETAIN})
    assert report.columns == ("before",)
    assert report.metric_names == ["likelihood", "exact_memorization", "perplexity"]
    assert report.set_names == ["forget", "more"]
    assert report.edit == {}


def test_metrics_by_function_module_name_and_partial() -> None:
    model = Bigram(V, {})
    depn = functools.partial(exposure, estimator="depn")
    report = evaluate(
        model, [likelihood_module, "perplexity", memorization_module, depn], forget=FORGET
    )
    assert report.metric_names == [
        "likelihood",
        "perplexity",
        "exact_memorization",
        "verbatim",
        "extraction_strength",
        "extraction_likelihood",
        "exposure(estimator=depn)",
    ]
    single = evaluate(model, exposure_module, forget=FORGET)
    assert single.metric_names == ["exposure"]
    assert "one token a digit" in single.line("exposure").cells["before"].withheld
    with pytest.raises(PromptError, match="the metric 'likelihood' is given twice"):
        evaluate(model, [likelihood, likelihood_module], forget=FORGET)
    with pytest.raises(PromptError, match="the module math defines no metric"):
        evaluate(model, math, forget=FORGET)


def test_sets_are_named_once_and_there_is_at_least_one() -> None:
    model = Bigram(V, {})
    with pytest.raises(PromptError, match="nothing to measure on: give forget="):
        evaluate(model, [likelihood])
    with pytest.raises(PromptError, match="two prompt sets are called 'forget'"):
        evaluate(model, [likelihood], forget=FORGET, others={"forget": RETAIN})
    fake = FakeEdit({})
    fake.model = None
    with pytest.raises(EditError, match="the edit is not applied to a model"):
        evaluate(fake, [likelihood])


def test_intervals_belong_to_the_items_and_the_seed() -> None:
    model = Bigram(V, {A: {B: 0.9}})
    one = evaluate(model, [likelihood], forget=FORGET[:1])
    assert one.line("likelihood").cells["before"].low is None
    runs = [
        evaluate(model, [likelihood], forget=FORGET, seed=seed, n_bootstrap=50, level=0.8)
        for seed in (0, 0, 1)
    ]
    values = runs[0].line("likelihood").values["before"]
    cell = runs[0].line("likelihood").cells["before"]
    assert (cell.low, cell.high) == values.interval(level=0.8, n_bootstrap=50, seed=0)
    assert runs[0].to_json() == runs[1].to_json()


def test_the_models_own_words_are_shown() -> None:
    fake = FakeEdit({"random 1": 0.9})
    report = evaluate(fake, [nll], examples=1)
    example = report.examples[0]
    assert (example.prompts, example.prompt, example.target) == ("forget", "a", "b")
    assert example.outputs["before"] == "b"
    assert example.outputs["after"] != "b"
    assert len(report.examples) == 2  # one of each set
    more = evaluate(fake, [nll], examples=2, others={"text": PromptSet(["a b c"], TOKENIZER)})
    # Two of the first set, one of the second, none of plain text.
    assert [example.prompts for example in more.examples] == ["forget", "forget", "retain"]
    masked = PromptSet([("Ann", " golf")], byte_tokenizer(mask=True))
    words = evaluate(tiny("bert"), [likelihood], forget=masked).examples[0].outputs["before"]
    assert len(words) > 0


# ---- side effects --------------------------------------------------------------------------------


def bigram(b_after_a: float, c_after_b: float, a_after_c: float) -> Bigram:
    return Bigram(V, {A: {B: b_after_a}, B: {C: c_after_b}, C: {A: a_after_c}})


class Careless(FakeEdit):
    """Forgets b after a, and harms c after b and, less, a after c."""

    def __init__(self) -> None:
        super().__init__({})
        self.model, self.base = bigram(0.1, 0.5, 0.55), bigram(0.9, 0.8, 0.6)
        self.retain = PromptSet([("b", " c"), ("b", " a"), ("b", " c")], TOKENIZER, name="r")

    @contextmanager
    def rerun(self, mask: FakeMask) -> Iterator[Any]:
        with self._weights(bigram(0.9, 0.7 if mask.name == "random 1" else 0.6, 0.6)):
            yield SimpleNamespace(model=self.model)


def test_side_effects_are_ranked_by_how_far_their_likelihood_moved() -> None:
    # The last item is in the forget set too, in the same words: it fell most and is no side effect.
    more = PromptSet([("c", " a"), ("b", " c a"), ("a", " b")], TOKENIZER, name="m")
    report = evaluate(Careless(), [perplexity], others={"more": more}, random=2)
    effects = report.side_effects or ()
    # Equal changes keep the order of the sets; b then a has become more likely, the least of all.
    expected = [("retain", 0), ("retain", 2), ("more", 1), ("more", 0), ("retain", 1)]
    assert [(effect.prompts, effect.item) for effect in effects] == expected
    assert (effects[2].prompt.strip(), effects[2].target.split()) == ("b", ["c", "a"])
    # The random column is the mean of two masks, 0.7 and 0.6.
    by_hand = [
        {"before": 0.8, "after": 0.5, "random": 0.65},
        {"before": 0.8, "after": 0.5, "random": 0.65},
        {
            "before": math.sqrt(0.8 * 0.6),
            "after": math.sqrt(0.5 * 0.55),
            "random": (math.sqrt(0.7 * 0.6) + math.sqrt(0.6 * 0.6)) / 2,
        },
        {"before": 0.6, "after": 0.55, "random": 0.6},
    ]
    for effect, numbers in zip(effects[:4], by_hand, strict=True):
        assert effect.likelihood == pytest.approx(numbers, rel=1e-5)
    assert effects[0].change == pytest.approx(-0.3, rel=1e-5)
    assert effects[4].change == pytest.approx((0.5 - 0.2) / 9, rel=1e-5)
    assert report.n_elsewhere == 6


def test_the_same_question_in_other_words_is_no_side_effect() -> None:
    def values(*numbers: float) -> Values:
        return Values.make("likelihood", list(numbers), unit="probability", direction="up")

    forget = PromptSet([{"prompt": "a", "target": " b", "group": "ann"}], TOKENIZER)
    rows = [
        {"prompt": "c", "target": " b", "group": "ann"},  # the same answer about the same person
        {"prompt": "c", "target": " b", "group": "bo"},
        {"prompt": "c", "target": " a", "group": "ann"},
        {"prompt": "c", "target": " b"},
    ]
    sets = {"forget": forget, "more": PromptSet(rows, TOKENIZER)}
    likelihoods = {
        "before": {"more": values(0.9, 0.9, 0.9, 0.9)},
        "after": {"more": values(0.1, 0.2, 0.3, 0.4)},
    }
    assert [effect.item for effect in side_effects(likelihoods, sets)] == [1, 2, 3]
    assert [effect.item for effect in side_effects(likelihoods, sets, least=0.6)] == [1, 2]
    # A rise counts like a fall.
    likelihoods["after"] = {"more": values(0.9, 0.8, 0.9, 0.9)}
    likelihoods["before"] = {"more": values(0.9, 0.9, 0.4, 0.9)}
    risen, fallen = side_effects(likelihoods, sets)
    assert (risen.item, fallen.item) == (2, 1)
    assert risen.change == pytest.approx(0.5)


def test_ten_side_effects_at_most_and_none_without_an_edit() -> None:
    careless = Careless()
    careless.retain = PromptSet([("b", " c")] * 12, TOKENIZER, name="r")
    assert len(evaluate(careless, [likelihood]).side_effects or ()) == 10
    assert evaluate(careless.model, [likelihood], retain=careless.retain).side_effects is None
    only = PromptSet([("a", " b")], TOKENIZER, name="r")  # what the forget set asks
    assert evaluate(careless, [likelihood], retain=only).side_effects == ()


# ---- real edits ----------------------------------------------------------------------------------


def real_edit(model: Any) -> Edit:
    tokenizer = byte_tokenizer()
    forget = PromptSet([("Ann Lee plays", " golf"), ("Bo", " 555-0123")], tokenizer, name="f")
    retain = PromptSet([("Cy", " chess"), "some plain text"], tokenizer, name="r")
    mask = ComponentMask.parse("L0.neuron[0-9 11]", describe(model))
    return edit(model, ZeroNeurons(), mask, forget=forget, retain=retain)


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_an_edited_transformer_is_measured_and_left_as_it_was() -> None:
    model = tiny("llama").train()
    base = copy.deepcopy(model).eval()
    change = real_edit(model)
    assert change.forget is not None
    edited = bits(model)
    oracle, other = tiny("llama", seed=8), tiny("llama", seed=9)
    report = evaluate(change, [likelihood, perplexity], oracle=oracle, other_oracle=other, seed=3)
    assert same(bits(model), edited)
    assert all(module.training for module in model.modules())
    assert not any(parameter.grad is not None for parameter in model.parameters())

    before = evaluate(base, [likelihood], forget=change.forget).value("likelihood", column="before")
    assert report.value("likelihood", column="before") == pytest.approx(before, abs=1e-7)
    # The random control is the same method on the drawn mask, on the base model.
    control = copy.deepcopy(base)
    assert change.mask is not None
    drawn = edit(control, ZeroNeurons(), change.mask.random_like(seed=4), forget=change.forget)
    by_hand = evaluate(drawn, [likelihood], random=False).value("likelihood")
    assert report.value("likelihood", column="random") == pytest.approx(by_hand, abs=1e-7)
    assert report.value("likelihood", column="random") != report.value("likelihood")
    assert report.mask["units"] == 11
    assert report.mask["of"] == 80
    assert report.mask["sites"] == {"L0.neuron": 11}
    assert 0 < report.mask["fraction_of_parameters"] < 0.1
    assert report.edit["method"]["name"] == "ZeroNeurons"
    change.undo()
    assert same(bits(model), bits(base))


def failing_on(call: int) -> Callable[..., Values]:
    """A metric that raises when it is used for the `call`-th time."""
    calls: list[int] = []

    def metric(predictions: Any) -> Values:
        """Fails."""
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("metric failed")
        return likelihood(predictions)

    return metric


@pytest.mark.parametrize("call", [1, 3, 5])  # with the edit, without it, and in the random control
def test_an_error_in_the_middle_leaves_the_edited_model(call: int) -> None:
    model = tiny("llama")
    base = bits(model)
    change = real_edit(model)
    edited = bits(model)
    assert not same(base, edited)
    with pytest.raises(RuntimeError, match="metric failed"):
        evaluate(change, [failing_on(call)])
    assert same(bits(model), edited)
    change.undo()
    assert same(bits(model), base)
