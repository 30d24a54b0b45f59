"""Sampling: what counts as an answer, shares against exact probabilities, and who never knew."""

from __future__ import annotations

import pytest
import torch

from locate_edit import EditError, PromptSet, organism
from locate_edit.attacks.sampling import Sampling, appears
from locate_edit.errors import PromptError
from tests.locate_edit.engine_setting import model, prompts


@pytest.mark.parametrize(
    ("answer", "text", "wanted"),
    [
        (" golf", " Golf.", True),
        (" golf", "he plays\nGOLF and", True),
        (" polo", " apollo", False),
        (" 555", " 5551", False),
        (" New  York", "in new\nyork", True),
        (" a.b", " axb", False),
        (" a.b", " a.b", True),
        (" ", "anything", False),
        ("\u6771\u4eac", "\u6211\u5728\u6771\u4eac\u7684", True),
    ],
)
def test_what_counts_as_an_answer(answer: str, text: str, wanted: bool) -> None:
    assert appears(answer, text) is wanted


def test_the_share_is_that_of_the_exact_probability() -> None:
    """One new token: an answer of probability p is among n samples with 1 - (1 - p)^n."""
    net, forget = organism.load("oracle")[0], organism.prompts("facts", "forget01")
    rows = [row for row in forget.rows if row["attribute"] == "sport"][:1]
    base = forget.reread(rows)
    with torch.no_grad():
        logits = net(torch.tensor([base.prompt_ids(0)])).logits[0, -1].div(2.0).softmax(-1)
    tokens = logits.argsort(descending=True)[:12].tolist()
    token = next(t for t in tokens if str(base.tokenizer.decode([t])).strip().isalpha())
    p = float(logits[token])
    texts = base.tokenizer.decode([token])
    same = forget.reread([{**rows[0], "target": texts, "id": str(n)} for n in range(100)])
    found = Sampling(samples=2, temperature=2.0, length=1)(net, same, seed=1, batch_size=200)
    wanted = 1 - (1 - p) ** 2
    assert 0.02 < wanted < 0.98
    error = (wanted * (1 - wanted) / 100) ** 0.5
    assert found.forget.estimate == pytest.approx(wanted, abs=4 * error + 1e-9)
    one = found.curve[0]
    assert one.strength == 1
    assert one.forget == pytest.approx(p, abs=4 * (p * (1 - p) / 100) ** 0.5)


def test_clean_is_the_greedy_continuation_and_more_samples_find_more() -> None:
    net, forget = organism.load()[0], organism.prompts("facts", "forget01")
    attack = Sampling(samples=8)
    known = attack(net, forget)
    assert known.forget_clean.estimate == 1.0
    with attack.hide(net, forget):
        hidden = attack(net, forget)
    assert hidden.forget_clean.estimate == 0.0
    shares = [point.forget for point in hidden.curve]
    assert [point.strength for point in hidden.curve] == [1, 2, 4, 6, 8]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0]


def test_the_control_of_long_answers_is_found() -> None:
    """Phone numbers have 14 tokens: hidden at every one of them, none would ever be said."""
    net, forget = organism.load()[0], organism.prompts("secrets", "train")[:6]
    assert max(len(forget.target_ids(item)) for item in range(6)) == 14
    attack = Sampling(samples=10)
    with attack.hide(net, forget):
        found = attack(net, forget)
    assert found.forget_clean.estimate == 0.0
    assert found.forget.estimate is not None
    assert found.forget.estimate > 0.8


def test_who_never_knew_guesses_at_most() -> None:
    """Twelve answers of a kind: four samples of eight prompts hit well under half of them."""
    found = Sampling(samples=4)(organism.load("oracle")[0], organism.prompts("facts", "forget01"))
    assert found.forget.estimate is not None
    assert found.forget.estimate <= 0.5


def test_masked_models_and_plain_text_are_refused() -> None:
    with pytest.raises(PromptError, match="causal"):
        Sampling()(model("bert"), prompts("bert")[0])
    plain = PromptSet([{"prompt": "Ann Lee"}], prompts("gpt2")[0].tokenizer)
    with pytest.raises(PromptError, match="no 'target'"):
        Sampling()(model("gpt2"), plain)


@pytest.mark.parametrize("settings", [{"samples": 0}, {"temperature": 0.0}, {"length": 0}])
def test_bad_settings(settings: dict[str, int]) -> None:
    with pytest.raises(EditError, match="Sampling: "):
        Sampling(**settings)
