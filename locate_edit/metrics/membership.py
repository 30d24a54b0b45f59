"""Membership inference: whether texts that a model was trained on can be told from like texts that it was not.

Papers: Yeom et al. 2018 (loss); Carlini et al. 2021, Extracting Training Data from Large Language Models
(arXiv:2012.07805; zlib, reference); Shi et al. 2024, Detecting Pretraining Data from Large Language Models
(arXiv:2310.16789; Min-K%); Zhang et al. 2025, Min-K%++ (arXiv:2404.02936); Shi et al. 2025, MUSE: Machine Unlearning
Six-Way Evaluation for Language Models (arXiv:2407.06460; PrivLeak).

    members, others = Predictions(model, forget), Predictions(model, holdout)
    membership(members, others, min_k)                      # AUC; 1 tells every member, 0.5 none
    membership(members, others, min_k, before=auc_before)   # withheld unless the un-edited model told them

Each score is one number an item and *smaller for what the model knows* ("down"); `nll` is the plain loss attack.

An AUC says something about membership only if nothing else tells the two sets apart: other lengths, topics or dates
do as well as membership, and are the usual reason for an AUC far from 0.5. `incomparable` looks at what can be counted;
topics and dates are the reader's to check. An AUC *below* 0.5 after an edit is no success: it says that something was
removed. `privleak` therefore compares with a model that never saw the members.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from scipy.stats import ks_2samp
from torch import nn

from circuits.forward import labelled_logits, token_log_probs
from locate_edit.errors import PromptError
from locate_edit.metrics.compat import check_compat
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.running import evaluating
from locate_edit.metrics.statistic import Statistic
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import PromptSet

__all__ = [
    "auc",
    "gradient_norm",
    "incomparable",
    "membership",
    "min_k",
    "min_k_plus_plus",
    "privleak",
    "reference_loss",
    "zlib_loss",
]

Score = Callable[[Predictions], Values]
Compat = Literal["open-unlearning"]
Muse = Literal["open-unlearning", "muse"]
# Of the Min-K papers, and of the toolkits.
_K, _TOOLKITS_K = 0.2, 0.4

_WEIGHTED = "at least one scored token of non-zero weight"
# Variances below this are those of a prediction that is all but certain (open-unlearning has the same floor).
_LEAST_VARIANCE = 1e-6


def zlib_loss(predictions: Predictions | nn.Module, prompts: PromptSet | None = None) -> Values:
    """Mean loss of the target over the size of its text as compressed by zlib, so that dull texts do not pass for
    known ones.

    Averaged over items.

    Direction: down, better known.
    Needs: a scored token of non-zero weight.
    Cost: shared forward.
    """
    predictions = Predictions.of(predictions, prompts)
    decode = predictions.prompts.tokenizer.decode
    values: list[float | None] = []
    for index, loss in enumerate(_losses(predictions, predictions.logprob)):
        text = str(decode(predictions.prompts.target_ids(index), skip_special_tokens=True))
        values.append(None if loss is None else loss / _compressed(text))
    return _made("zlib_loss", values, unit="nats a token and byte")


def min_k(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    k: float | None = None,
    compat: Muse | None = None,
) -> Values:
    """Min-K%, the mean loss of the least probable tokens of the target.

    Minus the mean of the lowest fraction `k` of the token log-probabilities (rounded down, one token at least),
    averaged over items. Token weights choose tokens (those above 0), no more.

    Direction: down, better known.
    Needs: a scored token of non-zero weight.
    Cost: shared forward.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        k: fraction of the tokens; None for the paper's 0.2, with `compat` 0.4. The values' name has it in percent.
        compat: "open-unlearning" leaves out the last token of each item, which is the end token there; "muse" does not.

    Raises:
        PromptError: `k` is not above 0 and at most 1, or another toolkit.
    """
    check_compat("Min-K%", compat, get_args(Muse))
    k = _fraction(k, compat)
    predictions = Predictions.of(predictions, prompts)
    values = [_lowest(part, k) for part in _counted(predictions, predictions.logprob, compat)]
    return _made(f"min_k_{100 * k:g}", values, unit="nats a token", compat=compat)


def min_k_plus_plus(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    k: float | None = None,
    compat: Compat | None = None,
) -> Values:
    """Min-K%++, the same with each token's log-probability in standard deviations from what the model expects there.

    z_t = (log p(x_t) - mu_t) / sigma_t with mu and sigma^2 the mean and variance of log p(y) for y drawn from the
    prediction (sigma^2 at least 1e-6); minus the mean of the lowest fraction `k`, averaged over items.

    Direction: down, better known.
    Needs: a scored token of non-zero weight.
    Cost: shared forward.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        k: as for `min_k`.
        compat: as for `min_k`; MUSE does not have it.

    Raises:
        PromptError: `k` is not above 0 and at most 1, or another toolkit.
    """
    check_compat("Min-K%++", compat, get_args(Compat))
    k = _fraction(k, compat)
    predictions = Predictions.of(predictions, prompts)
    spread = np.sqrt(np.maximum(predictions.variance, _LEAST_VARIANCE))
    standard = (predictions.logprob + predictions.entropy) / spread
    values = [_lowest(part, k) for part in _counted(predictions, standard, compat)]
    return _made(f"min_k_plus_plus_{100 * k:g}", values, unit="standard deviations", compat=compat)


def reference_loss(
    predictions: Predictions | nn.Module, prompts: PromptSet | None = None
) -> Values:
    """Mean loss of the target less that under a reference model, which cancels how hard a text is.

    The reference is a model of the same tokenizer that was not trained on the items. Averaged over items.

    Direction: down, better known.
    Needs: a reference, `Predictions(model, prompts, reference=...)`.
    Cost: shared forward, and one of the reference.
    """
    predictions = Predictions.of(predictions, prompts)
    if predictions.reference is None:
        return Values.none(
            "reference_loss",
            "needs: a reference model, Predictions(model, prompts, reference=...)",
            unit="nats a token",
            direction="down",
        )
    own = _losses(predictions, predictions.logprob)
    theirs = _losses(predictions, predictions.reference_logprob)
    values = [None if a is None or b is None else a - b for a, b in zip(own, theirs, strict=True)]
    return _made("reference_loss", values, unit="nats a token")


def gradient_norm(
    predictions: Predictions | nn.Module,
    prompts: PromptSet | None = None,
    *,
    compat: Compat | None = None,
) -> Values:
    """Norm of the gradient of the target's mean loss by all parameters; known texts pull little.

    The 2-norm over all parameters together, averaged over items. The model is as it was afterwards, gradients and
    flags included.

    Direction: down, better known.
    Needs: a scored token of non-zero weight.
    Cost: one forward and backward an item.

    Args:
        predictions: predictions, or a model.
        prompts: the prompts, with a model.
        compat: "open-unlearning" takes the mean over parameter tensors of each one's norm instead, which depends on
            how a model cuts its parameters into tensors, and leaves out the last token of each item.

    Raises:
        PromptError: another toolkit.
    """
    check_compat("gradient norm", compat, get_args(Compat))
    predictions = Predictions.of(predictions, prompts)
    model, values = predictions.model, list[float | None]()
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for index in range(len(predictions)):
            batch = predictions.prompts.batch([index]).to(device)
            weight = batch.weight.clone()
            if compat is not None:
                weight[-1] = 0.0
            mass = float(weight.sum())
            if not mass:
                values.append(None)
                continue
            with evaluating(model), torch.enable_grad():
                logprob = token_log_probs(labelled_logits(model, batch), batch.label)
                loss = -(weight * logprob).sum() / mass
                gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(
                    loss, parameters, allow_unused=True
                )
            norms = torch.stack([g.float().norm() for g in gradients if g is not None])
            values.append(float(norms.norm() if compat is None else norms.mean()))
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
    return _made("gradient_norm", values, unit="norm of the gradient", compat=compat)


# ---- telling two sets apart ----------------------------------------------------------------------


def membership(
    members: Predictions,
    others: Predictions,
    score: Score = min_k,
    *,
    before: Statistic | None = None,
) -> Statistic:
    """`auc` of a score on members and on hold-out items, withheld where the two sets are `incomparable`.

    Direction: up, members are told.
    Needs: sets that differ in nothing but membership, and with `before` a model before the edit that told them.
    Cost: the score's on both sets.

    Args:
        members: predictions on texts that the model was trained on (before it was edited).
        others: predictions of the same model on like texts that it never saw.
        score: a function of predictions, one number an item: `nll`, `min_k`, `functools.partial(min_k, k=0.4)`...
        before: the same statistic of the model before the edit, see `auc`.

    Raises:
        PromptError: predictions of two different models.
    """
    if members.model is not others.model:
        raise PromptError(
            "membership compares what one model makes of two sets, got predictions of two models."
        )
    if reason := incomparable(members.prompts, others.prompts):
        return Statistic.none("membership_auc", reason, unit="AUC")
    return auc(score(members), score(others), before=before)


def auc(members: Values, others: Values, *, before: Statistic | None = None) -> Statistic:
    """Probability that a member looks better known than a hold-out item, a tie counting half; 0.5 tells nothing.

    The exact area under the ROC curve over all pairs. The interval draws members and others anew.

    Direction: up, members are told.
    Needs: sets that differ in nothing but membership, and with `before` a model before the edit that told them.
    Cost: none beyond its values.

    Args:
        members: a score of the members.
        others: the same score of the hold-out items.
        before: the AUC of the model before the edit. The number is withheld unless that one's interval lies above
            0.5: where the un-edited model cannot tell members, an edit cannot be seen to hide them.

    Raises:
        PromptError: two different scores, or one that says how far from another model something is.
    """
    if members.name != others.name or members.direction != others.direction:
        raise PromptError(
            f"AUC: expected the same score of both sets, got {members!r}, {others!r}."
        )
    if members.direction == "distance":
        raise PromptError(f"AUC: {members!r} does not say how well the model knows a text.")
    for values in (members, others):
        if values.withheld:
            return Statistic.none("membership_auc", values.withheld, unit="AUC")
    if before is not None:
        span = before.interval()
        if span is None or span[0] <= 0.5:
            got = (
                "none"
                if span is None
                else f"{before.estimate:.3f} ({span[0]:.3f} to {span[1]:.3f})"
            )
            reason = f"needs: an un-edited model that tells members from hold-out items; its AUC is {got}"
            return Statistic.none("membership_auc", reason, unit="AUC")
    notes = [
        f"{name}: {v.note}" for name, v in (("members", members), ("others", others)) if v.note
    ]
    return Statistic(
        "membership_auc",
        (_knownness(members), _knownness(others)),
        _area,
        "AUC",
        "up",
        note="; ".join(notes),
    )


def privleak(
    members: Values,
    others: Values,
    oracle_members: Values | None = None,
    oracle_others: Values | None = None,
    *,
    compat: Muse | None = None,
) -> Statistic:
    """PrivLeak, 100 (B - B_oracle) / B_oracle with B = 1 - AUC: 0 for a model as if it had never seen the members.

    Below 0 (down to -100) members are still recognised; above 0 they look *less* known than texts never seen, which
    gives the removal away. MUSE takes `min_k` with k = 0.4. The interval draws items, each with its values under both
    models.

    Direction: distance from the oracle, either way.
    Needs: an oracle that does not tell all members from all hold-out items.
    Cost: none beyond its values.

    Args:
        members: a score of the members under the edited model.
        others: that of the hold-out items.
        oracle_members: that of the members under a model retrained without them.
        oracle_others: that of the hold-out items under the same.
        compat: "open-unlearning" takes the AUC of an oracle for 0.5 where there is none, which is right for sets that
            differ in nothing but membership; "muse" is the plain definition.

    Raises:
        PromptError: different scores, other items for the oracle than for the edited model, half an oracle, or another
            toolkit.
    """
    check_compat("PrivLeak", compat, get_args(Muse))
    name, unit = "privleak", "percent"
    if oracle_members is None and oracle_others is None:
        return _leak_without(members, others, compat)
    if oracle_members is None or oracle_others is None:
        raise PromptError("PrivLeak: expected the oracle's scores of both sets or of neither.")
    tables: list[Floats] = []
    for edited, oracle in ((members, oracle_members), (others, oracle_others)):
        for values in (edited, oracle):
            if values.withheld:
                return Statistic.none(name, values.withheld, unit=unit, direction="distance")
            if (values.name, values.direction) != (members.name, members.direction):
                raise PromptError(f"PrivLeak: expected the same score four times, got {values!r}.")
        if not np.array_equal(edited.items, oracle.items):
            raise PromptError(f"{edited!r} and {oracle!r} belong to different items.")
        tables.append(np.stack([_knownness(edited), _knownness(oracle)], axis=1))
    if _area(tables[0][:, 1], tables[1][:, 1]) == 1.0:
        reason = (
            "needs: an oracle that does not tell all members from all hold-out items; if it does, the two sets differ "
            "in more than membership"
        )
        return Statistic.none(name, reason, unit=unit, direction="distance")
    return Statistic(name, tuple(tables), _leak, unit, "distance")


def incomparable(members: PromptSet, others: PromptSet, *, level: float = 0.01) -> str:
    """Why two sets differ in more than membership, as far as can be counted; empty if nothing was found.

    Kolmogorov-Smirnov tests on the number of scored tokens, the number of all tokens and the compressed size of a
    character of the target, at `level` over all three together, and texts that are in both sets. Small sets pass
    easily, and topics and dates are not looked at.

    Args:
        members: the members.
        others: the hold-out items.
        level: chance of finding a difference where there is none (fraction).
    """
    shared = {tuple(members.ids(i)) for i in range(len(members))} & {
        tuple(others.ids(i)) for i in range(len(others))
    }
    if shared:
        return f"needs: sets without a text in common; {len(shared)} texts are in both"
    ours, theirs = _countable(members), _countable(others)
    for what, mine in ours.items():
        p = float(ks_2samp(mine, theirs[what]).pvalue)
        if p < level / len(ours):
            return (
                f"needs: members and hold-out items that differ in nothing but membership; their {what} differs "
                f"(median {np.median(mine):.3g} against {np.median(theirs[what]):.3g}, KS test p = {p:.1g})"
            )
    return ""


def _countable(prompts: PromptSet) -> dict[str, Floats]:
    texts = [
        str(prompts.tokenizer.decode(prompts.target_ids(i), skip_special_tokens=True))
        for i in range(len(prompts))
    ]
    found = {
        "number of scored tokens": [len(prompts.target_ids(i)) for i in range(len(prompts))],
        "number of tokens": [len(prompts.ids(i)) for i in range(len(prompts))],
        "compressed size of a character": [_compressed(t) / max(1, len(t)) for t in texts],
    }
    return {what: np.array(values, dtype=np.float64) for what, values in found.items()}


def _knownness(values: Values) -> Floats:
    """The values, turned round where a smaller one is better known."""
    return values.values if values.direction == "up" else -values.values


def _area(members: Floats, others: Floats) -> float:
    """Share of pairs in which the member has the larger value, ties counting half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, side="left")
    not_above = np.searchsorted(ordered, members, side="right")
    return float((below + not_above).sum() / (2 * len(members) * len(others)))


def _leak(members: Floats, others: Floats) -> float:
    """PrivLeak of tables `item model` with the edited model before the oracle."""
    edited, oracle = (1 - _area(members[:, m], others[:, m]) for m in (0, 1))
    # A resample may leave the oracle without a single confused pair.
    return 100 * (edited - oracle) / oracle if oracle else float("inf") * (edited > 0)


def _leak_without(members: Values, others: Values, compat: Muse | None) -> Statistic:
    """PrivLeak without an oracle."""
    name, unit = "privleak", "percent"
    if compat != "open-unlearning":
        reason = "needs: an oracle, a model retrained without the members"
        return Statistic.none(name, reason, unit=unit, direction="distance")
    told = auc(members, others)
    if told.withheld:
        return Statistic.none(name, told.withheld, unit=unit, direction="distance")
    return Statistic(
        name,
        told.samples,
        lambda ours, theirs: 100 * (1 - 2 * _area(ours, theirs)),
        unit,
        "distance",
        note="no oracle; its AUC is taken for 0.5",
    )


def _counted(predictions: Predictions, array: Floats, compat: Muse | None) -> list[Floats]:
    """An array over scored tokens item by item, those of weight 0 left out; the last ones too where that is asked."""
    end = -1 if compat == "open-unlearning" else None
    weights = predictions.split(predictions.weight)
    return [
        part[:end][w[:end] > 0] for part, w in zip(predictions.split(array), weights, strict=True)
    ]


def _losses(predictions: Predictions, logprob: Floats) -> list[float | None]:
    """Mean loss of each item, weighted; None where all weights are 0."""
    return [None if mean is None else -mean for mean in predictions.means(logprob)]


def _fraction(k: float | None, compat: Muse | None) -> float:
    """The fraction that is meant."""
    if k is None:
        return _K if compat is None else _TOOLKITS_K
    if not 0 < k <= 1:
        raise PromptError(f"Min-K: expected k above 0 and at most 1 (a fraction), got {k}.")
    return k


def _lowest(values: Floats, k: float) -> float | None:
    """Minus the mean of the lowest fraction `k` of the values."""
    if not len(values):
        return None
    if np.isnan(values).any():  # which sorting would put last
        return float("nan")
    return -float(np.sort(values)[: max(1, int(k * len(values)))].mean())


def _compressed(text: str) -> int:
    """Size of a text as compressed by zlib (bytes)."""
    return len(zlib.compress(text.encode("utf-8", "surrogatepass")))


def _made(
    name: str, values: list[float | None], *, unit: str, compat: Muse | None = None
) -> Values:
    needs = _WEIGHTED + (" before the last" if compat == "open-unlearning" else "")
    return Values.make(name, values, unit=unit, direction="down", precondition=needs)
