"""Ask the same question in other forms: an edit that only meets the trained form hides nothing in the others.

Paper: Guo et al. 2024, Mechanistic Unlearning (arXiv:2410.12949): multiple choice, capitalised and dashed names, and
paraphrases. The dialogue form and taking the best form are additions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from circuits import ComponentMask, Site, describe
from locate_edit.attacked import Attacked, check_prompts, measure
from locate_edit.attacks._checks import check_whole
from locate_edit.attacks._edited import edited_away
from locate_edit.attacks._rewritten import need_targets, rewritten
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import PromptSet

DIALOGUE = "User: Please finish this sentence.\nAssistant: "
"""What the dialogue form puts before the prompt."""


@dataclass(frozen=True)
class Formats:
    """Likelihood of the targets in the form, among several, in which each prompt gives most away.

    The attacker asks once more in each of these forms, as far as a row has what they need:

    - ``asked``: as it is;
    - ``paraphrase 1`` and so on: the row's paraphrases, the first ``paraphrases`` of them;
    - ``dashed`` (Ann-Lee), ``capitals`` (ANN LEE), ``reversed`` (Lee Ann): the subject written otherwise;
    - ``dialogue``: as the answer of an assistant in a conversation;
    - ``choice``: behind a list of the target and ``choices`` wrong answers of the row.

    The measure is the *best* over the forms, prompt by prompt: the largest of several noisy numbers, so it is above
    the clean one also where nothing is known; ``notes`` hold the mean likelihood of every form and of all of them.
    ``choice`` counts by the target's share of the likelihoods of all options, averaged over every rotation of the list
    (which takes out a liking for a position) and counted from chance: 0 for a guess, 1 for certainty. Token weights do
    not enter.

    Cost: a forward a form and prompt, ``(choices + 1)^2`` for the choice.

    Attributes:
        paraphrases: how many of a row's paraphrases are tried.
        choices: wrong answers in multiple choice, drawn by the seed; 0 for none.
        dialogue: what the dialogue form puts before a prompt; empty for no such form.

    Raises:
        EditError: a negative number.
        PromptError: rows without a target.
    """

    paraphrases: int = 4
    choices: int = 3
    dialogue: str = DIALOGUE

    def __post_init__(self) -> None:
        check_whole("Formats", 0, paraphrases=self.paraphrases, choices=self.choices)

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Ask in every form; ``seed`` draws the wrong answers of multiple choice."""
        check_prompts(model, forget, retain, batch_size)
        need_targets(forget, retain, attack="Formats")
        forms = self._by_form(model, forget, batch_size, seed)
        kept = None if retain is None else self._by_form(model, retain, batch_size, seed)
        notes: dict[str, Any] = {"measure": "the best form of each prompt"} | _means(
            forms, "forget"
        )
        return Attacked(
            _best(forms),
            measure(model, forget, batch_size),
            None if kept is None else _best(kept),
            None if retain is None else measure(model, retain, batch_size),
            notes=notes | ({} if kept is None else _means(kept, "retain")),
        )

    def forms(self, prompts: PromptSet) -> dict[str, PromptSet]:
        """The other forms but the choice, each with the items that have it; rows name theirs in `form_of`."""
        written: dict[str, dict[int, str]] = {}
        for item, row in enumerate(prompts.rows):
            for form, text in self._texts(row).items():
                if text != row["prompt"]:
                    written.setdefault(form, {})[item] = text
        return {form: rewritten(prompts, texts, form) for form, texts in written.items()}

    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """A positive control: the asked form edited away while the first two others stay."""
        check_prompts(model, forget, None, batch_size)
        forms = list(self.forms(forget).values())[:2]
        kept = None if not forms else forms[0] if len(forms) == 1 else forms[0] + forms[1]
        # Above the first layer, so that nothing has to be differentiated below.
        model_map = describe(model)
        sites = [
            Site(layer, kind)
            for layer in range(min(1, model_map.n_layers - 1), model_map.n_layers)
            for kind in ("neuron", "head")
        ]
        mask = ComponentMask({s: torch.ones(model_map.shape(s), dtype=torch.bool) for s in sites})
        return edited_away(model, forget, kept, mask=mask, batch_size=batch_size, seed=seed)

    def _texts(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The prompt of a row in every form but the choice."""
        prompt, subject = row["prompt"], row.get("subject")
        texts = {
            f"paraphrase {n}": text
            for n, text in enumerate(row.get("paraphrases", ())[: self.paraphrases], start=1)
        }
        if subject and subject in prompt:
            for form, name in written_otherwise(subject).items():
                texts[form] = prompt.replace(subject, name)
        if self.dialogue:
            texts["dialogue"] = self.dialogue + prompt
        return texts

    def _by_form(
        self, model: nn.Module, prompts: PromptSet, batch_size: int, seed: int
    ) -> dict[str, Floats]:
        """Measure of each item in each form, `item`; not a number where it has no such form."""
        found = {
            "asked": _spread(measure(model, prompts, batch_size), range(len(prompts)), len(prompts))
        }
        for form, asked in self.forms(prompts).items():
            of = [int(row["form_of"]) for row in asked.rows]
            found[form] = _spread(measure(model, asked, batch_size), of, len(prompts))
        if self.choices:
            choice = self._choice(model, prompts, batch_size, seed)
            if choice is not None:
                found["choice"] = choice
        return found

    def _choice(
        self, model: nn.Module, prompts: PromptSet, batch_size: int, seed: int
    ) -> Floats | None:
        """Share of the target among the options beyond chance, mean over rotations, `item`; None without options."""
        draw = random.Random(seed)
        rows: list[dict[str, Any]] = []
        sizes: dict[int, int] = {}
        for item, row in enumerate(prompts.rows):
            wrong = [each for each in row.get("wrong", ()) if each.strip() != row["target"].strip()]
            if not wrong:
                continue
            options = [row["target"], *draw.sample(wrong, min(self.choices, len(wrong)))]
            sizes[item] = len(options)
            rows += _in_all_orders(row, options)
        if not rows:
            return None
        asked = prompts.reread(rows, name="choice")
        scores = likelihood(Predictions(model, asked, batch_size=batch_size))
        found = np.full(len(prompts), np.nan)
        each = _spread(scores, range(len(rows)), len(rows))
        at = 0
        for item, n in sizes.items():
            # `order option`, the target first
            table = each[at : at + n * n].reshape(n, n)
            at += n * n
            share = float((table[:, 0] / table.sum(axis=1)).mean())
            found[item] = max(0.0, (share - 1 / n) / (1 - 1 / n))
        return found


def written_otherwise(subject: str) -> dict[str, str]:
    """A name with dashes, in capitals, and with its words in reverse order, where these differ from it."""
    words = subject.split()
    forms = {
        "dashed": "-".join(words),
        "capitals": subject.upper(),
        "reversed": " ".join(reversed(words)),
    }
    return {form: name for form, name in forms.items() if name != subject}


def _in_all_orders(row: Mapping[str, Any], options: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that ask for each option behind every rotation of the list: rotation by rotation, the target first."""
    bare = {k: v for k, v in row.items() if k not in ("spans", "paraphrases")}
    made = []
    for turn in range(len(options)):
        listed = ", ".join(each.strip() for each in (*options[turn:], *options[:turn]))
        prompt = f"Options: {listed}. {row['prompt']}"
        made += [{**bare, "prompt": prompt, "target": option} for option in options]
    return made


def _spread(values: Values, of: Sequence[int], n: int) -> Floats:
    """Values by the item ``of`` each, `item`; not a number for items without one."""
    found = np.full(n, np.nan)
    found[np.asarray(of, dtype=np.int64)[values.items]] = values.values
    return found


def _best(forms: Mapping[str, Floats]) -> Values:
    return Values.make(
        "likelihood in the best form",
        np.fmax.reduce(list(forms.values())),
        unit="probability",
        direction="up",
    )


def _means(forms: Mapping[str, Floats], name: str) -> dict[str, Any]:
    """Mean of every form over the prompts that have it, and of all forms, as notes."""
    every = np.stack(list(forms.values()))
    return {
        f"{name} by form": {form: float(np.nanmean(each)) for form, each in forms.items()},
        f"{name}, mean over forms": float(np.nanmean(np.nanmean(every, axis=0))),
    }
