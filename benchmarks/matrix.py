"""Localizers x methods x mask sizes on the organism: `python -m benchmarks.matrix --save`.

What is to go are the facts about two people of forget10; each repetition takes two others, with a seed of its own, so
that a range says how far a result depends on whom it is about. What should stay are facts and secrets of others, and
beside these there are people whom neither localizers nor methods saw: neighbours, who share a name with the two, and
others. Methods that ascend stop each prompt at its never-seen level, so cells differ mainly in what they cost. Finished
cells are kept in a folder and not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.tables import write_between
from circuits.draw import save_figure
from locate_edit import organism
from locate_edit.draw.comparison import heat_map, trade_off
from locate_edit.locate.activation_contrast import ActivationContrast
from locate_edit.locate.attribution_patching import AttributionPatching
from locate_edit.locate.eap_ig import EAPIG
from locate_edit.locate.privacy_neurons import PrivacyNeurons
from locate_edit.locate.saliency import Saliency
from locate_edit.methods.gradient_difference import GradientDifference
from locate_edit.methods.mechanistic import MechanisticUnlearning
from locate_edit.methods.npo import NPO
from locate_edit.methods.simnpo import SimNPO
from locate_edit.methods.undial import UNDIAL
from locate_edit.methods.wga import WeightedGradientAscent
from locate_edit.prompts import PromptSet
from locate_edit.reports.comparison import RANDOM, Comparison, compare

HERE = Path(__file__).parent
STEPS, LR = 40, 1e-3
LOCALIZERS = (
    PrivacyNeurons(steps=20, rule="near_zero"),
    EAPIG(steps=5),
    AttributionPatching(),
    Saliency(),
    ActivationContrast(),
)
METHODS = (
    GradientDifference(steps=STEPS, lr=LR),
    NPO(steps=STEPS, lr=LR),
    SimNPO(steps=STEPS, lr=LR),
    UNDIAL(steps=STEPS, lr=LR),
    WeightedGradientAscent(steps=STEPS, lr=LR),
    MechanisticUnlearning(steps=STEPS, lr=LR),
)
BUDGETS = (20, 80, 320)


COLUMNS = tuple(
    f"{part}/{metric}"
    for metric, parts in {
        "likelihood": ("forget", "reworded"),
        "oracle_kl": ("forget", "reworded", "retain", "neighbours", "others"),
    }.items()
    for part in parts
)


def sets(repetition: int) -> tuple[PromptSet, PromptSet, dict[str, PromptSet]]:
    """What one repetition forgets, what its methods retain, and what neither sees."""
    two = organism.people("forget10")[2 * repetition : 2 * repetition + 2]
    ids = {person.id for person in two}
    names = {name for person in two for name in (person.first, person.last)}
    facts, secrets = organism.prompts("facts", "retain"), organism.prompts("secrets", "retain")
    retain = (facts[::25] + secrets[::13]).named("retain")  # strides that meet every attribute
    seen = {row["group"] for row in retain}
    close = {p.id for p in organism.people("retain") if {p.first, p.last} & names} - seen
    neither = {p.id for p in organism.people("retain")} - seen - close

    def of(prompts: PromptSet, people: set[str]) -> PromptSet:
        return prompts.filter(lambda row: row["group"] in people)

    unseen = {
        "reworded": of(organism.prompts("facts", "forget10", "held_out"), ids),
        "neighbours": of(facts, close),
        "others": of(facts, neither)[::13] + of(secrets, neither)[::9],
    }
    return of(organism.prompts("facts", "forget10"), ids), retain, unseen


def run(folder: Path, repetitions: int) -> Comparison:
    """The comparison, finished cells taken from ``folder``; each repetition is a seed of it."""
    model, _ = organism.load()
    oracle, _ = organism.load("oracle")
    parts = []
    for seed in range(repetitions):
        forget, retain, unseen = sets(seed)
        part = compare(
            model,
            localizers=LOCALIZERS,
            methods=METHODS,
            budgets=BUDGETS,
            forget=forget,
            retain=retain,
            others=unseen,
            oracle=oracle,
            folder=folder,
            seeds=(seed,),
            progress=True,
        )
        parts.append(part)
    return joined(parts)


def joined(parts: Sequence[Comparison]) -> Comparison:
    """Repetitions as one comparison; original and oracle are means over them."""

    def mean(each: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for key in each[0]:
            known = [value for one in each if (value := one[key]) is not None]
            found[key] = sum(known) / len(known) if known else None
        return found

    order = [(c.localizer, c.method, c.budget) for c in parts[0].cells]
    cells = sorted(
        (cell for part in parts for cell in part.cells),
        key=lambda c: (order.index((c.localizer, c.method, c.budget)), c.seed),
    )
    oracles = [part.oracle for part in parts if part.oracle is not None]
    return Comparison(
        tuple(cells),
        mean([part.original for part in parts]),
        mean(oracles) if oracles else None,
        parts[0].about,
    )


def main() -> None:
    """Run, and with --save write the table, the figures and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3, choices=range(1, 11), metavar="1-10")
    parser.add_argument("--folder", type=Path, default=HERE / "results" / "matrix-cells")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    found = run(given.folder, given.repetitions)
    print(found.markdown(COLUMNS))
    if given.save:
        about = {"machine": describe_machine(), "random": RANDOM, **found.to_json()}
        (HERE / "results" / "matrix.json").write_text(json.dumps(about, indent=1), "utf-8")
        write_between(HERE / "MATRIX.md", "matrix", found.markdown(COLUMNS))
        for name, axes in (
            ("matrix-forget", heat_map(found, "forget/oracle_kl")),
            ("matrix-retain", heat_map(found, "retain/oracle_kl")),
            ("matrix-neighbours", heat_map(found, "neighbours/oracle_kl")),
            ("matrix-trade-off", trade_off(found, keep="neighbours")),
        ):
            save_figure(axes, HERE / "figures" / f"{name}.png", dpi=130)


if __name__ == "__main__":
    main()
