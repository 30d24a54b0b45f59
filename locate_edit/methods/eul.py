"""Unlearning with small adapters beside a frozen model, one set for each request.

Paper: Chen and Yang 2023, Unlearn What You Want to Forget: Efficient Unlearning for LLMs (arXiv:2310.20150), section 3:
``L = L_KL + lambda * L_TASK + gamma * L_LM``. Its fusion of the adapters of several requests is `locate_edit.fusion`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from circuits import Site
from locate_edit.additions import Adapter
from locate_edit.engine import Run, Step
from locate_edit.errors import EditError
from locate_edit.losses import kl_divergence, per_item_mean
from locate_edit.methods._terms import check_positive
from locate_edit.optim import Optim
from locate_edit.prompts import Batch, PromptSet

Role = Literal["retain", "forget"]

SHARE = (
    0.005  # of the model's parameters, when every layer has an adapter (the paper's "about 0.5%")
)
LEAST_WIDTH = 4


@dataclass(frozen=True)
class EUL:
    """Train adapters after the feed-forward blocks of the layers that the mask touches; the weights stay as they are.

    One epoch of the retain prompts and one of the forget prompts take turns. Loss of a retain batch: ``alpha * KL(base
    || model) + task * CE``; of a forget batch: ``-(1 - alpha) * w * min(KL(base || model), most) - gamma * w * NLL``,
    means over scored tokens (of each prompt first, on forget prompts), with ``w`` as in `GradientAscent`: a prompt at
    its never-seen level is left alone, and beyond it the likelihood term (not the divergence) pulls it back.

    Use it where a request has to be switched on and off, or several are to be merged afterwards
    (`locate_edit.fusion.fuse`; give them all the same seed). The mask only says which layers: its units are not told
    apart, so a random mask in the same layers is the same edit and no control. What is forgotten is still in the
    weights: whoever takes the adapters away has it back, and the edit cannot become an ordinary checkpoint.

    Cost a step: one forward of the model and one backward from the top down to the lowest adapter, plus one base
    forward a prompt, once, kept while memory lasts.

    Deviations: the divergence from the base model on forget prompts has no upper bound, so it is cut off at ``most``
    nats a token, and each prompt is pushed only as far as its never-seen level (None for the paper's open end).
    Language model, task and divergence are all read at the scored tokens of the prompts, since one head does both
    here; the paper has a classifier beside a masked-token head. Steps, not the paper's 3 to 5 epochs; a rate for the
    few prompts here (the paper's 5e-5 is for thousands of texts). Rules that end training early can look at "loss" or
    at a function of the model; the other terms are those of retain and forget batches in turn.

    Attributes:
        steps: optimizer steps, of both kinds together.
        lr: peak learning rate.
        alpha: weight of staying near the base model on retain prompts; 1 - alpha is that of leaving it on forget ones.
        task: weight of the cross-entropy of the retain prompts (the paper's lambda).
        gamma: weight of the negative log-likelihood of the forget prompts.
        most: divergence (nats a token, mean of a prompt) up to which a forget prompt is driven from the base model.
        width: neurons of an adapter; None takes what makes adapters in all layers 0.5% of the parameters, at least 4.
        warmup: share of the steps over which the rate rises.
        optim: further optimizer settings.
    """

    steps: int = 100
    lr: float = 1e-3
    alpha: float = 0.8
    task: float = 1.0
    gamma: float = 0.2
    most: float = 5.0
    width: int | None = None
    warmup: float = 0.06
    optim: Optim = field(default_factory=Optim)

    ascends: ClassVar[bool] = True
    needs_retain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(most=self.most)
        for name, share in (("alpha", self.alpha), ("warmup", self.warmup)):
            if not 0 <= share <= 1:
                raise EditError(f"{name} must be between 0 and 1, got {share}")

    def __call__(self, run: Run) -> None:
        """Train adapters on ``run``.

        Raises:
            EditError: the mask touches no layer.
        """
        run.add(self.adapters(run))
        turns = _turns(run)

        def loss(_step: Step) -> dict[str, Tensor]:
            role, items = next(turns)
            if role == "retain":
                assert run.retain is not None
                return self.on_retain(run, run.retain.batch(items))
            return self.on_forget(run, run.forget.batch(items))

        warmup = max(self.optim.warmup, round(self.warmup * self.steps))
        optim = replace(self.optim, warmup=warmup)
        run.fit(loss, steps=self.steps, lr=self.lr, optim=optim, train="additions")

    def adapters(self, run: Run) -> list[Adapter]:
        """One adapter for every layer that the mask touches, lowest first.

        Raises:
            EditError: it touches none.
        """
        the_map = run.model_map
        layers = {the_map.lowest_layer(slot.name) for slot in run.slots}
        inside = sorted(layer for layer in layers if 0 <= layer < the_map.n_layers)
        if not inside:
            raise EditError(
                "EUL puts adapters after the feed-forward blocks of the layers that the mask touches, and this mask "
                "touches none: choose units of layers, or no mask for all of them"
            )
        size = sum(parameter.numel() for parameter in run.model.parameters())
        of_one = 2 * the_map.d_model * the_map.n_layers
        width = self.width or max(LEAST_WIDTH, round(SHARE * size / of_one))
        return [Adapter(Site(layer, "mlp"), width) for layer in inside]

    def on_retain(self, run: Run, batch: Batch) -> dict[str, Tensor]:
        """Terms of the loss of a retain batch, each with its weight (nats a token)."""
        assert run.retain is not None
        reference = run.reference_logits(run.retain, batch)  # before the graph below is built
        scored = run.score(batch)
        near = scored.mean(kl_divergence(reference, scored.logits))
        return {"near": self.alpha * near, "task": self.task * scored.cross_entropy()}

    def on_forget(self, run: Run, batch: Batch) -> dict[str, Tensor]:
        """Terms of the loss of a forget batch, each with its weight (nats a token)."""
        reference = run.reference_logits(run.forget, batch)  # before the graph below is built
        scored = run.score(batch)
        nll = scored.nll()
        push = run.towards_level(batch, nll)
        away = per_item_mean(
            kl_divergence(reference, scored.logits),
            scored.batch.item,
            scored.n,
            scored.batch.weight,
        )
        far = (push.clamp_min(0.0) * away.clamp_max(self.most)).mean()
        return {"away": -(1 - self.alpha) * far, "unlikely": -self.gamma * (push * nll).mean()}


def _turns(run: Run) -> Iterator[tuple[Role, list[int]]]:
    """Items of batches without end: an epoch of the retain prompts, one of the forget prompts, and again."""
    generator = torch.Generator().manual_seed(run.settings.seed)
    size = run.settings.batch_size
    assert run.retain is not None
    sets: tuple[tuple[Role, PromptSet], ...] = (("retain", run.retain), ("forget", run.forget))
    while True:
        for role, prompts in sets:
            order = torch.randperm(len(prompts), generator=generator).tolist()
            for at in range(0, len(order), size):
                yield role, order[at : at + size]
