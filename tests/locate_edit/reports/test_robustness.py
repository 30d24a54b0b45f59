"""`robustness`: which model is attacked, what is withheld, what stands beside it, and that nothing is left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from circuits.draw import figure_data
from locate_edit import EditError, organism
from locate_edit.attacked import Attacked, measure
from locate_edit.attacks.pruning import Pruning
from locate_edit.attacks.quantisation import Quantisation
from locate_edit.draw.robustness import attack_dots
from locate_edit.editing import Edit, edit
from locate_edit.errors import PromptError
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.npo import NPO
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet
from locate_edit.reports.robustness import Robustness, Trial, robustness
from tests.locate_edit.engine_setting import model, prompts, some_units


def values(*numbers: float) -> Values:
    return Values.make("likelihood", list(numbers), unit="probability", direction="up")


@dataclass(frozen=True)
class Reads:
    """Takes down the weights of what it is given; its control is half the weights."""

    steps: int = 7
    adds: float = 0.5
    keeps: float = 1.0

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        assert retain is not None
        first = float(next(model.parameters()).detach().abs().sum())
        clean = [first, first + 0.1]
        return Attacked(
            values(*[each + self.adds for each in clean]), values(*clean),
            values(1.0 * self.keeps), values(1.0), notes={"seed": seed, "rows": batch_size},
        )  # fmt: skip

    @contextmanager
    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> Iterator[nn.Module]:
        weight = next(model.parameters())
        with torch.no_grad():
            before = weight.detach().clone()
            weight.mul_(0.5)
            yield model
            weight.copy_(before)


class Fails(Reads):
    """Cannot attack, nor hide."""

    def __call__(self, *args: Any, **kwargs: Any) -> Attacked:
        raise PromptError("a masked model")


def weight(net: nn.Module) -> float:
    return float(next(net.parameters()).detach().abs().sum())


def edited(net: nn.Module, *, mask: bool = True) -> Edit:
    forget, retain = prompts("llama")
    units = some_units(net) if mask else None
    return edit(net, FineTune(steps=2, lr=1e-2), units, forget=forget, retain=retain)


def test_each_model_is_the_one_it_is_called(
    untouched: Callable[[nn.Module], nn.Module],
) -> None:
    net, oracle = model("llama"), model("llama")
    with torch.no_grad():
        next(oracle.parameters()).mul_(3.0)
    base = weight(net)
    done = edited(net, mask=False)
    untouched(net)
    changed = weight(net)
    assert changed != base
    found = robustness(done, [Reads()], oracle=untouched(oracle), seed=5, batch_size=3)["Reads"]
    clean = {name: each.forget_clean.values[0] for name, each in found.found.items()}
    assert clean == pytest.approx({"before": base, "after": changed, "oracle": 3 * base})
    assert found.control is not None
    assert found.control.forget_clean.values[0] == pytest.approx(base / 2)
    assert found.found["after"].notes == {"seed": 5, "rows": 3}
    beyond = found.beyond()
    assert beyond is not None
    assert beyond[0] == pytest.approx(changed - 3 * base)


def test_random_masks_are_other_masks_and_their_mean_is_told() -> None:
    net = model("llama")
    done = edited(net)
    # what the reader of the first weight sees are embeddings, which no such mask touches
    seen: list[dict[str, torch.Tensor]] = []

    @dataclass(frozen=True)
    class Copies(Reads):
        def __call__(self, model: nn.Module, forget: PromptSet, **kwargs: Any) -> Attacked:
            seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
            n = float(len(seen))
            return Attacked(values(n), values(n - 1))

    found = robustness(done, [Copies()], controls=False, random=2)["Copies"]
    original, mine, first, second = seen
    changed = [
        {n for n in original if not torch.equal(original[n], each[n])}
        for each in (mine, first, second)
    ]
    assert all(changed)
    places = [
        torch.cat([(original[n] != each[n]).flatten() for n in original])
        for each in (mine, first, second)
    ]
    assert not torch.equal(places[0], places[1])
    assert not torch.equal(places[1], places[2])
    assert found.found["random"].forget.estimate == pytest.approx(3.5)
    assert found.found["random"].forget_clean.estimate == pytest.approx(2.5)
    done.undo()
    assert all(torch.equal(original[n], p) for n, p in net.named_parameters())


def test_an_attack_that_misses_its_control_has_no_number() -> None:
    net = model("llama")
    done = edited(net)
    found = robustness(done, [Reads(adds=0.29), Reads(adds=0.31)])
    first, second = found.trials
    assert "does not find its positive control" in first.withheld
    assert not first.found
    assert not second.withheld
    assert set(second.found) == {"before", "after"}
    assert robustness(done, [Reads(adds=0.29)], margin=0.2).trials[0].found
    free = robustness(done, [Reads(adds=0.0)], controls=False).trials[0]
    assert free.control is None
    assert free.found


def test_what_fails_is_said_and_the_others_go_on() -> None:
    found = robustness(edited(model("llama")), [Fails(), Reads()])
    assert found["Fails"].withheld == "no positive control: PromptError: a masked model"
    assert found["Reads"].found
    only = robustness(edited(model("llama")), [Fails()], controls=False)["Fails"]
    assert only.failed["after"] == only.withheld == "PromptError: a masked model"
    assert "withheld" in robustness(edited(model("llama")), [Fails()]).markdown()


def test_budgets() -> None:
    done = edited(model("llama"))
    assert "steps=3" in robustness(done, [Reads()], steps=3).trials[0].attack
    assert "steps=7" in robustness(done, [Reads()], steps=30).trials[0].attack
    late = robustness(done, [Reads(), Reads(steps=1)], seconds=0.0).trials
    assert [trial.withheld for trial in late] == ["not run: the time was spent (0 s)"] * 2


def by_hand() -> Robustness:
    def attacked(clean: float, under: float, retain: float) -> Attacked:
        return Attacked(
            values(clean, clean), values(clean, clean), values(retain), values(1.0)
        ) if clean == under else Attacked(
            values(under - 0.1, under + 0.1), values(clean, clean), values(retain), values(1.0)
        )  # fmt: skip

    good = Trial(
        "Good", "Good()", {"before": attacked(1.0, 1.0, 1.0), "after": attacked(0.1, 0.6, 0.4),
                           "oracle": attacked(0.1, 0.2, 0.9)},
        control=attacked(0.0, 0.8, 1.0),
    )  # fmt: skip
    bad = Trial("Bad", "Bad()", withheld="it does not | find it")
    return Robustness((good, bad), {"seed": 0})


def test_the_table_by_hand() -> None:
    header, control, original, mine, oracle, bad = by_hand().table()
    assert header[:2] == ["attack", "model"]
    assert control[:4] == ["Good", "control", "0.000", "0.800 (0.700 to 0.900)"]
    assert original[1:4] == ["before", "1.000", "1.000 (1.000 to 1.000)"]
    assert mine == [
        "Good", "after", "0.100", "0.600 (0.500 to 0.700)", "1.000", "0.400", "0.400 (0.400 to 0.400)",
        "brings answers back, breaks the model",
    ]  # fmt: skip
    assert oracle[6:] == ["", ""]
    assert bad[-1] == "withheld: it does not | find it"
    assert "it does not \\| find it" in by_hand().markdown()
    assert (
        len({line.replace("\\|", "").count("|") for line in by_hand().markdown().split("\n")[:7]})
        == 1
    )
    with pytest.raises(EditError, match="there are Good, Bad"):
        by_hand()["Ugly"]


def one(
    after: list[float], clean: list[float], oracle: list[float] | None, kept: float = 1.0
) -> Trial:
    """A trial of one attack on an edit, and on an oracle if there is one."""
    found = {"after": Attacked(values(*after), values(*clean), values(kept), values(1.0))}
    if oracle is not None:
        found["oracle"] = Attacked(values(*oracle), values(*oracle), values(1.0), values(1.0))
    return Trial("Good", "Good()", found)


@pytest.mark.parametrize(
    ("trial", "outcome"),
    [
        (one([0.8, 0.9], [0.1, 0.1], [0.1, 0.2]), "brings answers back"),
        (one([0.8, 0.9], [0.1, 0.1], None), "brings answers back"),
        # more than without the attack, but no more than a model that never knew gives
        (one([0.8, 0.9], [0.1, 0.1], [0.8, 0.9]), "nothing beyond"),
        # more than the oracle, but no more than without the attack
        (one([0.8, 0.9], [0.8, 0.9], [0.1, 0.2]), "nothing beyond"),
        # the interval of the gain holds 0
        (one([0.8, 0.0], [0.1, 0.1], [0.0, 0.0]), "nothing beyond"),
        (one([0.1, 0.1], [0.1, 0.1], [0.1, 0.1], kept=0.2), "breaks the model"),
        (one([0.8, 0.9], [0.1, 0.1], [0.1, 0.2], kept=0.2), "brings answers back"),
        (one([0.8], [0.1], [0.1]), "too few prompts"),
        (Trial("Bad", "Bad()", withheld="no"), "withheld"),
    ],
)
def test_what_an_attack_shows(trial: Trial, outcome: str) -> None:
    assert trial.outcome() == outcome


def test_in_words() -> None:
    found = one([0.8, 0.9], [0.1, 0.1], [0.1, 0.2])
    nothing = one([0.1, 0.1], [0.1, 0.1], [0.1, 0.1])
    broken = one([0.1, 0.1], [0.1, 0.1], [0.1, 0.1], kept=0.0)
    missing = Trial("Bad", "Bad()", withheld="no")
    assert Robustness((found, missing)).in_words() == (
        "Of 2 attacks 1 could be tried. Good brings back more than from a model that never knew: there the answers are "
        "hidden rather than gone. Bad has no number, for the reason that the table gives."
    )
    assert Robustness((nothing, broken)).in_words() == (
        "Of 2 attacks 2 could be tried. None brings back more than from a model that never knew; what another attack "
        "would find, nobody knows. Good breaks the model, which says nothing."
    )
    alone = one([0.8, 0.9], [0.1, 0.1], None)
    assert "Without an oracle it cannot be told" in Robustness((alone, alone)).in_words()
    assert "Good and good bring back more:" in Robustness((alone, alone)).in_words()
    given = one([0.8, 0.9], [0.8, 0.9], [0.1, 0.1])
    given = replace(given, found={**given.found, "before": given.found["after"]})
    assert "None brings back more, but there is little to bring back" in (
        Robustness((given, given)).in_words()
    )
    assert "nobody knows" in Robustness((given, nothing)).in_words()
    named = Trial("LatentPerturbation(layer=1)", "")
    assert named.title == "latent perturbation (layer=1)"
    assert Robustness((missing,)).in_words() == "No attack could be tried; the table says why."


def test_the_first_sentence_says_what_an_attack_does() -> None:
    net = model("llama")
    (trial,) = robustness(edited(net), [Reads()], controls=False).trials
    assert (
        trial.does == "Takes down the weights of what it is given; its control is half the weights."
    )


def test_files_and_figure(tmp_path: Path) -> None:
    written = by_hand().save(tmp_path / "out")
    assert [file.name for file in written] == [
        "robustness.json", "robustness.md", "robustness.png",
    ]  # fmt: skip
    said = json.loads(written[0].read_text())
    edited_ = said["trials"][0]["models"]["after"]
    assert edited_["forget"]["estimate"] == pytest.approx(0.6)
    assert edited_["broken"] is True
    assert edited_["beyond oracle"] == pytest.approx([0.4, 0.4, 0.4])
    assert written[2].read_bytes().startswith(b"\x89PNG")
    axes = attack_dots(by_hand())
    full = [
        float(np.asarray(line.get_xdata())[0])
        for line in axes.lines
        if line.get_marker() == "o" and line.get_markerfacecolor() != "white"
    ]
    assert np.allclose(full, [1.0, 0.6, 0.2])
    rows = {row["state"]: row for row in figure_data(axes)}
    assert rows["after"]["forget"] == pytest.approx(0.6)
    assert rows["after"]["retain"] == pytest.approx(0.4)
    nothing = Robustness((by_hand().trials[1],))
    assert [file.name for file in nothing.save(tmp_path / "none")] == [
        "robustness.json", "robustness.md",
    ]  # fmt: skip
    with pytest.raises(EditError, match="no attack has numbers"):
        attack_dots(nothing)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attacks": []}, "at least one attack"),
        ({"attacks": [Reads]}, "an attack is an object like"),
        ({"attacks": [Reads(), Reads()]}, "two attacks are called 'Reads"),
        ({"margin": 0.0}, "margin must be positive"),
        ({"original": "other"}, "brings its original model along"),
        ({"oracle": "same"}, "the oracle is one of the other models"),
    ],
)
def test_bad_arguments(change: dict[str, Any], says: str) -> None:
    net = model("llama")
    known = {"same": net, "other": model("llama")}
    change = {k: known.get(v, v) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(EditError, match=says):
        robustness(edited(net), **({"attacks": [Reads()]} | change))


def test_a_model_without_its_edit_and_an_edit_that_is_not_applied() -> None:
    net, before = model("llama"), model("llama")
    forget, retain = prompts("llama")
    with pytest.raises(EditError, match="give the edit itself or original="):
        robustness(net, [Reads()], forget, retain)
    with pytest.raises(PromptError, match="no retain prompts"):
        robustness(net, [Reads()], forget)
    with pytest.raises(EditError, match="random masks need the edit"):
        robustness(net, [Reads()], forget, retain, original=before, random=1)
    found = robustness(net, [Reads()], forget, retain, original=before)
    assert found.models == ("before", "after")
    done = edited(net)
    done.undo()
    with pytest.raises(EditError, match=re.escape("call .apply(model)")):
        robustness(done, [Reads()])
    with pytest.raises(EditError, match="no mask"):
        robustness(edited(net, mask=False), [Reads()], random=1)


def test_on_the_organism_rounding_finds_its_control(
    untouched: Callable[[nn.Module], nn.Module],
) -> None:
    net, oracle = organism.load()[0], organism.load("oracle")[0]
    forget = organism.prompts("facts", "forget01")
    retain = organism.prompts("facts", "retain")[::120]
    done = edit(net, NPO(steps=8, lr=1e-3), None, forget=forget, retain=retain)
    untouched(net)
    found = robustness(
        done, [Quantisation(bits=4), Pruning(share=0.05)], forget, retain, oracle=oracle
    )
    trial = found["Quantisation"]
    assert not trial.withheld
    original, mine = trial.found["before"], trial.found["after"]
    assert original.forget_clean.estimate == pytest.approx(1.0, abs=0.05)
    assert mine.forget_clean.estimate == pytest.approx(measure(net, forget).estimate)
    assert (mine.forget_clean.estimate or 1.0) < 0.5
    assert trial.beyond() is not None
