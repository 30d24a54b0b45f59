"""From a row of text to token ids and the positions that are scored.

Every rule about boundaries, special tokens and mask tokens lives here:

1. prompt and target are tokenised *together*, as the model would meet them, and split by character offsets;
   a token that straddles the boundary belongs to the target, because seeing it gives part of the target away;
2. leading special tokens (a start token) stay; trailing ones are dropped for causal models unless asked for;
3. a causal model never scores its very first token, which nothing predicts;
4. a masked model sees `[CLS] prompt target suffix [SEP]`; where the prompt holds the mask token, the target fills it;
5. a chat is what the chat template writes of both turns, what stands between the prompt for an answer and the answer
   included; the end of a turn is the template's own, and the tokenizer's end token only where it writes none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locate_edit.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tokens", "tokenise"]

# Tokenizers without a limit say so with a huge number.
_NO_LIMIT = 10**9

# Stands in for an answer to see what a chat template writes around it: no text holds a character of private use.
_ANSWER = "\ue000"


@dataclass(frozen=True)
class Tokens:
    """One row as token ids.

    Attributes:
        ids: the whole sequence, special tokens included.
        scored: positions in `ids` whose token is scored, ascending.
        sensitive: for each scored position, whether a span of the row touches it.
        at_once: masked models only: hide all scored tokens together (the prompt held the mask token)
            instead of one at a time with the others visible.
        subject: positions in `ids` of the tokens of the row's subject; empty where it has none, or does not hold it.
    """

    ids: tuple[int, ...]
    scored: tuple[int, ...]
    sensitive: tuple[bool, ...]
    at_once: bool = False
    subject: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Text:
    """A row as one string: characters `[start, end)` are scored, spans are in characters of `text`."""

    text: str
    start: int
    end: int
    spans: tuple[tuple[int, int], ...]
    n_masks: int = 0
    ended: bool = False  # the scored stretch closes with an end of its own


def tokenise(
    rows: Sequence[Mapping[str, Any]],
    places: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    masked: bool,
    max_length: int | None,
    append_eos: bool,
    chat_template: bool,
) -> list[Tokens]:
    """The tokens of each row; `places` name the rows in errors.

    Raises:
        PromptError: a target without tokens, a row longer than the limit, a span out of range, a setting that the
            tokenizer cannot serve, or a chat template that writes an answer otherwise than it is.
    """
    _check_settings(tokenizer, masked=masked, append_eos=append_eos, chat_template=chat_template)
    limit = max_length
    if limit is None and tokenizer.model_max_length < _NO_LIMIT:
        limit = tokenizer.model_max_length
    texts = [
        _chat_text(row, place, tokenizer, with_end=append_eos)
        if chat_template
        else _text(row, place, tokenizer.mask_token if masked else None)
        for row, place in zip(rows, places, strict=True)
    ]
    encoded = tokenizer(
        [text.text for text in texts],
        add_special_tokens=not chat_template,
        return_special_tokens_mask=True,
        return_offsets_mapping=tokenizer.is_fast,
        truncation=False,
        padding=False,
        verbose=False,
    )
    result = []
    for index, (text, place) in enumerate(zip(texts, places, strict=True)):
        ids = list(encoded["input_ids"][index])
        special = [bool(flag) for flag in encoded["special_tokens_mask"][index]]
        if tokenizer.is_fast:
            offsets = [(int(a), int(b)) for a, b in encoded["offset_mapping"][index]]
            scored = _scored_by_offsets(text, offsets, special)
            touched = [any(_touches(offsets[p], span) for span in text.spans) for p in scored]
            subject = _subject(text, rows[index].get("subject"), offsets, special)
        else:
            if text.spans:
                raise PromptError(
                    f"{place}: 'spans' need a tokenizer that knows character offsets, and "
                    f"{type(tokenizer).__name__} is not a fast tokenizer. Drop the spans or use the fast tokenizer."
                )
            scored = _scored_by_prefix(text, ids, special, tokenizer, not chat_template)
            touched = [False] * len(scored)
            subject = ()
        if not masked:
            ids, scored, touched = _causal_ends(ids, special, scored, touched)
            if append_eos and not text.ended:
                scored, touched = [*scored, len(ids)], [*touched, False]
                ids = [*ids, _end_token(tokenizer)]
        _check_tokens(text, place, ids, scored, limit, rows[index])
        result.append(Tokens(tuple(ids), tuple(scored), tuple(touched), text.n_masks > 0, subject))
    return result


def _check_settings(
    tokenizer: PreTrainedTokenizerBase, *, masked: bool, append_eos: bool, chat_template: bool
) -> None:
    """Raise for a setting that this tokenizer or kind of model has no answer to."""
    name = type(tokenizer).__name__
    if masked and tokenizer.mask_token_id is None:
        raise PromptError(
            f"masked=True needs a tokenizer with a mask token, and {name} has none. "
            "Use masked=False for a causal model."
        )
    if masked and (append_eos or chat_template):
        raise PromptError(
            "append_eos and chat_template are for causal models; these prompts are for a masked model. "
            "Leave them off, or pass masked=False if the model is causal."
        )
    if append_eos and not chat_template:
        _end_token(tokenizer)
    if chat_template and not tokenizer.chat_template:
        raise PromptError(
            f"chat_template=True needs a chat template, and {name} has none. "
            "Set tokenizer.chat_template or leave it off."
        )


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise PromptError(
            f"append_eos=True needs an end-of-sequence token, and {type(tokenizer).__name__} has none."
        )
    return int(tokenizer.eos_token_id)


def _text(row: Mapping[str, Any], place: str, mask_token: str | None) -> _Text:
    """The row's text with the scored stretch; `mask_token` is None for a causal model."""
    prompt, target = row["prompt"], row.get("target")
    # A causal model predicts the target before it could see the suffix, so the suffix is left out there.
    suffix = row.get("suffix", "") if mask_token is not None else ""
    spans = _checked_spans(row, place)
    if mask_token is not None and mask_token in prompt:
        return _fill_mask(row, place, mask_token, spans)
    if target is None:
        return _Text(prompt + suffix, 0, len(prompt), spans)
    return _Text(prompt + target + suffix, len(prompt), len(prompt) + len(target), spans)


def _fill_mask(
    row: Mapping[str, Any], place: str, mask_token: str, spans: tuple[tuple[int, int], ...]
) -> _Text:
    """The text with the target in the place of the mask token that the prompt holds."""
    prompt, target = row["prompt"], row.get("target")
    if target is None:
        raise PromptError(
            f"{place}: the prompt holds {mask_token} but the row has no 'target' to fill it. Add a 'target'."
        )
    literal = re.escape(mask_token)
    runs = list(re.finditer(rf"{literal}(?:\s*{literal})*", prompt))
    if len(runs) != 1:
        raise PromptError(
            f"{place}: expected one place for the target, got {len(runs)} separate {mask_token} in the prompt. "
            "Write one row for each of them."
        )
    before, after = prompt[: runs[0].start()], prompt[runs[0].end() :]
    filled = target.lstrip() if not before or before[-1].isspace() else target
    shift = len(before) - len(prompt) - (len(target) - len(filled))
    return _Text(
        before + filled + after + row.get("suffix", ""),
        len(before),
        len(before) + len(filled),
        tuple((start + shift, end + shift) for start, end in spans),
        n_masks=runs[0].group().count(mask_token),
    )


def _chat_text(
    row: Mapping[str, Any], place: str, tokenizer: PreTrainedTokenizerBase, *, with_end: bool
) -> _Text:
    """The conversation as the chat template writes it, up to the answer or with the end of its turn.

    White space around the answer is the template's: the space before the target is dropped, and white space after it
    too where the template strips turns. What the template writes between prompt and answer is given, not scored.
    """
    target = row.get("target")
    if target is None:
        raise PromptError(
            f"{place}: chat_template=True needs a 'target', the assistant's answer. Leave it off for plain text."
        )
    before, found, after = _chat(row["prompt"], _ANSWER, place, tokenizer).rpartition(_ANSWER)
    if not found:
        raise PromptError(
            f"{place}: the chat template leaves out the assistant's turn. Write one that writes it, or leave "
            "chat_template off."
        )
    answer = target.lstrip()
    whole = _chat(row["prompt"], answer, place, tokenizer)
    written = next((t for t in (answer, answer.rstrip()) if whole == before + t + after), None)
    if written is None:
        raise PromptError(
            f"{place}: the chat template does not write the answer {answer!r} as it is: it ends with "
            f"{whole[-len(answer) - len(after) - 20 :]!r}. Write the target as the template does, or change the "
            "template."
        )
    shift = len(before) - len(row["prompt"]) - (len(target) - len(answer))
    end = len(before) + len(written)
    spans = tuple((a + shift, min(b + shift, end)) for a, b in _checked_spans(row, place))
    closing = _turn_end(after, tokenizer) if with_end else ""
    return _Text(
        before + written + closing,
        len(before),
        end + len(closing),
        tuple((a, b) for a, b in spans if a < b),
        ended=bool(closing),
    )


def _chat(prompt: str, answer: str, place: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes of a user's and an assistant's turn."""
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError as error:
        raise PromptError(
            f"{place}: the chat template refuses a user's and an assistant's turn: {error}"
        ) from error


def _turn_end(after: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """How a template ends a turn: up to its first special token, or else all it writes but white space."""
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    special |= set(tokenizer.all_special_tokens)
    longest_first = sorted(special, key=len, reverse=True)
    found = re.search("|".join(map(re.escape, longest_first)), after) if special else None
    return after[: found.end()] if found else after.rstrip()


def _checked_spans(row: Mapping[str, Any], place: str) -> tuple[tuple[int, int], ...]:
    """The row's spans, inside prompt + target."""
    n_chars = len(row["prompt"]) + len(row.get("target") or "")
    for start, end in row.get("spans", ()):
        if not 0 <= start < end <= n_chars:
            raise PromptError(
                f"{place}: field 'spans': [{start}, {end}) is not a stretch of the {n_chars} characters of "
                "prompt + target. Spans are [start, end) with 0 <= start < end."
            )
    return tuple((int(start), int(end)) for start, end in row.get("spans", ()))


def _touches(token: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token's characters meet a span.

    Byte-level tokenizers trim spaces off their offsets, so a token of spaces is an empty stretch at its end.
    """
    if token[0] == token[1]:
        return span[0] < token[1] <= span[1]
    return token[0] < span[1] and token[1] > span[0]


def _scored_by_offsets(
    text: _Text, offsets: Sequence[tuple[int, int]], special: Sequence[bool]
) -> list[int]:
    """Positions of the tokens with at least one character in the scored stretch."""
    stretch = (text.start, text.end)
    return [
        position
        for position, token in enumerate(offsets)
        if not special[position] and _touches(token, stretch)
    ]


def _subject(
    text: _Text, subject: str | None, offsets: Sequence[tuple[int, int]], special: Sequence[bool]
) -> tuple[int, ...]:
    """Positions of the subject's tokens: where it stands last before the target, or else first after it."""
    start = text.text[: text.start].rfind(subject) if subject else -1
    if subject and start < 0:
        start = text.text.find(subject, text.end)
    if not subject or start < 0:
        return ()
    stretch = (start, start + len(subject))
    return tuple(
        position
        for position, token in enumerate(offsets)
        if not special[position] and _touches(token, stretch)
    )


def _scored_by_prefix(
    text: _Text,
    ids: Sequence[int],
    special: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    add_special_tokens: bool,
) -> list[int]:
    """The same without offsets: what the tokens of the text before and after alone do not already fix."""

    def alone(part: str) -> list[int]:
        encoded = tokenizer(
            part, add_special_tokens=add_special_tokens, return_special_tokens_mask=True
        )
        flags = encoded["special_tokens_mask"]
        return [token for token, flag in zip(encoded["input_ids"], flags, strict=True) if not flag]

    inner = [position for position, flag in enumerate(special) if not flag]
    own = [ids[position] for position in inner]
    n_before = _n_shared(own, alone(text.text[: text.start]))
    n_after = _n_shared(own[n_before:][::-1], alone(text.text[text.end :])[::-1])
    return inner[n_before : len(inner) - n_after]


def _n_shared(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading entries two sequences share."""
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count


def _causal_ends(
    ids: list[int], special: Sequence[bool], scored: list[int], touched: list[bool]
) -> tuple[list[int], list[int], list[bool]]:
    """Without trailing special tokens, and without the first token among the scored ones."""
    n_kept = len(ids)
    while n_kept > 1 and special[n_kept - 1]:
        n_kept -= 1
    if scored and scored[0] == 0:
        scored, touched = scored[1:], touched[1:]
    return ids[:n_kept], scored, touched


def _check_tokens(
    text: _Text,
    place: str,
    ids: Sequence[int],
    scored: Sequence[int],
    limit: int | None,
    row: Mapping[str, Any],
) -> None:
    """Raise for a row that cannot be scored."""
    if not scored:
        shown = row.get("target", row["prompt"])
        raise PromptError(
            f"{place}: nothing to score in {shown!r}: it gives no token that something before it predicts. "
            "Write a longer text, or a prompt before it."
        )
    if limit is not None and len(ids) > limit:
        raise PromptError(
            f"{place}: {len(ids)} tokens ({len(scored)} of them scored) are more than the limit of {limit}. "
            "Shorten the row, split it, or raise max_length if the model's context allows it."
        )
    if text.n_masks > 1 and text.n_masks != len(scored):
        raise PromptError(
            f"{place}: the prompt holds {text.n_masks} mask tokens but the target has {len(scored)} tokens. "
            "Write a single mask token: it grows to the length of the target."
        )
