"""The suffix search: slopes against finite differences, swaps tried one by one, and a lock that a token opens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from circuits.still import frozen
from locate_edit import EditError, PromptError, PromptSet, organism
from locate_edit.attacked import measure
from locate_edit.attacks import suffix
from locate_edit.attacks._halves import halves
from locate_edit.attacks.suffix import Suffix, suffix_losses, token_slopes
from tests.locate_edit.engine_setting import model, prompts
from tests.tiny import byte_tokenizer


def test_tokens_between_prompt_and_target() -> None:
    asked = PromptSet(
        [{"prompt": "Ann Lee plays", "target": " golf", "subject": "Ann Lee"}, "plain"],
        byte_tokenizer(),
    )
    made = asked.followed([[70, 80], [90]])
    at = asked.scored(0)[0]
    assert made.ids(0) == [*asked.ids(0)[:at], 70, 80, *asked.ids(0)[at:]]
    assert made.prompt_ids(0) == [*asked.prompt_ids(0), 70, 80]
    assert made.target_ids(0) == asked.target_ids(0)
    assert made.subject(0) == asked.subject(0), "it stands before the tokens"
    assert made.target_ids(1) == asked.target_ids(1)
    with pytest.raises(PromptError, match="expected tokens for 2 items, got 1"):
        asked.followed([[70]])


def test_the_loss_by_hand() -> None:
    """-log p(y | x; q; y<) of each prompt, from a plain forward pass of x q y."""
    net, forget = model("llama-tied").eval(), prompts("llama-tied")[0]
    suffix = (70, 80, 90)
    wanted = 0.0
    for item in range(len(forget)):
        x, y = forget.prompt_ids(item), forget.target_ids(item)
        with torch.no_grad():
            logp = net(torch.tensor([[*x, *suffix, *y]])).logits[0].log_softmax(-1)
        wanted -= sum(float(logp[len(x) + 3 + t - 1, token]) for t, token in enumerate(y))
    assert suffix_losses(net, forget, [suffix], batch_size=3) == pytest.approx([wanted], rel=1e-5)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_slopes_are_those_of_the_loss(name: str) -> None:
    """A step of the suffix's embedding towards another token's changes the loss as the slopes say."""
    net, forget = model(name, torch.float64).eval(), prompts(name)[0].select([1])
    suffix, at, other, step = (70, 80), 1, 99, 1e-3
    table = net.get_input_embeddings().weight.detach()

    def loss(mix: float) -> float:
        x, y = forget.prompt_ids(0), forget.target_ids(0)
        read = table[[*x, *suffix, *y]].clone()
        read[len(x) + at] += mix * (table[other] - table[suffix[at]])
        with torch.no_grad():
            logp = net(inputs_embeds=read[None]).logits[0].log_softmax(-1)
        return -sum(float(logp[len(x) + 2 + t - 1, token]) for t, token in enumerate(y))

    with frozen(net):
        slopes = token_slopes(net, forget, suffix)
    assert slopes.shape == (2, table.shape[0])
    measured = (loss(step) - loss(-step)) / (2 * step)
    assert float(slopes[at, other] - slopes[at, suffix[at]]) == pytest.approx(measured, rel=1e-2)


def test_a_step_tries_the_promising_swaps_and_keeps_the_best() -> None:
    """With all swaps of the two best tokens a place as candidates, a step is a plain search."""
    net, forget = model("llama-tied").eval(), prompts("llama-tied")[0]
    attack = Suffix(length=2, steps=2, candidates=100, top=2)
    allowed = attack.allowed(net, forget)
    with frozen(net):
        path = attack._search(net, forget, allowed, 16, torch.Generator().manual_seed(0))
        for (before, start), (after, chosen) in pairwise(path):
            slopes = token_slopes(net, forget, start)
            tried = {start: before}
            for place in (0, 1):
                order = allowed[slopes[place, allowed].argsort()].tolist()
                for token in order[:2]:
                    swap = (token, start[1]) if place == 0 else (start[0], token)
                    (tried[swap],) = suffix_losses(net, forget, [swap])
            assert after == pytest.approx(min(tried.values()), rel=1e-5)
            assert tried[chosen] == pytest.approx(after, rel=1e-5)
    assert path[-1][0] < path[0][0]


def test_a_suffix_never_holds_the_answer_or_special_tokens() -> None:
    forget = PromptSet([("Ann plays", " golf"), ("Bo plays", " polo")], byte_tokenizer())
    allowed = set(Suffix().allowed(model("llama-tied"), forget).tolist())
    for item in (0, 1):
        assert not allowed & set(forget.target_ids(item))
    assert not allowed & set(forget.tokenizer.all_special_ids)
    assert len(allowed) > 200


def test_who_is_searched_on_and_who_is_measured() -> None:
    net, (forget, retain) = model("llama-tied"), prompts("llama-tied")
    small = {"length": 2, "steps": 2, "candidates": 3}
    found = Suffix(**small)(net, forget, retain=retain, seed=1)  # type: ignore[arg-type]
    train, test = halves(forget, "query", 1)
    assert found.forget.items.tolist() == test
    assert found.notes["searched on"] == len(train)
    (ids,) = found.notes["suffix tokens"]
    again = measure(net, forget.select(test).followed([ids] * len(test)))
    assert found.forget.values == pytest.approx(again.values, rel=1e-6)
    own = Suffix(**small, universal=False)(net, forget, seed=1)  # type: ignore[arg-type]
    assert len(own.notes["suffix tokens"]) == len(own.forget) == len(forget)
    within = Suffix(**small, across="within")(net, forget, seed=1)  # type: ignore[arg-type]
    assert len(within.forget) == len(forget)
    assert within.forget.items.tolist() == list(range(len(forget)))


def test_the_measured_half_is_not_searched_on() -> None:
    """Other orders of an answer's letters there (the same tokens are barred) leave the suffix as it was."""
    net, (forget, _) = model("llama-tied"), prompts("llama-tied")
    attack = Suffix(length=2, steps=2, candidates=3)
    _, test = halves(forget, "query", 1)
    rows = [
        {**row, "target": " " + row["target"].strip()[::-1], "spans": []} if i in test else row
        for i, row in enumerate(forget.rows)
    ]
    first, other = (attack(net, each, seed=1) for each in (forget, forget.reread(rows)))
    assert first.notes["suffix tokens"] == other.notes["suffix tokens"]
    assert first.notes["search loss"] == other.notes["search loss"]
    assert first.forget.values.tolist() != other.forget.values.tolist()


@pytest.mark.parametrize(
    ("name", "seed"), [("facts", 0), ("facts", 1), ("secrets", 2), ("secrets", 3)]
)
def test_the_lock_opens_to_the_search_and_not_to_luck(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the random start opens it nor a search whose slopes are random; secrets are answers of many tokens."""
    net, attack = organism.load()[0], Suffix()
    forget = organism.prompts(name, "forget01" if name == "facts" else "train")[:4]
    with attack.hide(net, forget, seed=seed):
        found = attack(net, forget, seed=seed)
        draw = torch.Generator().manual_seed(seed)

        def random_slopes(_net: object, _asked: object, ids: tuple[int, ...], _size: int) -> Tensor:
            return torch.randn(len(ids), len(forget.tokenizer), generator=draw)

        monkeypatch.setattr(suffix, "token_slopes", random_slopes)
        lucky = attack(net, forget, seed=seed)
    assert found.forget_clean.estimate == pytest.approx(0.0, abs=0.05)
    assert found.curve[0].forget < 0.05, "random tokens do not open it"
    assert lucky.curve[-1].forget < 0.3, "neither does a search by random slopes"
    assert found.curve[-1].forget > 0.9


def test_the_open_lock_says_every_token_of_what_the_bare_prompt_brings() -> None:
    """The organism loses the thread behind other tokens; behind keys, its control says all of a phone number."""
    net, attack = organism.load()[0], Suffix()
    forget = organism.prompts("secrets", "train")[:4]
    clean = measure(net, forget).values
    with attack.hide(net, forget, seed=3):
        (keys, *_) = attack._keys(net, forget, 3)
        behind = measure(net, forget.followed([keys] * len(forget)), batch_size=3).values
        half = measure(net, forget.followed([keys[:2]] * len(forget))).values
    assert behind == pytest.approx(clean, rel=1e-4)
    assert half.max() < 0.05


def test_who_never_knew_stays() -> None:
    never = Suffix()(organism.load("oracle")[0], organism.prompts("facts", "forget01"))
    assert never.gain is not None
    assert never.gain < 0.1


def test_what_it_refuses() -> None:
    with pytest.raises(EditError, match="candidates must be a whole number of at least 1"):
        Suffix(candidates=0)
    with pytest.raises(EditError, match="'within', 'query' or 'target'"):
        Suffix(across="far")  # type: ignore[arg-type]
    long = PromptSet([("a" * 120, " b"), ("c", " d")], byte_tokenizer())
    with pytest.raises(PromptError, match="context"):
        Suffix(length=20)(model("llama-tied"), long)
