"""Rewards: functions that say how good a continuation is.

    reward = Lexicon(("grobnik", "snarvel"))                     # minus the share of these words
    reward = SmallClassifier.fit(texts, good)                    # log-odds of "good", learnt from labelled texts
    reward = lambda prompts, continuations: [-len(c) for c in continuations]

A reward is any function of two equally long sequences of texts, prompts and what a model wrote behind them, that
returns one number each; higher is better. `rewards` calls one and refuses what is not a finite number for each text:
nothing is skipped in silence. `find` reads one from text, for the command line.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from circuits.atomic import atomic_folder
from locate_edit.errors import RewardError
from locate_edit.metrics.words import whole_words
from locate_edit.metrics.words import words as words_of

__all__ = ["Lexicon", "Reward", "SmallClassifier", "find", "name_of", "rewards"]

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""Prompts and their continuations to one number each; higher is better."""

_WORD = re.compile(r"\w+")
_SHOWN = 80  # characters of a continuation that an error quotes


def rewards(
    reward: Reward, prompts: Sequence[str], continuations: Sequence[str]
) -> tuple[float, ...]:
    """What ``reward`` gives for each continuation, checked: one finite number each.

    Args:
        reward: the function to call, once for all texts.
        prompts: what was continued.
        continuations: what was written behind each.

    Raises:
        RewardError: the function raised, returned another number of values, or something that is not a finite number;
            with the name of the function and the first continuation concerned.
    """
    name = name_of(reward)
    if len(prompts) != len(continuations):
        raise RewardError(
            f"{name}: expected one continuation for each of {len(prompts)} prompts, got {len(continuations)}"
        )
    try:
        found: list[Any] = list(reward(prompts, continuations))
    except Exception as problem:
        where = _first_that_raises(reward, prompts, continuations)
        raise RewardError(
            f"the reward {name} raised {type(problem).__name__}: {problem}; {where}. Make it return a number for "
            "every text, the empty one included"
        ) from problem
    if len(found) != len(continuations):
        raise RewardError(
            f"the reward {name} returned {len(found)} values for {len(continuations)} continuations, the first of "
            f"which is {_quoted(continuations[0] if continuations else '')}. Return one number for each, in their order"
        )
    return tuple(_number(value, name, i, continuations[i]) for i, value in enumerate(found))


def find(text: str) -> Reward:
    """The reward that ``text`` names: ``lexicon:word,word,...`` or ``package.module:name``.

    ``name`` is a function, or a class that is made without arguments.

    Raises:
        RewardError: text of another form, or a module or name that does not exist or cannot be called.
    """
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise RewardError(
            f"cannot read the reward {text!r}: expected 'lexicon:word,word,...' or 'package.module:name'"
        )
    if module == "lexicon":
        return Lexicon(tuple(word.strip() for word in name.split(",") if word.strip()))
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as problem:
        raise RewardError(
            f"cannot import {module!r} for the reward {text!r}: {problem}. Install the package, or name its folder in "
            "PYTHONPATH"
        ) from problem
    except AttributeError as problem:
        raise RewardError(f"the module {module!r} has no {name!r} to use as a reward") from problem
    made = found() if isinstance(found, type) else found
    if not callable(made):
        raise RewardError(
            f"the reward {text!r} is a {type(made).__name__}: expected a function of prompts and continuations"
        )
    reward: Reward = made
    return reward


def name_of(reward: Reward) -> str:
    """What errors and provenance call a reward: ``module:name`` of a function, else its repr."""
    if hasattr(reward, "__qualname__"):
        return f"{reward.__module__}:{reward.__qualname__}"
    return repr(reward)


@dataclass(frozen=True)
class Lexicon:
    """Minus the share of a continuation's words that stand in a list; 0 for none of them, -1 for nothing else.

    Whole words count, whatever their case: ``rat`` is not found in ``rather``. An entry of several words counts as
    that many. The prompt plays no part.

    Attributes:
        words: the list.
        count: minus the number of such words instead of their share.

    Raises:
        RewardError: no words, or an entry without a letter or digit.
    """

    words: tuple[str, ...]
    count: bool = False

    def __post_init__(self) -> None:
        given: Any = self.words
        if isinstance(given, str):
            raise RewardError(f"Lexicon needs a tuple of words, got the text {given!r}")
        object.__setattr__(self, "words", tuple(self.words))
        bad = [word for word in self.words if not _WORD.search(word)]
        if not self.words or bad:
            what = f"got {bad[0]!r}" if bad else "got none"
            raise RewardError(f"Lexicon needs words with a letter or digit each, {what}")

    def __call__(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """Rewards of ``continuations``, at most 0."""
        return [0.0 - self._badness(text) for text in continuations]

    def _badness(self, text: str) -> float:
        listed = sum(_number_of_words(found) for found in self._pattern.findall(text))
        return float(listed) if self.count else listed / max(1, _number_of_words(text))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # Longer entries first, so that one that begins another does not hide it.
        entries = sorted(set(self.words), key=lambda word: (-len(word), word))
        return re.compile("|".join(whole_words(entry.strip()) for entry in entries), re.IGNORECASE)


def _number_of_words(text: str) -> int:
    return sum(bool(_WORD.match(word)) for word in words_of(text))


class SmallClassifier:
    """Log-odds (or probability) that a continuation is good, by logistic regression on hashed word n-grams.

    Made by `fit` from labelled texts within seconds, so that a reward needs no service and no large model. A text is
    its lower-case words and runs of up to ``order`` words, hashed into ``len(weight)`` places, as a vector of counts of
    length one. A text without words has the log-odds of the bias alone. It knows what was in its texts, and no more:
    measure it on held-out ones.

    Attributes:
        weight: log-odds of each place, `feature` float32.
        bias: log-odds of a text without words.
        order: longest run of words.
        output: "log-odds" or "probability".
    """

    def __init__(
        self,
        weight: Tensor,
        bias: float,
        *,
        order: int = 2,
        output: Literal["log-odds", "probability"] = "log-odds",
    ) -> None:
        if order < 1 or output not in ("log-odds", "probability"):
            raise RewardError(
                f"expected order of at least 1 and output 'log-odds' or 'probability', got {order} and {output!r}"
            )
        self.weight, self.bias, self.order, self.output = weight, bias, order, output

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        good: Sequence[bool],
        *,
        order: int = 2,
        features: int = 2**14,
        decay: float = 1e-3,
        steps: int = 200,
        output: Literal["log-odds", "probability"] = "log-odds",
    ) -> SmallClassifier:
        """A classifier that minimises mean cross-entropy plus ``decay / 2`` times the squared norm of its weights.

        The same texts give the same bits: the problem is convex, starts at zero and is solved with all texts at once.

        Args:
            texts: labelled texts.
            good: whether each is good.
            order: longest run of words.
            features: places that words and runs are hashed into.
            decay: weight of the squared norm.
            steps: largest number of L-BFGS iterations.
            output: what calling it returns.

        Raises:
            RewardError: another number of labels than texts, or labels of one kind only.
        """
        if len(texts) != len(good):
            raise RewardError(f"expected one label for each of {len(texts)} texts, got {len(good)}")
        if len(set(map(bool, good))) != 2:
            raise RewardError("a classifier needs good texts and others: the labels are all alike")
        row, place, value = _features(texts, order, features)
        wanted = torch.tensor([float(bool(label)) for label in good], dtype=torch.float64)
        weight = torch.zeros(features, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias],
            max_iter=steps,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-8,
            tolerance_change=1e-14,
        )

        def closure() -> Tensor:
            solver.zero_grad()
            odds = _log_odds(weight, bias, row, place, value, len(texts))
            loss = F.binary_cross_entropy_with_logits(odds, wanted)
            loss = loss + decay / 2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            solver.step(closure)
        return cls(weight.detach().float(), float(bias.detach()), order=order, output=output)

    def __call__(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """Rewards of ``continuations``; the prompts play no part."""
        row, place, value = _features(continuations, self.order, len(self.weight))
        bias = torch.tensor(self.bias, dtype=torch.float64)
        odds = _log_odds(self.weight.double(), bias, row, place, value, len(continuations))
        found: list[float] = (odds.sigmoid() if self.output == "probability" else odds).tolist()
        return found

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.weight.numpy().tobytes()).hexdigest()[:12]
        return f"SmallClassifier({len(self.weight)} features, order={self.order}, output={self.output!r}, {digest})"

    def save(self, folder: str | Path) -> Path:
        """Write ``classifier.safetensors`` and ``classifier.json`` into ``folder``, all or nothing."""
        with atomic_folder(folder, like="classifier.json") as place:
            save_file({"weight": self.weight.contiguous()}, place / "classifier.safetensors")
            about = {"format": 1, "bias": self.bias, "order": self.order, "output": self.output}
            (place / "classifier.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> SmallClassifier:
        """Read a classifier that `save` wrote.

        Raises:
            RewardError: there is none, or its files cannot be read.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
            if about["format"] != 1:
                raise ValueError(f"expected format 1, got {about['format']}")
            weight = load_file(folder / "classifier.safetensors")["weight"]
            return cls(weight, float(about["bias"]), order=about["order"], output=about["output"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            raise RewardError(
                f"{folder} holds no classifier that can be read: {problem}. Expected classifier.json and "
                "classifier.safetensors, as SmallClassifier.save writes them"
            ) from problem


def _features(texts: Iterable[str], order: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, place and value of every entry of the texts' feature vectors, each `entry`; rows have length one."""
    rows: list[int] = []
    places: list[int] = []
    values: list[float] = []
    for index, text in enumerate(texts):
        words = _WORD.findall(text.lower())
        counts: dict[int, int] = {}
        for size in range(1, order + 1):
            for at in range(len(words) - size + 1):
                # Python's own hash differs from process to process.
                place = zlib.crc32(" ".join(words[at : at + size]).encode()) % n
                counts[place] = counts.get(place, 0) + 1
        norm = math.sqrt(sum(count**2 for count in counts.values()))
        rows += [index] * len(counts)
        places += counts
        values += [count / norm for count in counts.values()]
    return (
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(places, dtype=torch.int64),
        torch.tensor(values, dtype=torch.float64),
    )


def _log_odds(
    weight: Tensor, bias: Tensor, row: Tensor, place: Tensor, value: Tensor, n: int
) -> Tensor:
    """Log-odds `text` of feature vectors given as entries."""
    return bias + torch.zeros(n, dtype=torch.float64).index_add(0, row, weight[place] * value)


def _number(value: Any, name: str, index: int, continuation: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as problem:
        raise RewardError(
            f"the reward {name} returned {value!r} for continuation {index}, {_quoted(continuation)}: expected a number"
        ) from problem
    if not math.isfinite(number):
        raise RewardError(
            f"the reward {name} returned {number} for continuation {index}, {_quoted(continuation)}. Give such texts a "
            "finite number, for instance the worst there is"
        )
    return number


def _first_that_raises(reward: Reward, prompts: Sequence[str], continuations: Sequence[str]) -> str:
    """Which continuation a reward fails on, by trying them one at a time."""
    for index, (prompt, text) in enumerate(zip(prompts, continuations, strict=True)):
        try:
            list(reward([prompt], [text]))
        except Exception:
            return f"the first continuation it fails on is number {index}, {_quoted(text)}"
    shown = _quoted(continuations[0]) if continuations else "none"
    return f"it fails on {len(continuations)} continuations together, not on any alone; the first is {shown}"


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
