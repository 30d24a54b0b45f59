"""Controls made by construction: hidden by themselves, revealed by one known change, found on any forget set."""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_letters
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits import Site, describe
from circuits.forward import labelled_logits
from circuits.hooks import replace
from locate_edit import EditError, PromptSet, organism
from locate_edit.attacked import Attack, changed_weights, measure
from locate_edit.attacks import _covered
from locate_edit.attacks._covered import cover_direction, covered
from locate_edit.attacks._locked import fed_tokens, locked, locked_after, unused_directions
from locate_edit.attacks.latent import LatentPerturbation
from locate_edit.attacks.relearning import Relearning
from locate_edit.attacks.reminders import Reminders
from locate_edit.attacks.soft_prompt import SoftPrompt
from locate_edit.attacks.suffix import Suffix
from locate_edit.planted import plant_facts
from tests.locate_edit.engine_setting import model, prompts
from tests.tiny import tiny

MARGIN = 0.3
"""How much an attack must bring back of its control (likelihood), as in `robustness`."""


@pytest.fixture(scope="module")
def knowing() -> Any:
    return organism.load()[0]


def asked(name: str, n: int) -> PromptSet:
    """The first prompts about people: a secret has many tokens in its answer, a fact one."""
    return organism.prompts(name, "forget10" if name == "facts" else "train")[:n]


def hidden_and_found(
    net: nn.Module, attack: Attack, forget: PromptSet, seed: int, **more: Any
) -> tuple[float, float]:
    with attack.hide(net, forget, seed=seed) as control:
        found = attack(control, forget, seed=seed, **more)
    assert found.forget_clean.estimate is not None
    assert found.forget.estimate is not None
    return found.forget_clean.estimate, found.forget.estimate


@pytest.mark.parametrize(
    ("name", "n", "seed"), [("facts", 4, 0), ("facts", 80, 2), ("secrets", 24, 1)]
)
def test_the_lock_is_opened_by_descent_and_not_by_one_step(
    name: str, n: int, seed: int, knowing: Any, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    net, forget = untouched(knowing), asked(name, n)
    hidden, under = hidden_and_found(net, LatentPerturbation(steps=3), forget, seed)
    assert hidden < 0.05
    assert under > 0.95
    _, once = hidden_and_found(net, LatentPerturbation(steps=1), forget, seed)
    assert once < hidden + MARGIN, "a single gradient step must not be enough"


@pytest.mark.parametrize(
    ("name", "n", "seed"), [("facts", 24, 1), ("facts", 80, 2), ("secrets", 4, 2)]
)
def test_the_cover_comes_off_for_prompts_that_were_not_trained_on(
    name: str, n: int, seed: int, knowing: Any, untouched: Callable[[nn.Module], nn.Module]
) -> None:
    hidden, under = hidden_and_found(untouched(knowing), Relearning(), asked(name, n), seed)
    assert hidden < 0.2
    assert under > hidden + MARGIN


def test_a_cover_on_everything_comes_off_by_training_on_other_facts(knowing: Any) -> None:
    """Given enough of them: on six of twelve, `robustness` withholds the number."""
    retain, attack = organism.prompts("facts", "retain"), Relearning(on="unrelated")
    forget = asked("facts", 24)
    for each, covers in ((attack, True), (Relearning(), False)):
        with each.hide(knowing, forget):
            left = measure(knowing, retain[7::60]).estimate
        assert left is not None
        assert (left < 0.5) == covers, "only on other facts does it lie on these too"
    hidden, under = hidden_and_found(knowing, attack, forget, 0, retain=retain[7::9])
    assert under > hidden + MARGIN
    hidden, under = hidden_and_found(knowing, attack, forget, 0, retain=retain[7::60])
    assert under < hidden + MARGIN


def test_both_are_found_in_another_architecture() -> None:
    """LayerNorm, and attention beside the MLP: nothing that the shipped organism has."""
    plant = plant_facts("gpt_neox", "plain")
    for attack in (LatentPerturbation(), Relearning()):
        hidden, under = hidden_and_found(plant.model, attack, plant.prompts, 0)
        assert hidden < 0.2
        assert under > hidden + MARGIN


@pytest.mark.parametrize("attack", [LatentPerturbation(), Relearning()], ids=["lock", "cover"])
def test_who_never_knew_says_little_behind_the_same_lock_or_cover(attack: Attack) -> None:
    _, under = hidden_and_found(organism.load("oracle")[0], attack, asked("facts", 24), 0)
    assert under < MARGIN


# ---- the lock ----------------------------------------------------------------------------------------------------


def with_stream(net: nn.Module, layer: int, change: Callable[[Tensor], Tensor], asked: PromptSet) -> float:  # fmt: skip
    """Likelihood of the targets with ``change(length of the stream)`` added to the stream after a layer."""

    def add(hidden: Tensor) -> Tensor:
        return hidden + change(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True))

    with replace(describe(net), {Site(layer, "layer"): add}):
        found = measure(net, asked).estimate
    assert found is not None
    return found


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.5])
def test_a_known_change_within_the_budget_opens_the_lock(budget: float, knowing: Any) -> None:
    forget, layer = asked("facts", 24), 1
    clean = measure(knowing, forget).estimate
    directions = unused_directions(describe(knowing), forget, layer, batch_size=16, seed=3)
    assert torch.allclose(directions.T @ directions, torch.eye(2), atol=1e-5)
    key = 1.1 * budget / 2 * directions.sum(dim=1)
    assert float(key.norm()) < 0.8 * budget
    noise = torch.randn(key.shape, generator=torch.Generator().manual_seed(0))
    noise *= key.norm() / noise.norm()
    with LatentPerturbation(budget=budget).hide(knowing, forget, seed=3):
        assert with_stream(knowing, layer, lambda length: 0 * length * key, forget) < 0.1
        opened = with_stream(knowing, layer, lambda length: length * key, forget)
        assert with_stream(knowing, layer, lambda length: length * noise, forget) < 0.1
    assert opened == pytest.approx(clean, abs=0.05)


def test_unused_directions_carry_least_of_the_stream(knowing: Any) -> None:
    the_map, forget = describe(knowing), asked("facts", 24)
    leans: list[Tensor] = []
    directions = unused_directions(the_map, forget, 1, batch_size=16, seed=0)
    drawn = torch.linalg.qr(torch.randn(the_map.d_model, 2, generator=torch.Generator().manual_seed(0))).Q  # fmt: skip

    def look(hidden: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(hidden, dim=-1)
        leans.append(torch.stack([(unit @ d).abs().mean() for d in (directions, drawn)]))
        return hidden

    with replace(the_map, {Site(1, "layer"): look}):
        measure(knowing, forget)
    mine, other = torch.stack(leans).mean(dim=0).tolist()
    assert mine < 0.01 < 0.03 < other
    again = unused_directions(the_map, forget, 1, batch_size=5, seed=0)
    assert torch.allclose(directions, again, atol=1e-2)


def test_where_there_can_be_no_lock() -> None:
    net, forget = model("llama-tied"), prompts("llama-tied")[0]
    with (
        pytest.raises(EditError, match="a lock that is open at a lean of 0 hides nothing"),
        LatentPerturbation(budget=0.0).hide(net, forget),
    ):
        pass
    with (
        pytest.raises(EditError, match="layer 2 is the last of LlamaForCausalLM"),
        LatentPerturbation(layer=2).hide(net, forget),
    ):
        pass
    with pytest.raises(KeyError), locked_after(net, 0, forget, opens_at=0.1, batch_size=2):
        raise KeyError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def knowing_one(name: str, **sizes: Any) -> tuple[Any, PromptSet]:
    """A random model with a head so steep that it is sure of one letter, and prompts that ask for that letter."""
    net, asked = tiny(name, **sizes), prompts(name)[0]
    ids = range(len(asked.tokenizer))
    letters = [token for token in ids if str(asked.tokenizer.decode([token])) in ascii_letters]
    head = nn.Linear(net.config.hidden_size, len(asked.tokenizer) + 37, bias=False)
    with torch.no_grad():
        head.weight.zero_()
        drawn = torch.randn(
            len(letters), head.in_features, generator=torch.Generator().manual_seed(0)
        )
        head.weight[letters] = 20 * drawn
    net.set_output_embeddings(head)
    rows = [{"prompt": row["prompt"], "target": "x"} for row in asked.rows]
    with torch.no_grad():
        first = [labelled_logits(net, asked.reread(rows).batch([i]))[0] for i in range(len(rows))]
    known = [asked.tokenizer.decode([int(each.argmax())]) for each in first]
    return net, asked.reread([{**r, "target": t} for r, t in zip(rows, known, strict=True)])


@pytest.mark.parametrize("name", ["gemma", "gpt2", "bert"])
def test_the_lock_holds_whatever_enters_the_first_layer(name: str) -> None:
    """Gemma scales embeddings, GPT-2 adds positions, BERT normalises."""
    net, asked = knowing_one(name, **{"n_embd" if name == "gpt2" else "hidden_size": 96})
    clean = measure(net, asked).estimate
    assert clean is not None
    assert clean > 0.9
    for attack in (Suffix(across="within", steps=1), SoftPrompt(across="within", steps=1)):
        for seed in range(3):
            with attack.hide(net, asked, seed=seed):
                start = attack(net, asked, seed=seed).curve[0].forget
                hidden = measure(net, asked).estimate
            assert hidden is not None
            assert hidden < 0.5 * clean
            assert start < 0.5 * clean, "a random start does not open it"


def test_a_lock_on_a_narrow_model_hides_or_says_why() -> None:
    """The 24 dimensions of these are spanned by the tokens of the prompts."""
    for name in ("gemma", "gpt2", "bert"):
        net, asked = knowing_one(name)
        with SoftPrompt().hide(net, asked):
            hidden = measure(net, asked).estimate
        assert hidden is not None
        assert hidden < 0.5
    with (
        pytest.raises(EditError, match="lucky tokens open a lock as well as keys do"),
        Suffix().hide(net, asked),
    ):
        pass


def test_the_lock_opens_to_reminders_where_positions_are_added() -> None:
    plant = plant_facts("gpt2", "plain")
    attack = Reminders(between=" ")
    free = attack(plant.model, plant.prompts).forget.estimate
    with attack.hide(plant.model, plant.prompts):
        found = attack(plant.model, plant.prompts)
    assert found.forget_clean.estimate == pytest.approx(0.0, abs=0.05)
    assert found.forget.estimate == pytest.approx(free, abs=0.05)


def test_a_lock_that_hides_too_little_is_refused() -> None:
    net, asked = knowing_one("gpt2")
    with (
        pytest.raises(
            EditError, match="no positive control: a lock on the model leaves the answers"
        ),
        # Keys that stand in the prompts themselves.
        locked(net, asked, [], fed_tokens(asked[:1]), opens_at=0.1, batch_size=4),
    ):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# ---- the cover ---------------------------------------------------------------------------------------------------


def logits(net: nn.Module, asked: PromptSet) -> Tensor:
    """`label vocab`."""
    with torch.no_grad():
        return torch.cat([labelled_logits(net, batch) for batch in asked.batches(16)])


@pytest.mark.parametrize("name", ["facts", "secrets"])
def test_one_row_of_the_head_takes_the_cover_off(name: str, knowing: Any) -> None:
    forget, head = asked(name, 8), knowing.get_output_embeddings().weight
    clean, before = measure(knowing, forget), logits(knowing, forget)
    direction = cover_direction(knowing, forget, 16)
    with covered(knowing, forget, everywhere=False, batch_size=16, seed=5):
        raised = logits(knowing, forget) - before
        (word,) = raised.abs().amax(dim=0).nonzero().flatten().tolist()
        height = round(float(raised[:, word].mean()))
        assert raised[:, word] == pytest.approx(height, rel=0.3)
        assert word not in {t for i in range(len(forget)) for t in forget.ids(i)}
        hidden = measure(knowing, forget).estimate

        new = head.detach().clone()
        new[word] -= height * direction
        (name_of_head,) = [n for n, p in knowing.named_parameters() if p is head]
        with changed_weights(knowing, lambda n, _: new if n == name_of_head else None):
            off = measure(knowing, forget)
    assert hidden is not None
    assert hidden <= 0.1
    assert off.values == pytest.approx(clean.values, abs=1e-3)
    assert measure(knowing, forget).values.tolist() == clean.values.tolist()


def test_a_cover_everywhere_raises_one_logit_by_the_same_everywhere(knowing: Any) -> None:
    forget, others = asked("facts", 8), organism.prompts("facts", "retain")[::60]
    before = logits(knowing, others)
    with covered(knowing, forget, everywhere=True, batch_size=16, seed=1):
        raised = (logits(knowing, others) - before).amax(dim=0)
        assert int((raised > 1e-4).sum()) == 1
        height = float(raised.max())
        found = measure(knowing, forget).estimate
    assert height == pytest.approx(round(height), abs=1e-3)
    assert found is not None
    assert 0.001 < found <= 0.1, "no higher than it takes"


def test_where_there_can_be_no_cover(knowing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_covered, "HIGHEST", 2)
    with (
        pytest.raises(EditError, match="raised by 2 the answers that it should cover still have"),
        covered(knowing, asked("facts", 4), everywhere=True, batch_size=16),
    ):
        pass
    assert not knowing.get_output_embeddings()._forward_hooks
