"""`robustness`: which model is attacked, what is withheld, what stands beside it, and that nothing is left behind."""

from __future__ import annotations

import json
import re
import time
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
from locate_edit.attacked import Attacked, Point, measure
from locate_edit.attacks.pruning import Pruning
from locate_edit.attacks.quantisation import Quantisation
from locate_edit.attacks.relearning import Relearning
from locate_edit.draw.robustness import attack_dots
from locate_edit.editing import Edit, edit
from locate_edit.errors import Interrupted, PromptError
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.npo import NPO
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet
from locate_edit.reports.robustness import Robustness, Trial, every_attack, robustness
from locate_edit.reports.states import states
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
        try:
            yield model
        finally:
            with torch.no_grad():
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
    assert [first.name, second.name] == ["Reads(adds=0.29)", "Reads(adds=0.31)"]
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
    late = robustness(done, [Reads(), Reads(steps=1)], seconds=1e-9).trials
    assert [trial.withheld for trial in late] == ["not run: the time was spent (1e-09 s)"] * 2


def test_making_the_random_edits_takes_of_the_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return states(*args, **kwargs)

    monkeypatch.setattr("locate_edit.reports.robustness.states", slow)
    (trial,) = robustness(edited(model("llama")), [Reads()], seconds=0.1).trials
    assert trial.withheld == "not run: the time was spent (0.1 s)"


def test_an_interruption_keeps_what_was_done(untouched: Callable[[nn.Module], nn.Module]) -> None:
    class Stops(Reads):
        def __call__(self, *args: Any, **kwargs: Any) -> Attacked:
            raise KeyboardInterrupt

    net = model("llama")
    done = edited(net)
    untouched(net)
    with pytest.raises(KeyboardInterrupt) as stopped:
        robustness(done, [Reads(), Stops(), Fails()])
    assert isinstance(stopped.value, Interrupted)
    first, *rest = stopped.value.found.trials
    assert set(first.found) == {"before", "after"}
    assert [(trial.name, trial.withheld) for trial in rest] == [
        ("Stops", "not run: interrupted"),
        ("Fails", "not run: interrupted"),
    ]


@dataclass(frozen=True)
class Searches(Reads):
    """Finds what it is given as a start, and no more."""

    start: float = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Attacked:
        found = super().__call__(*args, **kwargs)
        under = found.forget.estimate or 0.0
        clean = found.forget_clean.estimate or 0.0
        curve = (Point(0, clean + self.start), Point(self.steps, under))
        return replace(found, curve=curve, strength="steps")


def test_what_a_random_start_finds_in_the_control_is_not_the_merit_of_the_search() -> None:
    done = edited(model("llama"))
    lucky = robustness(done, [Searches(start=0.4)]).trials[0]
    assert "before the first step" in lucky.withheld
    assert not robustness(done, [Searches(start=0.1)]).trials[0].withheld


def test_curves_of_several_random_masks_are_averaged(tmp_path: Path) -> None:
    done = edited(model("llama"))
    found = robustness(done, [Relearning(steps=2)], controls=False, random=2)
    trial = found["Relearning"]
    assert len(trial.found["random"].curve) == len(trial.found["after"].curve) > 1
    last = trial.found["random"].curve[-1]
    assert last.forget == pytest.approx(trial.found["random"].forget.estimate)
    assert trial.found["random"].strength == "steps"
    found.save(tmp_path / "out")


def test_every_attack_there_is_and_two_in_another_form() -> None:
    names = [type(each).__name__ for each in every_attack()]
    assert len(names) == len(set(names)) + 2
    assert Quantisation(bits=8) in every_attack()
    assert Relearning(on="unrelated") in every_attack()
    assert (
        sum(each == Quantisation(bits=8) for each in every_attack({"quantisation": {"bits": "8"}}))
        == 1
    )


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
    assert control[:5] == ["Good", "control", "2", "0.000", "0.800 (0.700 to 0.900)"]
    assert original[1:5] == ["before", "2", "1.000", "1.000 (1.000 to 1.000)"]
    assert mine == [
        "Good", "after", "2", "0.100", "0.600 (0.500 to 0.700)", "1.000", "0.400", "0.400 (0.400 to 0.400)",
        "0.400 (0.400 to 0.400)", "brings answers back, breaks the model",
    ]  # fmt: skip
    assert oracle[7:] == ["", "", ""]
    assert bad[-1] == "withheld: it does not | find it"
    assert "it does not \\| find it" in by_hand().markdown()
    assert (
        len({line.replace("\\|", "").count("|") for line in by_hand().markdown().split("\n")[:7]})
        == 1
    )
    with pytest.raises(EditError, match="there are Good, Bad"):
        by_hand()["Ugly"]


def one(
    after: list[float],
    clean: list[float],
    oracle: list[float] | None,
    oracle_clean: list[float] | None = None,
    kept: float = 1.0,
) -> Trial:
    """A trial of one attack on an edit, and on an oracle if there is one."""
    found = {"after": Attacked(values(*after), values(*clean), values(kept), values(1.0))}
    if oracle is not None:
        never = values(*(oracle_clean or oracle))
        found["oracle"] = Attacked(values(*oracle), never, values(1.0), values(1.0))
    return Trial("Good", "Good()", found)


NUMBERLESS = Attacked(
    Values.none("likelihood", "needs: probes that read"), values(0.1), values(1.0), values(1.0)
)


@pytest.mark.parametrize(
    ("trial", "outcome"),
    [
        (one([0.8, 0.9], [0.1, 0.1], [0.1, 0.2]), "brings answers back"),
        # whether more than a model that never knew, nobody can say
        (one([0.8, 0.9], [0.1, 0.1], None), "rises"),
        (
            replace(one([0.8, 0.9], [0.1, 0.1], None), failed={"oracle": "ValueError: no"}),
            "rises",
        ),
        # more than without the attack, but no more than a model that never knew gives
        (one([0.8, 0.9], [0.1, 0.1], [0.8, 0.9]), "nothing shown"),
        # more than the oracle, but no more than without the attack
        (one([0.8, 0.9], [0.8, 0.9], [0.1, 0.2]), "ends above the oracle"),
        # adds something and ends above the oracle, to which it adds as much: known in the open
        (one([0.8, 0.9], [0.6, 0.7], [0.3, 0.4], [0.1, 0.2]), "ends above the oracle"),
        # surely more than the oracle under the attack, but not surely by what the attack adds
        (
            one([0.9, 0.2, 0.2], [0.0, 0.1, 0.1], [0.0, 0.15, 0.15], [0.0] * 3),
            "ends above the oracle",
        ),
        # what is too small to matter
        (one([0.105, 0.106], [0.1, 0.1], [0.0, 0.0]), "ends above the oracle"),
        # pushed below the oracle, and up to it again: nothing of the knowledge
        (one([0.2, 0.2], [0.0, 0.0], [0.2, 0.2], [0.2, 0.2]), "nothing shown"),
        # the interval of the gain holds 0
        (one([0.8, 0.0], [0.1, 0.1], [0.0, 0.0]), "nothing shown"),
        (one([0.1, 0.1], [0.1, 0.1], [0.1, 0.1], kept=0.2), "breaks the model"),
        (one([0.8, 0.9], [0.1, 0.1], [0.1, 0.2], kept=0.2), "brings answers back"),
        (one([0.8], [0.1], [0.1]), "too few prompts"),
        (Trial("Bad", "Bad()", withheld="no"), "withheld"),
        (Trial("Bad", "Bad()", {"after": NUMBERLESS}), "withheld"),
    ],
)
def test_what_an_attack_shows(trial: Trial, outcome: str) -> None:
    assert trial.outcome() == outcome


def test_an_open_half_is_not_hidden() -> None:
    # Knows two of four in the open; the attack adds as much to it as to a model that never knew any.
    clean, never = [1.0, 1.0, 0.1, 0.2], [0.1, 0.2, 0.1, 0.2]
    under, invented = [1.0, 1.0, 0.4, 0.5], [0.4, 0.5, 0.4, 0.5]
    trial = one(under, clean, invented, never)
    gain, beyond = trial.gain(), trial.beyond()
    assert gain is not None
    assert beyond is not None
    assert trial.gain_beyond() == pytest.approx((-0.15, -0.3, 0.0))
    assert beyond[0] > 0
    assert trial.outcome() != "brings answers back"


def test_a_model_without_a_number_says_why() -> None:
    trial = Trial("Probing", "Probing()", {"after": NUMBERLESS})
    assert trial.reason() == "needs: probes that read"
    assert trial.reason("oracle") == ""
    row = Robustness((trial,)).table()[1]
    assert row[-1] == "withheld: needs: probes that read"
    assert Robustness((trial,)).in_words() == (
        "No attack could be tried. Probing has no number: needs: probes that read."
    )


def test_in_words() -> None:
    found = one([0.8, 0.9], [0.1, 0.1], [0.1, 0.2])
    nothing = one([0.1, 0.1], [0.1, 0.1], [0.1, 0.1])
    broken = one([0.1, 0.1], [0.1, 0.1], [0.1, 0.1], kept=0.0)
    missing = Trial("Bad", "Bad()", withheld="no")
    assert Robustness((found, missing)).in_words() == (
        "Of 2 attacks 1 could be tried. Good brings back more than from a model that never knew: there the answers are "
        "hidden rather than gone. Bad has no number: no."
    )
    assert Robustness((nothing, broken)).in_words() == (
        "Of 2 attacks 2 could be tried. None is shown to bring back more than from a model that never knew; what "
        "another attack would find, nobody knows. Good breaks the model, which says nothing."
    )
    alone = one([0.8, 0.9], [0.1, 0.1], None)
    said = Robustness((alone, alone)).in_words()
    assert "Good and good bring up more than the model says by itself; without an oracle it" in said
    assert "hidden rather than gone" not in said
    given = one([0.8, 0.9], [0.8, 0.9], [0.1, 0.1])
    given = replace(given, found={**given.found, "before": given.found["after"]})
    said = Robustness((given, given)).in_words()
    assert "Under good and good the model ends above one that never knew: something is left" in said
    assert "None brings back more, but there is little to bring back" in said
    assert "nobody knows" in Robustness((given, nothing)).in_words()
    few = Robustness((one([0.99], [0.14], [0.01]),)).in_words()
    assert few == (
        "Of 1 attacks 1 could be tried. With a single prompt no interval can be told: good from 0.14 to 0.99 (oracle "
        "0.01)."
    )
    named = Trial("LatentPerturbation(layer=1)", "")
    assert named.title == "latent perturbation (layer=1)"
    assert Robustness((missing,)).in_words() == "No attack could be tried. Bad has no number: no."


def test_steps_until_half_of_what_was_there_before_the_edit_is_back() -> None:
    def curved(*measured: float) -> Attacked:
        curve = tuple(Point(2 * at, each) for at, each in enumerate(measured))
        return Attacked(values(0.5, 0.5), values(0.1, 0.1), curve=curve, strength="steps")

    before = Attacked(values(0.6, 0.6), values(0.6, 0.6))
    found = {"before": before, "after": curved(0.1, 0.29, 0.3, 0.5), "oracle": curved(0.1, 0.2)}
    trial = Trial("Relearning", "Relearning()", found)
    assert trial.recovered() == 4
    assert trial.recovered("oracle") is None
    assert "half is back after 4 steps" in Robustness((trial,)).table()[2][-1]
    bits = replace(found["after"], strength="bits")
    assert replace(trial, found={**found, "after": bits}).recovered() is None


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
    assert edited_["gain beyond oracle"] == pytest.approx([0.4, 0.4, 0.4])
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
        ({"seconds": -1.0}, "seconds must be positive"),
        ({"seconds": float("nan")}, "seconds must be positive"),
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
