"""Train briefly on a part of what was forgotten: what an edit only covered up comes back with prompts never trained on.

Paper: Guo et al. 2024, Mechanistic Unlearning (arXiv:2410.12949): fine-tune on half of the forgotten facts, test on the
other half. The trained weights are all of them (or a mask) in place of LoRA adapters, the rate is constant, and the
attacker has no text to keep the model whole.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from circuits import ComponentMask
from locate_edit.attacked import Attacked, Point, check_prompts, measure
from locate_edit.attacks._checks import check_positive, check_whole
from locate_edit.attacks._covered import covered
from locate_edit.attacks._halves import Across, check_across, halves, marks, of_items
from locate_edit.editing import edit
from locate_edit.engine import StopWhen
from locate_edit.errors import EditError, PromptError
from locate_edit.methods.fine_tune import FineTune
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet


@dataclass(frozen=True)
class Relearning:
    """Likelihood of the targets after fine-tuning on other prompts than those measured.

    The attacker may train the weights. ``on="half"``: on a seeded half of the forget prompts, with their answers; the
    other half is measured. Prompts of one group (a row's `group`, such as a person) stay on one side unless
    ``across="query"`` splits every group. ``on="unrelated"``: on ``text``, and all forget and all retain prompts are
    measured; without ``text``, on half of the *retain* prompts, and the other half of these is measured.

    Training teaches the form of an answer too, so the number rises somewhat in a model that never knew: compare with
    one. It also breaks models: a broken model gives no answers either, and only the retain column tells it from one
    that has forgotten. Where retain falls as far as forget, the attack was too strong to say anything. AdamW takes
    steps of length ``lr`` also where nothing is left to learn: on prompts that the model knows by heart already, as
    retain prompts often are, "unrelated" soon makes it drift, and what the first steps brought back is partly lost
    again by the last (see the curve).

    Cost: a forward and a backward of a batch each step, and measurements of the tested forget prompts at up to 11 steps
    and of the retain prompts at three (start, middle and end; the curve has no retain number elsewhere). So with 10
    steps or fewer `Attacked.recovered` counts every one. Without a mask the trained copies of the weights and the
    optimizer's moments take 16 bytes a parameter.

    Attributes:
        steps: optimizer steps (AdamW).
        lr: learning rate.
        on: "half" or "unrelated".
        mask: where the attacker trains; None for all weights.
        across: "target" keeps groups on one side; "query" splits each.
        text: what "unrelated" trains on: rows with a target on that, plain text on all of its tokens.

    Raises:
        EditError: a setting out of range, or text for ``on="half"``.
        PromptError: too few prompts or groups for two halves, "unrelated" with neither text nor retain prompts, or text
            that the model cannot read.
    """

    steps: int = 10
    lr: float = 7e-4
    on: Literal["half", "unrelated"] = "half"
    mask: ComponentMask | None = None
    across: Across = "target"
    text: PromptSet | None = None

    def __post_init__(self) -> None:
        check_whole("Relearning", 1, steps=self.steps)
        check_positive("Relearning", lr=self.lr)
        if self.on not in ("half", "unrelated"):
            raise EditError(f"Relearning: on must be 'half' or 'unrelated', got {self.on!r}")
        check_across(self.across, "Relearning")
        if self.across == "within":
            raise EditError(
                "Relearning: across='within' would measure what was trained on, which every model learns; "
                "expected 'target' or 'query'"
            )
        if not isinstance(self.text, PromptSet | None):
            raise EditError(
                f"Relearning: text must be a PromptSet, got {type(self.text).__name__}: "
                "PromptSet(texts, tokenizer) makes one from a list"
            )
        if self.text is not None and self.on == "half":
            raise EditError(
                "Relearning: text is what on='unrelated' trains on, while on='half' trains on half of the forget "
                "prompts; give one or the other"
            )

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Train, measure on the way, and put the weights back; ``seed`` draws halves and batches."""
        check_prompts(model, forget, retain, batch_size)
        if self.text is not None:
            check_prompts(model, self.text, None, batch_size)
        taught, asked, kept = self.parts(forget, retain, seed)
        tested = forget.select(asked)
        held = None if retain is None else retain.select(kept)

        often, seldom = marks(self.steps, most=11), marks(self.steps, most=3)
        seen: dict[int, tuple[Values, Values | None]] = {}

        def look(step: int) -> None:
            if step in often:
                beside = held if step in seldom else None
                seen[step] = (
                    of_items(measure(model, tested, batch_size), asked),
                    None if beside is None else of_items(measure(model, beside, batch_size), kept),
                )

        look(0)
        done = 0

        def watch(_: nn.Module) -> float:
            nonlocal done
            done += 1
            if done < self.steps:
                look(done)
            return 0.0

        made = edit(
            model, FineTune(steps=self.steps, lr=self.lr), self.mask, forget=taught, batch_size=batch_size, seed=seed,
            stop=StopWhen(watch),
        )  # fmt: skip
        try:
            look(self.steps)
        finally:
            made.undo()
        return self._attacked(seen, len(taught))

    def parts(
        self, forget: PromptSet, retain: PromptSet | None, seed: int
    ) -> tuple[PromptSet, list[int], list[int]]:
        """What is trained on, and the items of ``forget`` and of ``retain`` that are measured."""
        everything = list(range(len(retain))) if retain is not None else []
        if self.on == "half":
            train, asked = halves(forget, self.across, seed)
            return forget.select(train, name="half"), asked, everything
        if self.text is not None:
            return self.text, list(range(len(forget))), everything
        if retain is None:
            raise PromptError(
                "Relearning(on='unrelated') trains on half of the retain prompts, but there are none: pass retain=, or "
                "other text as Relearning(on='unrelated', text=PromptSet(...))"
            )
        train, kept = halves(retain, self.across, seed)
        return retain.select(train, name="unrelated"), list(range(len(forget))), kept

    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """A positive control: one and the same other word laid over the answers, as a trained refusal is.

        Half of the prompts teach to take it off, and it is off for the others as well. On "half" it lies on the forget
        prompts and what is like them, on "unrelated" on whatever is asked, as it could not be unlearned elsewhere
        otherwise. It shows that the training brings answers back that are whole underneath, not that it repairs others.
        """
        check_prompts(model, forget, None, batch_size)
        everywhere = self.on == "unrelated"
        return covered(model, forget, everywhere=everywhere, batch_size=batch_size, seed=seed)

    def _attacked(self, seen: dict[int, tuple[Values, Values | None]], trained: int) -> Attacked:
        curve = tuple(
            Point(step, _mean(asked), None if kept is None else _mean(kept))
            for step, (asked, kept) in sorted(seen.items())
        )
        (clean, retain_clean), (under, retain) = seen[0], seen[self.steps]
        what = "forget" if self.on == "half" else "retain" if self.text is None else "other"
        notes: dict[str, Any] = {
            "trained on": f"{trained} {what} prompts",
            "tested": len(under),
        }
        return Attacked(
            under, clean, retain, retain_clean, curve=curve, strength="steps", notes=notes
        )


def _mean(values: Values) -> float:
    found = values.estimate
    return float("nan") if found is None else found
