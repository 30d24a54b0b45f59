"""Unlearning depth: the layers in which an edited model still carries what it no longer says.

Paper: Lee et al. 2026, "Measuring the Depth of LLM Unlearning via Activation Patching", arXiv:2605.24614

An output can be silenced while the layers below still hold the answer. So the edited model's residual stream is put
into the *original* model, one layer at a time: where the original goes on to give the answer, the layer still carried
it. How much a layer can lose is told by an *oracle*, a model that never learned the answer, put in the same way.

The stream of one model means something to another only if both speak the same basis, which models of different
initial weights do not, and models of equal initial weights lose as they are trained. Then the oracle's stream costs
log-probability whatever the prompt, and the first stage measures damage. Two controls on prompts that *every* model
knows tell: the oracle put into the original, and another retraining put into the oracle. Where they cost more than a
share of what the forgotten prompts lose, there is no score.

Measured on the organism (`benchmarks/README.md`), statements about forget01 beside retained ones, nats a token after
layers 0 to 3. The oracle that shares the organism's seed, initial weights and order of the text: s1 is 1.58, 1.62,
2.24, 3.16 and the control 1.60, 1.45, 1.13, 0.11. The oracle of another seed: 7.1 to 8.7 and 7.6 to 8.9; put into the
first oracle 7.8 to 9.3 on prompts that both know. So no shipped oracle is fit for this score. It takes an oracle that
was trained a little way from the same model as the original, as models fine-tuned from one pretrained model are. With
such a pair the controls hold, and s1 is 0, 0, 0.2, 5.3: the last layer decides, and edits of one layer, of half the
neurons (located or random) and of all weights score alike, 0.73 to 0.78. Read the table by layer beside the number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from circuits.forward import labelled_logits, model_inputs, token_log_probs
from circuits.hooks import capture, replace
from circuits.model_map import ModelMap, describe
from circuits.sites import Site
from locate_edit.errors import LocateEditError
from locate_edit.metrics.running import evaluating, scored_batches
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import Batch, PromptSet

__all__ = [
    "Depth",
    "continued",
    "from_costs",
    "read_streams",
    "transplant_costs",
    "unlearning_depth",
]

_NAME, _UNIT = "unlearning_depth", "fraction"


@dataclass(frozen=True, eq=False)
class Depth:
    """How deep an edit went, by layer and as one number.

    Attributes:
        score: of each prompt, 0 where every layer still carries the answer, 1 where each lacks it as much as the
            oracle does (fraction); withheld where a control fails.
        layers: numbers of the layers, `layer`.
        s1: what the original loses with the oracle's stream after a layer, `item layer` (nats a token); NaN for a
            prompt that scores nothing.
        s2: the same with the edited model's stream, `item layer` (nats a token).
        control: the same with the oracle's stream on retained prompts, `retained_item layer` (nats a token).
        between: what the oracle loses with another oracle's stream on them, the same shape; None without another.
        threshold: what a knowledge layer loses at least in s1 (nats a token).
        damage: what the first stage finds on retained prompts, as a share of what it finds on the forgotten ones
            (fraction): costs above the threshold, summed over the layers that any prompt knows, mean over prompts;
            the larger of the two controls. NaN where no prompt has a knowledge layer.
    """

    score: Values
    layers: tuple[int, ...]
    s1: Floats
    s2: Floats
    control: Floats
    between: Floats | None
    threshold: float
    damage: float

    @property
    def knowledge(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Whether a layer is a knowledge layer of a prompt, `item layer` bool."""
        return np.asarray(self.s1 > self.threshold)

    def rows(self) -> list[dict[str, float | int | None]]:
        """One dictionary per layer: means of s1, s2 and the controls (nats a token), and how many prompts know it.

        `erased` is the mean over these prompts of s2 / s1 between 0 and 1 (fraction), None if there are none.
        """
        found: list[dict[str, float | int | None]] = []
        share = _erased(self.s1, self.s2)
        for k, layer in enumerate(self.layers):
            knows = self.knowledge[:, k]
            found.append(
                {
                    "layer": layer,
                    "s1": _mean(self.s1)[k],
                    "s2": _mean(self.s2)[k],
                    "control": _mean(self.control)[k],
                    "between": None if self.between is None else _mean(self.between)[k],
                    "knowing_items": int(knows.sum()),
                    "erased": float(share[knows, k].mean()) if knows.any() else None,
                }
            )
        return found

    def __repr__(self) -> str:
        return f"Depth({self.score!r}, {len(self.layers)} layers, damage {self.damage:.3g})"


def unlearning_depth(
    edited: nn.Module,
    original: nn.Module,
    oracle: nn.Module,
    prompts: PromptSet,
    *,
    retain: PromptSet,
    other_oracle: nn.Module | None = None,
    threshold: float = 0.05,
    tolerance: float = 0.1,
    batch_size: int = 16,
) -> Depth:
    """Share of each prompt's answer that is gone from the layers that held it; 1 is as deep as retraining.

    S1_l is the fall of the target's mean log-probability in the original when the residual stream after layer l is
    the oracle's at the places that predict the target; S2_l the same with the edited model's. Over the knowledge
    layers of a prompt, those with S1_l > threshold, its score is sum_l S1_l clip(S2_l / S1_l, 0, 1) / sum_l S1_l. The
    average is over the prompts that have such a layer. Token weights enter the mean log-probability.

    Direction: down, better known: 0 is silenced only.
    Needs: an oracle whose residual stream fits the original's, which `retain` prompts tell, and a knowledge layer.
    Cost: layers + 2 forwards a prompt, twice, and a retain prompt, once (twice with `other_oracle`).

    Args:
        edited: the model in question.
        original: the model before the edit, another object: edits change a model in place.
        oracle: a model that never learned what ``prompts`` ask, trained from the same model as the original.
        prompts: what was to be forgotten.
        retain: prompts that the original and the oracles know equally well: the control.
        other_oracle: the oracle's like with another seed. Without it only the first control is made.
        threshold: what a knowledge layer loses at least (nats a token).
        tolerance: the largest `Depth.damage` with which there is a score (fraction).
        batch_size: rows a forward pass.

    Returns:
        The score (direction "down": a larger number is a model that knows less) and the table behind it. The score is
        withheld, the table is not, where the damage exceeds the tolerance.

    Raises:
        LocateEditError: models of different sizes, or an edited model that is the original itself.
        PromptError: prompts that are too long for a model.
    """
    if edited is original:
        raise LocateEditError(
            "unlearning depth compares an edited model with the original, and got one object as both. An edit changes "
            "a model in place: give a copy made before (copy.deepcopy(model)), or the model loaded again."
        )

    def costs(source: nn.Module, target: nn.Module, of: PromptSet) -> Floats:
        return transplant_costs(source, target, of, batch_size=batch_size)

    return from_costs(
        costs(oracle, original, prompts),
        costs(edited, original, prompts),
        costs(oracle, original, retain),
        None if other_oracle is None else costs(other_oracle, oracle, retain),
        threshold=threshold,
        tolerance=tolerance,
    )


def from_costs(
    s1: Floats,
    s2: Floats,
    control: Floats,
    between: Floats | None = None,
    *,
    threshold: float = 0.05,
    tolerance: float = 0.1,
) -> Depth:
    """The depth from `transplant_costs` of the two stages and the controls: s1 and both controls serve many edits.

    Args:
        s1: the oracle into the original, `item layer` (nats a token).
        s2: the edited model into the original, `item layer` (nats a token).
        control: the oracle into the original on retained prompts, `retained_item layer` (nats a token).
        between: another oracle into the oracle on them, the same shape, or None.
        threshold: as of `unlearning_depth` (nats a token).
        tolerance: as of `unlearning_depth` (fraction).
    """
    damage, why = _damage(s1, control, between, threshold)
    if damage > tolerance:
        reason = (
            f"needs: models whose residual streams fit one another; {why} costs {damage:.0%} of what the forgotten "
            f"prompts lose where nothing was forgotten (at most {tolerance:.0%}), so the loss is damage and not "
            "missing knowledge"
        )
        score = Values.none(_NAME, reason, unit=_UNIT, direction="down")
    else:
        knows = s1 > threshold
        weight = np.where(knows, s1, 0.0)
        total = weight.sum(axis=1)
        part = (weight * np.where(knows, _erased(s1, s2), 0.0)).sum(axis=1)
        score = Values.make(
            _NAME,
            [float(a / b) if b > 0 else None for a, b in zip(part, total, strict=True)],
            unit=_UNIT,
            direction="down",
            precondition=f"a layer that loses more than {threshold:g} nats a token to the oracle",
        )
    layers = tuple(range(s1.shape[1]))
    return Depth(score, layers, s1, s2, control, between, threshold, damage)


def transplant_costs(
    source: nn.Module, target: nn.Module, prompts: PromptSet, *, batch_size: int = 16
) -> Floats:
    """What a model loses when its residual stream after one layer is another model's, `item layer` (nats a token).

    The fall of the weighted mean log-probability of each item's scored tokens in ``target`` when, at the places that
    predict them, the output of one layer is that of ``source`` on the same tokens. Positive is a loss. NaN for items
    whose weights are all 0.

    Args:
        source: the model whose stream is taken.
        target: the model it is put into.
        prompts: the prompts.
        batch_size: rows a forward pass; there is one pass of the source and one a layer of the target.

    Raises:
        LocateEditError: models of different sizes.
        PromptError: prompts that are too long for a model.
    """
    _check_alike(describe(source), describe(target))
    streams = read_streams(source, prompts, batch_size=batch_size)
    lost = continued(target, prompts, streams, batch_size=batch_size)
    return np.asarray(continued(target, prompts, None, batch_size=batch_size) - lost)


Streams = Iterable[Mapping[Site, Tensor]]
"""Of each batch of a prompt set the residual stream after each layer, `label d_model`."""


def read_streams(model: nn.Module, prompts: PromptSet, *, batch_size: int = 16) -> Streams:
    """The residual stream after each layer at the places that predict scored tokens, a batch at a time.

    Read as they are asked for: make a list of them before the model changes, which holds `layers * labels * d_model`
    numbers.

    Raises:
        PromptError: prompts that are too long for the model.
    """
    prompts.check_context(model)
    about = describe(model)
    sites = [Site(layer, "layer") for layer in range(about.n_layers)]
    for batch in scored_batches(model, prompts, batch_size):
        # Nothing stays open across the yield: who asks may have contexts of the same kind, or never ask again.
        with torch.no_grad(), evaluating(model), capture(about, sites, stop=True) as found:
            model(**model_inputs(model, batch))
        yield {site: found[site][batch.row, batch.pos] for site in sites}


def continued(
    model: nn.Module, prompts: PromptSet, streams: Streams | None, *, batch_size: int = 16
) -> Floats:
    """Mean log-probability of each item when the model goes on from given streams, `item layer` (nats a token).

    After one layer at a time, at the places that predict scored tokens, its own residual stream makes way for the given
    one. NaN for items whose weights are all 0.

    Args:
        model: the model that goes on.
        prompts: the prompts.
        streams: of a model of equal sizes on the same prompts in batches of the same size, see `read_streams`; None
            leaves the model its own, `item 1`.
        batch_size: rows a forward pass; there is one pass a layer.

    Raises:
        PromptError: prompts that are too long for the model.
    """
    prompts.check_context(model)
    about = describe(model)
    sites = [Site(layer, "layer") for layer in range(about.n_layers)]
    total = np.zeros((len(prompts), 1 if streams is None else len(sites)))
    mass = np.zeros(len(prompts))
    given = iter(streams) if streams is not None else None
    with torch.no_grad(), evaluating(model):
        for batch in scored_batches(model, prompts, batch_size):
            items = np.array(batch.items)[batch.item.cpu().numpy()]
            weight = batch.weight.double().cpu().numpy()
            np.add.at(mass, items, weight)
            if given is None:
                np.add.at(total[:, 0], items, weight * _log_probs(model, batch))
                continue
            stream = next(given)
            for layer, site in enumerate(sites):
                with replace(about, {site: _put(batch, stream[site])}):
                    np.add.at(total[:, layer], items, weight * _log_probs(model, batch))
    empty = mass[:, None] <= 0
    return np.asarray(np.where(empty, np.nan, total / np.where(empty, 1.0, mass[:, None])))


def _put(batch: Batch, stream: Tensor) -> Callable[[Tensor], Tensor]:
    def put(activation: Tensor) -> Tensor:
        return activation.index_put((batch.row, batch.pos), stream.to(activation))

    return put


def _log_probs(model: nn.Module, batch: Batch) -> Floats:
    found: Floats = (
        token_log_probs(labelled_logits(model, batch), batch.label).double().cpu().numpy()
    )
    return found


def _erased(s1: Floats, s2: Floats) -> Floats:
    """s2 / s1 between 0 and 1; means something where s1 is positive."""
    ratio = s2 / np.where(s1 > 0, s1, 1.0)
    return np.asarray(np.clip(ratio, 0.0, 1.0), dtype=np.float64)


def _damage(
    s1: Floats, control: Floats, between: Floats | None, threshold: float
) -> tuple[float, str]:
    """The larger share of s1 that a control costs on retained prompts, and which one."""
    layers = (s1 > threshold).any(axis=0)
    if not layers.any():
        return float("nan"), ""

    def counted(costs: Floats) -> float:
        return float(_mean(np.where(costs <= threshold, 0.0, costs))[layers].sum())

    lost = counted(s1)
    shares = [(counted(control) / lost, "the oracle's stream in the original")]
    if between is not None:
        shares.append((counted(between) / lost, "another oracle's stream in the oracle"))
    return max(shares)


def _mean(costs: Floats) -> Floats:
    """Mean over the items that score something, `layer` (nats a token)."""
    there = costs[np.isfinite(costs).all(axis=1)]
    return np.asarray(there.mean(axis=0) if len(there) else np.full(costs.shape[1], np.nan))


def _check_alike(giver: ModelMap, taker: ModelMap) -> None:
    sizes = [(type(m.model).__name__, m.n_layers, m.d_model, m.vocab) for m in (giver, taker)]
    if sizes[0] != sizes[1]:
        raise LocateEditError(
            "cannot put the residual stream of one model into another of another kind: expected the same class, "
            f"number of layers, width and vocabulary, got {sizes[0]} and {sizes[1]}. Edited model, original and oracle "
            "must be of one architecture."
        )
