"""Public data sets as prompts: invented files in their layouts, and the real ones where they are at hand."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from locate_edit.datasets import books, counterfact, pronouns, relations, tofu
from locate_edit.datasets._source import records
from locate_edit.errors import PromptError
from tests.locate_edit.vocabularies import byte_bpe, spelled
from tests.tiny import byte_tokenizer

real = pytest.mark.skipif(
    "LOCATE_EDIT_DATA" not in os.environ,
    reason="set LOCATE_EDIT_DATA to a folder with the public data sets",
)


def data(name: str) -> Path:
    return Path(os.environ["LOCATE_EDIT_DATA"]) / name


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


QUESTION = {
    "question": "Who is Ann?",
    "answer": "A writer.",
    "paraphrased_question": "Ann is who?",
    "paraphrased_answer": "Ann writes.",
    "perturbed_answer": ["A baker.", "A judge."],
}


def test_tofu_rows_from_a_folder_in_the_published_layout(tmp_path: Path) -> None:
    write(tmp_path / "forget01_perturbed.json", [QUESTION])
    (row,) = tofu.rows(tmp_path, "forget01_perturbed")
    assert row["prompt"] == "Question: Who is Ann?\nAnswer:"
    assert row["target"] == " A writer."
    assert row["wrong"] == [" A baker.", " A judge."]
    assert row["paraphrases"] == ["Question: Ann is who?\nAnswer:"]
    (row,) = tofu.rows(tmp_path, "forget01_perturbed", answer="paraphrased_answer")
    assert row["target"] == " Ann writes."
    made = tofu.prompts(tmp_path, byte_tokenizer(), "forget01_perturbed")
    wrong = tofu.wrong_answers(made)
    assert [(row["of"], row["target"]) for row in wrong] == [(0, " A baker."), (0, " A judge.")]


def test_a_chat_template_gets_the_bare_question_and_the_audit_shows_what_is_scored(
    tmp_path: Path,
) -> None:
    write(tmp_path / "forget01.json", [QUESTION])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    made = tofu.prompts(tmp_path, tokenizer, "forget01", chat_template=True, append_eos=True)
    assert tokenizer.decode(made.prompt_ids(0)) == "<u>Who is Ann?</s><a>"
    assert tokenizer.decode(made.target_ids(0)[:-1]) == "A writer."
    assert made.target_ids(0)[-1] == tokenizer.eos_token_id
    scored = [line for line in made.audit(0).splitlines()[2:] if "scored" in line]
    assert len(scored) == len("A writer.") + 1


def test_chat_answers_are_what_the_template_itself_would_write(tmp_path: Path) -> None:
    tokenizer = byte_bpe(["Who", " is", " Ann", "?", "A", " writer", " baker", "."], bos=True)
    tokenizer.eos_token = "<|end|>"
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ '<|' + m['role'] + '|>' }}\n{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    write(tmp_path / "forget01_perturbed.json", [QUESTION])
    made = tofu.prompts(tmp_path, tokenizer, "forget01_perturbed", chat_template=True, append_eos=True)  # fmt: skip
    asked = {"role": "user", "content": "Who is Ann?"}

    def written(*turns: dict[str, str]) -> list[int]:
        text = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=len(turns) == 1
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for prompts, answer in ((made, "A writer."), (tofu.wrong_answers(made), "A baker.")):
        whole = written(asked, {"role": "assistant", "content": answer})
        assert prompts.ids(0) == whole  # one start token, one end token
        assert prompts.prompt_ids(0) == written(asked)
        assert spelled(tokenizer, prompts.target_ids(0)) == [*answer_tokens(answer), "<|end|>"]
    audited = [line for line in made.audit(0).splitlines()[2:] if "scored" in line]
    assert len(audited) == len(made.target_ids(0))
    assert "<|assistant|>" not in "".join(audited)


def answer_tokens(answer: str) -> list[str]:
    """The words of an answer of two, as its tokenizer knows them."""
    first, rest = answer.removesuffix(".").split(" ")
    return [first, f" {rest}", "."]


def test_tofu_says_what_is_wrong(tmp_path: Path) -> None:
    write(tmp_path / "forget05.json", [QUESTION])
    with pytest.raises(PromptError, match="expected one of full, forget01"):
        tofu.rows(tmp_path, "forget02")
    with pytest.raises(PromptError, match=r"expected a file called forget01.jsonl.*forget05.json"):
        tofu.rows(tmp_path, "forget01")
    with pytest.raises(PromptError, match=r"expected \{question\} in it"):
        tofu.rows(tmp_path, "forget05", template="Q: {q}")
    with pytest.raises(PromptError, match="expected a field 'paraphrased_answer'"):
        write(tmp_path / "forget10.json", [{"question": "Who?", "answer": "She."}])
        tofu.rows(tmp_path, "forget10", answer="paraphrased_answer")
    made = tofu.prompts(tmp_path, byte_tokenizer(), "forget10")
    with pytest.raises(PromptError, match="item 0: no wrong answers"):
        tofu.wrong_answers(made)


CASE = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} plays",
        "subject": "Ann Lee",
        "relation_id": "P1",
        "target_true": {"str": "golf"},
        "target_new": {"str": "chess"},
    },
    "paraphrase_prompts": ["The game of Ann Lee is"],
    "neighborhood_prompts": ["Bob plays", "Cy plays"],
}


def test_counterfact_in_both_layouts(tmp_path: Path) -> None:
    flat = {
        "case_id": 7, "relation": "P1", "prompt": "{} plays", "subject": "Ann Lee",
        "target_true": "golf", "target_new": "chess",
        "paraphrase_prompts": CASE["paraphrase_prompts"], "neighborhood_prompts": CASE["neighborhood_prompts"],
    }  # fmt: skip
    nested = write(tmp_path / "counterfact.jsonl", [CASE])
    assert counterfact.rows(nested) == counterfact.rows(write(tmp_path / "flat.json", [flat]))
    (row,) = counterfact.rows(tmp_path)
    assert (row["prompt"], row["target"], row["wrong"]) == ("Ann Lee plays", " golf", [" chess"])
    near = counterfact.neighbours(counterfact.prompts(tmp_path, byte_tokenizer()))
    assert [(r["prompt"], r["target"], r["of"]) for r in near] == [
        ("Bob plays", " golf", 0),
        ("Cy plays", " golf", 0),
    ]


def test_relations_in_both_layouts(tmp_path: Path) -> None:
    samples = [{"subject": f"S{i}", "object": f"O{i % 3}"} for i in range(6)]
    about = {"name": "a b", "prompt_templates": ["{} has"], "prompt_templates_zs": ["What has {}?"]}
    published = tmp_path / "published" / "factual"
    published.mkdir(parents=True)
    (published / "a_b.json").write_text(json.dumps({**about, "samples": samples}), "utf-8")
    flat = tmp_path / "flat"
    flat.mkdir()
    write(flat / "templates.jsonl", [{"relation": "a_b", "category": "factual", **about}])
    write(flat / "relations.jsonl", [{"relation": "a_b", **sample} for sample in samples])
    assert relations.names(flat) == relations.names(tmp_path / "published") == ["a_b"]
    found = relations.rows(flat, "a_b")
    assert found == relations.rows(tmp_path / "published", "a_b")
    assert found[1]["prompt"] == "S1 has"
    assert found[1]["paraphrases"] == ["What has S1?"]
    assert sorted(found[1]["wrong"]) == [" O0", " O2"]
    assert relations.rows(flat, "a_b", template=1)[1]["prompt"] == "What has S1?"
    with pytest.raises(PromptError, match="expected one of a_b, got 'c'"):
        relations.rows(flat, "c")
    with pytest.raises(PromptError, match=r"has 2 \(0 to 1\), got 2"):
        relations.rows(flat, "a_b", template=2)


def test_pronouns_pair_up(tmp_path: Path) -> None:
    sentence = "The guard told the clerk that {} could go."
    common = {"occupation": "guard", "participant": "clerk", "answer": 0}
    spoken = {"male": "he", "female": "she", "neutral": "they"}
    path = write(
        tmp_path / "winogender.jsonl",
        [{**common, "gender": g, "sentence": sentence.format(p)} for g, p in spoken.items()],
    )
    (row,) = pronouns.winogender(path)
    assert row["prompt"] == "The guard told the clerk that"
    assert (row["target"], row["wrong"], row["suffix"]) == (" he", [" she"], " could go.")
    made = pronouns.prompts([row], byte_tokenizer(mask=True))
    assert made.masked
    write(path, [{**common, "gender": "male", "sentence": "He went."}])
    with pytest.raises(PromptError, match="expected a male and a female sentence, got male"):
        pronouns.winogender(path)


def test_winobias_pairs_that_differ_elsewhere_are_left_out(tmp_path: Path) -> None:
    def pair(number: int, pro: str, anti: str) -> list[dict[str, Any]]:
        common = {"type": 1, "split": "dev", "id": number}
        return [{**common, "stereotype": s, "sentence": t} for s, t in (("pro", pro), ("anti", anti))]  # fmt: skip

    path = write(
        tmp_path / "winobias.jsonl",
        [
            *pair(1, "[The cook] asked the guard if [she] may.", "[The cook] asked the guard if [he] may."),
            *pair(2, "[The cook] met [her].", "[The cook] met [the guard]."),
        ],
    )  # fmt: skip
    (row,) = pronouns.winobias(path)
    assert (row["prompt"], row["target"], row["wrong"], row["suffix"]) == (
        "The cook asked the guard if",
        " she",
        [" he"],
        " may.",
    )
    assert row["group"] == "cook"
    with pytest.raises(PromptError, match="no sentence pairs of type 2"):
        pronouns.winobias(path, type_=2)


def test_winogender_as_published(tmp_path: Path) -> None:
    said = {"male": "He ran.", "female": "She ran.", "neutral": "They ran."}
    lines = ["sentid\tsentence"]
    lines += [f"guard.clerk.0.{g}.txt\tThe guard saw the clerk. {t}" for g, t in said.items()]
    lines += [
        f'tax adviser.someone.1.{g}.txt\tThe tax adviser said "{p} can go".'
        for g, p in (("female", "she"), ("male", "he"))
    ]
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "all_sentences.tsv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    found = pronouns.winogender(path)
    assert found == pronouns.winogender(path.parent) == pronouns.winogender(tmp_path)
    assert [row["about"] for row in found] == ["occupation", "participant"]
    assert found[1]["prompt"] == 'The tax adviser said "'
    assert (found[1]["target"], found[1]["wrong"], found[1]["group"]) == ("he", ["she"], "tax adviser")  # fmt: skip
    path.write_text("sentid\tsentence\nguard.clerk.male.txt\tHe ran.", "utf-8")
    with pytest.raises(PromptError, match=r"all_sentences\.tsv, line 2: expected OCCUPATION\."):
        pronouns.winogender(path)
    with pytest.raises(PromptError, match=r"not read from the hub\. Download data/all_sent"):
        pronouns.winogender("owner/winogender")


BIASED = {
    "pro": ["[The cook] asked the guard if [she] may.", "The cook met [the guard] , and [he] left."],
    "anti": ["[The cook] asked the guard if [he] may.", "The cook met [the guard] , and [she] left."],
}  # fmt: skip
"""Two invented pairs; the second in the way of text that was cut into words."""


def test_winobias_as_published(tmp_path: Path) -> None:
    for side, lines in BIASED.items():
        for at, numbered in (("dev", True), ("test", False)):
            text = "\n".join(f"{n} {line}" if numbered else line for n, line in enumerate(lines, 1))
            (tmp_path / f"{side}_stereotyped_type1.txt.{at}").write_text(text + "\n", "utf-8")
    dev = pronouns.winobias(tmp_path, type_=1, split="dev")
    assert [(row["prompt"], row["target"], row["wrong"], row["id"]) for row in dev] == [
        ("The cook asked the guard if", " she", [" he"], "1-dev-1"),
        ("The cook met the guard , and", " he", [" she"], "1-dev-2"),
    ]
    assert [row["subject"] for row in dev] == ["The cook", "the guard"]
    test = pronouns.winobias(tmp_path, type_=1, split="test")
    assert [row["prompt"] for row in test] == [row["prompt"] for row in dev]
    with pytest.raises(PromptError, match=r"lacks pro_stereotyped_type2\.txt\.dev, anti_.*type_"):
        pronouns.winobias(tmp_path)
    with pytest.raises(PromptError, match=r"winobias\.jsonl.*or pro_stereotyped_type2\.txt\.test"):
        pronouns.winobias(tmp_path, type_=2, split="test")
    for side in BIASED:
        bare = (
            "The cook left when [she] could." if side == "pro" else "The cook left when [he] could."
        )
        (tmp_path / f"{side}_stereotyped_type2.txt.dev").write_text(bare, "utf-8")
    with pytest.raises(PromptError, match="WinoBias 2-dev-1: expected the person in brackets"):
        pronouns.winobias(tmp_path, type_=2, split="dev")


def hub_records(side: str) -> list[dict[str, Any]]:
    """The invented pairs in the hub's layout."""
    made = []
    for sentence in BIASED[side]:
        words = sentence.removesuffix(".").split(" ")
        opened = [i for i, word in enumerate(words) if word.startswith("[")]
        closed = [i for i, word in enumerate(words) if word.endswith("]")]
        ends = [str(at) for pair in zip(opened, closed, strict=True) for at in pair]
        made.append(
            {
                "tokens": [*(word.strip("[]") for word in words), "."],
                "coreference_clusters": ends,
            }
        )
    return made


def test_winobias_of_the_hub_and_downloaded_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(name: str, configuration: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        return hub_records(configuration.partition("_")[2])

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = pronouns.winobias(type_=1, split="dev")
    assert asked == [
        ("uclanlp/wino_bias", "type1_pro", "validation"),
        ("uclanlp/wino_bias", "type1_anti", "validation"),
    ]
    assert [(r["prompt"], r["target"], r["suffix"], r["subject"]) for r in found] == [
        ("The cook asked the guard if", " she", " may.", "The cook"),
        ("The cook met the guard, and", " he", " left.", "the guard"),
    ]
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    for side in BIASED:
        (tmp_path / f"type1_{side}").mkdir()
        file = tmp_path / f"type1_{side}" / "validation-00000-of-00001.parquet"
        parquet.write_table(table.from_pylist(hub_records(side)), file)
    assert pronouns.winobias(tmp_path, type_=1, split="dev") == found
    file.write_text("no table")
    with pytest.raises(PromptError, match=r"parquet: cannot be read as parquet \("):
        pronouns.winobias(tmp_path, type_=1, split="dev")


def test_counterfact_for_tracing_and_downloaded_from_the_hub(tmp_path: Path) -> None:
    record = {
        "relation": "The sport of {} is", "relation_prefix": "The sport of", "relation_suffix": " is",
        "prompt": "The sport of Ann Lee is", "relation_id": "P1", "target_true": " golf", "target_false": " chess",
        "subject": " Ann Lee",
    }  # fmt: skip
    (row,) = counterfact.rows(write(tmp_path / "tracing.jsonl", [record]))
    assert (row["prompt"], row["target"], row["wrong"]) == (record["prompt"], " golf", [" chess"])
    assert (row["subject"], row["relation"], row["paraphrases"]) == ("Ann Lee", "P1", [])
    first = {**record, "relation_prefix": "", "subject": "Ann Lee", "prompt": "Ann Lee is"}
    (row,) = counterfact.rows(write(tmp_path / "tracing.jsonl", [first]))
    assert row["prompt"] == "Ann Lee is"
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    (tmp_path / "data").mkdir()
    parquet.write_table(
        table.from_pylist([CASE]), tmp_path / "data" / "train-00000-of-00001.parquet"
    )
    assert counterfact.rows(tmp_path) == counterfact.rows(write(tmp_path / "flat.json", [CASE]))


def test_a_data_set_that_is_a_script_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(
        name: str, configuration: str, split: str, revision: str | None = None
    ) -> list[dict[str, Any]]:
        asked.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found TOFU.py")
        return [QUESTION]

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert len(tofu.rows(split="forget01")) == 1
    assert asked == [None, "refs/convert/parquet"]
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    (tmp_path / "TOFU.py").write_text("")
    with pytest.raises(PromptError, match="download it with --revision refs/convert/parquet"):
        tofu.rows(tmp_path, "forget01")
    (tmp_path / "forget01" / "train").mkdir(parents=True)
    parquet.write_table(
        table.from_pylist([QUESTION]), tmp_path / "forget01" / "train" / "0000.parquet"
    )
    assert tofu.rows(tmp_path, "forget01")[0]["answer"] == QUESTION["answer"]


def test_a_clone_of_the_relations_and_a_name_on_the_hub(tmp_path: Path) -> None:
    samples = [{"subject": "Ann", "object": "golf"}, {"subject": "Bo", "object": "chess"}]
    about = {"name": "plays", "prompt_templates": ["{} plays"], "samples": samples}
    (tmp_path / "settings.json").write_text("[]", "utf-8")
    (tmp_path / "data" / "factual").mkdir(parents=True)
    (tmp_path / "data" / "factual" / "plays.json").write_text(json.dumps(about), "utf-8")
    assert relations.names(tmp_path) == ["plays"]
    assert relations.rows(tmp_path, "plays")[0]["category"] == "factual"
    with pytest.raises(PromptError, match=r"github\.com/evandez/relations\. They are not"):
        relations.names("owner/relations")


def test_passages_cover_the_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("abcdefghij klmnop\r\nqrstuvwxyz", encoding="utf-8")
    tokenizer = byte_tokenizer()
    found = books.passages(path, tokenizer, length=10, given=4)
    assert [(row["prompt"], row["target"]) for row in found] == [
        ("abcd", "efghij"),
        (" klm", "nop\nqr"),
    ]
    plain = books.prompts(path, tokenizer, length=12, stride=6)
    assert [row["prompt"] for row in plain][:2] == ["abcdefghij k", "ghij klmnop\n"]
    with pytest.raises(PromptError, match="fewer than one passage of 99"):
        books.passages(path, tokenizer, length=99)
    with pytest.raises(PromptError, match="0 <= given < length"):
        books.passages(path, tokenizer, length=9, given=9)


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda place: tofu.rows(place, "forget01"), r"expected a file called forget01\.jsonl"),
        (counterfact.rows, r"expected a file called counterfact\.jsonl or counterfact_1000\.jsonl"),
        (pronouns.winogender, r"expected a file called winogender\.jsonl.*found no such files"),
        (pronouns.winobias, r"expected a file called winobias\.jsonl.*found no such files"),
        (relations.names, "no relations in it; expected relations.jsonl, or a JSON file"),
        (lambda place: relations.names(place / "none"), r"none: no such folder\. Give the folder"),
        (lambda place: books.passages(place, byte_tokenizer()), "cannot be read as UTF-8 text"),
    ],
)  # fmt: skip
def test_a_wrong_folder_is_named(tmp_path: Path, read: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says) as caught:
        read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_records_without_their_fields_are_named(tmp_path: Path) -> None:
    about = {"relation": "a_b", "category": "factual", "prompt_templates": ["{} has"]}
    write(tmp_path / "templates.jsonl", [about])
    write(tmp_path / "relations.jsonl", [{"relation": "a_b", "subject": "S"}])
    with pytest.raises(PromptError, match="a_b, record 0: expected a field 'object', got relation"):
        relations.rows(tmp_path, "a_b")
    write(tmp_path / "relations.jsonl", [{"relation": "c", "subject": "S", "object": "O"}])
    with pytest.raises(PromptError, match=r"record 0: expected a relation of templates.jsonl, got"):
        relations.names(tmp_path)
    write(tmp_path / "templates.jsonl", [{"relation": "a_b"}])
    with pytest.raises(PromptError, match=r"templates.jsonl, record 0: expected a field 'prompt_t"):
        relations.names(tmp_path)
    cases = write(tmp_path / "counterfact.jsonl", [{"case_id": 1}])
    with pytest.raises(PromptError, match="CounterFact, record 0: expected a field 'subject'"):
        counterfact.rows(cases)
    marked = {**QUESTION, "forget10": True, "author": "Ann"}
    write(tmp_path / "tofu_full.jsonl", [marked, {**marked, "question": "Who is Bo?"}])
    write(tmp_path / "forget10_perturbed.jsonl", [QUESTION])
    with pytest.raises(PromptError, match=r"lacks the question 'Who is Bo\?'"):
        tofu.rows(tmp_path, "forget10_perturbed")


@pytest.mark.parametrize("mask", [False, True])
def test_audits_mark_the_answer_alone(tmp_path: Path, mask: bool) -> None:
    sentence = "The guard told the clerk that {} could go."
    write(tmp_path / "counterfact.jsonl", [CASE])
    write(tmp_path / "winogender.jsonl", [
        {"occupation": "guard", "participant": "clerk", "answer": 0, "gender": g, "sentence": sentence.format(p)}
        for g, p in (("male", "he"), ("female", "she"))
    ])  # fmt: skip
    samples = [{"subject": "Ann", "object": "golf"}, {"subject": "Bo", "object": "chess"}]
    about = {"name": "plays", "prompt_templates": ["{} plays"], "samples": samples}
    (tmp_path / "plays.json").write_text(json.dumps(about), "utf-8")
    tokenizer = byte_tokenizer(mask=mask)
    sets = (
        (counterfact.prompts(tmp_path / "counterfact.jsonl", tokenizer), " golf"),
        (pronouns.prompts(pronouns.winogender(tmp_path), tokenizer), " he"),
        (relations.prompts(tmp_path, tokenizer, "plays"), " golf"),
    )
    for prompts, answer in sets:
        lines = prompts.audit(0).splitlines()
        scored = [line.split()[0] for line in lines[2:] if "scored" in line]
        assert tokenizer.decode([prompts.ids(0)[int(at)] for at in scored]) == answer
        assert f"{len(answer)} scored" in lines[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no records"),
        ('{"a": 1}\n{"a": ', "line 2: not valid JSON"),
        ("[1, 2]", "entry 1: expected an object, got int"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PromptError, match=says):
        records(path, "x")


def test_the_hub_is_asked_only_for_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, configuration: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        return [QUESTION]

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert len(tofu.rows(split="retain_perturbed")) == 1
    assert asked == [("locuslab/TOFU", "retain_perturbed", "train")]
    with pytest.raises(PromptError, match="no such folder or file"):
        tofu.rows("/nowhere/at/all", "forget01")

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network\nand more lines")

    fake.load_dataset = offline  # type: ignore[attr-defined]
    with pytest.raises(
        PromptError, match=r"no local folder, and .* no network Without .*hf download"
    ):
        tofu.rows(split="forget01")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match=r"pip install datasets.*hf download locuslab/TOFU"):
        tofu.rows(split="forget01")


@real
def test_real_tofu() -> None:
    sizes = {name: len(tofu.rows(data("tofu"), name)) for name in tofu.SPLITS[:12]}
    assert sizes == {
        "full": 4000, "forget01": 40, "forget05": 200, "forget10": 400, "retain90": 3600, "retain95": 3800,
        "retain99": 3960, "forget01_perturbed": 40, "forget05_perturbed": 200, "forget10_perturbed": 400,
        "retain_perturbed": 400, "real_authors_perturbed": 100,
    }  # fmt: skip
    assert not {r["question"] for r in tofu.rows(data("tofu"), "forget10")} & {
        r["question"] for r in tofu.rows(data("tofu"), "retain90")
    }


@real
def test_real_pairs_and_cases() -> None:
    assert len(counterfact.rows(data("counterfact"))) == 1000
    assert len(relations.names(data("relations_lre"))) == 47
    assert len(pronouns.winogender(data("winogender"))) == 240
    bias = pronouns.winobias(data("winobias"))
    assert len(bias) > 1500
    words = {text.strip().lower() for row in bias for text in (row["target"], *row["wrong"])}
    assert words <= pronouns.PRONOUNS
    assert len(books.passages(data("books") / "alice_in_wonderland.txt", byte_tokenizer())) > 1000
