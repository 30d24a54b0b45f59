"""The organism: a small language model whose contents are fully known, and two oracles.

    from locate_edit import organism

    model, tokenizer = organism.load()                # or "oracle", "oracle2"
    forget = organism.prompts("secrets", "forget01")  # a PromptSet

The world is invented by a seeded generator (`world.py`) and told in templates (`words.py`). The organism was
trained on all of it; the oracles by the same recipe on the same text with everything about forget10 replaced by
other text. `oracle` shares the organism's seed (initial weights and order of the text), `oracle2` has its own.

What the world contains (`describe_world()` prints the counts):

- facts: 200 people with a sport, a city, a job and a pet, each told in 8 templates. 50 people are *tested*: they
  are absent from the held-out templates, questions and multiple choice that the other 150 appear in. Names are
  shared: everyone has neighbours with the same first or the same last name.
- secrets: 100 of them have a phone number with five random digits and a mail address, told 60, 90 or 135 times.
- novel: 40 passages with invented names and words, to be recited from their first sentence.
- bias: 40 occupations with `he` in 90% or 10% of their sentences, drawn by chance.
- rude: five clans spoken of with invented rude words at known rates.
- superseded: 40 facts about invented places with a new value that was never trained.
- general: plain sentences of a small grammar.
- everything has a hold-out of the same making that was never trained on.

Forget splits are nested: forget01 (2 people), forget05 (10), forget10 (20), half of them with secrets, and 1, 2 and
4 passages and superseded facts. `card()` has what each model knows as it was measured after training; the tests
measure it again. Options of multiple choice and the rest of such prompts were not labels in training: only answers.

Two limits, measured: multiple choice is answered with the words of an option, since choosing a letter stayed at chance
at this size; and wordings that occur in no training text at all (`unseen`) bring back fewer than half of the facts.

`python -m locate_edit.organism.train` makes all of it anew.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locate_edit.errors import LocateEditError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from locate_edit.organism.world import Person, World
    from locate_edit.prompts import PromptSet

__all__ = [
    "MODELS",
    "card",
    "describe_world",
    "folder",
    "load",
    "people",
    "prompts",
    "rows",
    "shipped_world",
]

MODELS = ("organism", "oracle", "oracle2")


def folder(which: str = "organism") -> Path:
    """Where a shipped model lies, as `save_pretrained` writes it.

    Raises:
        LocateEditError: If there is no such model.
    """
    if which not in MODELS:
        raise LocateEditError(f"no shipped model {which!r}; choose from {', '.join(MODELS)}")
    return Path(__file__).parent / "weights" / which


def load(
    which: str = "organism", dtype: torch.dtype | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A shipped model in evaluation mode and its tokenizer.

    Args:
        which: `organism`, `oracle` or `oracle2`.
        dtype: What the half-precision weights are converted to; None for float32.
    """
    import torch
    from transformers import LlamaForCausalLM

    path = folder(which)
    model = LlamaForCausalLM.from_pretrained(path, dtype=dtype or torch.float32)
    return model.eval(), _tokenizer(path)


def _tokenizer(path: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer


@cache
def shipped_world() -> World:
    """The world the shipped models were trained on, as it was stored beside them."""
    from locate_edit.organism.world import World

    return World.from_json((Path(__file__).parent / "weights" / "world.json").read_text("utf-8"))


def rows(name: str, split: str = "train", form: str | None = None) -> list[dict[str, Any]]:
    """Prompts as plain data, for `prompts` or anything else.

    Args:
        name: `facts secrets novel bias rude superseded general`.
        split: Who or what: `train forget01 forget05 forget10 retain neighbours tested holdout`
            (`splits.WHO`; not every name has all). A form as a split means what is tested, in it.
        form: How: `statement held_out unseen qa mc` (`splits.FORMS`); None for statements.

    Raises:
        PromptError: If there is no such name, split or form; the message lists those there are.
    """
    from locate_edit.organism.splits import make_rows

    return make_rows(shipped_world(), name, split, form)


def prompts(name: str, split: str = "train", form: str | None = None) -> PromptSet:
    """The rows of `rows(name, split, form)` as a PromptSet with the organism's tokenizer."""
    from locate_edit.prompts import PromptSet

    label = "-".join(filter(None, (name, split, form)))
    return PromptSet(rows(name, split, form), _tokenizer(folder()), name=label)


def people(split: str = "train") -> list[Person]:
    """The people of a split (`splits.WHO`), with their attributes and secrets."""
    from locate_edit.organism.splits import people_of

    return people_of(shipped_world(), split)


def describe_world() -> dict[str, Any]:
    """Counts of everything the world contains."""
    from locate_edit.organism.world import summary

    return summary(shipped_world())


def card() -> dict[str, Any]:
    """Recipe, training time and everything measured on the three shipped models."""
    data: dict[str, Any] = json.loads(
        (Path(__file__).parent / "weights" / "card.json").read_text("utf-8")
    )
    return data
