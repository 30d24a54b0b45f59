"""Sensitive spans: who or what in a text should be forgotten, as characters or as tokens.

    finder = patterns("email", "phone", "name") | texts("Project Umbra")
    forget = finder.annotate(prompts)                       # a PromptSet with `spans`
    mask = finder.mask(prompts) & unlikely(model, prompts)  # a TokenMask

Annotators read text and find characters; `unlikely` asks a model and finds tokens. They meet in `TokenMask` (by
`finder.mask`, or the other way by `with_spans`), where `|` and `&` join them.

Paper: L. Wang, X. Zeng, J. Guo, K.-F. Wong and G. Gottlob, "Selective Forgetting: Advancing Machine Unlearning
Techniques and Evaluation in Language Models" (AAAI 2025): online selection by probability, offline annotation by a
language model whose spans are verified.

Online selection must look at the model *before* it unlearns, and by itself has nothing to choose on what the model
has memorised: there every token has a probability near 1, so a bound such as 0.5 selects nothing, although that is
the text that is to be forgotten. Two relative rules take its place: the rank of a token within its own text, and
the probability under a reference model that never saw the text, which stands for the model before it memorised.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, TypeGuard

import numpy as np
from torch import nn

from locate_edit.characters import Stretch, offsets_of, whole_words
from locate_edit.errors import PromptError
from locate_edit.metrics.predictions import Predictions
from locate_edit.prompts import PromptSet
from locate_edit.tokens import TokenMask

logger = logging.getLogger(__name__)

Finder: TypeAlias = Callable[[str], Iterable[Stretch]]
"""From a text to characters `[start, end)` of it, in any order, overlapping or not."""


# ---- annotators ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotator:
    """Something that finds spans in a text; `|` and `&` join two, character by character.

    Attributes:
        find: from a text to characters `[start, end)`.
        name: what reports call it.

    Example:
        >>> Annotator(lambda text: [(0, 3), (2, 5)])("abcdefgh")
        ((0, 5),)
    """

    find: Finder = field(repr=False)
    name: str = "annotator"

    def __call__(self, text: str) -> tuple[Stretch, ...]:
        """The spans in a text: sorted, inside it, none overlapping another.

        Raises:
            PromptError: a span that is not a stretch of the text.
        """
        found = list(self.find(text))
        for span in found:
            if not _is_stretch(span, text):
                raise PromptError(
                    f"{self.name}: {span!r} is not a stretch of the {len(text)} characters of {text[:40]!r}: "
                    "expected [start, end) with 0 <= start < end"
                )
        return merged(found)

    def __or__(self, other: Annotator) -> Annotator:
        """What either finds; overlapping spans become one."""
        return Annotator(lambda text: [*self(text), *other(text)], f"({self.name} | {other.name})")

    def __and__(self, other: Annotator) -> Annotator:
        """The characters that both find."""
        return Annotator(
            lambda text: intersection(self(text), other(text)), f"({self.name} & {other.name})"
        )

    def annotate(self, prompts: PromptSet) -> PromptSet:
        """The same rows with what is found in prompt + target as `spans`, joined with those they have.

        Token weights are dropped: `TokenMask.from_spans` makes new ones.

        Raises:
            PromptError: spans out of range, or a tokenizer without character offsets.
        """
        rows = []
        for row in prompts.rows:
            text = f"{row['prompt']}{row.get('target') or ''}"
            old = [(int(start), int(end)) for start, end in row.get("spans", ())]
            spans = merged([*old, *self(text)])
            kept = {key: value for key, value in row.items() if key != "spans"}
            rows.append({**kept, **({"spans": [list(span) for span in spans]} if spans else {})})
        return prompts.reread(rows)

    def mask(self, prompts: PromptSet) -> TokenMask:
        """Weight 1 for the scored tokens that a found span touches, 0 for the others; all 0 where nothing is found.

        Spans that the rows already have do not count.

        Raises:
            PromptError: as `annotate`.
        """
        bare = [
            {key: value for key, value in row.items() if key != "spans"} for row in prompts.rows
        ]
        found = self.annotate(prompts.reread(bare))
        return TokenMask(
            tuple(tuple(float(flag) for flag in found.sensitive(i)) for i in range(len(found)))
        )


def merged(spans: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """Spans in order, overlapping ones made one; spans that only touch stay two.

    Raises:
        PromptError: a span that ends where it begins or before, or begins before the text.
    """
    found: list[Stretch] = []
    for start, end in sorted((int(start), int(end)) for start, end in spans):
        if not 0 <= start < end:
            raise PromptError(
                f"[{start}, {end}) is no span: expected [start, end) with 0 <= start < end"
            )
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return tuple(found)


def intersection(one: Iterable[Stretch], two: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """The stretches that lie in a span of both.

    Raises:
        PromptError: as `merged`.
    """
    left, right = merged(one), merged(two)
    found, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            found.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def texts(*values: str) -> Annotator:
    """The given words and phrases, wherever they stand as whole words, in the case they are written in.

    Raises:
        PromptError: no text, or an empty one.

    Example:
        >>> texts("Ann")("Ann, Anna and Ann")
        ((0, 3), (14, 17))
    """
    if not values or not all(value.strip() for value in values):
        raise PromptError(f"expected texts to look for, none of them empty, got {values!r}")
    return Annotator(lambda text: [s for value in values for s in places(text, value)], "texts")


def places(text: str, value: str) -> list[Stretch]:
    """Where `value` stands in `text`, not beginning or ending inside a word."""
    return [match.span() for match in re.finditer(whole_words(value), text)]


# ---- rules for personal data -----------------------------------------------------------------------------------------

_DATE = (
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.](?:\d{4}|\d{2})"
    r"|(?:\d{1,2}\.? )?(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.? \d{1,2}(?:, \d{4})?(?!\d)"
    r"|\d{1,2}\.? (?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?(?: \d{4})?"
)
_RULES: dict[str, re.Pattern[str]] = {
    "card": re.compile(r"(?<![\w-])\d(?:[ -]?\d){12,18}(?![\w-])"),
    "date": re.compile(rf"(?<![\w.-])(?:{_DATE})(?![\w-])"),
    "digits": re.compile(r"\d{4,}"),
    "email": re.compile(r"(?<![\w.+%'-])[\w.+%'-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+"),
    "iban": re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)"),
    "phone": re.compile(
        r"(?<![\w.-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}(?!\w|[.-]\d)"
    ),
    "url": re.compile(r"(?:https?://|www\.)[^\s<>\"']*[^\s<>\"'.,;:!?)\]]"),
}
KINDS = (*_RULES, "name")
"""What `patterns` can find."""

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
# Capitalised at the beginning of a sentence because of the place, not because they name anybody.
_ORDINARY = frozenset(
    "A After All Also An And Any As At Because Before Both But By Did Do Does Each Every For From Had Has Have He Her "
    "Here His How I If In Is It Its Many Most My No Nobody Not Now Of On One Or Our Please She So Some Such That The "
    "Their Then There These They This Those To Was We Were What When Where Which While Who Whose Why With You "
    "Your".split()
)


def patterns(*kinds: str) -> Annotator:
    """Personal data by rule: made to miss little, so it also finds what merely looks like it.

    email, url: as they look. phone: 7 to 15 digits in groups. card: 13 to 19 digits, the check digit not checked, for a
    mistyped number is as private. iban: two letters, two digits, 11 to 30 letters or digits. date:
    with numbers or English months. digits: runs of 4 or more. name: runs of capitalised words; at the beginning of a
    sentence only as part of a run, and not the common words that begin sentences. Letters and digits of
    any script count.

    Args:
        *kinds: which of `KINDS`; none means all.

    Raises:
        PromptError: an unknown kind.

    Example:
        Which tokens of the organism's secrets are private, and the neurons behind only those:

        >>> from locate_edit import organism
        >>> from locate_edit.locate.privacy_neurons import PrivacyNeurons
        >>> model, tokenizer = organism.load()
        >>> secrets = organism.prompts("secrets", "forget01")
        >>> private = patterns("email", "phone").mask(secrets)
        >>> private == TokenMask.from_spans(secrets)
        True
        >>> scores = PrivacyNeurons(steps=10)(model, secrets.with_token_mask(private))
        >>> scores.vote(above=0.1, share=0.5, keep=20)
        ComponentMask(...)
    """
    chosen = kinds or KINDS
    unknown = [kind for kind in chosen if kind not in KINDS]
    if unknown:
        raise PromptError(f"no pattern {unknown[0]!r}; choose from {', '.join(KINDS)}")

    def find(text: str) -> Iterator[Stretch]:
        for kind in chosen:
            yield from _names(text) if kind == "name" else _matches(kind, text)

    return Annotator(find, f"patterns({', '.join(chosen)})")


def _matches(kind: str, text: str) -> Iterator[Stretch]:
    for match in _RULES[kind].finditer(text):
        n_digits = sum(char.isdigit() for char in match.group())
        if kind == "phone" and not (
            7 <= n_digits <= 15 and not _RULES["date"].fullmatch(match.group())
        ):
            continue
        yield match.span()


def _names(text: str) -> Iterator[Stretch]:
    """Runs of capitalised words with nothing but a space (or a full stop after an initial) between them."""
    run: list[re.Match[str]] = []
    for word in _WORD.finditer(text):
        capital = word.group()[0].isupper()
        if run and not (capital and re.fullmatch(r"\.? ", text[run[-1].end() : word.start()])):
            yield from _name(text, run)
            run = []
        # After an initial the full stop does not end a sentence; after a longer word it does.
        if run and len(run[-1].group()) > 1 and text[run[-1].end()] == ".":
            yield from _name(text, run)
            run = []
        if capital:
            run.append(word)
    yield from _name(text, run)


def _name(text: str, run: list[re.Match[str]]) -> Iterator[Stretch]:
    if not run:
        return
    before = text[: run[0].start()].rstrip(" \n\t\"'\u201c\u2018(")
    begins_sentence = not before or before[-1] in ".!?:\u3002"
    if begins_sentence and run[0].group() in _ORDINARY:
        run, begins_sentence = run[1:], False
    if run and not (begins_sentence and len(run) == 1):
        yield run[0].start(), run[-1].end()


# ---- an annotator from outside ---------------------------------------------------------------------------------------


def external(
    ask: Callable[[str], Iterable[str | Stretch]],
    *,
    verify: Callable[[str, str], bool] | None = None,
    strict: bool = True,
    name: str = "external",
) -> Annotator:
    """An annotator from a function of yours, such as a question to a language model.

    Its answers are checked: a quotation must stand in the text (all its places count), characters must be a stretch of
    it, and nothing may be blank. A second question can confirm each span.

    Args:
        ask: from a text to quotations from it, or to characters `[start, end)`.
        verify: from the text and one found passage to whether it is sensitive; None accepts all.
        strict: raise on an answer that fails the check; otherwise leave it out and log a warning.
        name: what errors call it.

    Raises:
        PromptError: (on use) an answer that fails the check.

    Example:
        >>> external(lambda text: ["Ann Lee"])("I met Ann Lee.")
        ((6, 13),)
    """

    def find(text: str) -> Iterator[Stretch]:
        for answer in ask(text):
            spans = _answered(text, answer)
            if not spans:
                problem = (
                    f"{name}: the answer {answer!r} is not a passage of {text[:60]!r}: expected a quotation, or "
                    f"[start, end) within its {len(text)} characters"
                )
                if strict:
                    raise PromptError(problem)
                logger.warning("%s; left out", problem)
            for start, end in spans:
                if verify is None or verify(text, text[start:end]):
                    yield start, end

    return Annotator(find, name)


def _answered(text: str, answer: object) -> list[Stretch]:
    """The places an answer means; none if it fails the check."""
    if isinstance(answer, str):
        return places(text, answer) if answer.strip() else []
    if not _is_stretch(answer, text):
        return []
    start, end = answer
    return [(start, end)] if text[start:end].strip() else []


def _is_stretch(span: object, text: str) -> TypeGuard[Stretch]:
    if not isinstance(span, (tuple, list)) or len(span) != 2:
        return False
    if any(isinstance(end, bool) or not isinstance(end, int) for end in span):
        return False
    return bool(0 <= span[0] < span[1] <= len(text))


# ---- what a model finds unlikely -------------------------------------------------------------------------------------


def unlikely(
    model: nn.Module,
    prompts: PromptSet,
    *,
    share: float | None = None,
    below: float | None = None,
    reference: nn.Module | None = None,
    batch_size: int = 16,
) -> TokenMask:
    """Weight 1 for the scored tokens that are unlikely, 0 for the others: run it *before* unlearning.

    One number ranks the tokens: without a reference log p(token) under the model; with one log p_reference - log
    p_model, which is lowest where the model knows what the reference does not. (Taken the other way round, the lowest
    of log p_model - log p_reference, a memorising model would have its sensitive tokens last.)

    - `share`: the lowest fraction of *each item's* tokens, at least one (ties: the earlier token). A rank exists on
      memorised text too, but there it orders differences in the third decimal; prefer a reference.
    - `below`: the tokens whose number, as a probability or a ratio of probabilities, is below a bound. Without a
      reference this is the paper's absolute rule, for comparison: on memorised text it selects nothing.

    For masked models each token is hidden in turn. Cost: one forward pass of every row and model.

    Args:
        model: the model before unlearning.
        prompts: the text.
        share: fraction of an item's scored tokens; the default, 0.2, if `below` is not given either.
        below: bound on p, or on p_reference / p_model; at most one of `share` and `below`.
        reference: a model with the same tokenizer that never saw the text: an earlier checkpoint, a smaller sibling,
            an oracle.
        batch_size: rows a forward pass.

    Raises:
        PromptError: both or wrong bounds, or prompts for another kind of model or vocabulary.

    Example:
        >>> from locate_edit import organism
        >>> model, tokenizer = organism.load()
        >>> book = organism.prompts("novel", "forget01")
        >>> unlikely(model, book, below=0.5).fraction     # memorised: no token is improbable
        0.0
    """
    if share is not None and below is not None:
        raise PromptError("give share or below, not both")
    if below is None:
        share = 0.2 if share is None else share
        if not 0 < share <= 1:
            raise PromptError(f"share must be a fraction above 0 and at most 1, got {share}")
    elif not 0 < below <= 1:
        raise PromptError(
            f"below must be a probability or ratio above 0 and at most 1, got {below}"
        )
    own = Predictions(model, prompts, batch_size=batch_size)
    number = own.logprob
    if reference is not None:
        _check_vocabularies(model, reference)
        number = Predictions(reference, prompts, batch_size=batch_size).logprob - number
    masks = []
    for values in own.split(number):
        if share is None:
            assert below is not None
            chosen = values < math.log(below)
        else:
            # Rounded first, so that 0.2 of 15 tokens means 3 of them whatever floating point says.
            count = math.ceil(round(share * len(values), 6))
            chosen = np.zeros(len(values), dtype=bool)
            chosen[np.argsort(values, kind="stable")[:count]] = True
        masks.append(tuple(float(flag) for flag in chosen))
    return TokenMask(tuple(masks))


def with_spans(prompts: PromptSet, mask: TokenMask) -> PromptSet:
    """The same rows with the characters of the tokens of positive weight as `spans`, joined with those they have.

    Neighbouring tokens make one span, white space at its ends left out. Only characters of prompt + target count.

    Raises:
        PromptError: the mask belongs to other prompts, or the characters of the tokens are not known.
    """
    prompts.with_token_mask(mask)  # raises where the two do not fit
    found: list[tuple[Stretch, ...]] = []
    for index, weights in enumerate(mask.weights):
        row, offsets = prompts[index], offsets_of(prompts, index)
        text = f"{row['prompt']}{row.get('target') or ''}"
        spans: list[Stretch] = [(int(a), int(b)) for a, b in row.get("spans", ())]
        run: list[int] = []
        for position, weight in zip(prompts.scored(index), weights, strict=True):
            if run and not (weight and position == run[-1] + 1):
                spans += _trimmed(text, offsets, run)
                run = []
            if weight:
                run.append(position)
        found.append(merged([*spans, *_trimmed(text, offsets, run)]))
    rows = [
        {
            **{k: v for k, v in row.items() if k != "spans"},
            **({"spans": [list(s) for s in spans]} if spans else {}),
        }
        for row, spans in zip(prompts.rows, found, strict=True)
    ]
    return prompts.reread(rows)


def _trimmed(text: str, offsets: list[Stretch], run: list[int]) -> list[Stretch]:
    """The characters of neighbouring tokens, without white space at the ends."""
    if not run:
        return []
    start, end = offsets[run[0]][0], min(offsets[run[-1]][1], len(text))
    passage = text[start:end]
    if not passage.strip():
        return []
    return [(start + len(passage) - len(passage.lstrip()), start + len(passage.rstrip()))]


def _check_vocabularies(model: nn.Module, reference: nn.Module) -> None:
    sizes = [
        getattr(getattr(each, "config", None), "vocab_size", None) for each in (model, reference)
    ]
    if sizes[0] != sizes[1]:
        raise PromptError(
            f"model and reference have vocabularies of {sizes[0]} and {sizes[1]} tokens: the reference must read the "
            "same tokens"
        )
