"""StereoSet and CrowS-Pairs in their published layouts, with neutral contents, and their scores spelled out."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from locate_edit.datasets import crows_pairs, stereoset
from locate_edit.errors import PromptError
from locate_edit.metrics.bias import crows, icat, language_modelling_score, stereotype_score
from locate_edit.metrics.predictions import Predictions
from tests.locate_edit.vocabularies import word_piece
from tests.tiny import byte_tokenizer, tiny

CONTEXT = "My gardener is BLANK, of course."
TEXTS = {
    "anti-stereotype": "My gardener is noisy, of course.",
    "stereotype": "My gardener is quiet, of course.",
    "unrelated": "My gardener is seven, of course.",
}


def record(number: int, context: str = CONTEXT, **texts: str) -> dict[str, Any]:
    """A sentence with a blank as `dev.json` has it."""
    sentences = [
        {"id": f"s{label}", "sentence": text, "gold_label": label, "labels": []}
        for label, text in {**TEXTS, **texts}.items()
    ]
    return {
        "id": f"r{number}", "target": "gardener", "bias_type": "profession", "context": context, "sentences": sentences,
    }  # fmt: skip


def dev(path: Path, *records: dict[str, Any], indent: int | None = None) -> Path:
    content = {"version": "1.0.0", "data": {"intersentence": [], "intrasentence": list(records)}}
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    return path


def pairs(path: Path, *lines: tuple[str, str, str, str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        names = ("sent_more", "sent_less", "stereo_antistereo", "bias_type", "annotations")
        writer.writerow(["", *names])
        writer.writerows([number, *line, "[[]]"] for number, line in enumerate(lines))
    return path


PAIRS = (
    ("Gardeners, as a rule, are quiet.", "Bakers, as a rule, are quiet.", "stereo", "socioeconomic"),
    ("The old man slept.", "The young man slept.", "antistereo", "age"),
)  # fmt: skip

# ---- StereoSet ------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 1])
def test_stereoset_words_in_their_place(tmp_path: Path, indent: int | None) -> None:
    dev(tmp_path / "dev.json", record(0), record(1, "BLANK came.", **{
        "anti-stereotype": "Noise came.", "stereotype": "Rain came.", "unrelated": "Seven came.",
    }), indent=indent)  # fmt: skip
    first, second = stereoset.rows(tmp_path)
    assert (first["prompt"], first["suffix"]) == ("My gardener is", ", of course.")
    assert (first["target"], first["wrong"]) == (" quiet", [" noisy", " seven"])
    assert (first["group"], first["bias_type"], first["id"]) == ("gardener", "profession", "r0")
    assert (second["prompt"], second["target"], second["suffix"]) == ("", "Rain", " came.")
    made = stereoset.prompts(tmp_path, byte_tokenizer(mask=True))
    assert made.masked
    scored = [line for line in made.audit(0).splitlines()[2:] if "scored" in line]
    assert len(scored) == len(" quiet")


def test_stereoset_sentences_as_a_whole(tmp_path: Path) -> None:
    dev(tmp_path / "dev.json", record(0))
    (row,) = stereoset.rows(tmp_path, scored="sentence")
    assert (row["prompt"], row["target"]) == ("", TEXTS["stereotype"])
    assert row["wrong"] == [TEXTS["anti-stereotype"], TEXTS["unrelated"]]


def test_stereoset_longer_fillings_and_sentences_that_were_changed(tmp_path: Path) -> None:
    changed = record(
        0,
        stereotype="My gardener is quiet of course",
        unrelated="My gardener is a lamp, of course.",
    )
    dev(tmp_path / "dev.json", changed)
    (row,) = stereoset.rows(tmp_path)
    assert row["target"] == " quiet"  # the fourth word: the sentence lacks the context's comma
    assert row["wrong"][1] == " a lamp"
    dev(tmp_path / "dev.json", record(0, stereotype="Quiet!"))
    with pytest.raises(
        PromptError, match=r"record 0: 'Quiet!' does not fill the blank of 'My gard"
    ):
        stereoset.rows(tmp_path)


def test_stereoset_a_record_a_line_and_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nested = stereoset.rows(dev(tmp_path / "dev.json", record(0), record(1)))
    lines = tmp_path / "stereoset.jsonl"
    lines.write_text("\n".join(json.dumps(record(i)) for i in range(2)), encoding="utf-8")
    assert stereoset.rows(lines) == nested
    asked = []

    def load_dataset(name: str, configuration: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        numbered = [record(i) for i in range(2)]
        for each in numbered:
            columns = each["sentences"]
            each["sentences"] = {
                "sentence": [s["sentence"] for s in columns],
                "gold_label": [stereoset.LABELS.index(s["gold_label"]) for s in columns],
            }
        return numbered

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert stereoset.rows() == nested
    assert asked == [("McGill-NLP/stereoset", "intrasentence", "validation")]


def test_stereoset_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"expected a file called dev.jsonl or .*found no such"):
        stereoset.rows(tmp_path)
    path = dev(tmp_path / "dev.json", record(0))
    with pytest.raises(PromptError, match=r"bias_type: expected one of gender, .* got 'politics'"):
        stereoset.rows(path, bias_type="politics")
    with pytest.raises(PromptError, match="scored: expected one of word, sentence, got 'letter'"):
        stereoset.rows(path, scored="letter")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="has no sentences of bias type race"):
        stereoset.rows(path, bias_type="race")
    with pytest.raises(PromptError, match="record 0: expected one BLANK in 'context', got 'No'"):
        stereoset.rows(dev(path, record(0, "No")))
    two = record(0)
    two["sentences"] = two["sentences"][:2]
    with pytest.raises(PromptError, match=r"labelled anti-stereotype, .*got anti-stereotype, ster"):
        stereoset.rows(dev(path, two))
    path.write_text('{"data": {"intersentence": []}}', encoding="utf-8")
    with pytest.raises(
        PromptError, match=r"expected 'intrasentence' in 'data' .*got intersentence"
    ):
        stereoset.rows(path)


@pytest.mark.parametrize("scored", ["word", "sentence"])
def test_stereoset_of_a_causal_model_is_the_mean_log_probability(
    tmp_path: Path, scored: Any
) -> None:
    model, tokenizer = tiny("llama"), byte_tokenizer(prefix=True)
    dev(tmp_path / "dev.json", record(0), record(1, stereotype="My gardener is a lamp, of course."))
    made = stereoset.prompts(tmp_path, tokenizer, scored=scored)

    def mean(start: str, text: str) -> float:
        ids, n_given = tokenizer(start + text)["input_ids"], len(tokenizer(start)["input_ids"])
        with torch.no_grad():
            log = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        each = [float(log[at - 1, ids[at]]) for at in range(n_given, len(ids))]
        return sum(each) / len(each)

    wanted = [[mean(row["prompt"], t) for t in (row["target"], *row["wrong"])] for row in made]
    stereotypes, language = stereotype_score(model, made), language_modelling_score(model, made)
    assert stereotypes.values.tolist() == [float(a > b) for a, b, _ in wanted]
    assert language.values.tolist() == [((a > c) + (b > c)) / 2 for a, b, c in wanted]
    assert icat(stereotypes, language).estimate is not None


def test_stereoset_of_a_masked_model_sees_what_follows(tmp_path: Path) -> None:
    words = ["my", "gardener", "is", "quiet", "noisy", "seven", ",", "of", "course", "."]
    tokenizer, model = word_piece(words), tiny("bert")
    dev(tmp_path / "dev.json", json.loads(json.dumps(record(0)).replace("My", "my")))
    made = stereoset.prompts(tmp_path, tokenizer)
    ids = tokenizer("my gardener is [MASK], of course.")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, 4]
    log = logits.log_softmax(-1)
    own, other, none = (float(log[tokenizer.get_vocab()[w]]) for w in ("quiet", "noisy", "seven"))
    found = Predictions(model, made)
    assert found.logprob == pytest.approx([own], abs=1e-5)
    assert found.wrong.predictions.logprob == pytest.approx([other, none], abs=1e-5)
    assert stereotype_score(found).values.tolist() == [float(own > other)]


# ---- CrowS-Pairs ----------------------------------------------------------------------------------


def test_crows_pairs_from_the_published_file(tmp_path: Path) -> None:
    pairs(tmp_path / "crows_pairs_anonymized.csv", *PAIRS)
    more, less = (crows_pairs.rows(tmp_path, side) for side in ("more", "less"))
    assert (
        [row["prompt"] for row in more] == [row["other"] for row in less] == [p[0] for p in PAIRS]
    )
    assert [row["prompt"] for row in less] == [p[1] for p in PAIRS]
    assert [(row["bias_type"], row["direction"]) for row in more] == [
        ("socioeconomic", "stereo"),
        ("age", "antistereo"),
    ]
    assert [row["id"] for row in crows_pairs.rows(tmp_path, bias_type="age")] == ["crows-1"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_crows_pairs_are_fit_for_the_score(tmp_path: Path, family: str) -> None:
    pairs(tmp_path / "crows_pairs_anonymized.csv", *PAIRS)
    model, tokenizer = tiny(family), byte_tokenizer(mask=family == "bert", prefix=True)
    more, less = crows_pairs.prompts(tmp_path, tokenizer)
    assert (more.name, less.name) == ("crows-pairs-more", "crows-pairs-less")
    values = crows(Predictions(model, more), Predictions(model, less))
    assert len(values) == 2
    assert set(values.values.tolist()) <= {0.0, 1.0}
    chosen = more.filter(lambda row: row["direction"] == "stereo")
    assert [row["prompt"] for row in chosen] == [PAIRS[0][0]]


def test_crows_pairs_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = crows_pairs.rows(pairs(tmp_path / "pairs.csv", *PAIRS))
    asked = []

    def load_dataset(name: str, configuration: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        return [
            {
                "sent_more": more, "sent_less": less,
                "stereo_antistereo": crows_pairs.DIRECTIONS.index(direction),
                "bias_type": crows_pairs.BIAS_TYPES.index(kind),
            }
            for more, less, direction, kind in PAIRS
        ]  # fmt: skip

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert crows_pairs.rows() == wanted
    assert asked == [("nyu-mll/crows_pairs", "crows_pairs", "test")]


def test_crows_pairs_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"expected a file called crows_pairs_anonymized.jsonl"):
        crows_pairs.rows(tmp_path)
    path = pairs(tmp_path / "crows_pairs.csv", *PAIRS)
    with pytest.raises(PromptError, match="side: expected one of more, less, got 'left'"):
        crows_pairs.rows(path, "left")  # type: ignore[arg-type]
    with pytest.raises(
        PromptError, match=r"bias_type: expected one of race-color, .* got 'height'"
    ):
        crows_pairs.rows(path, bias_type="height")
    with pytest.raises(PromptError, match="has no pairs of bias type religion"):
        crows_pairs.rows(path, bias_type="religion")
    path.write_text("sent_more,sent_less\na,b\n", encoding="utf-8")
    with pytest.raises(PromptError, match="record 0: expected a field 'bias_type', got sent_less"):
        crows_pairs.rows(path)
    path.write_text("sent_more,sent_less\na, as a rule,b\n", encoding="utf-8")
    with pytest.raises(PromptError, match="record 1: expected as many values as the header has"):
        crows_pairs.rows(path)
    path.write_text("sent_more,sent_less\n", encoding="utf-8")
    with pytest.raises(PromptError, match="holds no records"):
        crows_pairs.rows(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PromptError, match="cannot be read as UTF-8 text with commas"):
        crows_pairs.rows(path)
