"""Sampling against one prompt at a time, against `generate`, and by hand."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from locate_edit import PromptSet, sampling
from locate_edit.errors import PromptError
from locate_edit.sampling import Continuation, _Draw, _numbers, sample, sample_ids
from tests.conftest import fingerprint
from tests.tiny import byte_tokenizer, tiny

STARTS = [[9, 10, 11, 12, 13, 14], [40], [7, 99, 30], [250, 3]]


def generated(model: Any, start: list[int], length: int, **options: Any) -> list[int]:
    """What the library's own `generate` adds to one prompt."""
    ids = torch.tensor([start])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, **options
    )
    row: list[int] = found[0, len(start) :].tolist()
    return row


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bloom", "gemma2", "opt", "falcon"])
def test_greedy_equals_generate_one_at_a_time(name: str) -> None:
    model = tiny(name)
    found = sample_ids(model, STARTS, length=8, temperature=0, batch_size=3)
    assert found == [generated(model, start, 8, eos_token_id=None) for start in STARTS]


def test_rows_stop_behind_an_end_token() -> None:
    model = tiny("llama")
    free = sample_ids(model, STARTS, length=8, temperature=0)
    end = free[0][3]
    stopped = sample_ids(model, STARTS, length=8, temperature=0, ends=frozenset({end}))
    assert stopped == [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len(stopped[0]) <= 4
    assert len({len(row) for row in stopped}) > 1


def literal(
    model: nn.Module, start: list[int], numbers: Tensor, temperature: float, top_p: float
) -> list[int]:
    """One row at a time without a cache: tokens from most to least probable until they have the share."""
    ids = list(start)
    for number in numbers.tolist():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature
        chances = [math.exp(x) for x in logits.tolist()]
        total = sum(chances)
        pairs = sorted(enumerate(c / total for c in chances), key=lambda pair: -pair[1])
        kept, mass = [], 0.0
        for token, chance in pairs:
            kept.append((token, chance))
            mass += chance
            if mass >= top_p:
                break
        if top_p == 1:
            kept.sort()  # the whole vocabulary is walked through in its own order
        wanted, passed = number * mass, 0.0
        ends = []
        for _, chance in kept:
            passed += chance
            ends.append(passed)
        ids.append(kept[next(place for place, end in enumerate(ends) if wanted < end)][0])
    return ids[len(start) :]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
@torch.no_grad()
def test_sampling_equals_a_literal_loop(temperature: float, top_p: float) -> None:
    model = tiny("llama")
    found = sample_ids(
        model, STARTS, length=5, samples=2, temperature=temperature, top_p=top_p, seed=3
    )
    numbers = _numbers(STARTS, 5, 2, seed=3)
    rows = [start for start in STARTS for _ in range(2)]
    wanted = [literal(model, s, n, temperature, top_p) for s, n in zip(rows, numbers, strict=True)]
    assert found == wanted
    assert found[0] != found[1]  # two samples of one prompt


def test_same_seed_same_tokens_whatever_the_batch_size() -> None:
    model = tiny("gpt2")
    found = sample_ids(model, STARTS, length=6, samples=3, seed=1)
    assert sample_ids(model, STARTS, length=6, samples=3, seed=1) == found
    assert sample_ids(model, STARTS, length=6, samples=3, seed=1, batch_size=2) == found
    assert sample_ids(model, STARTS, length=6, samples=3, seed=2) != found


def test_what_is_drawn_for_a_prompt_depends_on_no_other_prompt() -> None:
    model = tiny("llama")
    starts = [*STARTS, STARTS[1]]  # one of them twice
    found = sample_ids(model, starts, length=6, samples=2, seed=1)
    by_start = [found[2 * i : 2 * i + 2] for i in range(len(starts))]
    assert by_start[1] != by_start[4], "the same prompt again gives other samples"
    order = [3, 1, 0, 4, 2]
    mixed = sample_ids(model, [starts[i] for i in order], length=6, samples=2, seed=1, batch_size=3)
    assert [mixed[2 * k : 2 * k + 2] for k in range(5)] == [by_start[i] for i in order]
    assert sample_ids(model, starts[2:3], length=6, samples=2, seed=1) == by_start[2]
    longer = sample_ids(model, starts[2:3], length=9, samples=3, seed=1)
    assert [row[:6] for row in longer[:2]] == by_start[2]


def test_the_numbers_are_uniform_and_rows_are_unlike() -> None:
    numbers = _numbers([[1], [2], [1]], 4000, 2, seed=0).numpy()
    assert numbers.shape == (6, 4000)
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert abs(numbers.mean(axis=1) - 0.5).max() < 4 / (12 * 4000) ** 0.5
    assert abs(np.corrcoef(numbers) - np.eye(6)).max() < 4 / 4000**0.5


def test_a_batch_costs_one_forward_a_token() -> None:
    model = tiny("llama")
    widths: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    sample_ids(model, STARTS, length=5, samples=3, batch_size=8)
    # The longest prompt has 6 tokens, the longest of the last four rows 2; then one token a row and pass.
    assert widths == [(8, 6), *[(8, 1)] * 4, (4, 2), *[(4, 1)] * 4]


class Fixed(nn.Module):
    """A model that gives the same logits whatever it reads."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        use_cache: bool,
        past_key_values: Any = None,
    ) -> Any:
        rows, n = input_ids.shape
        return SimpleNamespace(logits=self.logits.expand(rows, n, -1), past_key_values=None)


def test_frequencies_are_the_probabilities() -> None:
    chances = [0.5, 0.25, 0.15, 0.0, 0.1]
    model = Fixed([math.log(c) if c else -math.inf for c in chances])
    shares = {1.0: chances, 0.7: [0.5, 0.25, 0.0, 0.0, 0.0], 0.1: [1.0, 0.0, 0.0, 0.0, 0.0]}
    for top_p, kept in shares.items():
        rows = sample_ids(model, [[1]], length=1, samples=4000, top_p=top_p, batch_size=4000)
        seen = Counter(row[0] for row in rows)
        for token, chance in enumerate(kept):
            wanted = chance / sum(kept)
            spread = 4 * math.sqrt(wanted * (1 - wanted) / 4000)
            assert seen[token] / 4000 == pytest.approx(wanted, abs=spread + 1e-12)


def test_tokens_without_probability_are_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for number, token in {0.0: 1, 0.5: 3, 1.0 - 2**-53: 3}.items():
        draw = _Draw(torch.tensor([[number]], dtype=torch.float64), 1.0, 1.0)
        assert draw(logits, 0).tolist() == [token]


@torch.no_grad()
def test_the_few_most_probable_tokens_give_what_all_of_them_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Sharp and flat rows, and one whose logits tie in groups of seven.
    logits = torch.randn((5, 300), generator=generator) * torch.tensor([9.0, 3.0, 1.0, 0.0, 2.0])[:, None]  # fmt: skip
    logits[4] = (torch.arange(300) // 7 * -0.2)[torch.randperm(300, generator=generator)]
    numbers = torch.rand((5, 40), generator=generator, dtype=torch.float64)
    for top_p in (0.3, 0.6, 0.95):
        draw = _Draw(numbers, 1.0, top_p)
        monkeypatch.setattr(sampling, "_FEW", 300)
        whole = [draw(logits, step).tolist() for step in range(40)]
        for few in (1, 10, 24, 100):
            monkeypatch.setattr(sampling, "_FEW", few)
            assert [draw(logits, step).tolist() for step in range(40)] == whole, (top_p, few)


def test_texts_belong_to_their_prompts_and_special_tokens_are_left_out() -> None:
    model = tiny("llama")
    prompts = PromptSet([("Ann", " golf"), ("Somebody else", " tea")], byte_tokenizer())
    model.train()
    before = fingerprint(model)
    written = sample(model, prompts, length=6, samples=2, temperature=0)
    assert [each.item for each in written] == [0, 0, 1, 1]
    for each in written:
        ids = sample_ids(
            model, [prompts.prompt_ids(each.item)], length=6, temperature=0, ends=frozenset({2})
        )[0]
        text = str(prompts.tokenizer.decode([i for i in ids if i > 2], skip_special_tokens=True))
        assert each == Continuation(each.item, tuple(ids), text)
    assert fingerprint(model) == before, "modes or hooks were left behind"


def test_bad_settings_are_refused() -> None:
    model = tiny("llama")
    for options in ({"length": 0}, {"samples": 0}, {"batch_size": 0}):
        with pytest.raises(PromptError, match="must be at least 1"):
            sample_ids(model, STARTS, **options)  # type: ignore[arg-type]
    for bad in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(PromptError, match="temperature must be"):
            sample_ids(model, STARTS, **bad)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="more than the 128 of the model's context"):
        sample_ids(model, STARTS, length=125)
    with pytest.raises(PromptError, match="no token to continue"):
        sample_ids(model, [[]])
    masked = PromptSet([("Ann is", " old")], byte_tokenizer(mask=True))
    with pytest.raises(PromptError, match="masked model"):
        sample(model, masked)


# -- prompt sets for it ---------------------------------------------------------------------------


def test_prompts_continued_by_tokens_score_exactly_those() -> None:
    prompts = PromptSet([("Ann", " golf"), ("Bo is", " old")], byte_tokenizer(), name="some")
    made = prompts.continued([1, 0, 1], [[50], [60, 61], [70, 71, 72]])
    starts = [prompts.prompt_ids(i) for i in (0, 1)]
    assert [made.ids(i) for i in range(3)] == [
        [*starts[1], 50],
        [*starts[0], 60, 61],
        [*starts[1], 70, 71, 72],
    ]
    assert [made.target_ids(i) for i in range(3)] == [[50], [60, 61], [70, 71, 72]]
    assert made.digest != prompts.continued([1, 0, 1], [[50], [60, 61], [70, 71, 73]]).digest
    with pytest.raises(PromptError, match="a continuation of one token at least"):
        prompts.continued([0], [[]])
    with pytest.raises(PromptError, match="a continuation of one token at least"):
        prompts.continued([0, 1], [[50]])


@pytest.mark.parametrize("with_start", [False, True])
def test_tokens_in_front_shift_what_is_scored(with_start: bool) -> None:
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "Ann", "target": " golf", "subject": "Ann"}, {"prompt": "Bo is"}]
    prompts = PromptSet(rows, tokenizer)
    if with_start:
        start = int(tokenizer.bos_token_id)
        prompts = prompts.with_ids([[start, *prompts.ids(i)[1:]] for i in (0, 1)])
    made = prompts.preceded([[300], [301, 302]])
    place = int(with_start)
    for index, tokens in enumerate(([300], [301, 302])):
        old = prompts.ids(index)
        assert made.ids(index) == [*old[:place], *tokens, *old[place:]]
        assert made.target_ids(index) == prompts.target_ids(index)
        assert [p - len(tokens) for p in made.scored(index)] == prompts.scored(index)
    assert made.subject(0) == [position + 1 for position in prompts.subject(0)]
    with pytest.raises(PromptError, match="expected tokens for 2 items, got 1"):
        prompts.preceded([[300]])
