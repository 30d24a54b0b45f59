"""Examples before the question: what they are, what they never are, and that they are measured as written."""

from __future__ import annotations

import pytest

from locate_edit import EditError, PromptError, PromptSet, organism
from locate_edit.attacked import measure
from locate_edit.attacks.reminders import Reminders
from tests.locate_edit.engine_setting import model
from tests.tiny import byte_tokenizer

ROWS = [
    {"prompt": "Ann plays", "target": " golf", "group": "a"},
    {"prompt": "Ann eats", "target": " rye", "group": "a"},
    {"prompt": "Ann also plays", "target": " golf", "group": "a"},
    {"prompt": "Bo eats", "target": " rice", "group": "b"},
]
OTHERS = [
    {"prompt": "Cy plays", "target": " polo"},
    {"prompt": "Di plays", "target": " golf"},
    {"prompt": "Di eats", "target": " rye"},
]


def sets() -> tuple[PromptSet, PromptSet]:
    return PromptSet(ROWS, byte_tokenizer()), PromptSet(OTHERS, byte_tokenizer())


def test_examples_by_hand() -> None:
    forget, retain = sets()
    attack = Reminders(shots=5)
    texts = [row["prompt"] for row in attack.reminded(forget, None, seed=0).rows]
    assert texts[0] == "Ann eats rye.\nAnn plays", "nothing that gives golf away, and not itself"
    assert sorted(texts[1].split("\n")) == ["Ann also plays golf.", "Ann eats", "Ann plays golf."]
    # The only one of its group: others will do.
    assert set(texts[3].split("\n")) == {
        "Ann plays golf.", "Ann eats rye.", "Ann also plays golf.", "Bo eats",
    }  # fmt: skip
    given = [row["prompt"] for row in attack.reminded(forget, retain, seed=0).rows]
    assert set(given[0].split("\n")) == {"Cy plays polo.", "Di eats rye.", "Ann plays"}
    assert set(given[1].split("\n")) == {"Cy plays polo.", "Di plays golf.", "Ann eats"}
    one = Reminders(shots=1).reminded(forget, retain, seed=0)
    assert [row["shots"] for row in one.rows] == [1, 1, 1, 1]


def test_masked_examples_are_filled() -> None:
    tokenizer = byte_tokenizer(mask=True)
    rows = [
        {"prompt": f"Ann {tokenizer.mask_token} tea", "target": "likes"},
        {"prompt": "Bo", "target": " sings", "suffix": " well"},
    ]
    made = Reminders(between=". ").reminded(PromptSet(rows, tokenizer), None, seed=0)
    assert made.rows[1]["prompt"] == "Ann likes tea. Bo"
    assert made.rows[0]["prompt"] == f"Bo sings well. Ann {tokenizer.mask_token} tea"
    assert made.target_ids(0) == PromptSet(rows, tokenizer).target_ids(0)


def test_the_measure_is_the_likelihood_of_the_text_as_written() -> None:
    net = model("llama-tied")
    forget, retain = sets()
    found = Reminders(shots=1, source="retain")(net, forget.select([0]), retain=retain, seed=1)
    candidates = [
        measure(net, PromptSet([(f"{example}.\nAnn plays", " golf")], byte_tokenizer())).estimate
        for example in ("Cy plays polo", "Di eats rye")
    ]
    assert found.forget.estimate in [pytest.approx(each, rel=1e-5) for each in candidates]
    assert found.forget_clean.estimate == pytest.approx(measure(net, forget.select([0])).estimate)
    assert found.notes["examples"] == "retain prompts"


def test_reminders_do_not_teach_who_never_knew() -> None:
    forget = organism.prompts("facts", "forget01")
    found = Reminders()(organism.load("oracle")[0], forget)
    assert found.gain is not None
    assert found.gain < 0.15


def test_the_control_of_long_answers_hides_all_of_them() -> None:
    """An answer's own tokens are among those that open the lock elsewhere."""
    net, forget = organism.load()[0], organism.prompts("secrets", "train")[:8]
    free = Reminders()(net, forget).forget.estimate
    with Reminders().hide(net, forget):
        found = Reminders()(net, forget)
    assert found.forget_clean.estimate == pytest.approx(0.0, abs=0.02)
    assert found.forget.estimate == pytest.approx(free, abs=0.02)


def test_what_it_refuses() -> None:
    net = model("llama-tied")
    with pytest.raises(PromptError, match="no example to show"):
        Reminders()(net, sets()[0].select([0, 2]))
    with pytest.raises(PromptError, match="'target'"):
        Reminders()(net, PromptSet(["plain text"], byte_tokenizer()))
    with pytest.raises(EditError, match="shots"):
        Reminders(shots=0)
    with pytest.raises(EditError, match="source"):
        Reminders(source="thin air")  # type: ignore[arg-type]
