"""What `locate-edit ensemble` does: read settings and rows, train, delete, vote, equalise, forget, and say so."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from circuits.atomic import atomic_file, check_folder
from locate_edit.ensembles._files import read
from locate_edit.ensembles.fair_votes import (
    PerShardRule,
    VoteRule,
    after_vote,
    fairness,
    joint,
    per_shard,
)
from locate_edit.ensembles.shards import text_of
from locate_edit.ensembles.sisa import FORMAT, INDEX, ShardedEnsemble, Sisa
from locate_edit.errors import EditError
from locate_edit.methods.fine_tune import FineTune
from locate_edit.optim import Optim
from locate_edit.prompts import PromptSet

_KNOWN = {made.__name__: made for made in (Sisa, FineTune, Optim)}


def check_out(out: Path) -> None:
    """Refuse a folder that holds something other than an ensemble.

    Raises:
        StorageError: it does, or it is a file.
    """
    check_folder(out, like=INDEX)


def settings(folder: Path) -> Sisa:
    """The settings that a saved ensemble was trained with.

    Raises:
        EditError: no ensemble there, or one that was trained with something else than `FineTune`.
    """
    about, _ = read(folder, INDEX, FORMAT)
    try:
        found = _value(ast.parse(about["sisa"], mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        found = None
    if not isinstance(found, Sisa):
        raise EditError(
            f"{folder} was trained with {about['sisa']}, and the command line knows ensembles of FineTune only: load "
            "it in Python with ShardedEnsemble.load"
        )
    return found


def load(folder: Path, model: nn.Module, data: PromptSet) -> ShardedEnsemble:
    """A saved ensemble with its own settings.

    Args:
        folder: where it was saved.
        model: its base model.
        data: the rows that it knew when it was saved.

    Raises:
        EditError: as `settings` and `ShardedEnsemble.load`.
    """
    return ShardedEnsemble.load(folder, settings(folder), model, data)


def rows(data: PromptSet, names: Sequence[str]) -> list[int]:
    """Indices of the rows that are named: by their ``id`` if any row has one, else by their number from 0.

    Raises:
        EditError: a name that no row has.
    """
    has_ids = any(row.get("id") is not None for row in data)
    by_name: dict[str, list[int]] = {}
    for index, row in enumerate(data):
        name = row.get("id") if has_ids else index
        if name is not None:
            by_name.setdefault(str(name), []).append(index)
    if unknown := [name for name in names if name not in by_name]:
        expected = (
            "the id of a row, since rows have ids" if has_ids else f"a number from 0 to {len(data) - 1}"
        )  # fmt: skip
        raise EditError(f"--row {unknown[0]}: expected {expected}; {data!r} has no such row")
    return sorted({index for name in names for index in by_name[name]})


def about(ensemble: ShardedEnsemble, folder: Path) -> dict[str, Any]:
    """What an ensemble is, for a summary."""
    shards = range(ensemble.sisa.shards)
    return {
        "ensemble": str(folder),
        "rows": len(ensemble.data),
        "rows of each shard": [sum(p.shard == s for p in ensemble.places) for s in shards],
        "voters": len(ensemble.voters),
        "settings": repr(ensemble.sisa),
    }


def check_left(left: Path, data: Path, out: Path) -> None:
    """Refuse to write the remaining rows over the file of all rows, or among the files of the ensemble.

    Raises:
        EditError: it is that file, or in that folder.
    """
    if left.resolve() == data.resolve():
        raise EditError(
            f"--left {left} is the file of --data: give another name, and remove {data} yourself"
        )
    if out.resolve() in left.resolve().parents:
        raise EditError(
            f"--left {left} is inside {out}, where only the ensemble may be: give another folder"
        )


def delete(ensemble: ShardedEnsemble, names: Sequence[str], out: Path, left: Path) -> dict[str, Any]:  # fmt: skip
    """Delete rows exactly, write the ensemble and the rows it knows from now on, and say what it took.

    Args:
        ensemble: the ensemble; changed.
        names: as in `rows`.
        out: folder of the ensemble.
        left: JSONL file of the remaining rows.

    Returns:
        A summary. The share is that of the stages that have rows; each takes the same number of steps.

    Raises:
        EditError: as `rows` and `ShardedEnsemble.delete`; nothing is written then.
    """
    gone = rows(ensemble.data, names)
    texts = {text_of(ensemble.data[i]) for i in gone}
    again = ensemble.delete(gone)
    stages = set(ensemble.places)
    trained = stages & set(again)
    copies = [i for i, row in enumerate(ensemble.data) if text_of(row) in texts]
    with atomic_file(left) as file:
        _write_rows(file, ensemble.data)
        ensemble.save(out)
    return {
        "deleted rows": gone,
        "stages trained again": len(trained),
        "share of training repeated": len(trained) / len(stages),
        "copies that stay": copies,
        **about(ensemble, out),
        "remaining rows": str(left),
    }


def votes(
    ensemble: ShardedEnsemble, prompts: PromptSet, choices: Sequence[str], batch_size: int
) -> dict[str, Any]:
    """What each shard answers to each prompt, and the answer with the most votes.

    Args:
        ensemble: the voters.
        prompts: what to ask.
        choices: the answers to choose from; none for the likeliest next token.
        batch_size: prompts a forward pass.
    """
    if choices:
        ballots = ensemble.answers(prompts, choices, batch_size=batch_size)
        said = list(choices)
        names = {i: said[i] for i in range(len(said))}
    else:
        ballots = ensemble.next_tokens(prompts, batch_size=batch_size)
        tokens = {int(token) for token in ballots.flatten()}
        names = {token: str(prompts.tokenizer.decode([token])) for token in tokens}
    winners = ensemble.vote(ballots).tolist()
    found = [
        {
            "prompt": row["prompt"],
            "answer": names[winner],
            "share": cast.count(winner) / len(cast),
            "votes": [names[each] for each in cast],
        }
        for row, winner, cast in zip(prompts, winners, ballots.T.tolist(), strict=True)
    ]
    return {"shards": ensemble.voters, "answers": found}


def fairness_of(
    ensemble: ShardedEnsemble,
    fit: PromptSet,
    test: PromptSet,
    choices: Sequence[str],
    batch_size: int,
) -> dict[str, Any]:
    """Accuracy and equalised-odds gap of the vote and of the three post-processings, fitted on one set, on another.

    Args:
        ensemble: the voters.
        fit: prompts to fit the rules on. A row's target is the right answer, its `group` the sensitive group.
        test: prompts to measure on, and to give each answer's probability for.
        choices: the two answers; the second counts as 1.
        batch_size: prompts a forward pass.

    Raises:
        EditError: not two choices, a target that is neither, a row without a group, or a group that cannot be fitted.
    """
    if len(choices) != 2 or choices[0] == choices[1]:
        raise EditError(f"--choice is needed twice, for answers 0 and 1; got {list(choices)}")
    labels, groups = zip(*(_judged(prompts, choices) for prompts in (fit, test)), strict=True)
    known, asked = (
        ensemble.answers(prompts, choices, batch_size=batch_size).numpy() for prompts in (fit, test)
    )
    rules: dict[str, Callable[..., PerShardRule | VoteRule]] = {
        "per shard": per_shard,
        "after the vote": after_vote,
        "joint": joint,
    }
    chances = {name: rule(known, labels[0], groups[0])(asked, groups[1]) for name, rule in rules.items()}  # fmt: skip
    chances = {"vote": (2 * asked.sum(0) > len(asked)).astype(float), **chances}
    measured = {name: fairness(chance, labels[1], groups[1]) for name, chance in chances.items()}
    return {
        "shards": ensemble.voters,
        "fitted on": len(fit),
        "measured on": len(test),
        "placements": {
            name: {"accuracy": f.accuracy, "gap": f.gap, "tpr_gap": f.tpr_gap, "fpr_gap": f.fpr_gap}
            for name, f in measured.items()
        },
        f"probability of {choices[1]!r}": {
            name: [float(each) for each in chance] for name, chance in chances.items()
        },
    }


def _judged(prompts: PromptSet, choices: Sequence[str]) -> tuple[list[int], list[str]]:
    """Label and sensitive group of each row."""
    for index, row in enumerate(prompts):
        if row.get("target") not in choices:
            raise EditError(
                f"{prompts.name}, row {index}: expected one of {list(choices)} as the target, got {row.get('target')!r}"
            )
        if "group" not in row:
            raise EditError(f"{prompts.name}, row {index}: no 'group', whose odds are to be equal")
    return [choices.index(row["target"]) for row in prompts], [row["group"] for row in prompts]


def write_json(file: Path, value: object) -> None:
    """Write a value as JSON, whole or not at all."""
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")  # fmt: skip


def same_vocabulary(base: nn.Module, student: nn.Module) -> None:
    """Refuse a student that speaks of other tokens than the teachers.

    Raises:
        EditError: the numbers of tokens differ.
    """
    sizes: list[Any] = [getattr(each, "config", None) for each in (base, student)]
    teachers, own = (getattr(each, "vocab_size", None) for each in sizes)
    if teachers != own:
        raise EditError(
            f"--student has a vocabulary of {own} tokens and the teachers one of {teachers}: give a model trained from "
            "the same base"
        )


def _write_rows(file: Path, data: Iterable[Any]) -> None:
    lines = [json.dumps(dict(row), ensure_ascii=False) + "\n" for row in data]
    file.write_text("".join(lines), encoding="utf-8")


def _value(node: ast.expr) -> Any:
    """A literal, or one of the known dataclasses called with keywords, from its syntax."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.args or node.func.id not in _KNOWN:
            raise ValueError(node.func.id)
        return _KNOWN[node.func.id](**{str(k.arg): _value(k.value) for k in node.keywords})
    return ast.literal_eval(node)
