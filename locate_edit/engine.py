"""The one place that trains weights: packed slices of a frozen model.

A `Run` is what an edit method receives. It offers forward passes over labelled positions (`score`),
the unedited model (`base`, `reference`), and two ways to change weights: `fit`, which trains the
packed slices on a loss, and `write`, which sets them. Everything outside the slices is never
written, so it stays bit-identical by construction. `add` brings tensors that are no part of the
model (`locate_edit.additions`), which `fit` trains beside the slices or instead of them.

One step of `fit` costs, relative to a forward pass of the whole model, ``1 + (1 - start/n_layers) +
f``: the forward, the input gradients above the lowest edited block ``start``, and the weight
gradient of the edited fraction ``f`` of the parameters. Hidden states below ``start`` are kept when
items come back, which saves ``start/n_layers`` of the forward too.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from circuits import ModelMap, Site, capture
from circuits.forward import labelled_logits, model_inputs, token_log_probs
from circuits.hooks import Activations, Visit
from circuits.hooks import replace as replace_activations
from locate_edit.additions import Adapter, Added, Addition, Placed, install, made
from locate_edit.delta import Change, Delta
from locate_edit.errors import EditError
from locate_edit.losses import per_item_mean, per_item_sum
from locate_edit.never_seen import Levels
from locate_edit.optim import Optim
from locate_edit.packed import packed_forward
from locate_edit.prefix import PrefixCache
from locate_edit.prompts import Batch, PromptSet
from locate_edit.slots import Slot

logger = logging.getLogger(__name__)

Combine = Callable[[dict[str, list[Tensor]]], list[Tensor]]
"""One direction, packed as a tensor a slot, from the gradients of the terms of a loss by name."""

Train = Literal["both", "slices", "additions"]
"""What `Run.fit` trains: the packed slices, the additions, or both together."""

CHECK_EVERY_ON_GPU = (
    16  # steps between looks at the loss on a GPU: a look waits for all queued work
)


@dataclass(frozen=True)
class Scored:
    """One forward pass over a batch: logits `label vocab` (float32) and the batch on the model's device."""

    logits: Tensor
    batch: Batch

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.batch.items)

    @cached_property
    def log_prob(self) -> Tensor:
        """Log-probability `label` of each labelled token, in nats."""
        return token_log_probs(self.logits, self.batch.label)

    def nll(self) -> Tensor:
        """Mean negative log-likelihood a labelled token of each prompt: `item`, in nats a token."""
        return per_item_mean(-self.log_prob, self.batch.item, self.n, self.batch.weight)

    def total_log_prob(self) -> Tensor:
        """Log-probability of each prompt's whole target: `item`, in nats."""
        return per_item_sum(self.log_prob * self.batch.weight, self.batch.item, self.n)

    def cross_entropy(self) -> Tensor:
        """Mean negative log-likelihood over all labelled tokens of the batch, in nats a token."""
        weight = self.batch.weight
        return -(self.log_prob * weight).sum() / weight.sum()

    def mean(self, per_label: Tensor) -> Tensor:
        """Weighted mean of ``per_label`` values `label` over the batch."""
        weight = self.batch.weight
        return (per_label * weight).sum() / weight.sum()


@dataclass(frozen=True)
class Step:
    """The data of one step: batches on the CPU, with the index of the step (0-based)."""

    index: int
    forget: Batch
    retain: Batch | None


@dataclass(frozen=True)
class StopWhen:
    """End training early once a quantity crosses a bound.

    Attributes:
        quantity: name of a logged term ("loss", "forget", "retain", ...), or a function of the model that returns a
            number. A function sees the model as edited so far, in evaluation mode and without gradients.
        above: stop when the quantity is larger.
        below: stop when the quantity is smaller.
        every: steps between looks.
    """

    quantity: str | Callable[[nn.Module], float]
    above: float = math.inf
    below: float = -math.inf
    every: int = 1

    def reason(self, step: int, record: dict[str, Any], model: nn.Module) -> str | None:
        """Why to stop after ``step``, or None."""
        if (step + 1) % self.every:
            return None
        name = (
            self.quantity
            if isinstance(self.quantity, str)
            else getattr(self.quantity, "__name__", "metric")
        )
        if isinstance(self.quantity, str):
            if self.quantity not in record:
                raise EditError(f"cannot stop on {name!r}: this method logs {sorted(record)}")
            value = float(record[self.quantity])
        else:
            with torch.no_grad():
                value = float(self.quantity(model))
        if value > self.above:
            return f"{name} {value:.4g} rose above {self.above:g}"
        if value < self.below:
            return f"{name} {value:.4g} fell below {self.below:g}"
        return None


@dataclass(frozen=True)
class Settings:
    """How a run is executed; none of it changes what a method means.

    Attributes:
        batch_size: prompts a batch, of the forget and of the retain set each.
        seed: seed of the order of the data.
        reuse_prefix_bytes: memory for hidden states kept below the lowest edited block; 0 switches reuse off.
        reference_bytes: memory for kept logits of the base model; beyond it they are computed when needed.
        gradient_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
        stop: rules that end training early.
        on_step: called after every step with its log record.
    """

    batch_size: int = 8
    seed: int = 0
    reuse_prefix_bytes: int = 2**30
    reference_bytes: int = 2**28
    gradient_checkpointing: bool = False
    stop: tuple[StopWhen, ...] = ()
    on_step: Callable[[dict[str, Any]], None] | None = None


@dataclass
class Run:
    """A model with packed slices that an edit method may train or write. Made by `locate_edit.edit`."""

    model_map: ModelMap
    slots: Sequence[Slot]
    forget: PromptSet
    retain: PromptSet | None
    settings: Settings
    levels: Levels | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model: nn.Module = self.model_map.model
        self.device = next(self.model.parameters()).device
        self.old = [slot.selection.gather(slot.parameter.data) for slot in self.slots]
        self._now = self.old
        self.placed: Placed | None = None
        self._above_slices = False  # whether kept hidden states hold for unedited slices alone
        self._kept_logits: dict[tuple[int, int], Tensor] = {}
        self._kept_hidden: dict[tuple[int, int, int], list[Tensor]] = {}
        self._free_bytes = self.settings.reference_bytes
        self._references: dict[int, list[Tensor]] = {}
        self._also_seen: list[tuple[PromptSet, PromptSet | None]] = []
        self._prefix = self._make_prefix(self.slots)

    # -- forward passes ---------------------------------------------------------------------------

    def score(self, batch: Batch) -> Scored:
        """One forward pass over a CPU ``batch`` with the model as edited so far."""
        there = batch.to(self.device)
        if self._prefix is None:
            return Scored(labelled_logits(self.model, there), there)
        with self._prefix.supply(self._prefix.hidden(batch)):
            return Scored(labelled_logits(self.model, there), there)

    def activations(self, batch: Batch, sites: Sequence[Site]) -> Activations:
        """Activations at ``sites`` on a CPU ``batch`` with the model as edited so far; nothing above the last one runs.

        They belong to the graph inside `fit`. Axes are those of `ModelMap.read_point`.
        """
        there = batch.to(self.device)
        with ExitStack() as stack:
            stack.enter_context(self._reuse_for(sites))
            if self._prefix is not None:
                stack.enter_context(self._prefix.supply(self._prefix.hidden(batch)))
            found = stack.enter_context(capture(self.model_map, sites, stop=True))
            self.model(**model_inputs(self.model, there))
        return found

    @contextmanager
    def changed(self, changes: Mapping[Site, Visit]) -> Iterator[None]:
        """Forward passes whose activations go through functions, by site, see `circuits.hooks.replace`."""
        with self._reuse_for(list(changes)), replace_activations(self.model_map, changes):
            yield

    @contextmanager
    def _reuse_for(self, sites: Sequence[Site]) -> Iterator[None]:
        """No reuse of kept hidden states in the context if one of ``sites`` lies below what they skip to."""
        kept = self._prefix
        if kept is not None and not all(
            site.layer is not None
            and site.layer >= kept.start
            and site.kind in ("neuron", "mlp", "layer")
            for site in sites
        ):
            self._prefix = None
        try:
            yield
        finally:
            self._prefix = kept

    @contextmanager
    def base(self) -> Iterator[None]:
        """The unedited model while the context is open: old values in the slices, additions off, no second copy."""
        written = self.wrote
        try:
            if written:
                self._put(self.old)
            with self._without_additions():
                yield
        finally:
            if written:
                self._put(self._now)

    @contextmanager
    def swapped(self, delta: Delta) -> Iterator[None]:
        """Another model over the same base while the context is open: the new values of ``delta`` in the slices.

        ``delta`` comes from `delta()` of this run or of one with the same mask. Additions are off.
        """
        now, kept = self._now, self._prefix
        try:
            self._put([delta.changes[slot.name].new for slot in self.slots])
            if self._above_slices:
                self._prefix = None
            with self._without_additions():
                yield
        finally:
            self._prefix = kept
            self._put(now)
            self._now = now

    @contextmanager
    def _without_additions(self) -> Iterator[None]:
        """Forward passes without this run's additions while the context is open."""
        was = self.placed is not None and self.placed.on
        try:
            if self.placed is not None:
                self.placed.on = False
            yield
        finally:
            if self.placed is not None:
                self.placed.on = was

    @contextmanager
    def on(self, forget: PromptSet, retain: PromptSet | None = None) -> Iterator[None]:
        """Other data while the context is open, for methods that train in phases; it has no never-seen levels."""
        before = self.forget, self.retain, self.levels
        self._also_seen.append((forget, retain))  # kept alive: references are kept by identity
        try:
            self.forget, self.retain, self.levels = forget, retain, None
            yield
        finally:
            self.forget, self.retain, self.levels = before

    @torch.no_grad()
    def reference(self, prompts: PromptSet, batch: Batch) -> Tensor:
        """The base model's log-probability `label` of ``batch`` of ``prompts``, computed once a set."""
        if id(prompts) not in self._references:
            with self.base():
                self._references[id(prompts)] = self._per_item(prompts)
        kept = self._references[id(prompts)]
        return torch.cat([kept[i] for i in batch.items])

    @torch.no_grad()
    def reference_logits(self, prompts: PromptSet, batch: Batch) -> Tensor:
        """The base model's logits `label vocab` on ``batch`` (of ``prompts``), kept while memory for them lasts."""
        keys = [(id(prompts), i) for i in batch.items]
        if all(key in self._kept_logits for key in keys):
            return torch.cat([self._kept_logits[key] for key in keys])
        with self.base():
            logits = self.score(batch).logits
        for key, part in zip(keys, logits.split(_labels_per_item(batch)), strict=True):
            size = part.numel() * part.element_size()
            if key not in self._kept_logits and size <= self._free_bytes:
                self._kept_logits[key] = part.clone()
                self._free_bytes -= size
        return logits

    @torch.no_grad()
    def reference_hidden(self, prompts: PromptSet, batch: Batch, layer: int) -> Tensor:
        """The base model's residual stream `row token d_model` after ``layer``, kept while memory for it lasts.

        Padding holds zeros.
        """
        rows = _rows_per_item(batch)
        keys = [(id(prompts), layer, i) for i in batch.items]
        lengths = [part.sum(1).tolist() for part in batch.attention_mask.split(rows)]
        if not all(key in self._kept_hidden for key in keys):
            with self.base():
                hidden = self.activations(batch, [Site(layer, "layer")])[Site(layer, "layer")]
            for key, part, length in zip(keys, hidden.split(rows), lengths, strict=True):
                size = sum(length) * hidden.shape[-1] * hidden.element_size()
                if key not in self._kept_hidden and size <= self._free_bytes:
                    self._kept_hidden[key] = [
                        row[:n].clone() for row, n in zip(part, length, strict=True)
                    ]
                    self._free_bytes -= size
            real = batch.attention_mask.bool().to(hidden.device)
            return hidden.masked_fill(~real[..., None], 0.0)
        return nn.utils.rnn.pad_sequence(
            [row for key in keys for row in self._kept_hidden[key]], batch_first=True
        )

    @torch.no_grad()
    def forget_nll(self) -> Tensor:
        """Mean negative log-likelihood a token of every forget prompt now: `item`, in nats a token."""
        found = torch.zeros(len(self.forget), device=self.device)
        for batch in self.forget.batches(self.settings.batch_size):
            found[list(batch.items)] = self.score(batch).nll()
        return found

    def towards_level(self, batch: Batch, nll: Tensor) -> Tensor:
        """How hard to push each forget prompt of ``batch`` up: `item` in [-1, 1], ones without a never-seen level.

        Proportional control: 1 far below its never-seen level, 0 at the level, negative (pull back) beyond it, so that
        every prompt ends at the level and none beyond.
        """
        if self.levels is None:
            return torch.ones_like(nll)
        return self.levels.push(batch.items, nll.detach())

    def add_stop(self, rule: StopWhen) -> None:
        """Let a method bring its own rule to end training early."""
        self.settings = replace(self.settings, stop=(*self.settings.stop, rule))

    def gradients(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """Gradient of a scalar with respect to every slot, packed like it, as the model is now; zeros if there is none.

        Additions take part with their present values, and have no gradient here.

        Args:
            loss: makes the scalar with the passes above, such as ``lambda: run.score(batch).cross_entropy()``.
        """
        leaves = [now.to(_wide(now), copy=True).requires_grad_() for now in self._now]
        with torch.enable_grad(), packed_forward(self.model, self.slots, leaves):
            value = loss()
            if not value.requires_grad:
                return [torch.zeros_like(leaf) for leaf in leaves]
            found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        return list(found)

    # -- changing weights -------------------------------------------------------------------------

    def add(self, additions: Sequence[Addition]) -> None:
        """Put additions in place, for `fit` to train; they start from the run's seed and change nothing yet.

        Extra tokens then are valid inputs; `extra_ids` says which.

        Raises:
            EditError: there are additions already, none are given, or they do not fit the model.
            SiteError: the model has no such site.
        """
        if self.placed is not None:
            raise EditError(
                "this run has additions already: pass all of them at once, or restore() it first"
            )
        if not additions:
            raise EditError("no additions were given: pass e.g. [Adapter(Site(3, 'mlp'), 16)]")
        seed = self.settings.seed
        self.placed = install(
            self.model_map,
            [made(what, self.model_map, seed=seed + n) for n, what in enumerate(additions)],
        )
        self._prefix = self._make_prefix(self.slots)

    @property
    def extra_ids(self) -> range:
        """Ids of the extra tokens that `add` made valid inputs; empty without any."""
        return range(0) if self.placed is None else self.placed.ids

    def added(self) -> tuple[Added, ...]:
        """The additions with their present values; empty without any."""
        return () if self.placed is None else self.placed.added()

    @property
    def wrote(self) -> bool:
        """Whether slices were written or trained since the run began or was restored."""
        return self._now is not self.old

    def write(self, values: Callable[[Slot, Tensor], Tensor]) -> None:
        """Set every slot to ``values(slot, packed values now)``, a tensor of the packed shape."""
        new = [
            values(slot, now).to(now.dtype) for slot, now in zip(self.slots, self._now, strict=True)
        ]
        self._finish(new)

    def fit(
        self,
        loss: Callable[[Step], dict[str, Tensor]],
        *,
        steps: int,
        lr: float,
        optim: Optim | None = None,
        combine: Combine | None = None,
        train: Train = "both",
    ) -> None:
        """Train the packed slices and the additions on ``loss`` for at most ``steps`` optimizer steps.

        Args:
            loss: the terms of the loss of one batch, by name; their sum is minimised, each is logged.
            steps: optimizer steps.
            lr: peak learning rate.
            optim: optimizer settings.
            combine: the direction to step against, packed as one tensor a slot, from the gradient of each term by name;
                by default their sum, of which there is one backward pass. Given, there is one for each term (no more
                work where terms come from forward passes of their own) and one packed gradient for each is held. The
                tensors of trained additions come after those of the slots.
            train: "both" slices and additions (where there are any), only the "slices" (additions stay as they are), or
                only the "additions" (slices stay as they are).

        Raises:
            EditError: the loss stops being a finite number (said at which step), or does not depend on anything that is
                trained; or there are no additions to train.
        """
        if steps < 0 or not lr >= 0:
            raise EditError(f"steps and lr must not be negative: got steps={steps}, lr={lr}")
        if train not in ("both", "slices", "additions"):
            raise EditError(f"train must be 'both', 'slices' or 'additions', got {train!r}")
        if train == "additions" and self.placed is None:
            raise EditError("there are no additions to train: call run.add([...]) before run.fit")
        optim = optim or Optim()
        slots = [] if train == "additions" else self.slots
        packed = [
            now.to(_wide(now), copy=True).requires_grad_() for now in (self._now if slots else [])
        ]
        with ExitStack() as stack:
            beside = [] if train == "slices" else stack.enter_context(self._leaves_of_additions())
            leaves = [*packed, *beside]
            if not leaves or not steps:
                return
            if not slots and not self.wrote:
                stack.enter_context(self._starting_at_additions())
            optimizer = optim.build(leaves, lr)
            base = (
                [old.to(_wide(old)) for old in (self.old if slots else [])]
                + [leaf.detach().clone() for leaf in beside]
                if optim.weight_decay
                else []
            )
            data = self._steps()
            stack.enter_context(torch.enable_grad())
            stack.enter_context(packed_forward(self.model, slots, packed))
            if self.settings.gradient_checkpointing:
                stack.enter_context(_checkpointed(self._layers()))
            for index in range(steps):
                started = time.process_time()
                rate = lr * optim.factor(index, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                record = self._backward(loss, data, index, optim.accumulate, leaves, combine)
                if optim.clip is not None:
                    record["grad_norm"] = nn.utils.clip_grad_norm_(leaves, optim.clip)
                if base:
                    torch._foreach_lerp_(
                        [leaf.data for leaf in leaves], base, rate * optim.weight_decay
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if slots:
                    self._put(self._narrow(packed))
                record |= {"step": index, "lr": rate, "cpu_seconds": time.process_time() - started}
                self.log.append(record)
                if self._done(index, record):
                    break
        self._check_finite(self.log)
        if slots:
            self._finish(self._narrow(packed))
        self._check_additions()
        self.log[:] = [{k: _number(v) for k, v in record.items()} for record in self.log]
        if self.levels is not None:
            self.notes["never_seen"] = self.levels.summary(self.forget_nll())

    def restore(self) -> None:
        """Write the unedited values back, bit for bit, and take the additions out."""
        if self.placed is not None:
            self.placed.remove()
            self.placed = None
            self._prefix = self._make_prefix(self.slots)
        self._put(self.old)
        self._now = self.old

    def delta(self) -> Delta:
        """What has changed so far in the slices."""
        return Delta(
            {
                slot.name: Change(slot.selection, old, new.clone())
                for slot, old, new in zip(self.slots, self.old, self._now, strict=True)
            }
        )

    def _backward(
        self,
        loss: Callable[[Step], dict[str, Tensor]],
        data: Iterator[Step],
        index: int,
        n: int,
        leaves: list[Tensor],
        combine: Combine | None,
    ) -> dict[str, Any]:
        """Gradients of ``n`` batches, averaged, into the leaves; returns the loss and its terms."""
        record: dict[str, Any] = {"loss": 0.0}
        apart: dict[str, list[Tensor]] = {}
        for _ in range(n):
            step = next(data)
            terms = loss(Step(index, step.forget, step.retain))
            total = torch.stack(list(terms.values())).sum()
            if not total.requires_grad:
                raise EditError(
                    "the loss does not depend on anything the mask selects: choose units that the scored "
                    "tokens pass through"
                )
            if combine is None:
                (total / n).backward()
            else:
                _add_gradients(apart, terms, leaves, 1 / n)
            for name, term in {"loss": total, **terms}.items():
                record[name] = record.get(name, 0.0) + term.detach() / n
        if combine is not None:
            for leaf, direction in zip(leaves, combine(apart), strict=True):
                leaf.grad = direction
        for leaf in leaves:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
        return record

    def _done(self, index: int, record: dict[str, Any]) -> bool:
        """Whether to stop after this step; raises when the loss is not finite."""
        if self.settings.on_step is not None:
            self.settings.on_step(record)
        if not self.device.type == "cuda" or (index + 1) % CHECK_EVERY_ON_GPU == 0:
            self._check_finite(self.log[-CHECK_EVERY_ON_GPU:])
        for rule in self.settings.stop:
            reason = rule.reason(index, record, self.model)
            if reason:
                self.notes["stopped"] = f"after step {index}: {reason}"
                return True
        if self.levels is not None and (index + 1) % self._steps_per_epoch() == 0:
            if self.levels.all_seen_there() and self.levels.all_there(self.forget_nll()):
                self.notes["stopped"] = (
                    f"after step {index}: every forget prompt is at its never-seen level"
                )
                return True
        return False

    def _check_finite(self, records: list[dict[str, Any]]) -> None:
        losses = torch.stack([torch.as_tensor(r["loss"], device=self.device) for r in records])
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            record = records[int(bad[0])]
            raise EditError(
                f"the loss became {float(record['loss'])} at step {record['step']}; the model was restored. "
                "Lower lr, add optim=Optim(clip=1.0), or start with fewer units"
            )

    def _finish(self, new: list[Tensor]) -> None:
        for slot, values in zip(self.slots, new, strict=True):
            if not bool(torch.isfinite(values.float()).all()):
                raise EditError(
                    f"new values of {slot.name} are not finite; the model was restored. Lower lr or clip"
                )
        self._put(new)

    def _narrow(self, leaves: list[Tensor]) -> list[Tensor]:
        """Packed leaves in the dtypes of their parameters."""
        return [leaf.detach().to(old.dtype) for leaf, old in zip(leaves, self.old, strict=True)]

    def _check_additions(self) -> None:
        if self.placed is None:
            return
        for what, values in zip(self.placed.what, self.placed.values, strict=True):
            if not all(bool(torch.isfinite(value).all()) for value in values.values()):
                raise EditError(
                    f"new values of the {what} are not finite; the model was restored. Lower lr or clip"
                )

    @contextmanager
    def _leaves_of_additions(self) -> Iterator[list[Tensor]]:
        """The tensors of the additions as leaves that hooks use while the context is open, and ordinary afterwards."""
        placed = self.placed
        if placed is None:
            yield []
            return
        leaves = []
        for values in placed.values:
            for name, value in values.items():
                values[name] = value.detach().clone().requires_grad_()
                leaves.append(values[name])
        try:
            yield leaves
        finally:
            for values in placed.values:
                for name, value in values.items():
                    values[name] = value.detach()

    @contextmanager
    def _starting_at_additions(self) -> Iterator[None]:
        """Reuse of hidden states up to the lowest adapter while the context is open, for unedited slices stay so."""
        kept = self._prefix
        try:
            self._prefix, self._above_slices = self._make_prefix([]), True
            yield
        finally:
            self._prefix, self._above_slices = kept, False

    def _put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for slot, packed in zip(self.slots, values, strict=True):
                slot.selection.scatter_(slot.parameter.data, packed)
        if values is not self.old:
            self._now = values

    # -- data -------------------------------------------------------------------------------------

    def _steps(self) -> Iterator[Step]:
        """Endless batches, both sets in a fresh seeded order every epoch."""
        forget = _batches(self.forget, self.settings.batch_size, self.settings.seed)
        retain = (
            _batches(self.retain, self.settings.batch_size, self.settings.seed + 1)
            if self.retain
            else None
        )
        while True:
            yield Step(0, next(forget), next(retain) if retain is not None else None)

    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.forget) / self.settings.batch_size)

    def _per_item(self, prompts: PromptSet) -> list[Tensor]:
        """Log-probabilities `label` of every prompt, in its order."""
        found: dict[int, Tensor] = {}
        for batch in prompts.batches(self.settings.batch_size):
            parts = self.score(batch).log_prob.split(_labels_per_item(batch))
            found.update(zip(batch.items, parts, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _layers(self) -> list[nn.Module]:
        return [self.model_map.layer_module(i) for i in range(self.model_map.n_layers)]

    def _make_prefix(self, slots: Sequence[Slot]) -> PrefixCache | None:
        """Reuse of what runs below the lowest of ``slots`` and of the additions, if anything does."""
        layers = [self.model_map.lowest_layer(slot.name) for slot in slots]
        for what in self.placed.what if self.placed is not None else ():
            layer = what.site.layer if isinstance(what, Adapter) else None
            layers.append(-1 if layer is None else layer)
        start = min(min(layers, default=0), self.model_map.n_layers - 1)
        if start < 1 or not self.settings.reuse_prefix_bytes:
            return None
        memory = self.settings.reuse_prefix_bytes
        frozen = self._frozen_attention(start, slots)
        return PrefixCache(self.model, self._layers(), start, memory, frozen)

    def _frozen_attention(self, start: int, slots: Sequence[Slot]) -> nn.Module | None:
        """The attention of the lowest edited block, if only the block's MLP is edited: it runs before that.

        Not with gradient checkpointing, whose second run of the block happens when nothing is supplied.
        """
        mlp = {piece.parameter for piece in self.model_map.slices(Site(start, "mlp"))}
        edited = [s.name for s in slots if self.model_map.lowest_layer(s.name) == start]
        if self.settings.gradient_checkpointing or not mlp.issuperset(edited):
            return None
        return self.model_map.layer_module(start).get_submodule(self.model_map.family.attn[0])


def _batches(prompts: PromptSet, size: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    whole = prompts.batch(range(len(prompts))) if len(prompts) <= size else None
    while True:
        if whole is not None:
            yield whole
            continue
        order = torch.randperm(len(prompts), generator=generator).tolist()
        for at in range(0, len(order), size):
            yield prompts.batch(order[at : at + size])


def _labels_per_item(batch: Batch) -> list[int]:
    return torch.bincount(batch.item.cpu(), minlength=len(batch.items)).tolist()


def _rows_per_item(batch: Batch) -> list[int]:
    """How many rows each item has: one, or for a masked model one a scored token."""
    first = torch.zeros(len(batch.input_ids), dtype=torch.int64).scatter(0, batch.row, batch.item)
    return torch.bincount(first, minlength=len(batch.items)).tolist()


def _add_gradients(
    totals: dict[str, list[Tensor]], terms: dict[str, Tensor], leaves: list[Tensor], share: float
) -> None:
    """Add ``share`` of the gradient of every term to its total, zeros for a term that depends on no leaf."""
    for name, term in terms.items():
        total = totals.setdefault(name, [torch.zeros_like(leaf) for leaf in leaves])
        if term.requires_grad:  # the graph is kept, since terms may share a forward pass
            found = torch.autograd.grad(
                term * share, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for part, gradient in zip(total, found, strict=True):
                part += gradient


def _wide(values: Tensor) -> torch.dtype:
    """The dtype master values are kept in: float32, or float64 for float64 models."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value


@contextmanager
def _checkpointed(layers: list[nn.Module]) -> Iterator[None]:
    """Blocks that keep no activations and run again in the backward pass."""
    before = [layer.__dict__.get("forward") for layer in layers]

    def rerun(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    try:
        for layer in layers:
            layer.forward = rerun(layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.forward = forward
