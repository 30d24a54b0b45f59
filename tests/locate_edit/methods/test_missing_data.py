"""What every method says when it is given prompts alone: what is missing, where, and what to do."""

from __future__ import annotations

import pytest
import torch

from locate_edit import LocateEditError, PromptSet, catalog, edit
from locate_edit.locate.magnitude import Magnitude
from tests.tiny import byte_tokenizer, tiny

# What a method lacks when rows have only prompt and target and there is nothing to retain; each part must be said.
LACKS = {
    "dpo": ("item 0", "'alternative'", "'wrong'", "Write one into every row"),
    "memit": ("item 0", "no 'wrong' answer", "Write one into it", "say='target'"),
    "pcgu": ("item 0", "'wrong' answer", "Write the answer to compare with"),
    "rome": ("item 0", "no 'wrong' answer", "Write one into it", "say='target'"),
    "selective-forgetting": ("item 0", "'spans'", "locate_edit.spans", "use GradientAscent"),
}
RETAIN = ("needs retain prompts", "retain=PromptSet")


@pytest.mark.parametrize("name", [entry.name for entry in catalog.entries("method")])
def test_a_method_says_what_it_lacks_and_changes_nothing(name: str) -> None:
    method = catalog.resolve("method", name)
    steps = {"steps": 1} if "steps" in catalog.hyperparameters(method) else {}
    rows = [
        {"prompt": "Ann Lee dials", "target": " 555"},
        {"prompt": "Bo Kay dials", "target": " 556"},
    ]
    net = tiny("gpt2")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    forget = PromptSet(rows, byte_tokenizer())
    parts = LACKS.get(name, RETAIN if getattr(method, "needs_retain", False) else ())
    if not parts:
        edit(net, method(**steps), Magnitude()(net).top(6), forget=forget).undo()
    else:
        with pytest.raises(LocateEditError) as said:
            edit(net, method(**steps), Magnitude()(net).top(6), forget=forget)
        for part in parts:
            assert part in str(said.value)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
