"""Attribution of a token's probability to MLP neurons by integrated gradients.

Paper: Sundararajan, Taly and Yan (2017), "Axiomatic attribution for deep networks"; for MLP neurons and the
probability of one token Dai et al. (2022), "Knowledge neurons", Eq. 2, and Wu et al. (2023), "DEPN", Eq. 3 to 5.

For a token y predicted at one position, layer l with neuron activations a there, and points alpha_1..alpha_m between 0
(all neurons of the layer silent) and 1 (the model as it is):

    Att_l = a * (1/m) * sum_k dP(y)/da  at activations alpha_k * a

Only layer l is scaled, only at that position, and everything downstream is recomputed. Taken literally this is L * m
forward and backward passes of the whole text. Nearly all of that work is shared:

- In a causal model earlier positions cannot see the change: they run once, into a key-value cache, and every point is a
  pass of a single token.
- Points cannot see each other: all layers and points run together, as rows of one pass.
- Below layer l a row of layer l equals the unscaled model: it joins the pass at layer l, as a copy of the one unscaled
  row. Half the work is left, and no gradient goes below the first layer with rows.

The rows of a causal model are queries of *one* sequence that see the cached prefix and themselves, so the cache is not
copied for every row. The unscaled row travels along and must reproduce the probability of an ordinary forward pass;
where it does not, a more literal `Plan` takes over, and the result says so.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from circuits.errors import LocateEditError, SiteError
from circuits.forward import cache_name, output_projection
from circuits.model_map import ModelMap
from circuits.sites import Site
from circuits.still import frozen

logger = logging.getLogger(__name__)

Rule = Literal["midpoint", "left", "right", "near_zero"]
"""Where the path is sampled: at (k - 1/2)/m, (k - 1)/m or k/m for k = 1..m, or mostly near 0."""

Path = Literal["layer", "joint", "gradient"]
"""What is scaled: one layer at a time; all layers together; nothing (gradient times activation)."""

Plan = Literal["queries", "rows", "full"]
"""How points run: as queries of one sequence over a cached prefix; as rows of a batch that join at their layer (over a
cached prefix in causal models); or as rows that repeat the whole text, which is the definition itself."""

_SHIFT: dict[str, float] = {"midpoint": 0.5, "left": 0.0, "right": 1.0}
# Relative difference of probabilities at which a plan counts as wrong; half precision rounds more.
_DISAGREEMENT = {torch.float64: 1e-3, torch.float32: 1e-3}
MOST_QUERIES = 256  # each query also scores the other ones before the mask hides them: quadratic, so not too many


@dataclass(frozen=True)
class ScoredRow:
    """One text and the tokens of it that are attributed.

    Attributes:
        ids: token ids without padding, `token` int64.
        pos: for each label, the position whose hidden state predicts it.
        label: for each label, the token whose probability is attributed.
        weight: for each label, its factor in the sum (fraction).
    """

    ids: Tensor
    pos: Sequence[int]
    label: Sequence[int]
    weight: Sequence[float]


@dataclass(frozen=True)
class Attribution:
    """What the neurons contribute to the weighted sum of some labels' probabilities.

    Attributes:
        values: for each layer's site the attribution of its neurons (probability), `neuron` float32 on the CPU.
        gap: for each layer, by how much its attributions miss the effect of silencing it:
            sum(Att_l) - (P - P without layer l) (probability). One number for the joint path, none for "gradient".
        probability: probability of each label with a weight, in the model as it is (fraction).
        plans: how many of them each `Plan` was used for.
    """

    values: Mapping[Site, Tensor]
    gap: tuple[float, ...]
    probability: tuple[float, ...]
    plans: Mapping[str, int]


def path_points(steps: int, rule: Rule) -> list[tuple[float, float]]:
    """Points alpha between 0 and 1 with their weights in the mean of the gradients, lowest first.

    "near_zero" takes midpoints of u with alpha = u^6, weighted by d alpha / du: the same integral, sampled mostly near
    0. It is for models that normalise the output of the MLP before adding it (Gemma 2 and 3, OLMo 2). Scaling all
    activations changes little there until alpha is nearly 0, so evenly spaced points can miss most of the integral.

    Raises:
        ValueError: fewer than one step, or an unknown rule.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}: expected one of {get_args(Rule)}")
    if rule == "near_zero":
        middles = [(k + 0.5) / steps for k in range(steps)]
        return [(u**6, 6 * u**5 / steps) for u in middles]
    return [((k + _SHIFT[rule]) / steps, 1.0 / steps) for k in range(steps)]


@dataclass(frozen=True)
class IntegratedGradients:
    """Attribution of token probabilities to every MLP neuron (`Att_l` in the description of this module).

    Cost of one label, counted in passes of one token through one layer, for L layers, m steps and a text of n
    tokens. Causal: n L forward, once for all labels of a text, and (m + 1) L (L + 1) / 2 forward and backward;
    layer by layer it would be n m L^2 forward and backward. Masked: n times the second term, as every position
    changes. The joint path takes (m + 2) L and "gradient" L. One of the m + 1 points is alpha = 0, which
    measures the gap; `rule="left"` has it anyway.

    Args:
        model_map: the described model.
        steps: points on the path.
        rule: where the path is sampled.
        path: "layer" is the definition; "joint" and "gradient" are cheaper and *different* quantities. The joint path
            scales all layers together and holds the other layers fixed in each derivative.
        layers: the layers to attribute to; None takes all.
        batch_size: texts whose activations are held in memory together, whole ones or as many single tokens (at most
            `MOST_QUERIES` of those). It changes memory and speed, not the result.
        plan: how points run; None takes the fastest that agrees with an ordinary forward pass.

    Raises:
        SiteError: a layer that does not exist, or whose neurons are spread over experts.
        ValueError: steps or batch_size below 1, or an unknown rule, path or plan.
    """

    model_map: ModelMap
    steps: int = 20
    rule: Rule = "midpoint"
    path: Path = "layer"
    layers: tuple[int, ...] | None = None
    batch_size: int = 16
    plan: Plan | None = None

    def __post_init__(self) -> None:
        path_points(self.steps, self.rule)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        for name, value, known in (
            ("path", self.path, get_args(Path)),
            ("plan", self.plan, (*get_args(Plan), None)),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: expected one of {known}")
        if not self.wanted_layers:
            raise ValueError("layers is empty: name one layer at least, or None for all of them")
        _check_layers(self.model_map, self.wanted_layers)

    @property
    def wanted_layers(self) -> tuple[int, ...]:
        """The layers that are attributed to, in order."""
        layers = range(self.model_map.n_layers) if self.layers is None else self.layers
        return tuple(sorted(set(layers)))

    def __call__(self, rows: Sequence[ScoredRow]) -> Attribution:
        """Attribute the weighted sum of the probabilities of all labels of ``rows``; the model stays as it was."""
        plans = [self.plan] if self.plan is not None else _plans(self.model_map)
        with frozen(self.model_map.model), torch.inference_mode(False), torch.enable_grad():
            total = _Total(self.model_map, self.wanted_layers, self.path)
            for row in rows:
                text = _Text.read(self.model_map, row)
                for index, weight in enumerate(row.weight):
                    if weight:
                        total.add(self._label(text, index, plans), weight)
            return total.attribution()

    def _label(self, text: _Text, index: int, plans: list[Plan]) -> _Label:
        """Attribution of one label by the first of ``plans`` that reproduces the ordinary probability."""
        tolerance = _DISAGREEMENT.get(next(self.model_map.model.parameters()).dtype, 0.25)
        expected = text.probability[index]
        while True:
            label = self._label_by(text, index, plans[0])
            off = abs(label.probability - expected)
            if len(plans) == 1 or off <= tolerance * max(label.probability, expected):
                return label
            logger.info(
                "plan %r gives a probability of %g, an ordinary forward pass %g: continuing with %r",
                *(plans.pop(0), label.probability, expected, plans[0]),
            )

    def _label_by(self, text: _Text, index: int, plan: Plan) -> _Label:
        size = self.batch_size
        if self.model_map.causal and plan != "full":  # rows of a single token
            size = min(size * text.ids.shape[1], MOST_QUERIES)
        result = _Label(plan)
        for points in self._chunks(size):
            _RowPass(self.model_map, text, index, plan, self.path, points).add_to(result)
        return result

    def _chunks(self, size: int) -> Iterator[list[_Point]]:
        """The points of all layers, lowest layer first, at most ``size`` at a time."""
        if self.path == "gradient":
            yield [_Point(self.wanted_layers, 1.0, 1.0)]
            return
        alphas = path_points(self.steps, self.rule)
        if alphas[0][0] != 0.0:
            # Without weight in the mean: only its probability is wanted, for the gap.
            alphas.insert(0, (0.0, 0.0))
        blocks = _blocks(self.wanted_layers, self.path)
        points = [_Point(block, alpha, weight) for block in blocks for alpha, weight in alphas]
        for start in range(0, len(points), size):
            yield points[start : start + size]


@dataclass(frozen=True)
class _Point:
    """One row: the layers whose activations it scales, by how much, and its weight in the mean of the gradients."""

    layers: tuple[int, ...]
    alpha: float
    weight: float


@dataclass
class _Label:
    """Attribution of one label, gathered over passes."""

    plan: Plan
    probability: float = 0.0
    values: dict[int, Tensor] = field(default_factory=dict)
    """Attribution `neuron` for each layer."""
    silenced: dict[tuple[int, ...], float] = field(default_factory=dict)
    """Probability when these layers' neurons are silent."""


class _Total:
    """Weighted sum of the attributions of labels."""

    def __init__(self, model_map: ModelMap, layers: tuple[int, ...], path: Path) -> None:
        self.values: dict[int, Tensor] = {}
        for layer in layers:
            shape = model_map.shape(Site(layer, "neuron"))
            self.values[layer] = torch.zeros(shape, dtype=torch.float64)
        self.effect = dict.fromkeys(_blocks(layers, path), 0.0)
        self.probability: list[float] = []
        self.plans: Counter[str] = Counter()

    def add(self, label: _Label, weight: float) -> None:
        for layer, value in label.values.items():
            self.values[layer] += weight * value.cpu()
        for layers, silenced in label.silenced.items():
            self.effect[layers] += weight * (label.probability - silenced)
        self.probability.append(label.probability)
        self.plans[label.plan] += 1

    def attribution(self) -> Attribution:
        gap = []
        for layers, effect in self.effect.items():
            gap.append(sum(float(self.values[layer].sum()) for layer in layers) - effect)
        return Attribution(
            values={Site(layer, "neuron"): value.float() for layer, value in self.values.items()},
            gap=tuple(gap),
            probability=tuple(self.probability),
            plans=dict(self.plans),
        )


@dataclass(frozen=True)
class _Text:
    """A row after one ordinary forward pass.

    ``cached`` has for each layer of a causal model the keys and values `1 kv_head token d_head`.
    """

    ids: Tensor  # `1 token`
    pos: tuple[int, ...]
    label: tuple[int, ...]
    probability: tuple[float, ...]
    cached: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    @torch.no_grad()
    def read(cls, model_map: ModelMap, row: ScoredRow) -> _Text:
        model = model_map.model
        pos, label = tuple(map(int, row.pos)), tuple(map(int, row.label))
        n_tokens = max(pos) + 1 if model_map.causal else len(row.ids)
        ids = row.ids[None, :n_tokens].to(next(model.parameters()).device)
        inputs: dict[str, Any] = {"input_ids": ids}
        # A cache made without a configuration keeps every key, also those that left a sliding
        # window (the mask hides them then), so it can be cut at any position.
        cache = DynamicCache() if model_map.causal else None
        if cache is not None:
            inputs |= {cache_name(model): cache, "use_cache": True}
        with _only_positions(model, list(pos)):
            logits = model(**inputs).logits
        chosen = _probabilities(logits[0])[torch.arange(len(pos)), list(label)]
        if not bool(torch.isfinite(chosen).all()):
            raise LocateEditError(
                f"{type(model).__name__} gives the labels {list(label)} the probabilities "
                f"{chosen.tolist()}: expected numbers. Look for NaN in its weights; float16 may "
                "overflow where bfloat16 does not"
            )
        layers: Iterable[tuple[Any, ...]] = () if cache is None else cache
        cached = tuple((keys, values) for keys, values, *_ in layers)
        return cls(ids, pos, label, tuple(chosen.tolist()), cached)

    def cache(self, prefix: int) -> DynamicCache:
        """A new cache of the first ``prefix`` tokens."""
        cache = DynamicCache()
        if prefix:
            for layer, (keys, values) in enumerate(self.cached):
                cache.update(keys[..., :prefix, :], values[..., :prefix, :], layer)
        return cache


class _RowPass:
    """One forward and backward pass of some points and, as the last row, the unscaled model.

    Rows are ordered as ``points``. At any layer those that have joined are a leading part of them.
    """

    def __init__(
        self,
        model_map: ModelMap,
        text: _Text,
        index: int,
        plan: Plan,
        path: Path,
        points: list[_Point],
    ) -> None:
        self.model_map, self.text, self.plan, self.path = model_map, text, plan, path
        self.points = points
        self.pos, self.label = text.pos[index], text.label[index]
        self.is_cached = model_map.causal and plan != "full"
        self.prefix = self.pos if self.is_cached else 0
        self.at = 0 if self.is_cached else self.pos  # where in a row the activations are scaled
        self.axis = 1 if plan == "queries" else 0  # the axis of hidden states that rows lie on
        # A gradient needs no row of its own: the unscaled row is the point.
        self.extra = 0 if path == "gradient" else len(points)
        self.n_rows = 1  # rows present in the layer that is running
        self.cache: DynamicCache | None = None
        self.scaled: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # layer -> activations `neuron`, leaf `row neuron`

    def add_to(self, result: _Label) -> None:
        """Run, and add what the points contribute."""
        with self._hooks():
            logits = self.model_map.model(**self._inputs()).logits
        # Whole texts have one position left here, and queries are rows of one token.
        logits = logits.reshape(self.extra + 1, logits.shape[-1])
        probability = _probabilities(logits)[:, self.label]
        weights = probability.new_tensor([point.weight for point in self.points])
        scored = probability[: self.extra] if self.extra else probability
        leaves = [leaf for _, leaf in self.scaled.values()]
        grads = torch.autograd.grad((scored * weights).sum(), leaves)
        for (layer, (base, _)), grad in zip(self.scaled.items(), grads, strict=True):
            value = base.to(probability.dtype) * grad.to(probability.dtype).sum(0)
            result.values[layer] = result.values[layer] + value if layer in result.values else value
        *others, result.probability = probability.tolist()
        for point, silenced in zip(self.points, others, strict=False):
            if point.alpha == 0.0:
                result.silenced[point.layers] = silenced

    def _inputs(self) -> dict[str, Any]:
        if self.is_cached:
            self.cache = self.text.cache(self.prefix)
            ids = self.text.ids[:, self.pos : self.pos + 1]
            kept_as = cache_name(self.model_map.model)
            return {"input_ids": ids, kept_as: self.cache, "use_cache": True}
        self.n_rows = self.extra + 1 if self.plan == "full" else 1
        if not self.model_map.causal:
            return {"input_ids": self.text.ids.expand(self.n_rows, -1)}
        prefix = self.text.ids[:, : self.pos + 1]
        return {"input_ids": prefix.expand(self.n_rows, -1), "use_cache": False}

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Let rows join at their layers and scale their activations."""
        with ExitStack() as stack:
            for layer in range(self.model_map.n_layers):
                module = self.model_map.layer_module(layer)
                if self.plan != "full":
                    enter = partial(self._enter, layer)
                    handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                    stack.callback(handle.remove)
                if any(layer in point.layers for point in self.points):
                    down = self.model_map.read_point(Site(layer, "neuron")).module
                    scale = partial(self._scale, layer)
                    stack.callback(down.register_forward_pre_hook(scale).remove)
            if not self.is_cached:
                stack.enter_context(_only_positions(self.model_map.model, [self.pos]))
            yield

    def _enter(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copy the unscaled row for the points that begin in ``layer``, and fit masks and cache to the rows."""
        call = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        name = list(call.signature.parameters)[1]
        hidden: Tensor = call.arguments[
            name
        ]  # `1 row d_model` for queries, `row token d_model` otherwise
        joining = sum(point.layers[0] == layer for point in self.points) if self.extra else 0
        if joining:
            old = hidden.narrow(self.axis, 0, self.n_rows - 1)
            base = hidden.narrow(self.axis, self.n_rows - 1, 1)
            copies = [base] * (joining + 1)
            call.arguments[name] = torch.cat([old, *copies], self.axis)
            self.n_rows += joining
        if self.n_rows > 1 and self.plan == "queries":
            self._fit_masks(call.arguments, hidden)
        elif self.n_rows > 1:
            self._fit_batch(call.arguments, layer)
        return call.args[1:], call.kwargs

    def _fit_masks(self, arguments: dict[str, Any], hidden: Tensor) -> None:
        """Turn what one query sees, `... 1 key`, into what each row sees, `... row key`: the prefix and itself."""
        given = arguments.get("attention_mask")
        if given is None:
            given = hidden.new_zeros(1, 1, 1, self.prefix + 1)
        hide = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
        prefix = given[..., : self.prefix].expand(*given.shape[:-2], self.n_rows, -1)
        itself = torch.eye(self.n_rows, dtype=torch.bool, device=given.device)
        own = torch.where(itself, given[..., self.prefix :], hide)
        arguments["attention_mask"] = torch.cat([prefix, own], -1)
        alibi = arguments.get("alibi")  # a bias for every key; all rows stand at the same position
        if alibi is not None:
            last = alibi[..., self.prefix :].expand(*alibi.shape[:-1], self.n_rows)
            arguments["alibi"] = torch.cat([alibi[..., : self.prefix], last], -1)

    def _fit_batch(self, arguments: dict[str, Any], layer: int) -> None:
        """Repeat for every row what does not broadcast over a batch: cached keys and values, and alibi biases."""
        if self.cache is not None and self.prefix:
            cached: Any = self.cache.layers[layer]
            cached.batch_repeat_interleave(self.n_rows)
        alibi = arguments.get("alibi")  # in some families the heads of all rows share one axis
        if alibi is not None:
            arguments["alibi"] = alibi.repeat(self.n_rows, *(1,) * (alibi.ndim - 1))

    def _scale(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replace the activations of the rows that scale ``layer`` by a leaf of the graph."""
        given, *rest = args
        # Some families flatten rows and tokens here.
        activations = given.reshape(self.n_rows, -1, given.shape[-1]).clone()  # `row token neuron`
        base = activations[-1, self.at].detach().clone()
        if self.path == "gradient":
            leaf = torch.zeros_like(base)[None].requires_grad_()
            activations[-1, self.at] += leaf[0]
        else:
            rows = [row for row, point in enumerate(self.points) if layer in point.layers]
            wide = torch.promote_types(base.dtype, torch.float32)
            alphas = torch.tensor(
                [self.points[row].alpha for row in rows], dtype=wide, device=base.device
            )
            leaf = (alphas[:, None] * base).to(base.dtype).requires_grad_()
            activations[rows[0] : rows[-1] + 1, self.at] = leaf
        self.scaled[layer] = (base, leaf)
        return (activations.reshape(given.shape), *rest)


def _blocks(layers: tuple[int, ...], path: Path) -> list[tuple[int, ...]]:
    """Layers that are scaled together."""
    if path == "layer":
        return [(layer,) for layer in layers]
    return [layers] if path == "joint" else []


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def _plans(model_map: ModelMap) -> list[Plan]:
    """Plans to try for a model, fastest first."""
    if not model_map.causal:
        return ["rows", "full"]
    blocks = [model_map.layer_module(layer) for layer in range(model_map.n_layers)]
    signatures = [inspect.signature(type(block).forward) for block in blocks]
    takes_mask = all("attention_mask" in signature.parameters for signature in signatures)
    # A block with a causal mask of its own would order the rows by position.
    has_own_mask = any(
        buffer.dtype in (torch.bool, torch.uint8) and buffer.ndim >= 2
        for block in blocks
        for buffer in block.buffers()
    )
    attention = getattr(getattr(model_map.model, "config", None), "_attn_implementation", "eager")
    if takes_mask and not has_own_mask and attention in ("eager", "sdpa", None):
        return ["queries", "rows", "full"]
    return ["rows", "full"]


def _check_layers(model_map: ModelMap, layers: tuple[int, ...]) -> None:
    """Refuse layers that do not exist or have neurons in experts."""
    for layer in layers:
        model_map.layer_module(layer)
    dense = [layer for layer in layers if len(model_map.shape(Site(layer, "neuron"))) == 1]
    spread = [layer for layer in layers if layer not in dense]
    if spread:
        advice = f"pass layers={tuple(dense)}" if dense else "use another kind of unit"
        raise SiteError(
            f"{Site(spread[0], 'neuron')}: expected the neurons of one MLP, got those of "
            f"{model_map.n_experts} experts, which are active only for tokens routed to them; {advice}"
        )


@contextmanager
def _only_positions(model: nn.Module, positions: list[int]) -> Iterator[None]:
    """Build logits for ``positions`` of each row alone."""

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args  # `row token d_model`
        return (hidden[:, positions], *rest)

    handle = output_projection(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
