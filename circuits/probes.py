"""Linear probes: from which layer on can something be read off the activations, and would chance read it too?

    states = read_states(model_map, prompts.batches(16), model_map.sites("layer"))   # `prompt d_model` per site
    probes = probe(states, labels)                                                   # accuracy per site, with controls
    with replace(model_map, dict.fromkeys(model_map.sites("attn"), torch.zeros_like)):
        without = probe(read_states(model_map, batches, sites), labels)              # the same without attention

Paper: Alain and Bengio (2017), "Understanding intermediate layers using linear classifier probes"; the control with
shuffled labels follows Hewitt and Liang (2019), "Designing and interpreting probes with control tasks".

A probe is a ridge regression on one-hot labels, solved in closed form. Its penalty is the one with the smallest
leave-one-out error on the training part, which is closed form too (Golub, Heath and Wahba 1979). Accuracy is counted
on held-out folds only, and stands beside two baselines on the same folds: the most frequent class, and the same probe
trained on shuffled labels.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuits.errors import LocateEditError
from circuits.model_map import ModelMap
from circuits.places import Asked, place_of_items, read_at
from circuits.sites import Site
from circuits.still import evaluating

if TYPE_CHECKING:
    import pandas as pd

PENALTIES = tuple(10.0**k for k in range(-4, 4))
"""Penalties that are tried, in units of the mean squared singular value of the training activations."""


@dataclass(frozen=True)
class Probe:
    """How well a label can be read linearly at one site. Accuracies are fractions of held-out examples.

    Attributes:
        site: where the activations come from.
        accuracy: of the probe.
        low, high: Wilson confidence interval of ``accuracy``.
        majority: accuracy of always saying the most frequent class of the training folds.
        shuffled: mean accuracy of probes trained on shuffled labels: what chance, and the size of the data, give.
        shuffled_high: the highest accuracy among those; ``accuracy`` should lie clearly above it.
        examples: number of examples.
        classes: number of classes.
        held_out: the class given to each example by the probe of the folds without it.
    """

    site: Site
    accuracy: float
    low: float
    high: float
    majority: float
    shuffled: float
    shuffled_high: float
    examples: int
    classes: int
    held_out: tuple[Hashable, ...] = field(default=(), repr=False)

    @property
    def reads(self) -> bool:
        """Whether the whole interval lies above both baselines."""
        return self.low > max(self.majority, self.shuffled_high)


@dataclass(frozen=True)
class Probes:
    """One `Probe` per site, in the order of the sites."""

    probes: tuple[Probe, ...]

    def __getitem__(self, site: Site) -> Probe:
        for found in self.probes:
            if found.site == site:
                return found
        raise LocateEditError(
            f"no probe at {site}: expected one of {', '.join(str(p.site) for p in self.probes)}"
        )

    @property
    def accuracy(self) -> list[float]:
        """Accuracy of every probe (fraction), e.g. by layer."""
        return [found.accuracy for found in self.probes]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per probe."""
        return [
            {
                "site": str(p.site),
                "layer": p.site.layer,
                **{k: v for k, v in asdict(p).items() if k not in ("site", "held_out")},
            }
            for p in self.probes
        ]

    def frame(self) -> pd.DataFrame:
        """`rows` as a data frame.

        Raises:
            LocateEditError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise LocateEditError(
                "a data frame needs pandas, which is not installed: pip install pandas, or use rows()"
            ) from None
        return pandas.DataFrame(self.rows())


def read_states(
    model_map: ModelMap,
    places: Asked | Iterable[Asked],
    sites: Iterable[Site],
    *,
    offset: int | Sequence[int] = 0,
) -> dict[Site, Tensor]:
    """Activations at the position that predicts one token of each prompt: `prompt feature` float32 per site.

    Layers above the last site are not run. Inside a `circuits.hooks.replace` block the activations are those of the
    changed model.

    Args:
        model_map: the model.
        places: batches of a prompt set (``prompts.batches(16)``), or `Places`. Prompts come out in the order of their
            numbers in the set.
        sites: neuron, head, mlp, attn or layer sites.
        offset: which scored token of each prompt, from 0.

    Raises:
        SiteError: the model has no such site.
        LocateEditError: no prompts.
    """
    wanted = list(dict.fromkeys(sites))
    given: list[Asked] = list(places) if isinstance(places, Iterable) else [places]
    numbers = [item for batch in given for item in batch.items]
    if not numbers or len(set(numbers)) != len(numbers):
        raise LocateEditError(
            "expected every prompt of a set once, at least one: give all batches of one prompt set, or one `Places`"
        )
    found: dict[Site, list[Tensor]] = {site: [] for site in wanted}
    with evaluating(model_map.model):
        for batch in given:
            chosen = place_of_items(batch, offset)
            for site, value in read_at(model_map, batch, wanted, chosen, stop=True).items():
                found[site].append(value.flatten(1).float().cpu())
    order = torch.tensor(numbers).argsort()
    return {site: torch.cat(parts)[order] for site, parts in found.items()}


def probe(
    states: Mapping[Site, Tensor],
    labels: Sequence[Hashable],
    *,
    folds: int = 5,
    groups: Sequence[Hashable] | None = None,
    shuffles: int = 10,
    penalties: Sequence[float] = PENALTIES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Probes:
    """Train and test a linear probe at every site, with cross-validation and baselines.

    Args:
        states: activations by site, `example feature`, as from `read_states`.
        labels: the class of each example.
        folds: parts that the examples are cut into; each is predicted by a probe trained on the others. Classes are
            spread evenly over the folds.
        groups: examples of one group stay in one fold. Give them when examples share something that identifies the
            label otherwise, e.g. the person when several prompts ask for the same person's city.
        shuffles: number of probes with shuffled labels per fold.
        penalties: ridge penalties to choose from, in units of the mean squared singular value.
        confidence: of the interval of the accuracy.
        seed: of the folds and the shuffles.

    Raises:
        LocateEditError: fewer than two classes, not as many labels as examples, more folds than examples or groups,
            or activations that are not finite.
    """
    classes = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    y = torch.tensor([classes[label] for label in labels])
    _check(states, y, len(classes), folds, shuffles, penalties)
    generator = torch.Generator().manual_seed(seed)
    fold = _folds(y, groups, folds, generator)
    shuffled = [y[torch.randperm(len(y), generator=generator)] for _ in range(shuffles)]
    targets = torch.stack([y, *shuffled])  # `labelling example`
    names = list(classes)
    found = []
    for site, activations in states.items():
        predicted = torch.zeros_like(targets)
        majority = torch.zeros(len(y), dtype=torch.bool)
        for number in range(folds):
            test = fold == number
            predicted[:, test] = ridge_predictions(
                activations[~test].double(),
                targets[:, ~test],
                activations[test].double(),
                len(classes),
                penalties,
            )
            majority[test] = y[test] == y[~test].bincount(minlength=len(classes)).argmax()
        accuracy, *control = (predicted == targets).double().mean(1).tolist()
        low, high = wilson(accuracy, len(y), confidence)
        found.append(
            Probe(
                site=site, accuracy=accuracy, low=low, high=high,
                majority=float(majority.double().mean()),
                shuffled=sum(control) / len(control), shuffled_high=max(control),
                examples=len(y), classes=len(classes),
                held_out=tuple(names[c] for c in predicted[0].tolist()),
            )
        )  # fmt: skip
    return Probes(tuple(found))


def ridge_predictions(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
) -> Tensor:
    """Classes `labelling example` that ridge regressions on one-hot labels predict.

    All labellings share one singular value decomposition; each has the penalty of its smallest leave-one-out error.

    Args:
        train: activations to learn from, `example feature`.
        labels: classes of these, one row per labelling, `labelling example` int64.
        test: activations to predict, `example feature`.
        classes: number of classes.
        penalties: penalties to choose from, in units of the mean squared singular value.
    """
    mean, spread = train.mean(0), train.std(0)
    scale = torch.where(spread > 0, spread, 1.0)
    train, test = (train - mean) / scale, (test - mean) / scale
    onehot = torch.nn.functional.one_hot(labels, classes).to(train.dtype)
    base = onehot.mean(1, keepdim=True)  # `labelling 1 class`
    left, singular, right = torch.linalg.svd(train, full_matrices=False)
    inside = left.T @ (onehot - base)  # `labelling component class`
    squares = singular.square()
    errors, scores = [], []
    for penalty in penalties:
        shrink = squares / (squares + penalty * squares.mean().clamp_min(1e-30))
        fitted = left @ (shrink[:, None] * inside)
        # The mean is fitted too: it is the 1/n in the leverage.
        leverage = (left.square() * shrink).sum(1) + 1 / len(train)
        residual = (onehot - base - fitted) / (1 - leverage).clamp_min(1e-6)[:, None]
        errors.append(residual.square().mean((1, 2)))
        weights = torch.where(singular > 1e-10 * singular.max(), shrink / singular, 0.0)
        scores.append(test @ right.T @ (weights[:, None] * inside) + base)
    best = torch.stack(errors).argmin(0)
    return torch.stack(scores)[best, torch.arange(len(labels))].argmax(-1)


def wilson(accuracy: float, examples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a fraction of independent trials (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    shrunk = 1 + z * z / examples
    middle = (accuracy + z * z / (2 * examples)) / shrunk
    half = z * math.sqrt(accuracy * (1 - accuracy) / examples + (z / (2 * examples)) ** 2) / shrunk
    return max(0.0, middle - half), min(1.0, middle + half)


def _folds(
    y: Tensor, groups: Sequence[Hashable] | None, folds: int, generator: torch.Generator
) -> Tensor:
    """The fold of each example: classes, and the sizes of groups, spread evenly."""
    if groups is None:
        order = torch.randperm(len(y), generator=generator)
        order = order[y[order].argsort(stable=True)]
        fold = torch.empty_like(y)
        fold[order] = torch.arange(len(y)) % folds
        return fold
    if len(groups) != len(y):
        raise LocateEditError(f"groups: expected {len(y)}, one per example, got {len(groups)}")
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    if len(members) < folds:
        raise LocateEditError(f"{folds} folds need as many groups, got {len(members)}")
    names = list(members)
    fold = torch.empty_like(y)
    sizes = [0] * folds
    mixed = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    for name in sorted(mixed, key=lambda name: -len(members[name])):
        smallest = sizes.index(min(sizes))
        fold[members[name]] = smallest
        sizes[smallest] += len(members[name])
    return fold


def _check(
    states: Mapping[Site, Tensor],
    y: Tensor,
    classes: int,
    folds: int,
    shuffles: int,
    penalties: Sequence[float],
) -> None:
    if classes < 2:
        raise LocateEditError(f"a probe needs at least two classes, the labels have {classes}")
    if not 2 <= folds <= len(y):
        raise LocateEditError(f"folds: expected 2 to {len(y)}, the number of examples, got {folds}")
    if shuffles < 1 or not penalties or min(penalties) <= 0:
        raise LocateEditError(
            f"expected at least one shuffle and positive penalties, got {shuffles} and {tuple(penalties)}"
        )
    for site, activations in states.items():
        if activations.dim() != 2 or len(activations) != len(y):
            raise LocateEditError(
                f"{site}: expected activations `example feature` of {len(y)} examples, one per label, got "
                f"{tuple(activations.shape)}"
            )
        if not bool(torch.isfinite(activations).all()):
            raise LocateEditError(f"{site}: expected finite activations")
