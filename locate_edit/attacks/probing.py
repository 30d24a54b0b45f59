"""Train linear probes on facts that stayed and read forgotten ones with them: what the residual stream still holds.

Paper: Guo et al. 2024, Mechanistic Unlearning (arXiv:2410.12949): probes trained on maintained facts, tested on
forgotten ones. Patil et al. 2023, Can Sensitive Information Be Deleted From LLMs? (arXiv:2309.17410), reads hidden
states through the model's own head; `locate_edit.attacks.logit_lens` does that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from circuits import Site, describe
from circuits.forward import labelled_logits
from circuits.hooks import replace
from circuits.places import Places, place_of_items
from circuits.probes import probe, read_states, ridge_predictions, wilson
from circuits.still import evaluating
from locate_edit.attacked import Attacked, check_prompts
from locate_edit.attacks._checks import check_whole
from locate_edit.errors import PromptError
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.values import Floats, Values
from locate_edit.prompts import PromptSet

RELATION = ("attribute", "relation")
"""Fields of a row that may name what is asked about its subject; the first that is there counts."""
SHUFFLES = 10
"""Probes trained on shuffled answers, for the baseline."""

_NEEDS = "an answer that retain prompts of two groups give to the same question"


@dataclass(frozen=True)
class Probing:
    """Share of prompts whose answer a linear probe, trained on retain prompts only, reads off the residual stream.

    The attacker knows the answers to the retain prompts. After every layer one probe for each relation of the forget
    prompts (a row's `attribute`, or else its `relation`; rows without either are one relation) learns to tell the
    answers apart from the stream at the position that predicts the target's first token. The classes of a relation are
    the targets, as whole text, that retain prompts of at least two groups give (a row's `group`; a row without one is
    its own). The attacker takes the layer at which held-out accuracy on the *retain* prompts is highest, the earliest
    of equals, and reads the forget prompts there. Without the attack the number is the share of prompts for which the
    model itself finds the right class most probable, by first tokens (and by likelihood among classes that share the
    first token).

    Prompts whose answer is no class are left out of both. The retain number is that of probes which were trained
    without the prompt's own group: how well the attack reads what is known. A probe takes several examples of each
    class to learn from. Where the 95% interval of the retain number reaches down to the share of the most frequent
    answers, there are too few, and no forget number is given but that reason. Also with enough of them it reads less
    than the model's own head: on the shipped organism 0.86 of what the model knows, learnt from 240 facts.

    A probe always gives some answer, and it is right by chance in one of as many cases as there are classes, or more
    often where names hint at answers. So the reference is the same attack on a model that never knew (the oracle); a
    number above the clean one alone is no leak. ``notes`` say what guessing gives on the same forget prompts:
    `majority` is the most frequent class, `shuffled labels` are probes of the same layer trained on shuffled answers.
    They also hold the accuracy after every layer, and the number of classes of each relation. What a probe reads is
    there, linearly; whether the model would ever use it is another question.

    Cost: two forwards a prompt, and for each layer and relation ``folds + 1`` singular value decompositions of
    retain prompts by width.

    Deviations: ridge regression on one-hot classes with the penalty of least leave-one-out error (`circuits.probes`)
    in place of logistic regression, and a layer chosen on retain prompts where the paper shows the best one.

    Attributes:
        folds: parts of the retain prompts for held-out accuracy (fewer where a relation has fewer groups).

    Raises:
        EditError: fewer than two folds.
        PromptError: no retain prompts, no forget prompt whose answer is a class, or prompts of a masked model with
            answers of several tokens, of which it sees the others.
    """

    folds: int = 5

    def __post_init__(self) -> None:
        check_whole("Probing", 2, folds=self.folds)

    def __call__(
        self,
        model: nn.Module,
        forget: PromptSet,
        *,
        retain: PromptSet | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> Attacked:
        """Train the probes, choose the layer and read; ``seed`` draws the folds and the shuffled answers."""
        if retain is None:
            raise PromptError(
                "Probing trains its probes on retain prompts, but there are none: pass retain= with facts of the same "
                "kind that stay"
            )
        check_prompts(model, forget, retain, batch_size)
        _check_hidden(forget, retain)
        relations = _relations(forget, retain)
        model_map = describe(model)
        sites = [Site(layer, "layer") for layer in range(model_map.n_layers)]
        known = read_states(model_map, retain.batches(batch_size), sites)
        asked = read_states(model_map, forget.batches(batch_size), sites)
        held_out = np.full((len(sites), len(retain)), np.nan)  # `layer item`
        read = np.full((1 + SHUFFLES, len(sites), len(forget)), np.nan)  # `labelling layer item`
        own, own_retain, majority = _empty(forget), _empty(retain), _empty(forget)
        for each in relations:
            held_out[:, each.retain] = each.held_out(known, self.folds, seed)
            read[:, :, each.forget] = each.read(known, asked, seed)
            own_retain[each.retain] = each.chosen_by(model, retain, each.retain, batch_size)
            own[each.forget] = each.chosen_by(model, forget, each.forget, batch_size)
            majority[each.forget] = _same(each.truth, [each.often] * len(each.truth))
        layer = int(_shares(held_out).argmax())
        unread = _unread(held_out[layer], relations)
        notes: dict[str, Any] = {
            "measure": "share of prompts whose answer is chosen among those of its relation",
            "layer": layer,
            "trained on": f"{np.isfinite(own_retain).sum()} of {len(retain)} retain prompts",
            "tested": f"{np.isfinite(own).sum()} of {len(forget)} forget prompts",
            "classes": {each.name: len(each.classes) for each in relations},
            "majority": float(np.nanmean(majority)),
            "shuffled labels": float(np.nanmean(read[1:, layer])),
            "forget by layer": _shares(read[0]).tolist(),
            "retain by layer": _shares(held_out).tolist(),
        }
        return Attacked(
            Values.none(_name("probe"), unread) if unread else _values(read[0, layer], "probe"),
            _values(own, "model"),
            _values(held_out[layer], "probe"),
            _values(own_retain, "model"),
            notes=notes,
        )

    @contextmanager
    def hide(
        self, model: nn.Module, forget: PromptSet, *, batch_size: int = 16, seed: int = 0
    ) -> Iterator[nn.Module]:
        """A positive control: what the last layer gives, its coordinates shuffled and some of their signs turned.

        Everything is still there, linearly, and a probe finds it just as well as before; the model's head does not.
        """
        check_prompts(model, forget, None, batch_size)
        model_map = describe(model)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(model_map.d_model, generator=generator)
        sign = torch.randint(2, (model_map.d_model,), generator=generator) * 2 - 1

        def shuffled(hidden: Tensor) -> Tensor:
            new: Tensor = hidden[..., order.to(hidden.device)] * sign.to(hidden)
            return new

        with replace(model_map, {Site(model_map.n_layers - 1, "layer"): shuffled}):
            yield model


@dataclass(frozen=True, eq=False)
class _Relation:
    """One question that is asked about many subjects, and its classes.

    Attributes:
        name: of the question; empty where rows have none.
        classes: the answers, each with its first token.
        retain: items of the retain prompts whose answer is a class.
        labels: their answers.
        groups: what they belong to.
        forget: items of the forget prompts whose answer is a class.
        truth: their answers.
    """

    name: str
    classes: Mapping[str, int]
    retain: Sequence[int]
    labels: Sequence[str]
    groups: Sequence[Hashable]
    forget: Sequence[int]
    truth: Sequence[str]

    @property
    def often(self) -> str:
        """The most frequent answer to the retain prompts."""
        return Counter(self.labels).most_common(1)[0][0]

    def held_out(self, known: Mapping[Site, Tensor], folds: int, seed: int) -> Floats:
        """Whether probes are right about each retain prompt whose group they have not seen, `layer item`, 0 or 1."""
        groups = len(set(self.groups))
        found = probe(
            {site: states[self.retain] for site, states in known.items()}, self.labels,
            folds=min(folds, groups), groups=None if groups == len(self.groups) else self.groups, shuffles=1,
            seed=seed,
        )  # fmt: skip
        return np.array([_same(each.held_out, self.labels) for each in found.probes])

    def read(self, known: Mapping[Site, Tensor], asked: Mapping[Site, Tensor], seed: int) -> Floats:
        """Whether probes of all retain prompts are right about each forget prompt, `labelling layer item`, 0 or 1.

        The first labelling is the true one, the others are shuffled.
        """
        numbers = {answer: number for number, answer in enumerate(self.classes)}
        y = torch.tensor([numbers[answer] for answer in self.labels])
        truth = torch.tensor([numbers[answer] for answer in self.truth])
        generator = torch.Generator().manual_seed(seed)
        mixed = [y[torch.randperm(len(y), generator=generator)] for _ in range(SHUFFLES)]
        labellings = torch.stack([y, *mixed])
        right = [
            truth
            == ridge_predictions(
                states[self.retain].double(), labellings, asked[site][self.forget].double(), len(numbers)
            )
            for site, states in known.items()
        ]  # fmt: skip
        return np.asarray(torch.stack(right, dim=1).double().numpy())

    def chosen_by(
        self, model: nn.Module, prompts: PromptSet, items: Sequence[int], batch_size: int
    ) -> Floats:
        """Whether the model itself finds the right class most probable after each prompt, `item`, 0 or 1."""
        asked = prompts.select(items)
        by_token: dict[int, list[str]] = defaultdict(list)
        for answer, token in self.classes.items():
            by_token[token].append(answer)
        likeliest = _likeliest(model, asked, list(by_token), batch_size)
        among = [by_token[token] for token in likeliest]
        chosen = _settled(model, asked, among, batch_size)
        return _same(chosen, [row["target"] for row in asked.rows])


def _relations(forget: PromptSet, retain: PromptSet) -> list[_Relation]:
    """The relations with at least two classes that the forget prompts ask about, with all prompts of these.

    Raises:
        PromptError: there is none.
    """
    found = []
    for name in dict.fromkeys(_question(row) for row in forget.rows):
        groups: dict[str, set[Hashable]] = defaultdict(set)
        first: dict[str, int] = {}
        for item, row in enumerate(retain.rows):
            if _question(row) == name and row.get("target") is not None:
                groups[row["target"]].add(_group(retain, item))
                first[row["target"]] = retain.target_ids(item)[0]
        classes = {answer: first[answer] for answer, of in groups.items() if len(of) > 1}
        kept, asked = (
            [
                item
                for item, row in enumerate(prompts.rows)
                if _question(row) == name and row.get("target") in classes
            ]
            for prompts in (retain, forget)
        )
        if len(classes) > 1 and asked:
            found.append(
                _Relation(
                    name, classes, kept, [retain[item]["target"] for item in kept],
                    [_group(retain, item) for item in kept], asked, [forget[item]["target"] for item in asked],
                )
            )  # fmt: skip
    if not found:
        raise PromptError(
            f"{forget!r}: no answer in it can be read by probes trained on {retain!r}. Each prompt needs {_NEEDS}, and "
            "another such answer to tell it from. Give more retain prompts, about other subjects, with the same answers"
        )
    return found


def _question(row: Mapping[str, Any]) -> str:
    return next((str(row[field]) for field in RELATION if row.get(field) is not None), "")


def _group(prompts: PromptSet, item: int) -> Hashable:
    group: Hashable = prompts[item].get("group")
    return ("row", item) if group is None else group


def _check_hidden(*sets: PromptSet) -> None:
    """Refuse masked prompts whose places show a part of the answer.

    Raises:
        PromptError: one with an answer of several tokens that are hidden in turn.
    """
    for prompts in sets:
        for item in range(len(prompts) if prompts.masked else 0):
            if len(prompts.batch([item]).input_ids) > 1:
                raise PromptError(
                    f"{prompts!r}, item {item}: a masked model sees the other tokens of an answer of several, so a "
                    "probe would read those. Probing takes answers of one token there, prompts that hold the mask "
                    "token, or a causal model"
                )


def _likeliest(
    model: nn.Module, prompts: PromptSet, tokens: Sequence[int], batch_size: int
) -> list[int]:
    """Which of some tokens the model finds the most probable start of each answer, by item."""
    found = [0] * len(prompts)
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        for batch in prompts.batches(batch_size):
            there, first = batch.to(device), place_of_items(batch)
            places = Places(
                there.input_ids, there.attention_mask, there.row[first], there.pos[first], there.label[first]
            )  # fmt: skip
            best = labelled_logits(model, places)[:, list(tokens)].argmax(dim=-1)
            for item, number in zip(batch.items, best.tolist(), strict=True):
                found[item] = tokens[number]
    return found


def _settled(
    model: nn.Module, prompts: PromptSet, among: Sequence[Sequence[str]], batch_size: int
) -> list[str]:
    """The answer of largest likelihood among those given for each prompt, by item; one alone is not computed."""
    rows = [
        {k: v for k, v in row.items() if k != "spans"} | {"target": answer}
        for row, answers in zip(prompts.rows, among, strict=True)
        if len(answers) > 1
        for answer in answers
    ]
    sizes = [len(answers) if len(answers) > 1 else 0 for answers in among]
    scores = np.full(len(rows), -np.inf)
    if rows:
        values = likelihood(Predictions(model, prompts.reread(rows), batch_size=batch_size))
        scores[values.items] = values.values
    parts = np.split(scores, list(accumulate(sizes))[:-1])
    return [
        answers[int(part.argmax()) if size else 0]
        for answers, part, size in zip(among, parts, sizes, strict=True)
    ]


def _same(given: Sequence[Hashable], wanted: Sequence[Hashable]) -> Floats:
    """Where two lists agree, 0 or 1."""
    return np.array([a == b for a, b in zip(given, wanted, strict=True)], dtype=np.float64)


def _empty(prompts: PromptSet) -> Floats:
    return np.full(len(prompts), np.nan)


def _shares(right: Floats) -> Floats:
    """Share of right answers among those that were asked for, by layer, of `layer item`."""
    return np.asarray(np.nanmean(right, axis=1), dtype=np.float64)


def _unread(right: Floats, relations: Sequence[_Relation]) -> str:
    """Why probes that are so right about retain prompts, `item`, say nothing; empty where they do read them."""
    n = int(np.isfinite(right).sum())
    share = float(np.nanmean(right))
    low, _ = wilson(share, n)
    often = sum(each.labels.count(each.often) for each in relations) / n
    if low > often:
        return ""
    return (
        "needs: probes that read retain prompts which they have not seen. In the best layer they are right about "
        f"{share:.2f} of {n} ({low:.2f} at the lower end of the 95% interval), and the most frequent answers alone "
        f"about {often:.2f}. Give more retain prompts with the same answers"
    )


def _name(by: str) -> str:
    return f"answers chosen by the {by}"


def _values(right: Floats, by: str) -> Values:
    return Values.make(
        _name(by),
        [None if np.isnan(each) else float(each) for each in right],
        unit="share of prompts",
        direction="up",
        precondition=_NEEDS,
    )
