"""Every attack on one edit of the organism: `python -m benchmarks.attacks --save`.

The edit is NPO in the 160 neurons of attribution patching; 24 facts about six people of forget10 are to go. Attacked
are the edited model, the same edit in random neurons, the original, the oracle, and each attack's positive control.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from benchmarks.tables import write_between
from circuits.draw import save_figure
from locate_edit import edit, organism
from locate_edit.draw.robustness import attack_dots
from locate_edit.locate.attribution_patching import AttributionPatching
from locate_edit.methods.npo import NPO
from locate_edit.reports.robustness import robustness

HERE = Path(__file__).parent
UNITS, STEPS, LR = 160, 40, 1e-3
FACTS = 24


def main() -> None:
    """Run, and with --save write the table, the figure and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = organism.load()
    oracle, _ = organism.load("oracle")
    facts = organism.prompts("facts", "retain")
    forget, retain = organism.prompts("facts", "forget10")[:FACTS], facts[::29]
    kept = (
        facts[7::29] + facts[17::29]
    )  # measured, and other prompts than those the edit was told to keep
    mask = AttributionPatching(kinds=("neuron",))(model, forget).top(UNITS)
    made = edit(model, NPO(steps=STEPS, lr=LR, retain="kl"), mask, forget=forget, retain=retain)
    started, wall = time.process_time(), time.perf_counter()
    found = robustness(made, forget=forget, retain=kept, oracle=oracle, random=1, progress=True)
    spent = {"cpu": time.process_time() - started, "wall": time.perf_counter() - wall}
    text = f"{spent['cpu']:.0f} s of CPU time on one thread.\n\n{found.markdown()}"
    print(text)
    if given.save:
        about = {"machine": describe_machine(), "seconds": spent, **found.to_json()}
        (HERE / "results" / "attacks.json").write_text(json.dumps(about, indent=1), "utf-8")
        write_between(HERE / "ATTACKS.md", "attacks", text)
        save_figure(attack_dots(found), HERE / "figures" / "attacks.png", dpi=130)


if __name__ == "__main__":
    main()
