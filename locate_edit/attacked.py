"""What an attack brings back of what a model was made to forget, and how attacks leave the model as they found it.

An attack is told nothing about the edit. It is given the model, the prompts in question and prompts whose answers the
model should know anyway: an attack that ruins these too has broken the model rather than found anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuits import describe
from circuits.errors import SiteError, UnknownFamily
from circuits.families import CONTRACTED, ROLES
from circuits.forward import output_projection
from locate_edit.attacks._checks import check_whole
from locate_edit.errors import EditError, PromptError
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet

__all__ = [
    "Attack",
    "Attacked",
    "Point",
    "changed_weights",
    "check_prompts",
    "measure",
    "through_matrices",
    "vocabulary_weights",
    "weight_matrices",
]


@dataclass(frozen=True)
class Point:
    """One strength of an attack.

    Attributes:
        strength: such as optimizer steps, bits, a fraction.
        forget: the measure on the forget prompts.
        retain: the same on the retain prompts; None without them.
    """

    strength: float
    forget: float
    retain: float | None = None


@dataclass(frozen=True, eq=False)
class Attacked:
    """The measure of an attack with and without it, on the same prompts.

    The measure is the likelihood of the targets where the attack leaves them to be read off (see
    `locate_edit.metrics.likelihood`), and what the attack's docstring says elsewhere; larger is more given away.

    Attributes:
        forget: under the attack, by forget prompt (those that were tested).
        forget_clean: the same prompts without it.
        retain: under the attack, by retain prompt; None without them.
        retain_clean: the same prompts without it; None without them.
        curve: by strength, where the attack has one; the last point is the whole attack.
        strength: what the curve counts, such as "steps".
        notes: what a reader must know: the suffix found, the layer used, how many prompts were trained on.
    """

    forget: Values
    forget_clean: Values
    retain: Values | None = None
    retain_clean: Values | None = None
    curve: tuple[Point, ...] = ()
    strength: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def recovered(self, level: float) -> float | None:
        """The first measured number of steps at which half of a likelihood ``level`` is back; None for never.

        None too for an attack whose curve does not count steps.

        Args:
            level: of the answers before they were forgotten.
        """
        if self.strength != "steps":
            return None
        return next((point.strength for point in self.curve if point.forget >= level / 2), None)

    @property
    def gain(self) -> float | None:
        """How much more is given away than without the attack; None where a number is withheld."""
        under, clean = self.forget.estimate, self.forget_clean.estimate
        return None if under is None or clean is None else under - clean


@runtime_checkable
class Attack(Protocol):
    """A frozen dataclass of hyperparameters whose call attacks a model and leaves it as it was.

    An attack that finds nothing may be a bad attack. So it brings a positive control, a model that knows the answers
    and hides them in the way this attack is made for; where it does not find them there, its number is withheld.
    """

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Attack ``model`` on ``forget``, and do the same to ``retain`` to see what it breaks."""

    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> AbstractContextManager[nn.Module]:
        """The positive control made of a ``model`` that knows ``forget``, while the context is open."""


def measure(model: nn.Module, prompts: PromptSet, batch_size: int = 16) -> Values:
    """Likelihood of each target: the geometric mean of its tokens' probabilities."""
    return likelihood(Predictions(model, prompts, batch_size=batch_size))


@contextmanager
def changed_weights(
    model: nn.Module, new: Callable[[str, Tensor], Tensor | None]
) -> Iterator[nn.Module]:
    """The model with other weights while the context is open; the old ones, bit for bit, afterwards.

    Args:
        model: any model. Tied weights are asked for once, under their first name.
        new: from the name and value of each parameter, its new value of the same shape, or None to leave it. Nothing is
            kept of those left, so memory grows with what changes.

    Raises:
        EditError: a new value has another shape or is not finite.
    """
    before: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                value = new(name, parameter.detach())
                if value is None:
                    continue
                if value.shape != parameter.shape or not bool(torch.isfinite(value).all()):
                    raise EditError(
                        f"the attack's new value of {name} is {tuple(value.shape)} where "
                        f"{tuple(parameter.shape)} finite numbers are needed; the model was restored"
                    )
                before[name] = parameter.detach().clone()
                parameter.copy_(value)
        yield model
    finally:
        with torch.no_grad():
            for name, old in before.items():
                parameters[name].copy_(old)


def through_matrices(
    model: nn.Module,
    new: Callable[[Tensor], Tensor],
    forget: PromptSet,
    retain: PromptSet | None,
    *,
    batch_size: int,
    vocabulary: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Attacked:
    """What the model gives away with another value of every weight matrix, which is put back afterwards.

    Args:
        model: any model.
        new: from a matrix (or a stack of them) `... out in`, its new value. Matrices that a family stores as `in out`
            (GPT-2, the experts of gpt_oss) are given and taken back transposed.
        forget: the prompts in question.
        retain: the same is measured on these.
        batch_size: rows a forward pass.
        vocabulary: change embeddings and output head too.
        notes: to keep with the result.

    Raises:
        PromptError: prompts that the model cannot read.
        EditError: a new value has another shape or is not finite.
    """
    check_prompts(model, forget, retain, batch_size)
    turned = weight_matrices(model, vocabulary=vocabulary)

    def value(name: str, weight: Tensor) -> Tensor | None:
        if name not in turned:
            return None
        return new(weight.mT).mT if turned[name] else new(weight)

    clean = measure(model, forget, batch_size)
    retain_clean = None if retain is None else measure(model, retain, batch_size)
    with changed_weights(model, value):
        return Attacked(
            measure(model, forget, batch_size),
            clean,
            None if retain is None else measure(model, retain, batch_size),
            retain_clean,
            notes=dict(notes or {}),
        )


def weight_matrices(model: nn.Module, *, vocabulary: bool = False) -> dict[str, bool]:
    """Names of the weight matrices, or stacks of them, and whether each is stored `in out` in place of `out in`.

    Which way is told by the table of families; in a model that it does not know, only `Conv1D` counts as `in out`.
    Stacked biases are no matrices.

    Args:
        model: any model.
        vocabulary: with embeddings (of tokens, positions, token types) and the output head.
    """
    kept = set() if vocabulary else vocabulary_weights(model)
    turned = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    }
    with suppress(UnknownFamily):
        model_map = describe(model)
        for layer, role in product(range(model_map.n_layers), ROLES):
            if model_map.has(layer, role):
                stored = model_map.find(layer, role)[0].layout.groups
                if not stored[-1].names & set(CONTRACTED[role]):
                    turned.add(model_map.parameter_name(layer, role))
    return {
        name: name in turned
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name not in kept and not name.endswith("bias")
    }


def vocabulary_weights(model: nn.Module) -> set[str]:
    """Names of the parameters of the embeddings, of tokens or anything else, and of the output head."""
    ends = [getattr(model, f"get_{end}_embeddings")() for end in ("input", "output")]
    ends += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    theirs = {id(p) for end in ends if end is not None for p in end.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in theirs}


def check_prompts(
    model: nn.Module, forget: PromptSet, retain: PromptSet | None, batch_size: int
) -> None:
    """Refuse what an attack cannot use.

    Raises:
        EditError: not a language model, or a batch size that is no whole number of at least 1.
        PromptError: not prompt sets, or a prompt longer than the model's context.
    """
    try:
        output_projection(model)
    except SiteError as problem:
        raise EditError(f"an attack takes a language model: {problem}") from problem
    check_whole("an attack", 1, batch_size=batch_size)
    given: tuple[Any, ...] = (forget, retain)
    if not isinstance(given[0], PromptSet) or not isinstance(given[1], PromptSet | None):
        raise PromptError(
            f"an attack takes PromptSets, got {type(forget).__name__} and {type(retain).__name__}: "
            "PromptSet(rows, tokenizer) makes one from a list"
        )
    for prompts in (forget, retain):
        if prompts is not None:
            prompts.check_context(model)
