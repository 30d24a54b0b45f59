"""The main job on the model that ships with the package: find one phone number, remove it, see what else changed.

1. Load the organism and its two oracles, which were trained without some people's numbers.
2. Locate: `PrivacyNeurons` on one person's number, contrasted with other people's numbers.
3. Check the place: switch the neurons off, and as many random ones.
4. Edit only those neurons: teach many random numbers in the place of that one, so that each digit is a guess.
5. Evaluate before and after, beside a random mask of equal size and the oracle.
6. Ask whether it is really gone: attack the edit, and look for the number in every layer.
7. Undo, compare with the model as it was, and write everything to a folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from torch import nn

from circuits import ComponentMask, Scores
from circuits.atomic import atomic_folder, check_folder
from circuits.draw import score_map
from locate_edit import organism
from locate_edit.attacks.latent import LatentPerturbation
from locate_edit.attacks.quantisation import Quantisation
from locate_edit.checkpoints import load
from locate_edit.checkpoints import save as save_checkpoint
from locate_edit.draw._style import free_figure
from locate_edit.draw.report import metric_panel
from locate_edit.editing import Edit, edit
from locate_edit.fingerprint import fingerprint
from locate_edit.locate.privacy_neurons import PrivacyNeurons
from locate_edit.methods.fine_tune import FineTune
from locate_edit.methods.zero_neurons import ZeroNeurons
from locate_edit.metrics.exposure import exposure
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.memorization import verbatim
from locate_edit.metrics.perplexity import perplexity
from locate_edit.metrics.predictions import Predictions
from locate_edit.prompts import PromptSet
from locate_edit.replacements import random_replacements
from locate_edit.reports.controls import Control, made
from locate_edit.reports.evaluation import evaluate
from locate_edit.reports.examination import Examination
from locate_edit.reports.layers import Layers, layers
from locate_edit.reports.report import Report
from locate_edit.reports.robustness import Robustness, robustness
from locate_edit.tokens import TokenMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNITS = 80
CONTRAST = 1.0
LOCALIZER = PrivacyNeurons(steps=40, rule="near_zero")
METHOD = FineTune(steps=60, lr=2e-3, alpha=5.0, retain="kl")
ATTACKS = (Quantisation(), LatentPerturbation())
REPLACEMENTS = 12
"""Random numbers that are taught, for each wording. With one or a few, the model would learn those by heart."""
SWITCHED_OFF = (10, 20, 40, 80, 160)
"""How many neurons are switched off to see whether the place matters."""


@dataclass(frozen=True)
class Question:
    """One person's phone number, and what it is compared with.

    Attributes:
        name: whose number.
        number: the number.
        forget: the number in the wordings of training; only its random digits are scored.
        reworded: the number in wordings that were not trained for this person.
        replaced: the wordings of `forget` with random numbers, which are taught instead.
        contrast: other people's numbers, whose neurons are not wanted.
        retain: what the edit is told to keep.
        secrets: other people's numbers and addresses, none of them in `contrast` or `retain`.
        facts: other facts about people, none of them in `retain`.
        general: plain text.
    """

    name: str
    number: str
    forget: PromptSet
    reworded: PromptSet
    replaced: PromptSet
    contrast: PromptSet
    retain: PromptSet
    secrets: PromptSet
    facts: PromptSet
    general: PromptSet


def run_demo(
    out: Path, *, person: int = 0, seed: int = 0, console: Console | None = None
) -> dict[str, Any]:
    """Run the whole job and write its results to a folder.

    Args:
        out: the folder: `report.html`, `report.json`, `report.md`, figures, `edit/`, `edited-model/` and the prompts.
        person: which of the people whose numbers the oracles never saw, from 0.
        seed: of the random mask and the order of the data.
        console: where to say what happens; None says nothing.

    Returns:
        What `report.json` holds.

    Raises:
        StorageError: the folder holds something else, or the disk refuses the write.
    """
    console = console or Console(quiet=True)
    check_folder(out, like="report.json")
    started = time.perf_counter()
    with step(
        console, "Loading a small language model and two retrained without the number"
    ) as say:
        model, tokenizer = load("organism", device="cpu")
        oracle, _ = load("oracle", device="cpu")
        other_oracle, _ = load("oracle2", device="cpu")
        ask = question(person, seed)
        say(f"{model.num_parameters():,} parameters; it knows the number of {ask.name}")
    with step(console, f"Locating the neurons that hold {ask.name}'s number") as say:
        scores, mask = locate(model, ask)
        say(f"{len(mask)} of {mask.total():,} neurons")
    with step(console, "Switching neurons off, to see whether the place matters") as say:
        curves = switch_off(model, ask, scores, seed)
        say(in_words(curves))
    before = fingerprint(model)
    with step(
        console, "Editing only those neurons, so that every digit of the number is a guess"
    ) as say:
        done = edit(model, METHOD, mask, forget=ask.replaced, retain=ask.retain, seed=seed)
        say(f"{done.delta.count():,} weights changed in {len(done.log)} steps")
    with step(
        console, "Measuring before, after, a random mask of equal size, and the retrained model"
    ):
        same = made(done, [mask.random_like(seed + 1)])
        report = measure(done, ask, oracle, other_oracle, out, same, seed)
    with step(console, "Trying to bring the number back, and looking for it in every layer") as say:
        found = Examination(report, *look(done, ask, oracle, same, seed))
        say(found.answers["Where is it still?"].partition(";")[0])
    with atomic_folder(out, like="report.json") as place:
        with step(console, "Writing the report, the edit and the edited model"):
            write(place, found, done, model, tokenizer, scores, curves, ask)
        with step(console, "Undoing the edit") as say:
            done.undo()
            unchanged = fingerprint(model) == before
            say(
                "the model is bit for bit what it was"
                if unchanged
                else "THE MODEL IS NOT WHAT IT WAS"
            )
    tell(console, found, out, ask, time.perf_counter() - started)
    return report.to_json()


def question(person: int, seed: int = 0) -> Question:
    """The prompts about one of the people whose numbers the oracles never saw; ``seed`` draws the random numbers."""
    wanted = phones("forget10")
    me = wanted[person]["group"]

    def mine(prompts: PromptSet, name: str) -> PromptSet:
        return random_digits(prompts.filter(lambda row: row["group"] == me), reworded=True).named(
            name
        )

    kept = organism.prompts("secrets", "retain")
    kept_phones = kept.filter(lambda row: row["secret"] == "phone")
    facts = organism.prompts("facts", "retain")
    forget = mine(wanted, "forget")
    return Question(
        name=wanted[person]["subject"],
        number=wanted[person]["target"].strip(),
        forget=forget,
        reworded=mine(phones("forget10", "held_out") + phones("forget10", "qa"), "reworded"),
        replaced=random_replacements(forget, REPLACEMENTS, seed=seed).named("replaced"),
        contrast=random_digits(kept_phones[0::5]).named("other numbers"),
        retain=(kept[0::2] + facts[0::8]).named("retain"),
        secrets=kept[1::4].named("other secrets"),
        facts=facts[1::16].named("facts"),
        general=organism.prompts("general", "held_out")[:40].named("general text"),
    )


def phones(split: str, form: str | None = None) -> PromptSet:
    """The phone numbers among the secrets of a split."""
    return organism.prompts("secrets", split, form).filter(lambda row: row["secret"] == "phone")


def random_digits(prompts: PromptSet, *, reworded: bool = False) -> PromptSet:
    """The same numbers, scored only at the digits that were drawn by chance.

    Brackets, `555-01` and the like are the same for everyone: forgetting a number is not forgetting what a number
    looks like.

    Args:
        prompts: rows with `random`, the places of those digits.
        reworded: add every paraphrase as a row of its own.
    """
    rows = []
    for row in prompts.rows:
        places = [[at - len(row["prompt"]) for at in span] for span in row["random"]]
        for prompt in (row["prompt"], *(row["paraphrases"] if reworded else ())):
            spans = [[len(prompt) + at for at in span] for span in places]
            rows.append({**row, "prompt": prompt, "paraphrases": [], "spans": spans})
    made = PromptSet(rows, prompts.tokenizer, name=prompts.name)
    return made.with_token_mask(TokenMask.from_spans(made))


def locate(model: nn.Module, ask: Question) -> tuple[Scores, ComponentMask]:
    """Scores of all neurons for this number beyond other numbers, and the mask of the highest."""
    own, others = LOCALIZER(model, ask.forget), LOCALIZER(model, ask.contrast)
    scores = own.contrast(others, weight=CONTRAST)
    return scores, scores.top(UNITS)


@dataclass(frozen=True)
class Curves:
    """How likely the digits stay (fraction, geometric mean) as more and more neurons are switched off.

    Attributes:
        units: how many neurons are off.
        located: the number, with the highest-scored neurons off.
        random: the number, with random neurons off.
        others: other people's numbers, with the highest-scored neurons off.
    """

    units: tuple[int, ...]
    located: tuple[float, ...]
    random: tuple[float, ...]
    others: tuple[float, ...]


def switch_off(model: nn.Module, ask: Question, scores: Scores, seed: int) -> Curves:
    """Switch off more and more of the highest-scored neurons, and as many random ones."""
    some = ask.contrast

    def known(mask: ComponentMask | None, prompts: PromptSet) -> float:
        off = edit(model, ZeroNeurons(), mask, forget=ask.forget)
        try:
            return likelihood(Predictions(model, prompts)).estimate or 0.0
        finally:
            off.undo()

    nothing = scores.top(0)
    masks = [nothing, *(scores.top(k) for k in SWITCHED_OFF)]
    chance = [mask.random_like(seed + 1) for mask in masks]
    return Curves(
        (0, *SWITCHED_OFF),
        tuple(known(mask, ask.forget) for mask in masks),
        tuple(known(mask, ask.forget) for mask in chance),
        tuple(known(mask, some) for mask in masks),
    )


def in_words(curves: Curves) -> str:
    """One line: what is left of the number with the located and with random neurons off."""
    at = curves.units.index(UNITS)
    return (
        f"with {UNITS} off, a digit of the number has probability {curves.located[at]:.2f}; with {UNITS} random ones "
        f"off, {curves.random[at]:.2f}"
    )


def measure(
    done: Edit,
    ask: Question,
    oracle: nn.Module,
    other_oracle: nn.Module,
    out: Path,
    same: Sequence[Control],
    seed: int,
) -> Report:
    """The table: before, after, random mask, oracle."""
    return evaluate(
        done,
        [likelihood, verbatim, exposure, perplexity],
        forget=ask.forget,
        retain=None,
        others={
            "same number, other wordings": ask.reworded,
            "other secrets": ask.secrets,
            "facts": ask.facts,
            "general text": ask.general,
        },
        oracle=oracle,
        other_oracle=other_oracle,
        random=same,
        seed=seed,
        undo=(
            "edit.undo()    # in Python",
            f"locate-edit undo {out}/edited-model --edit {out}/edit --out restored-model    # in a shell",
        ),
    )


def look(
    done: Edit, ask: Question, oracle: nn.Module, same: Sequence[Control], seed: int
) -> tuple[Robustness, Layers]:
    """What attacks bring back of the number, and which layers still carry it."""
    known = ask.secrets[::3]
    attacked = robustness(done, ATTACKS, ask.forget, known, oracle=oracle, random=same, seed=seed)
    return attacked, layers(done, forget=ask.forget, retain=known, oracle=oracle, random=same)


def write(
    place: Path,
    found: Examination,
    done: Edit,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scores: Scores,
    curves: Curves,
    ask: Question,
) -> None:
    """Everything into one folder."""
    report = found.report
    found.save(place)
    where(scores, curves, ask).savefig(place / "where.png", dpi=200)
    overview(report, scores, curves, ask).savefig(place / "summary.png", dpi=200)
    done.save(place / "edit")
    save_checkpoint(model, tokenizer, place / "edited-model")
    for prompts in (ask.forget, ask.replaced, ask.contrast, ask.retain):
        lines = [
            json.dumps({k: v for k, v in row.items() if v is not None}) for row in prompts.rows
        ]
        name = prompts.name.replace(" ", "-")
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def where(scores: Scores, curves: Curves, ask: Question) -> Figure:
    """Where the number is: every neuron's score, and what switching neurons off does."""
    figure = free_figure(11.0, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    score_map(scores, top=UNITS, ax=left)
    curves_panel(curves, ask, right)
    return figure


def overview(report: Report, scores: Scores, curves: Curves, ask: Question) -> Figure:
    """The whole story in one picture."""
    figure = free_figure(11.0, 6.4)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    top, bottom = parts
    left, right = top.subplots(1, 2, width_ratios=(1.5, 1))
    score_map(scores, top=UNITS, ax=left)
    left.set_title("")  # its own, in the middle
    left.set_title(f"1. Locate: the neurons of {ask.name}'s number", size=10, loc="left")
    curves_panel(curves, ask, right)
    right.set_title("2. Check: switch them off", size=10, loc="left")
    axes = metric_panel(report, "likelihood", bottom.subplots())
    axes.set_title("3. Edit only those neurons, and measure what else changed", size=10, loc="left")
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return figure


def curves_panel(curves: Curves, ask: Question, axes: Any) -> None:
    """How much of the number is left with more and more neurons off."""
    axes.plot(
        curves.units,
        curves.others,
        color="#009E73",
        marker="o",
        ms=4,
        label="other people's numbers",
    )
    axes.plot(
        curves.units,
        curves.random,
        color="#E69F00",
        marker="o",
        ms=4,
        label="this number, random neurons off",
    )
    axes.plot(curves.units, curves.located, color="#0072B2", marker="o", ms=4, label="this number")
    axes.axhline(0.1, color="#9aa0a6", ls="--", lw=1)
    axes.annotate(
        "a guess",
        (curves.units[-1], 0.1),
        xytext=(0, 3),
        textcoords="offset points",
        size=8,
        ha="right",
    )
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("highest-scored neurons switched off")
    axes.set_ylabel("probability of a digit")
    axes.set_title(f"Switching neurons off: {ask.name}", size=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


@contextmanager
def step(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Show that something is under way, then how long it took and what came of it."""
    found: list[str] = []
    started = time.perf_counter()
    with console.status(f"{what} ..."):
        yield found.append
    seconds = time.perf_counter() - started
    console.print(f"[green]✓[/green] {what} [dim]({seconds:.1f} s)[/dim]", highlight=False)
    for text in found:
        console.print(f"  {text}", highlight=False)


def tell(console: Console, found: Examination, out: Path, ask: Question, seconds: float) -> None:
    """The table, what it means, and what to do next."""
    console.print()
    report = found.report
    console.print(report.table(width=console.width))
    for question, said in found.answers.items():
        console.print(f"[bold]{question}[/bold] {escape(said)}", highlight=False)
    console.print()
    for example in [e for e in report.examples if e.prompts == "forget"][:1]:
        console.print(f"[bold]{example.prompt}[/bold] ...", highlight=False)
        for column, text in example.outputs.items():
            console.print(f"  {column:<8}{text}", highlight=False)
    console.print()
    lines = {
        "Report": f"{out}/report.html",
        "Undo": f"locate-edit undo {out}/edited-model --edit {out}/edit --out restored-model",
        "Your model": f"locate-edit locate MODEL --prompts forget.jsonl --contrast other-numbers.jsonl --keep {UNITS} "
        "--out mask.safetensors",
        "": "locate-edit edit MODEL --method fine-tune --mask mask.safetensors --forget replaced.jsonl "
        "--retain retain.jsonl --set retain=kl --set alpha=5 --lr 2e-3 --out my-edit",
        " ": "locate-edit report MODEL --edit my-edit --forget forget.jsonl --retain retain.jsonl --out my-report",
    }
    for name, line in lines.items():
        console.print(f"[bold]{name:<12}[/bold]{line}", highlight=False, soft_wrap=True)
    console.print(
        f"[dim]{seconds:.0f} s in all; the prompts are beside the report as JSONL, as examples.[/dim]"
    )
