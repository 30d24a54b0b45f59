"""Quark against its formula in loops, quantiles by hand, and what it samples when."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from locate_edit import Edit, EditError, PromptSet, catalog, edit
from locate_edit.errors import PromptError, RewardError
from locate_edit.methods import quark
from locate_edit.methods.npo import NPO
from locate_edit.methods.quark import Quark, prefixed, quantiles, reward_token
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.predictions import Predictions
from locate_edit.optim import Optim
from locate_edit.sampling import Continuation, sample, sample_ids
from tests.conftest import fingerprint
from tests.locate_edit.engine_setting import differing, model, prompts, some_units, state
from tests.tiny import byte_tokenizer, tiny

Samples = list[Continuation]


def letters(texts: Sequence[str], continuations: Sequence[str]) -> list[float]:
    """Minus the number of the first letter, so that every text below has a reward of its own."""
    return [-float(ord(text[0])) if text else -200.0 for text in continuations]


def as_continuation(tokenizer: Any, item: int, text: str) -> Continuation:
    return Continuation(item, tuple(tokenizer.encode(text, add_special_tokens=False)), text)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Instead of sampling, the same continuations each time; what was asked for."""
    asked: list[dict[str, Any]] = []

    def instead(net: nn.Module, given: PromptSet, **options: Any) -> Samples:
        weights = {name: p.detach().clone() for name, p in net.named_parameters()}
        asked.append({"prompts": given, "weights": weights, **options})
        texts = ["dog", "cat", "b", "apple"]
        return [as_continuation(given.tokenizer, i, text) for i, text in enumerate(texts)]

    monkeypatch.setattr(quark, "sample", instead)
    return asked


# -- the loss -------------------------------------------------------------------------------------


def literal_loss(
    net: Any, rows: Tensor, base: Any, cut: dict[str, int], beta: float, entropy: float
) -> dict[str, float]:
    """The terms of the loss over the fixed continuations, token by token."""
    forget, _ = prompts("llama-tied")
    tokenizer = forget.tokenizer
    sums, n = {"nll": 0.0, "kl": 0.0, "entropy": 0.0}, 0
    for item, (text, k) in enumerate(cut.items()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        start = forget.prompt_ids(item)
        for t, token in enumerate(ids):
            plain = torch.tensor([[*start, *ids[:t]]])
            embedded = net.get_input_embeddings().weight[plain[0]]
            embedded = torch.cat([rows[k][None], embedded])[None]
            log_p = net(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)
            log_base = base(input_ids=plain).logits[0, -1].log_softmax(-1)
            sums["nll"] -= float(log_p[token])
            for a, b in zip(log_p.tolist(), log_base.tolist(), strict=True):
                p = math.exp(a)
                sums["kl"] += beta * p * (a - b)
                sums["entropy"] += entropy * p * a
            n += 1
    return {name: value / n for name, value in sums.items()}


@torch.no_grad()
def test_the_loss_is_the_formula(fixed: list[dict[str, Any]]) -> None:
    forget, _ = prompts("llama-tied")
    method = Quark(
        reward=letters,
        quantiles=2,
        lr=2e-2,
        every=10,
        beta=0.3,
        entropy=0.2,
        optim=Optim(name="sgd"),
    )
    # Rewards: apple > b > cat > dog, and items are dog, cat, b, apple.
    cut = {"dog": 1, "cat": 1, "b": 0, "apple": 0}

    def run(steps: int, lr: float) -> tuple[Any, Edit]:
        net = model("llama-tied")
        changed = Quark(**{**vars(method), "steps": steps, "lr": lr})
        return net, edit(net, changed, some_units(net), forget=forget, batch_size=8)

    base = model("llama-tied")
    logged = run(2, 2e-2)[1].log
    for step, (net, made) in enumerate((run(1, 0.0), run(1, 2e-2))):
        rows = made.additions[0].values["rows"]
        wanted = literal_loss(net, rows, base, cut, 0.3, 0.2)
        for name, value in wanted.items():
            assert logged[step][name] == pytest.approx(value, rel=1e-4), (step, name)
        assert logged[step]["loss"] == pytest.approx(sum(wanted.values()), rel=1e-4)
    assert wanted["kl"] > 0.001
    notes = made.provenance["quark"]
    assert notes["rounds"][0]["kl"] == pytest.approx(logged[0]["kl"] / 0.3, rel=1e-5)


# -- quantiles ------------------------------------------------------------------------------------


def test_quantiles_by_hand() -> None:
    assert quantiles([3.0, -1.0, 7.0, 0.5], 2) == [0, 1, 0, 1]
    assert quantiles([1, 2, 3], 1) == [0, 0, 0]
    # 11 values in 4 quantiles: 2, 2, 2, and the remainder to the worst: 5
    values = [float(v) for v in (5, 11, 3, 9, 1, 7, 2, 8, 4, 10, 6)]
    cut = quantiles(values, 4)
    assert {k: sorted(v for v, q in zip(values, cut, strict=True) if q == k) for k in range(4)} == {
        0: [10, 11],
        1: [8, 9],
        2: [6, 7],
        3: [1, 2, 3, 4, 5],
    }


def test_chance_decides_among_equal_values_and_only_there() -> None:
    values = [0.0] * 6 + [-1.0, 1.0]
    cuts = {tuple(quantiles(values, 4, seed=seed)) for seed in range(20)}
    assert len(cuts) > 5
    for cut in cuts:
        assert sorted(cut) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert cut[6] == 3
        assert cut[7] == 0
    assert quantiles(values, 4, seed=3) == quantiles(values, 4, seed=3)
    with pytest.raises(EditError, match="cannot cut 3 values into 4 quantiles"):
        quantiles([1, 2, 3], 4)


# -- rounds ---------------------------------------------------------------------------------------


def test_the_first_round_asks_the_base_and_later_ones_the_best_token(
    fixed: list[dict[str, Any]],
) -> None:
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")
    before = state(net)
    method = Quark(
        steps=5, every=2, lr=2e-2, reward=letters, quantiles=2, samples=3, length=7, temperature=0.9,
        top_p=0.8, optim=Optim(accumulate=2),
    )  # fmt: skip
    made = edit(net, method, some_units(net), forget=forget, batch_size=2)

    assert len(fixed) == 3  # before steps 0, 2 and 4, once however many batches a step has
    assert len({call["seed"] for call in fixed}) == 3
    for call in fixed:
        assert call["samples"] == 3
        assert (call["length"], call["temperature"], call["top_p"]) == (7, 0.9, 0.8)
    best = reward_token(made)
    assert fixed[0]["prompts"] is forget
    assert all(torch.equal(fixed[0]["weights"][n], before[n]) for n in fixed[0]["weights"])
    for call in fixed[1:]:
        assert [call["prompts"].prompt_ids(i) for i in range(4)] == [
            [best, *forget.prompt_ids(i)] for i in range(4)
        ]
        assert any(not torch.equal(call["weights"][n], before[n]) for n in call["weights"])
    rounds = made.provenance["quark"]["rounds"]
    assert [(r["step"], r["pool"]) for r in rounds] == [(0, 4), (2, 8), (4, 12)]
    assert all(r["reward_sampled"] == pytest.approx(-(97 + 98 + 99 + 100) / 4) for r in rounds)
    assert rounds[2]["reward_by_quantile"] == [
        pytest.approx(-97.5),
        pytest.approx(-99.5),
    ]  # three of each letter
    made.undo()
    assert not differing(net, before)


def test_the_pool_may_be_bounded_and_may_start_from_targets(fixed: list[dict[str, Any]]) -> None:
    forget, _ = prompts("llama-tied")
    sizes = {}
    for name, options in {"pool": {"pool": 6}, "targets": {"targets": True}}.items():
        net = model("llama-tied")
        method = Quark(steps=3, every=1, reward=letters, quantiles=2, **options)  # type: ignore[arg-type]
        made = edit(net, method, some_units(net), forget=forget)
        sizes[name] = made.provenance["quark"]["rounds"]
    assert [r["pool"] for r in sizes["pool"]] == [4, 6, 6]
    assert [r["pool"] for r in sizes["targets"]] == [8, 12, 16]
    # Targets begin with a space, number 32, which is better than any letter.
    assert sizes["targets"][0]["reward_by_quantile"] == [-32.0, -98.5]
    with pytest.raises(EditError, match="pool must hold one continuation for each of 5"):
        Quark(pool=4)


def test_a_bounded_pool_keeps_the_newest(fixed: list[dict[str, Any]]) -> None:
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")

    def which_round(texts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        return [float(len(fixed))] * len(continuations)

    method = Quark(steps=3, every=1, reward=which_round, quantiles=2, pool=4)
    made = edit(net, method, some_units(net), forget=forget)
    assert made.provenance["quark"]["rounds"][-1]["reward_by_quantile"] == [3.0, 3.0]


def test_every_continuation_comes_once_before_any_comes_again(fixed: list[dict[str, Any]]) -> None:
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")
    seen: list[str] = []
    kept = PromptSet.batch

    def watched(self: PromptSet, indices: Any) -> Any:
        chosen = list(indices)
        if any(token >= 300 for token in self.ids(chosen[0])):
            seen.extend(str(self.tokenizer.decode(self.target_ids(i))) for i in chosen)
        return kept(self, chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptSet, "batch", watched)
        method = Quark(steps=4, reward=letters, quantiles=2)
        edit(net, method, some_units(net), forget=forget, batch_size=3)
    assert len(seen) == 12
    assert Counter(seen) == {"apple": 3, "b": 3, "cat": 3, "dog": 3}


# -- what it is for -------------------------------------------------------------------------------


def test_the_best_token_asks_for_what_is_rewarded() -> None:
    """One of two letters is rewarded: the tokens of a model that writes both equally often tell them apart."""
    net = tiny("llama", num_hidden_layers=3)
    tokenizer = byte_tokenizer()
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")
    with torch.no_grad():  # it writes a and b and hardly anything else
        net.lm_head.weight.mul_(0.1)
        bias = torch.full((300,), -12.0)
        bias[[a, b]] = 0.0
        net.lm_head.bias = nn.Parameter(bias)
    forget = PromptSet(["now", "then", "here", "there"], tokenizer)

    def share_of_b(given: PromptSet) -> float:
        texts = [each.text for each in sample(net, given, length=4, samples=50, seed=9)]
        return "".join(texts).count("b") / sum(map(len, texts))

    assert 0.3 < share_of_b(forget) < 0.7

    def badness(texts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        return [-float(text.count("b")) for text in continuations]

    before = share_of_b(forget)
    method = Quark(
        steps=60, every=20, lr=1e-2, reward=badness, quantiles=3, samples=16, length=4, entropy=0.0
    )
    made = edit(net, method, None, forget=forget, batch_size=32)
    best, _, worst = (share_of_b(prefixed(forget, made, k)) for k in (1, 2, 3))
    assert best < 0.5 * before
    assert worst > best + 0.25


def test_the_prefix_works_in_metrics_after_loading_and_not_without_the_edit(tmp_path: Path) -> None:
    net = model("llama-tied")
    forget, retain = prompts("llama-tied")
    method = Quark(steps=3, lr=2e-2, reward=letters, quantiles=3, samples=2)
    made = edit(net, method, some_units(net), forget=forget, batch_size=4)
    best = prefixed(retain, made)
    assert [best.ids(i)[0] for i in range(4)] == [300] * 4
    assert reward_token(made, 3) == 302

    def measured(given: PromptSet) -> list[float]:
        return [float(value) for value in likelihood(Predictions(net, given)).values]

    values = measured(best)
    assert values != measured(prefixed(retain, made, 3))
    assert json.loads(json.dumps(made.provenance["quark"])) == made.provenance["quark"]
    made.save(tmp_path / "edit")
    made.undo()

    with pytest.raises((IndexError, EditError)):
        sample_ids(net, [[300, 9]], length=1)
    loaded = Edit.load(tmp_path / "edit")
    with loaded.applied(net):
        assert measured(prefixed(retain, loaded)) == values
        with loaded.off(), pytest.raises(EditError, match="switched off"):
            sample_ids(net, [[300, 9]], length=1)


def test_wrong_tokens_are_refused() -> None:
    net = model("llama-tied")
    forget, retain = prompts("llama-tied")
    made = edit(net, Quark(steps=1, reward=letters), some_units(net), forget=forget)
    for k in (0, 6):
        with pytest.raises(EditError, match=f"quantile must be 1 .* to 5, got {k}"):
            reward_token(made, k)
    made.undo()
    other = edit(net, NPO(steps=1), some_units(net), forget=forget, retain=retain)
    with pytest.raises(EditError, match="expected an edit made with Quark"):
        prefixed(retain, other)


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raises", "nan", "count"])
def test_a_reward_that_breaks_later_leaves_the_model_as_it_was(kind: str) -> None:
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")
    before, as_was = state(net), fingerprint(net)
    moved = []

    def breaks(texts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        values = [0.0] * len(continuations)
        if not differing(net, before):
            return values
        moved.append(True)
        if kind == "raises":
            raise LookupError("no such word")
        return values[1:] if kind == "count" else [float("nan"), *values[1:]]

    method = Quark(steps=4, every=2, lr=2e-2, reward=breaks, samples=2)
    says = {
        "raises": "LookupError: no such word",
        "nan": "nan for continuation 0",
        "count": "7 values for 8",
    }
    with pytest.raises(RewardError, match=says[kind]):
        edit(net, method, some_units(net), forget=forget)
    assert moved, "the reward broke before anything had changed, so the test shows nothing"
    assert not differing(net, before)
    assert fingerprint(net) == as_was


def test_it_says_what_it_needs() -> None:
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")
    units = some_units(net)
    with pytest.raises(EditError, match="cannot cut 4 values into 5 quantiles"):
        edit(net, Quark(steps=1, reward=letters, samples=1), units, forget=forget)
    plain = PromptSet(["Ann calls", "Bo calls"], forget.tokenizer)
    with pytest.raises(EditError, match=r"has none: pass Quark\(reward="):
        edit(net, Quark(steps=1), units, forget=plain)
    with pytest.raises(RewardError, match="cannot import"):
        edit(net, Quark(steps=1, reward="not_there:x"), units, forget=forget)
    for options in ({"quantiles": 0}, {"every": 0}, {"samples": 0}, {"length": 0}):
        with pytest.raises(EditError, match="must be at least 1, got 0"):
            Quark(**options)  # type: ignore[arg-type]
    with pytest.raises(EditError, match="beta must be a number of at least 0"):
        Quark(beta=float("nan"))
    with pytest.raises(EditError, match="reward must be a function"):
        Quark(reward=3)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="35 tokens and 94 new ones are more than the 128"):
        edit(net, Quark(steps=1, length=94), units, forget=forget)  # 34 without the reward token
    assert not differing(net, state(model("llama-tied")))


def test_the_command_line_names_rewards() -> None:
    built = catalog.build("method", "quark", {"reward": "lexicon:grob,snarl", "pool": "none"})
    assert built == Quark(reward="lexicon:grob,snarl")
    net = model("llama-tied")
    forget, _ = prompts("llama-tied")
    here = "tests.locate_edit.methods.test_quark:letters"
    for reward, name in {
        "lexicon:grob": "Lexicon(words=('grob',), count=False)",
        here: here,
        None: "Lexicon(words=('550', '551', '552', '553'), count=False)",  # words of the targets
    }.items():
        made = edit(net, Quark(steps=1, reward=reward), some_units(net), forget=forget)
        assert made.provenance["quark"]["reward"] == name
        made.undo()
