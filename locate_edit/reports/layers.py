"""Which layers still carry what an edit silenced: the logit lens, and the residual stream put into the original model.

    found = layers(edit, forget=forget, retain=retain, oracle=oracle)
    lens_map(found)        # what the model's own head reads after each layer, before and after the edit
    carried_map(found)     # whether the original model can go on from the stream of each state

The logit lens reads the residual stream with the model's own output layer; an answer that is there in another form does
not show. So the stream is also put into the *original* model, one layer at a time: where that goes on to give the
answer, the layer still carried it. Below the lowest edited layer nothing changed, so the answer is there by
construction; a deep edit is one after which few layers above carry it.

A stream means something to another model only if both speak one basis. An edit of a model's own weights mostly keeps
it; a model of other training does not. So the same is done with retained prompts, which every state knows: where these
are lost too, the stream does not fit, and what becomes of the forgotten ones says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from circuits.logit_lens import logit_lens
from circuits.model_map import describe
from locate_edit.editing import Edit
from locate_edit.errors import EditError
from locate_edit.metrics.running import scored_batches
from locate_edit.metrics.unlearning_depth import Depth, continued, from_costs, read_streams
from locate_edit.metrics.values import Floats
from locate_edit.prompts import PromptSet
from locate_edit.reports.controls import Control
from locate_edit.reports.states import Opened, states

__all__ = ["Layers", "layers", "lens_readings"]

FITS = 0.5
"""A stream fits where the original model keeps this share of the likelihood of retained prompts with it."""
CARRIES = 0.5
"""A layer carries an answer where the original model keeps this share of its likelihood."""


@dataclass(frozen=True, eq=False)
class Layers:
    """What is left of each answer after each layer, by state of the model (see `COLUMNS` in `reports.states`).

    Attributes:
        lens: what the logit lens reads, `item layer` (probability): exp of the weighted mean log-probability of the
            scored tokens, the text before each being given. The first layer is the stream before all layers, the last
            one's is the metric `likelihood`. NaN for a prompt whose weights are all 0.
        carried: likelihood of each answer when the original model goes on from the state's stream after a layer,
            `item layer` (probability).
        kept: the same of retained prompts, `retained_item layer` (probability).
        own: likelihood of the forgotten and of the retained prompts in the original model (probability).
        names: a label for each prompt: its last words and its target.
        depth: unlearning depth of the edit, where there is an oracle; None without.
        model: what is written under a figure.
    """

    lens: Mapping[str, Floats]
    carried: Mapping[str, Floats]
    kept: Mapping[str, Floats]
    own: tuple[float, float]
    names: tuple[str, ...]
    depth: Depth | None = None
    model: str = ""

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return int(next(iter(self.carried.values())).shape[1])

    def fits(self, state: str) -> list[bool]:
        """Whether the state's stream after each layer means to the original model what its own does."""
        return [bool(each >= FITS * self.own[1]) for each in np.nanmean(self.kept[state], axis=0)]

    def carries(self, state: str) -> list[bool | None]:
        """Whether each layer still carries the answers; None where the stream does not fit."""
        found = np.nanmean(self.carried[state], axis=0)
        return [
            bool(each >= CARRIES * self.own[0]) if fits else None
            for each, fits in zip(found, self.fits(state), strict=True)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per state and layer: means over prompts, and what follows from them."""
        return [
            {
                "state": state,
                "layer": layer,
                "lens": float(np.nanmean(self.lens[state][:, layer + 1])),
                "carried": float(np.nanmean(self.carried[state][:, layer])),
                "kept": float(np.nanmean(self.kept[state][:, layer])),
                "carries": self.carries(state)[layer],
            }
            for state in self.carried
            for layer in range(self.n_layers)
        ]

    def in_words(self) -> str:
        """Which layers of the edited model still carry the answers, beside the random mask and the oracle."""
        said = [
            _in_words(state, self.carries(state)) for state in self.carried if state != "before"
        ]
        score = "" if self.depth is None else self.depth.score.estimate
        return f"{'; '.join(said)}." + (f" Unlearning depth: {score:.2f}." if score else "")

    def depth_in_words(self) -> str:
        """What unlearning depth says, or why it says nothing; nothing without an oracle."""
        if self.depth is None:
            return ""
        score = self.depth.score
        if score.withheld:
            return f"Unlearning depth has no number: {score.withheld}."
        return (
            f"Unlearning depth is {score.estimate:.2f}: 0 is an edit after which every layer still carries the "
            "answers, 1 one after which none carries more than the oracle's."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the values of every prompt."""
        return {
            "layers": self.n_layers,
            "own": {"forget": self.own[0], "retain": self.own[1]},
            "names": list(self.names),
            "model": self.model,
            **{
                what: {state: _plain(values) for state, values in getattr(self, what).items()}
                for what in ("lens", "carried", "kept")
            },
            "carries": {state: self.carries(state) for state in self.carried},
            "unlearning_depth": None
            if self.depth is None
            else {
                "score": self.depth.score.estimate,
                "withheld": self.depth.score.withheld,
                "layers": self.depth.rows(),
            },
        }


def layers(
    target: Edit | nn.Module,
    *,
    forget: PromptSet | None = None,
    retain: PromptSet | None = None,
    original: nn.Module | None = None,
    oracle: nn.Module | None = None,
    random: bool | int | Sequence[Control] | None = 0,
    most: int = 40,
    batch_size: int = 16,
    seed: int = 0,
) -> Layers:
    """Read every layer of each state, and let the original model go on from each.

    The model is afterwards as it was. One forward pass a state, and two sets times one pass a layer and state of the
    original.

    Args:
        target: an applied edit, or the edited model.
        forget: what was to be forgotten; None takes the prompts of the edit.
        retain: prompts that every state knows; None takes those of the edit.
        original: the model before the edit, where ``target`` is no edit.
        oracle: a model trained without the forget prompts; adds unlearning depth.
        random: the random control, see `locate_edit.reports.controls.wanted`; of several, the mean.
        most: how many prompts of each set are looked at; evenly spread where there are more.
        batch_size: rows a forward pass.
        seed: of the random masks.

    Raises:
        EditError: no original model, no prompts, or models of different kinds.
        PromptError: prompts that are too long for a model.
    """
    if isinstance(target, Edit):
        forget = target.forget if forget is None else forget
        retain = target.retain if retain is None else retain
    if forget is None or retain is None:
        raise EditError("layers needs forget and retain prompts: pass forget= and retain=")
    if most < 1:
        raise EditError(f"most is a number of prompts of at least 1, got {most}")
    opened = states(target, original=original, oracle=oracle, random=random, seed=seed)
    if "before" not in opened:
        raise EditError(
            "layers needs the model before the edit: give the edit itself, or original="
        )
    asked, kept = _spread(forget, most), _spread(retain, most)
    with opened["before"][0]() as model:
        about = describe(model)
        own = tuple(continued(model, s, None, batch_size=batch_size) for s in (asked, kept))
    if any(np.isnan(each).all() for each in own):
        raise EditError("no prompt scores a token: the weights of a token mask are all 0")
    lens, put = {}, {}
    for state, ways in opened.items():
        lens[state] = np.mean([_lens(way, asked, batch_size) for way in ways], axis=0)
        put[state] = tuple(
            np.mean([_put_into(opened["before"][0], way, s, batch_size) for way in ways], axis=0)
            for s in (asked, kept)
        )
    costs = {state: (own[0] - on, own[1] - off) for state, (on, off) in put.items()}
    depth = None
    if "oracle" in costs:
        depth = from_costs(costs["oracle"][0], costs["after"][0], costs["oracle"][1])
    return Layers(
        lens,
        {state: np.exp(on) for state, (on, _) in put.items()},
        {state: np.exp(off) for state, (_, off) in put.items()},
        (float(np.nanmean(np.exp(own[0]))), float(np.nanmean(np.exp(own[1])))),
        tuple(_name(asked, item) for item in range(len(asked))),
        depth,
        about.name,
    )


def lens_readings(model: nn.Module, prompts: PromptSet, *, batch_size: int = 16) -> Floats:
    """What the logit lens reads of each prompt's target after each layer, see `Layers.lens`, `item layer`.

    Raises:
        PromptError: prompts that are too long for the model.
    """
    prompts.check_context(model)
    about = describe(model)
    total = np.zeros((len(prompts), about.n_layers + 1))
    mass = np.zeros(len(prompts))
    for batch in scored_batches(model, prompts, batch_size):
        lens = logit_lens(about, batch)
        items = np.array(batch.items)[batch.item.cpu().numpy()]
        weight = batch.weight.double().cpu().numpy()
        # The smallest number of float32 stands for a probability that was rounded to nothing.
        floor = torch.finfo(torch.float32).tiny
        log_p = lens.probability.double().clamp(min=floor).log().numpy()
        np.add.at(mass, items, weight)
        np.add.at(total, items, (log_p * weight).T)
    empty = mass[:, None] <= 0
    mean = total / np.where(empty, 1.0, mass[:, None])
    return np.asarray(np.where(empty, np.nan, np.exp(mean)), dtype=np.float64)


def _lens(opened: Opened, prompts: PromptSet, batch_size: int) -> Floats:
    with opened() as model:
        return lens_readings(model, prompts, batch_size=batch_size)


def _put_into(reader: Opened, source: Opened, prompts: PromptSet, batch_size: int) -> Floats:
    """Mean log-probability with which the reader goes on from the source's stream, `item layer` (nats a token)."""
    with source() as model:
        # Kept, because reader and source may be one model in two states.
        streams = list(read_streams(model, prompts, batch_size=batch_size))
        size = _size(model)
    with reader() as model:
        if (mine := _size(model)) != size:
            raise EditError(
                "cannot put the residual stream of one model into another of another kind: expected the same class, "
                f"number of layers, width and vocabulary, got {size} and {mine}"
            )
        return continued(model, prompts, streams, batch_size=batch_size)


def _size(model: nn.Module) -> tuple[str, int, int, int]:
    about = describe(model)
    return type(model).__name__, about.n_layers, about.d_model, about.vocab


def _spread(prompts: PromptSet, most: int) -> PromptSet:
    if len(prompts) <= most:
        return prompts
    chosen = np.linspace(0, len(prompts) - 1, most).round().astype(int)
    return prompts.select([int(item) for item in chosen])


def _name(prompts: PromptSet, item: int) -> str:
    decode = prompts.tokenizer.decode
    target = str(decode(prompts.target_ids(item))).strip()
    before = str(decode(prompts.prompt_ids(item), skip_special_tokens=True)).strip()
    before = before if len(before) <= 28 else "…" + before[-27:]
    return f"{before} → {target[:20]}"


_WHO = {
    "after": "After the edit",
    "random": "with a random mask of equal size",
    "oracle": "in a model that never learned them",
}


def _in_words(state: str, carries: Sequence[bool | None]) -> str:
    """What the layers of one state carry."""
    if all(each is None for each in carries):
        return f"{_WHO[state]} no layer's stream fits the original model, so nothing can be said"
    known = [str(layer) for layer, each in enumerate(carries) if each]
    unfit = [str(layer) for layer, each in enumerate(carries) if each is None]
    which = f" (after layer {', '.join(known)})" if known else ""
    rest = f" of {len(carries)} layers still carry the answers" if state == "after" else ""
    said = f"{_WHO[state]} {len(known) or 'none'}{rest}{which}"
    return said + (f", and the stream does not fit after layer {', '.join(unfit)}" if unfit else "")


def _plain(values: Floats) -> list[list[float | None]]:
    return [[None if np.isnan(v) else float(v) for v in row] for row in values]
