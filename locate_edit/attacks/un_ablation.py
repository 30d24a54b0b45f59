"""Add a task vector of some forgotten prompts several times over: an edit that subtracted a direction is undone by it.

Paper: Ilharco et al. 2023, Editing Models with Task Arithmetic (arXiv:2212.04089): the difference that fine-tuning
makes, scaled and added. The paper unlearns by subtracting such a vector; here it is added again, learnt on other
prompts than those measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from circuits import Site, describe
from circuits.forward import output_projection
from circuits.hooks import replace
from locate_edit.attacked import Attacked, Point, check_prompts, measure
from locate_edit.attacks._checks import check_positive, check_whole, is_finite
from locate_edit.attacks._halves import Across, check_across, halves, of_items
from locate_edit.attacks._locked import target_tokens
from locate_edit.delta import Delta
from locate_edit.editing import edit
from locate_edit.errors import EditError, PromptError
from locate_edit.methods.fine_tune import FineTune
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet

TIE = 0.01
"""Likelihoods that are no further apart count as equal when the scale is chosen; the smaller scale is taken."""
HIDDEN = 0.2
"""Largest mean likelihood of the answers in the positive control."""
MOST = 20.0
"""Longest push that the positive control may need (units of the residual stream's length)."""


@dataclass(frozen=True)
class UnAblation:
    """Likelihood of the targets after adding a scaled task vector that was learnt on other forget prompts.

    The attacker knows the answers to a seeded half of the forget prompts and fine-tunes the attacked model on them,
    gently. The change of the weights, ``tau = FT(theta, known) - theta``, is a task vector, and ``theta + scale *
    tau`` is measured on the *other* half for each of ``scales``. What an edit took from all forgotten prompts at once,
    such as one direction that it subtracted or ablated, is in the vector, and extrapolation brings it back; what it
    took from each prompt apart is not. That makes it another attack than `Relearning`, whose training alone must show
    an effect: by default this training moves the weights a twentieth as far, and the scale does the rest.

    The scale is chosen by what the attacker can see. The known prompts are soon likely under a vector that was trained
    on them, whatever the scale, so they are split once more: a vector of each part is tried on the other part, and the
    scale with the largest likelihood there is taken, the smallest of those within 0.01 of it. That likelihood falls
    where extrapolation breaks the model, so retain prompts need not enter the choice, and stay a fair measure of
    damage. Prompts of one group (a row's `group`, such as a person) stay on one side in both splits, unless
    ``across="query"`` splits every group; where a single group is known, its prompts are split.

    Compare with a model that never knew: the vector teaches the form of an answer too, and answers that are easily
    guessed come up by chance. A low number where retain has fallen as far says that the attack broke the model.
    ``notes`` have every scale; the curve ends at the chosen one.

    Cost: three trainings of ``steps`` batches, and for each scale two measurements of the known half and one of the
    other half and of the retain prompts. While it trains, the trained copies of the weights and the optimizer's
    moments take 16 bytes a parameter.

    Deviations: the vector starts from the attacked model in place of a pretrained one, and its scale is chosen on
    prompts that it was not trained on.

    Attributes:
        steps: optimizer steps of the fine-tuning (AdamW).
        lr: its learning rate.
        scales: what the vector is multiplied with (1 is the fine-tuned model).
        across: "target" keeps groups on one side; "query" splits each.

    Raises:
        EditError: a setting out of range.
        PromptError: too few prompts or groups for two halves, or a known half that cannot be split.
    """

    steps: int = 3
    lr: float = 1e-4
    scales: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    across: Across = "target"

    def __post_init__(self) -> None:
        check_whole("UnAblation", 1, steps=self.steps)
        check_positive("UnAblation", lr=self.lr)
        scales: Any = self.scales
        if not isinstance(scales, tuple | list) or not scales or not all(map(_positive, scales)):
            raise EditError(
                f"UnAblation: scales must be a tuple of one positive finite number at least, got {scales!r}"
            )
        check_across(self.across, "UnAblation")
        if self.across == "within":
            raise EditError(
                "UnAblation: across='within' would measure what was trained on, which every model learns; "
                "expected 'target' or 'query'"
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
        """Make the vector, choose the scale, measure, and put the weights back; ``seed`` draws halves and batches."""
        check_prompts(model, forget, retain, batch_size)
        taught, asked = halves(forget, self.across, seed)
        known, tested = forget.select(taught, name="known"), forget.select(asked)
        held_out = self._held_out(model, known, batch_size, seed)
        scale = chosen(held_out)
        vector = self.vector(model, known, batch_size, seed)
        sets = {"known": known, "forget": tested}
        sets |= {} if retain is None else {"retain": retain}

        def look() -> dict[str, Values]:
            return {name: measure(model, each, batch_size) for name, each in sets.items()}

        found = {0.0: look()}
        for each in held_out:
            with moved(model, vector.scaled(each)):
                found[each] = look()
        clean, under = found[0.0], found[scale]
        notes: dict[str, Any] = {
            "scale": scale,
            "trained on": f"{len(known)} forget prompts",
            "tested": len(tested),
            "held-out known by scale": held_out,
        }
        for name in clean:
            notes[f"{name} by scale"] = {each: _mean(found[each][name]) for each in found}
        return Attacked(
            of_items(under["forget"], asked),
            of_items(clean["forget"], asked),
            under.get("retain"),
            clean.get("retain"),
            curve=tuple(
                Point(
                    each,
                    _mean(values["forget"]),
                    _mean(values["retain"]) if "retain" in values else None,
                )
                for each, values in found.items()
                if each <= scale
            ),
            strength="scale",
            notes=notes,
        )

    def vector(self, model: nn.Module, known: PromptSet, batch_size: int, seed: int) -> Delta:
        """The change that fine-tuning on ``known`` makes of the weights, which are put back."""
        made = edit(
            model, FineTune(steps=self.steps, lr=self.lr), None, forget=known, batch_size=batch_size, seed=seed
        )  # fmt: skip
        made.undo()
        return made.delta

    @contextmanager
    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> Iterator[nn.Module]:
        """A positive control: the last layer's output pushed in one direction, away from the answers, everywhere.

        The direction leads from the mean output embedding of the answers' tokens to that of all other tokens; the push
        grows until the answers' mean likelihood is 0.2. Subtracting a task vector of the facts themselves makes a poor
        control: on the organism each fact is stored apart, and a vector of other facts does not bring it back.
        """
        check_prompts(model, forget, None, batch_size)
        model_map = describe(model)
        head = output_projection(model).weight.detach().float()  # type: ignore[operator]
        answers = torch.zeros(len(head), dtype=torch.bool, device=head.device)
        answers[sorted(target_tokens(forget))] = True
        if bool(answers.all()):
            raise EditError("no positive control: the answers use every token of the vocabulary")
        lean = head[~answers].mean(dim=0) - head[answers].mean(dim=0)
        lean = lean / torch.linalg.vector_norm(lean)
        length = 0.05

        def pushed(hidden: Tensor) -> Tensor:
            own = torch.linalg.vector_norm(hidden.detach().float(), dim=-1, keepdim=True)
            new: Tensor = hidden + (length * own * lean.to(own.device)).to(hidden.dtype)
            return new

        with replace(model_map, {Site(model_map.n_layers - 1, "layer"): pushed}):
            while (left := _mean(measure(model, forget, batch_size))) > HIDDEN:
                length *= 1.2
                if length > MOST:
                    raise EditError(
                        f"no positive control: a push of {MOST:g} times the stream's length leaves the answers at a "
                        f"likelihood of {left:.2f}, where {HIDDEN} at most is needed"
                    )
            yield model

    def _held_out(
        self, model: nn.Module, known: PromptSet, batch_size: int, seed: int
    ) -> dict[float, float]:
        """Mean likelihood of the known prompts by scale, ascending, each under the vector of the part without it."""
        if len(known) < 2:
            raise PromptError(
                f"{known!r}: UnAblation chooses its scale on known prompts that its vector was not trained on, which "
                f"needs two known prompts at least, and half of the forget prompts is {len(known)}. Give more"
            )
        try:
            parts = halves(known, self.across, seed)
        except PromptError:  # a single group
            parts = halves(known, "query", seed)
        total = dict.fromkeys(sorted(set(self.scales)), 0.0)
        for one, other in (parts, parts[::-1]):
            vector = self.vector(model, known.select(one), batch_size, seed)
            shown = known.select(other)
            for scale in total:
                with moved(model, vector.scaled(scale)):
                    total[scale] += len(other) * _mean(measure(model, shown, batch_size))
        return {scale: each / len(known) for scale, each in total.items()}


def _positive(scale: Any) -> bool:
    return is_finite(scale) and scale > 0


def chosen(likelihoods: Mapping[float, float]) -> float:
    """The scale of the largest likelihood, the smallest of those that come within `TIE` of it."""
    finite = {s: -math.inf if math.isnan(each) else each for s, each in likelihoods.items()}
    best = max(finite.values())
    return min(scale for scale, each in finite.items() if each >= best - TIE)


@contextmanager
def moved(model: nn.Module, change: Delta) -> Iterator[nn.Module]:
    """The model with a change of its weights while the context is open; the old ones, bit for bit, afterwards."""
    try:
        change.write(model, "new")
        yield model
    finally:
        change.write(model, "old")


def _mean(values: Values) -> float:
    found = values.estimate
    return float("nan") if found is None else found
