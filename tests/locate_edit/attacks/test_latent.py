"""The latent attack: a literal descent, its budget, padding, and what it finds in who never knew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuits import Site, capture, describe
from circuits.hooks import replace
from locate_edit import EditError, organism
from locate_edit.attacks import latent
from locate_edit.attacks.latent import LatentPerturbation, moved
from tests.locate_edit.engine_setting import model, prompts


def test_a_step_by_hand() -> None:
    place = torch.tensor([[0.0, 0.0], [0.6, 0.0], [0.3, 0.4]])
    gradient = torch.tensor([[3.0, -4.0], [-2.0, 0.0], [0.0, 0.0]])
    wanted = torch.tensor([[-0.3, 0.4], [1.0, 0.0], [0.3, 0.4]])
    # half a budget against the gradient; 0.6 + 0.5 is cut to 1; without gradient nothing moves
    assert torch.allclose(moved(place, gradient, 0.5), wanted)


def test_it_is_the_literal_descent_of_a_single_prompt() -> None:
    """One prompt, plain code: hook the layer, descend on the target's loss, keep the best."""
    net, forget = model("llama-tied").eval(), prompts("llama-tied")[0].select([1])
    layer, budget, steps = 1, 0.3, 3
    found = LatentPerturbation(layer=layer, budget=budget, steps=steps, step=0.5)(net, forget)

    ids, scored = torch.tensor([forget.ids(0)]), forget.scored(0)
    delta = torch.zeros(1, ids.shape[1], 24)
    with torch.no_grad(), capture(describe(net), [Site(layer, "layer")]) as acts:
        net(ids)
    radius = budget * acts[Site(layer, "layer")].norm(dim=-1, keepdim=True)
    best = []
    for _ in range(steps + 1):
        delta.requires_grad_()
        block = net.model.layers[layer]
        handle = block.register_forward_hook(lambda _m, _a, out, d=delta: out + d)
        logits = net(ids).logits[0].log_softmax(-1)
        handle.remove()
        loss = -torch.stack([logits[p - 1, ids[0, p]] for p in scored]).mean()
        best.append(float((-loss).exp().detach()))
        (gradient,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            for t in range(ids.shape[1]):
                if float(gradient[0, t].norm()) > 0:
                    delta[0, t] -= 0.5 * radius[0, t] * gradient[0, t] / gradient[0, t].norm()
                longest = float(radius[0, t])
                if float(delta[0, t].detach().norm()) > longest:
                    delta[0, t] *= longest / delta[0, t].norm()
        delta = delta.detach()
    assert [point.forget for point in found.curve] == pytest.approx(
        [max(best[: n + 1]) for n in range(steps + 1)], rel=1e-4
    )
    assert best[-1] > 1.05 * best[0]


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
def test_padding_is_left_alone_and_the_budget_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, forget = model(name), prompts(name)[0]
    changes: list[tuple[Tensor, Tensor]] = []

    def watched(model_map, given):  # type: ignore[no-untyped-def]
        ((site, change),) = given.items()

        def seen(hidden: Tensor) -> Tensor:
            new: Tensor = change(hidden)
            changes.append((hidden.detach().norm(dim=-1), (new - hidden).detach().norm(dim=-1)))
            return new

        return replace(model_map, {site: seen})

    monkeypatch.setattr(latent, "replace", watched)
    rows = LatentPerturbation(budget=0.3, steps=4)
    rows._by_step(describe(net), forget, 1, batch_size=100)
    (batch,) = forget.batches(100)
    real = batch.attention_mask.bool()
    assert not bool(real.all())
    assert len(changes) == 5
    for length, change in changes:
        assert bool((change[~real] == 0).all())
        assert bool((change <= 0.3 * length * 1.0001).all())
    assert float((changes[-1][1] / changes[-1][0])[real].max()) > 0.29


def test_without_budget_nothing_changes_and_batches_do_not_matter() -> None:
    net, forget = model("llama-tied"), prompts("llama-tied")[0]
    still = LatentPerturbation(budget=0.0)(net, forget)
    assert still.gain == pytest.approx(0.0, abs=1e-9)
    one, all_ = (LatentPerturbation(steps=3)(net, forget, batch_size=n) for n in (1, 16))
    assert one.forget.values == pytest.approx(all_.forget.values, rel=1e-3)


def test_at_the_default_budget_who_never_knew_gains_too_and_who_hides_gains_more() -> None:
    """The same attack on both: what it writes into the oracle, towards right and wrong answers, is no small thing."""
    forget = organism.prompts("facts", "forget01")
    attack = LatentPerturbation()
    net, oracle = organism.load()[0], organism.load("oracle")[0]
    never = attack(oracle, forget)
    with attack.hide(net, forget):
        hidden = attack(net, forget)
    assert never.gain is not None
    assert 0.2 < never.gain < 0.6, "so a gain of this size alone says nothing"
    for found in (never, hidden):
        wrong = found.notes
        rise = wrong["forget wrong"] - wrong["forget wrong clean"]
        assert wrong["forget wrong gain"] == pytest.approx(rise)
    assert 0.1 < never.notes["forget wrong gain"] < never.gain, "and wrong answers are no bound"
    assert hidden.gain is not None
    assert hidden.gain > never.gain + 0.3
    assert hidden.notes["forget wrong gain"] < 0.1


def test_wrong_answers_by_hand() -> None:
    net, forget = model("llama-tied"), prompts("llama-tied")[0]
    attack = LatentPerturbation(steps=2)
    rows = [{"prompt": r["prompt"], "target": r["wrong"][0]} for r in forget.rows]
    wanted = attack(net, forget.reread(rows))
    notes = attack(net, forget).notes
    assert notes["forget wrong"] == pytest.approx(wanted.forget.estimate)
    assert notes["forget wrong clean"] == pytest.approx(wanted.forget_clean.estimate)


@pytest.mark.parametrize(
    "settings", [{"budget": -0.1}, {"steps": 0}, {"step": 0.0}], ids=lambda s: next(iter(s))
)
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(EditError, match=r"LatentPerturbation: .* must be"):
        LatentPerturbation(**settings)  # type: ignore[arg-type]


def test_no_such_layer() -> None:
    with pytest.raises(EditError, match="has 0 to 2"):
        LatentPerturbation(layer=3)(model("llama-tied"), prompts("llama-tied")[0])
