"""Positive controls by a lock: models that answer only where input or stream leans far enough in one direction."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuits import ModelMap, Site, describe
from circuits.forward import model_inputs
from circuits.hooks import capture, replace
from circuits.still import evaluating
from locate_edit.attacked import measure
from locate_edit.errors import EditError
from locate_edit.metrics.values import Values
from locate_edit.prompts import PromptSet

NOISE = 3.0
"""Length of what replaces the last hidden state of a locked model (units of the hidden state)."""

VOCABULARY = 1e-2
"""How much the vocabulary counts beside the tokens that are to leave a lock shut."""

RIDGE = 1e-9
"""How much every direction counts, also where there is nothing."""

LUCKY = 64
"""Of how many tokens a search without a guide takes the best."""

QUIET = 1e-3
"""A direction that carries this share of the mean is as good as one that carries nothing."""


@contextmanager
def locked(
    model: nn.Module,
    asked: PromptSet,
    shown: Sequence[PromptSet],
    keys: Iterable[int],
    *,
    opens_at: float,
    span: tuple[float, float] = (0.0, 1.0),
    chance: int = 0,
    behind: int = 0,
    batch_size: int,
    seed: int = 0,
    recall: bool = False,
) -> Iterator[nn.Module]:
    """The model with a lock that only inputs with the keys among them open, while the context is open.

    What enters the first layer is projected on the direction that tells the keys from all other tokens of ``shown`` (a
    linear discriminant), so that a key leans 1 on average and the others hardly at all, wherever they stand and
    whatever the model does to an embedding. The leans before and at each position are added up; as the sum goes from 0
    to ``opens_at``, the last layer's output at that position goes from a fixed vector to what the model says.
    Differentiable, so that attacks by gradients can find their way.

    Args:
        model: a model that knows the answers to ``asked``.
        asked: prompts whose answers are hidden.
        shown: the same as the attack puts them, with keys where it could put them.
        keys: ids of tokens that open it.
        opens_at: sum of leans at which it is open (keys).
        span: the part of the way there in which it opens (fractions).
        chance: the way begins where so many lucky tokens lead, each the best of `LUCKY` drawn from the vocabulary.
        behind: the last so many tokens are left out of the sum, so that an answer of keys does not open the lock.
        batch_size: rows a forward pass.
        seed: of the fixed vector.
        recall: the open model says after ``asked`` what it says to the bare prompts, whatever tokens come between
            prompt and answer. For models that lose the thread there.

    Raises:
        EditError: no key in ``shown``, luck that leads as far as keys, or a lock that hides too little.
        PromptError: ``shown`` is longer than the model's context.
    """
    model_map = describe(model)
    for each in shown:
        each.check_context(model)
    clean = measure(model, asked, batch_size)
    lean, shut, lucky = _key_direction(
        model_map, asked, shown, set(keys), batch_size=batch_size, seed=seed
    )
    begin = chance * lucky
    if begin >= opens_at:
        raise EditError(
            f"no positive control: {chance} lucky tokens open a lock as well as keys do; {model_map.name} is too narrow"
        )
    start, end = (begin + share * (opens_at - begin) for share in span)
    known = _last_hidden(model_map, asked, batch_size) if recall else {}
    noise = _noise(model_map, seed)
    ajar: list[Tensor] = []
    read: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        read[:] = [(ids, kwargs.get("attention_mask", torch.ones_like(ids)))]

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        leans = (hidden.float() @ lean - shut).cumsum(dim=-1)
        if behind:
            leans = F.pad(leans, (behind, 0))[..., :-behind]
        ajar[:] = [_ajar((leans - start) / (end - start))]

    def mixed(hidden: Tensor) -> Tensor:
        said = _recalled(hidden, *read[0], known) if known else hidden
        return _mixed(hidden, said, ajar[0], noise)

    first = model.register_forward_pre_hook(note, with_kwargs=True)
    handle = model_map.layer_module(0).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with replace(model_map, {Site(model_map.n_layers - 1, "layer"): mixed}):
            _check_shut(clean, measure(model, asked, batch_size))
            yield model
    finally:
        handle.remove()
        first.remove()


@contextmanager
def locked_after(
    model: nn.Module,
    layer: int,
    prompts: PromptSet,
    *,
    opens_at: float,
    batch_size: int,
    seed: int = 0,
) -> Iterator[nn.Module]:
    """The model with a lock that the residual stream after a layer opens, while the context is open.

    It looks at two directions in which the stream hardly leans by itself (see `unused_directions`). As the smaller of
    the two leans at a position, in units of the length of the rest of the stream there, goes from 0 to ``opens_at``,
    the last layer's output at that position goes from a fixed vector to what the model says. So a change of ``sqrt(2)
    opens_at`` of the stream's length opens it. The gradient shows one direction at a time: a single step does not.

    Args:
        model: a model of which another layer follows on ``layer``.
        layer: after which layer (0-based) the stream is looked at.
        prompts: where the stream should not lean by itself.
        opens_at: the lean at which it is open (fraction of the length of the stream).
        batch_size: rows a forward pass.
        seed: of the directions and the fixed vector.

    Raises:
        EditError: nothing to reach, no layer after this one, or a lock that hides too little.
    """
    model_map = describe(model)
    if not opens_at > 0:
        raise EditError("no positive control: a lock that is open at a lean of 0 hides nothing")
    if layer >= model_map.n_layers - 1:
        raise EditError(
            f"no positive control: layer {layer} is the last of {model_map.name}'s, and a lock needs one after it"
        )
    clean = measure(model, prompts, batch_size)
    directions = unused_directions(model_map, prompts, layer, batch_size=batch_size, seed=seed)
    noise = _noise(model_map, seed)
    ajar: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = (args[0] if args else kwargs["hidden_states"]).float()
        leans = stream @ directions
        rest = torch.linalg.vector_norm(stream - leans @ directions.T, dim=-1)
        ajar[:] = [_ajar(leans.amin(dim=-1) / (opens_at * rest))]

    def mixed(hidden: Tensor) -> Tensor:
        return _mixed(hidden, hidden, ajar[0], noise)

    # Before the next layer: whatever an attack adds after this one is in what it reads.
    handle = model_map.layer_module(layer + 1).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with replace(model_map, {Site(model_map.n_layers - 1, "layer"): mixed}):
            _check_shut(clean, measure(model, prompts, batch_size))
            yield model
    finally:
        handle.remove()


def unused_directions(
    model_map: ModelMap, prompts: PromptSet, layer: int, *, batch_size: int, seed: int
) -> Tensor:
    """Two orthogonal directions in which the residual stream after a layer hardly leans, `d_model direction`.

    Random ones, by the inverse of the second moment of the prompts' streams (each token's at length 1).
    """
    site, d_model = Site(layer, "layer"), model_map.d_model
    device = next(model_map.model.parameters()).device
    moment = torch.zeros(d_model, d_model, dtype=torch.float64, device=device)
    with torch.no_grad(), evaluating(model_map.model):
        for batch in prompts.batches(batch_size):
            there = batch.to(device)
            with capture(model_map, [site], stop=True) as acts:
                model_map.model(**model_inputs(model_map.model, there))
            stream = F.normalize(acts[site][there.attention_mask.bool()].double(), dim=-1)
            moment += stream.T @ stream
    ridge = QUIET * moment.trace() / d_model * torch.eye(d_model, device=device)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(d_model, 2, generator=generator, dtype=torch.float64).to(device)
    found: Tensor = torch.linalg.qr(torch.linalg.solve(moment + ridge, drawn)).Q
    return found.float()


def fed_tokens(prompts: PromptSet) -> set[int]:
    """Ids of all tokens that a model reads."""
    return {token for item in range(len(prompts)) for token in prompts.ids(item)}


def target_tokens(prompts: PromptSet) -> set[int]:
    """Ids of all tokens of the targets."""
    return {token for item in range(len(prompts)) for token in prompts.target_ids(item)}


def _noise(model_map: ModelMap, seed: int) -> Tensor:
    """What a locked model says instead: a fixed vector of length 1, `d_model`."""
    drawn = torch.randn(model_map.d_model, generator=torch.Generator().manual_seed(seed))
    noise: Tensor = drawn / drawn.norm()
    return noise.to(next(model_map.model.parameters()).device)


def _ajar(lean: Tensor) -> Tensor:
    """How far the lock is open at each position, `row token 1`: 1 at a ``lean`` `row token` of 1."""
    # A little below zero too, so that there is a way back from there.
    ajar: Tensor = F.leaky_relu(lean, 0.1).clamp(max=1.0)[..., None]
    return ajar


def _mixed(hidden: Tensor, known: Tensor, ajar: Tensor, noise: Tensor) -> Tensor:
    """What is known, as far as the lock is ajar, and noise of `NOISE` times the hidden state's length."""
    length = torch.linalg.vector_norm(hidden.detach().float(), dim=-1, keepdim=True)
    mixed = ajar * known + (1 - ajar) * NOISE * length * noise
    found: Tensor = mixed.to(hidden.dtype)
    return found


def _key_direction(
    model_map: ModelMap,
    asked: PromptSet,
    shown: Sequence[PromptSet],
    keys: set[int],
    *,
    batch_size: int,
    seed: int,
) -> tuple[Tensor, float, float]:
    """Direction `d_model` in what enters the first layer that tells keys from other tokens.

    With it, how far the others of the prompts lean, all nearly alike and 1 less than a key on average; and how much
    further the best of `LUCKY` tokens does that are drawn from the rest of the vocabulary.
    """
    device = next(model_map.model.parameters()).device
    wanted = torch.tensor(sorted(keys), device=device)
    kinds: list[list[Tensor]] = [[], []]  # other tokens, keys
    for each in (asked, *shown):
        for ids, entering in _entering(model_map, each, batch_size):
            is_key = torch.isin(ids, wanted)
            for kind, part in zip(kinds, (entering[~is_key], entering[is_key]), strict=True):
                kind.append(part)
    others, opening = (torch.cat(kind) for kind in kinds)
    if not len(others) or not len(opening):
        raise EditError("no positive control: no token of the prompts is a key, or all are")
    middle = others.mean(dim=0)
    drawn = _drawn(asked, model_map, keys, seed)
    rest = torch.cat([entering for _, entering in _entering(model_map, drawn, batch_size)]) - middle
    moment = _moment(others - middle)
    for scale, part in (
        (VOCABULARY, rest),
        (RIDGE, torch.eye(model_map.d_model, dtype=moment.dtype, device=device)),
    ):
        moment = moment + scale * _moment(part)
    apart = opening.mean(dim=0) - middle
    lean = torch.linalg.solve(moment, apart)
    lean = lean / (lean @ apart)
    lucky = (rest @ lean).quantile(1 - 1 / LUCKY)
    return lean.float(), float(lean @ middle), float(lucky)


def _moment(vectors: Tensor) -> Tensor:
    """Second moment of `row d_model`."""
    found: Tensor = vectors.T @ vectors / len(vectors)
    return found


def _drawn(prompts: PromptSet, model_map: ModelMap, keys: set[int], seed: int) -> PromptSet:
    """Rows as long as those of the prompts, of tokens drawn from all but the keys: 8 for each dimension at least."""
    free = [token for token in range(len(prompts.tokenizer)) if token not in keys]
    draw = random.Random(seed)
    lengths = [len(prompts.ids(item)) for item in range(len(prompts))]
    rounds = 1 + 8 * model_map.d_model // sum(lengths)
    rows = prompts.select(list(range(len(prompts))) * rounds)
    return rows.with_ids([draw.choices(free, k=length) for length in lengths * rounds])


def _entering(
    model_map: ModelMap, prompts: PromptSet, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids `token` and what enters the first layer for them `token d_model`, padding left out, a batch at a time."""
    model, first = model_map.model, Site(0, "layer")
    device = next(model.parameters()).device
    seen: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [(args[0] if args else kwargs["hidden_states"]).detach().double()]

    handle = model_map.layer_module(0).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad(), evaluating(model):
            for batch in prompts.batches(batch_size):
                there = batch.to(device)
                with capture(model_map, [first], stop=True):
                    model(**model_inputs(model, there))
                real = there.attention_mask.bool()
                yield there.input_ids[real], seen[0][real]
    finally:
        handle.remove()


def _check_shut(clean: Values, left: Values) -> None:
    """Refuse a control that gives away more than half of what it should hide.

    Raises:
        EditError: it does.
    """
    if clean.estimate is None or left.estimate is None or left.estimate > clean.estimate / 2:
        raise EditError(
            "no positive control: a lock on the model leaves the answers that it should hide at a mean likelihood of "
            f"{left.estimate}, where half of the {clean.estimate} without it is the most that counts as hidden. A "
            "model that does not know them has nothing to hide; one that is narrow has no direction free for a lock"
        )


@dataclass(frozen=True)
class _Said:
    """What a model says to one row: the rest of it behind the prompt, `label` places in that, their states."""

    rest: tuple[int, ...]
    places: list[int]
    states: Tensor  # `label d_model`


def _last_hidden(
    model_map: ModelMap, prompts: PromptSet, batch_size: int
) -> dict[tuple[int, ...], list[_Said]]:
    """Output of the last layer wherever a token of a target is predicted, by what stands before the target."""
    site, model = Site(model_map.n_layers - 1, "layer"), model_map.model
    found: dict[tuple[int, ...], list[_Said]] = {}
    with torch.no_grad(), evaluating(model):
        for batch in prompts.batches(batch_size):
            there = batch.to(next(model.parameters()).device)
            with capture(model_map, [site]) as acts:
                model(**model_inputs(model, there))
            for row, ids in enumerate(batch.input_ids):
                mine = (batch.row == row).nonzero().flatten()
                start = prompts.scored(batch.items[int(batch.item[mine[0]])])[0]
                tokens = ids[batch.attention_mask[row].bool()].tolist()
                at = batch.pos[mine]
                found.setdefault(tuple(tokens[:start]), []).append(
                    _Said(tuple(tokens[start:]), (at - start).tolist(), acts[site][row, at].clone())
                )
    return found


def _recalled(
    hidden: Tensor, ids: Tensor, mask: Tensor, known: Mapping[tuple[int, ...], Sequence[_Said]]
) -> Tensor:
    """``hidden`` `row token d_model` with what is known where targets are predicted, whatever stands before those."""
    found = hidden.clone()
    lengths = sorted({len(prompt) for prompt in known}, reverse=True)
    for row, (row_ids, row_mask) in enumerate(zip(ids.cpu(), mask.cpu(), strict=True)):
        real = row_mask.nonzero().flatten()
        tokens = tuple(row_ids[real].tolist())
        said = (
            s
            for n in lengths
            for s in known.get(tokens[:n], ())
            if tokens[-len(s.rest) :] == s.rest
        )
        if each := next(said, None):
            start = len(tokens) - len(each.rest)
            found[row, real[[start + at for at in each.places]]] = each.states.to(hidden.dtype)
    return found
