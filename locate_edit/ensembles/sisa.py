"""SISA: models trained on disjoint shards, slice by slice, from which a row can be deleted exactly.

Paper: Bourtoule et al. 2021, Machine Unlearning (arXiv:1912.03817): Sharded, Isolated, Sliced, Aggregated training.

    ensemble = Sisa(FineTune(steps=200, lr=1e-3), shards=5, slices=4).train(model, data, mask)
    ensemble.delete([17])                       # trains again what row 17 ever touched, nothing else
    ensemble.vote(ensemble.answers(test, choices=(" yes", " no")))

Every shard is a delta over the same base model, and so is every checkpoint: the ensemble of S shards with R slices
costs one model and ``S * R`` times the size of the mask. The model itself stays the base; `ShardedEnsemble.member`
switches a shard in.

Deviations from the paper: a row's shard and slice follow from its text and the seed (see `places`), not from a
shuffle, because only then is the ensemble after a deletion *the* ensemble of the remaining rows; shards are edits of a
pretrained base inside a mask, not models from scratch, so that what the base itself knows is not deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuits import ComponentMask, describe
from circuits.forward import labelled_logits, token_log_probs
from locate_edit.delta import Change, Delta
from locate_edit.editing import Method, edit
from locate_edit.ensembles._files import read, write
from locate_edit.ensembles.shards import By, Place, places, text_of
from locate_edit.errors import EditError
from locate_edit.fingerprint import difference, fingerprint
from locate_edit.losses import per_item_sum
from locate_edit.methods.fine_tune import FineTune
from locate_edit.metrics.running import evaluating
from locate_edit.prompts import PromptSet

logger = logging.getLogger(__name__)

INDEX, FORMAT = "ensemble.json", "sharded-ensemble/1"


@dataclass(frozen=True)
class Sisa:
    """How an ensemble is trained and how it forgets.

    Stage ``r`` of a shard starts at the checkpoint of stage ``r - 1`` and trains on the shard's slices 0 to ``r``;
    a stage whose slice is empty is the checkpoint before it. Its seed follows from ``seed``, shard and slice.

    Use it where deletions must be exact and are known to come. Not to delete from a model that was trained already (see
    `leave_one_out` for that), nor where one shard's data are too few to learn from.

    Cost: ``slices`` runs of ``method`` a shard; a deletion repeats those from its slice on: half a shard on average.

    Attributes:
        method: how a stage is trained, e.g. ``FineTune(steps=100, lr=1e-3)``.
        shards: number of shards. An odd number has no ties in votes between two answers.
        slices: stages a shard; more make deletions cheaper and training dearer.
        by: "text", or "group" to keep rows of one ``group`` in one shard.
        seed: seed of places and of the order of the data.
        options: further arguments of `locate_edit.edit`, such as ``batch_size``.
    """

    method: Method = field(default_factory=FineTune)
    shards: int = 3
    slices: int = 2
    by: By = "text"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shards < 1 or self.slices < 1:
            raise EditError(
                f"an ensemble needs a shard and a slice at least, got {self.shards} and {self.slices}"
            )
        if self.by not in ("text", "group"):
            raise EditError(f"by must be 'text' or 'group', got {self.by!r}")
        if taken := {"forget", "seed"} & set(self.options):
            raise EditError(f"options may not hold {sorted(taken)}: the ensemble sets them itself")

    def train(
        self, model: nn.Module, data: PromptSet, mask: ComponentMask | None
    ) -> ShardedEnsemble:
        """Train every shard on its rows of ``data`` inside ``mask``; ``model`` is as before afterwards.

        Raises:
            EditError: a shard without rows, a text in two shards, or what `locate_edit.edit` raises.
        """
        where = places(data, shards=self.shards, slices=self.slices, by=self.by, seed=self.seed)
        ensemble = ShardedEnsemble(self, model, mask, data, where)
        ensemble.checkpoints = [
            ensemble._trained(shard, 0, data, where) for shard in range(self.shards)
        ]
        return ensemble


class ShardedEnsemble:
    """Deltas over one base model, one a shard and slice. Made by `Sisa.train`.

    Attributes:
        sisa: how it was trained.
        model: the base model.
        mask: where the shards may differ from it.
        data: the rows it knows; deleted ones are gone.
        places: shard and slice of each of them.
        checkpoints: delta after each slice, by shard; None before a shard's first row.
    """

    def __init__(
        self,
        sisa: Sisa,
        model: nn.Module,
        mask: ComponentMask | None,
        data: PromptSet,
        where: Sequence[Place],
    ) -> None:
        self.sisa, self.model, self.mask, self.data = sisa, model, mask, data
        self.places = list(where)
        self.checkpoints: list[list[Delta | None]] = []
        self._base = fingerprint(model)

    def __repr__(self) -> str:
        return f"ShardedEnsemble({len(self.data)} rows, {self.sisa.shards} shards, {self.sisa.slices} slices)"

    @property
    def voters(self) -> list[int]:
        """Shards that have rows left to have learnt from."""
        return [shard for shard, stages in enumerate(self.checkpoints) if stages[-1] is not None]

    @contextmanager
    def member(self, shard: int) -> Iterator[nn.Module]:
        """The model of one shard while the context is open; the base model again afterwards.

        Raises:
            EditError: the model is not the base model now.
        """
        delta = self.checkpoints[shard][-1]
        if delta is not None and (at := delta.mismatch(self.model, "old")) is not None:
            raise EditError(
                f"the model is not the base of this ensemble now: {at} differs. Undo later edits, or switch them off: "
                "with the_edit.off(): ..."
            )
        with _switched(self.model, delta) as model:
            yield model

    # -- forgetting -------------------------------------------------------------------------------

    def delete(self, items: Iterable[int]) -> list[Place]:
        """Delete rows by index, exactly: the ensemble becomes the one trained without them, bit for bit on a CPU.

        Rows are deleted, not texts: where another row says the same (without regard to case and spacing), a warning is
        logged that names it, because the ensemble goes on knowing the text.

        Returns:
            The stages that were trained again.

        Raises:
            EditError: an index out of range, nothing left, a model that is not the base, or failing training. The
                ensemble and the model are as before.
        """
        gone = set(items)
        if wrong := sorted(i for i in gone if not 0 <= i < len(self.data)):
            raise EditError(f"no row {wrong[0]}: the ensemble has rows 0 to {len(self.data) - 1}")
        left = [i for i in range(len(self.data)) if i not in gone]
        if not left:
            raise EditError("nothing would be left of the ensemble; drop it instead")
        if (reason := difference(self._base, fingerprint(self.model))) is not None:
            raise EditError(f"the model is not the base of this ensemble now: {reason}")
        texts = {text_of(self.data[i]) for i in gone}
        if copies := [at for at, i in enumerate(left) if text_of(self.data[i]) in texts]:
            logger.warning(
                "what is deleted also stands in row %s (counted after the deletion), which stays: delete it too if the "
                "text is to be forgotten",
                ", ".join(map(str, copies)),
            )
        first: dict[int, int] = {}
        for place in (self.places[i] for i in gone):
            first[place.shard] = min(place.slice, first.get(place.shard, place.slice))
        data, where = self.data.select(left), [self.places[i] for i in left]
        new = {s: self._trained(s, slice_, data, where) for s, slice_ in first.items()}
        self.data, self.places = data, where
        self.checkpoints = [new.get(s, stages) for s, stages in enumerate(self.checkpoints)]
        return [Place(s, r) for s, start in first.items() for r in range(start, self.sisa.slices)]

    def _trained(
        self, shard: int, first: int, data: PromptSet, where: Sequence[Place]
    ) -> list[Delta | None]:
        """Checkpoints of a shard whose stages from ``first`` on are trained anew."""
        stages = self.checkpoints[shard][:first] if first else []
        for stage in range(first, self.sisa.slices):
            last = stages[-1] if stages else None
            if Place(shard, stage) not in where:
                stages.append(last)
                continue
            items = [i for i, p in enumerate(where) if p.shard == shard and p.slice <= stage]
            seed = self.sisa.seed + shard * self.sisa.slices + stage
            with _switched(self.model, last) as model:
                made = edit(
                    model,
                    self.sisa.method,
                    self.mask,
                    forget=data.select(items),
                    seed=seed,
                    **self.sisa.options,
                )
                made.undo()
                made.without_additions("a sharded ensemble")
            stages.append(made.delta if last is None else _over(last, made.delta))
        return stages

    # -- files ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write every checkpoint as a safetensors file and ``ensemble.json`` into ``folder``, all or nothing.

        The rows are *not* saved, only their digest and places: after a deletion nothing of the deleted rows is left
        in the folder, an earlier save of the same ensemble included, which is replaced.
        """
        files: dict[str, Mapping[str, Tensor]] = {}
        layouts: list[list[Any]] = []
        for shard, stages in enumerate(self.checkpoints):
            layouts.append([])
            for stage, delta in enumerate(stages):
                if stage and delta is stages[stage - 1]:
                    layouts[shard].append("before")  # an empty slice: the checkpoint before it
                elif delta is None:
                    layouts[shard].append(None)
                else:
                    tensors, layout = delta.tensors()
                    files[_file_of(shard, stage)] = tensors
                    layouts[shard].append(layout)
        mask = None if self.mask is None else str(self.mask)
        about = {
            "sisa": repr(self.sisa),
            "mask": mask,
            "data": self.data.digest,
            "places": [[place.shard, place.slice] for place in self.places],
            "base": self._base,
            "layouts": layouts,
        }
        return write(folder, INDEX, FORMAT, about, files)

    @classmethod
    def load(
        cls, folder: str | Path, sisa: Sisa, model: nn.Module, data: PromptSet
    ) -> ShardedEnsemble:
        """Read what `save` wrote, to vote with and to delete from as before.

        Args:
            folder: where it was saved.
            sisa: the settings that it was trained with: a deletion trains with them.
            model: the base model.
            data: the rows that the ensemble knew when it was saved.

        Raises:
            EditError: no ensemble there, files that were changed, or settings, a model or rows that are not its own.
        """
        about, files = read(folder, INDEX, FORMAT)
        if repr(sisa) != about["sisa"]:
            raise EditError(
                f"{folder} was trained with {about['sisa']}, got {sisa!r}: give the same settings"
            )
        if data.digest != about["data"]:
            raise EditError(
                f"{data!r} ({data.digest[:12]}) are not the rows of {folder} ({about['data'][:12]}): give those that "
                "it knew when it was saved, without deleted ones"
            )
        if (reason := difference(about["base"], fingerprint(model))) is not None:
            raise EditError(f"the model is not the base of the ensemble in {folder}: {reason}")
        text = about["mask"]
        mask = None if text is None else ComponentMask.parse(text, describe(model))
        ensemble = cls(sisa, model, mask, data, [Place(*place) for place in about["places"]])
        for shard, layouts in enumerate(about["layouts"]):
            stages: list[Delta | None] = []
            for stage, layout in enumerate(layouts):
                if layout == "before":
                    stages.append(stages[-1])
                elif layout is None:
                    stages.append(None)
                else:
                    stages.append(Delta.from_tensors(files[_file_of(shard, stage)], layout))
            ensemble.checkpoints.append(stages)
        return ensemble

    # -- voting -----------------------------------------------------------------------------------

    def answers(
        self, prompts: PromptSet, choices: Sequence[str], *, batch_size: int = 16
    ) -> Tensor:
        """Which of ``choices`` each voter finds likeliest as a whole after each prompt: `voter item` int64.

        The targets of ``prompts`` are ignored. A choice's score is the log-probability of all its tokens.
        """
        if len(choices) < 2:
            raise EditError(f"a choice needs two answers at least, got {list(choices)}")
        bare = [{k: v for k, v in row.items() if k not in ("spans", "wrong")} for row in prompts]
        asked = [prompts.reread([{**row, "target": choice} for row in bare]) for choice in choices]
        found = []
        for shard in self.voters:
            with self.member(shard) as model:
                scores = [_total_log_prob(model, each, batch_size) for each in asked]
            found.append(torch.stack(scores).argmax(0))
        return torch.stack(found)

    def next_tokens(self, prompts: PromptSet, *, batch_size: int = 16) -> Tensor:
        """The token that each voter finds likeliest where each prompt's target begins: `voter item` int64."""
        found = []
        for shard in self.voters:
            with self.member(shard) as model:
                found.append(_first_token(model, prompts, batch_size))
        return torch.stack(found)

    @staticmethod
    def vote(ballots: Tensor) -> Tensor:
        """The answer `item` with the most votes of ``ballots`` `voter item`; of tied ones the smallest."""
        return ballots.mode(dim=0).values


def _file_of(shard: int, stage: int) -> str:
    return f"shard{shard}-slice{stage}.safetensors"


@contextmanager
def _switched(model: nn.Module, delta: Delta | None) -> Iterator[nn.Module]:
    """``model`` with ``delta``'s new values while the context is open, and its old ones again afterwards."""
    try:
        if delta is not None:
            delta.write(model, "new")
        yield model
    finally:
        if delta is not None:
            delta.write(model, "old")


def _over(below: Delta, above: Delta) -> Delta:
    """Two deltas over the same entries, one made on the other, as one over the base."""
    return Delta({name: Change(c.selection, below.changes[name].old, c.new) for name, c in above})


@torch.no_grad()
def _total_log_prob(model: nn.Module, prompts: PromptSet, batch_size: int) -> Tensor:
    """Log-probability of each whole target: `item`, in nats, on the CPU."""
    device = next(model.parameters()).device
    found = torch.zeros(len(prompts))
    with evaluating(model):
        for batch in prompts.batches(batch_size):
            there = batch.to(device)
            log_prob = token_log_probs(labelled_logits(model, there), there.label) * there.weight
            found[list(batch.items)] = per_item_sum(log_prob, there.item, len(batch.items)).cpu()
    return found


@torch.no_grad()
def _first_token(model: nn.Module, prompts: PromptSet, batch_size: int) -> Tensor:
    """The likeliest token `item` int64 at each item's first scored position, on the CPU."""
    device = next(model.parameters()).device
    found = torch.zeros(len(prompts), dtype=torch.int64)
    with evaluating(model):
        for batch in prompts.batches(batch_size):
            top = labelled_logits(model, batch.to(device)).argmax(-1).cpu()
            first = torch.searchsorted(batch.item.contiguous(), torch.arange(len(batch.items)))
            found[list(batch.items)] = top[first]
    return found
