"""Models by name: the right class for each, whole checkpoints, and an edit taken out of one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from circuits import ComponentMask, describe
from locate_edit import EditError, PromptSet, edit
from locate_edit.checkpoints import LoadError, is_masked, load, save, take_out
from locate_edit.methods.fine_tune import FineTune
from tests.tiny import CONFIGS, MASKED, byte_tokenizer, tiny


@pytest.mark.parametrize("name", sorted({model_type for model_type, _ in CONFIGS.values()}))
def test_the_kind_of_model_follows_from_its_configuration(name: str) -> None:
    config = AutoConfig.for_model(name)
    assert is_masked(config) == (name in MASKED)
    saved = type(tiny(name)).__name__
    config.architectures = [saved]
    assert is_masked(config) == saved.endswith("MaskedLM")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, False),
        ({"model_type": "bert", "architectures": ["BertModel"], "is_decoder": True}, False),
        ({"model_type": "bert", "architectures": ["BertModel"]}, True),
        ({"model_type": "llama", "architectures": None}, False),
    ],
)
def test_the_saved_class_decides_before_the_family(
    settings: dict[str, Any], expected: bool
) -> None:
    config: Any = SimpleNamespace(**settings)
    assert is_masked(config) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder model"),
        (
            {"model_type": "vit", "architectures": ["ViTModel"]},
            r"vit \(saved as ViTModel\) is no language",
        ),
    ],
)
def test_other_models_are_refused(settings: dict[str, Any], message: str) -> None:
    config: Any = SimpleNamespace(**{"architectures": None, **settings})
    with pytest.raises(LoadError, match=message):
        is_masked(config)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_saved_model_loads_as_it_was(tmp_path: Path, dtype: str) -> None:
    model, tokenizer = tiny("bert"), byte_tokenizer(mask=True)
    save(model, tokenizer, tmp_path / "bert")
    again, tokens = load(tmp_path / "bert", dtype=dtype, device="cpu")
    assert type(again) is type(model)
    assert not again.training
    assert tokens("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one if dtype == "auto" else one.bfloat16(), two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_an_edit_is_taken_out_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model, tokenizer = tiny(name, dtype=dtype), byte_tokenizer()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    forget = PromptSet([("Ann Lee plays", " golf")], tokenizer)
    mask = ComponentMask.parse("embed.vocab[70-90]; L1.neuron[0-9]", describe(model))
    made = edit(model, FineTune(steps=3, lr=0.01), mask, forget=forget)
    save(model, tokenizer, tmp_path / "merged")
    merged, _ = load(tmp_path / "merged", device="cpu")
    assert any(not torch.equal(base[key], value) for key, value in merged.state_dict().items())
    take_out(made, merged)
    for key, value in merged.state_dict().items():
        assert torch.equal(base[key], value), key
    with pytest.raises(EditError, match="there is nothing to undo"):
        take_out(made, merged)
