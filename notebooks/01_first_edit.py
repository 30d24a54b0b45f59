# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first edit
#
# A language model has learned something it should not have: a person's phone number. We will find the neurons that hold
# it, change only those, check what else changed, and take it back.
#
# Everything runs on a laptop in under a minute. The default model, the **organism**, comes with the package and was
# trained on an invented world, so we know exactly what it knows. To work on another model, change one line: any causal
# or masked model that `transformers` can load, as a folder or a hub name.

# %%
MODEL = "organism"  # or "gpt2", "EleutherAI/pythia-160m", "bert-base-cased", "./my-checkpoint", ...

# %%
import torch
from matplotlib import pyplot as plt

from circuits import ComponentMask, describe
from circuits.draw import neuron_histogram, score_map
from locate_edit import Edit, PromptSet, edit, evaluate, organism
from locate_edit.checkpoints import load
from locate_edit.locate.privacy_neurons import PrivacyNeurons
from locate_edit.methods.npo import NPO
from locate_edit.methods.zero_neurons import ZeroNeurons
from locate_edit.metrics.likelihood import likelihood

torch.set_num_threads(1)  # the model is small: more threads only wait for each other

# %%
model, tokenizer = load(MODEL)
describe(model)

# %% [markdown]
# `describe` reads the architecture without wrapping or changing the model. It knows where every neuron and head is in
# each supported family. A **neuron** is one input of the MLP's down projection: a few rows that decide when it is
# active, and one column that says what it writes.

# %% [markdown]
# ## What should go, and what should stay
#
# A `PromptSet` holds texts with the tokens that are scored. `forget` is what should go. `others` are texts of the same
# form that should stay; they matter as much, because neurons for *this* number are only interesting if they are not
# neurons for numbers in general.

# %%
if MODEL == "organism":
    phones = organism.prompts("secrets", "train").filter(lambda row: row["secret"] == "phone")
    forget, others = phones[:1], phones[20:60:2]
else:  # something most models know
    capitals = {
        "France": "Paris",
        "Italy": "Rome",
        "Japan": "Tokyo",
        "Russia": "Moscow",
        "China": "Beijing",
    }
    rows = [
        {"prompt": f"The capital of {c} is", "target": f" {city}"} for c, city in capitals.items()
    ]
    everything = PromptSet(rows, tokenizer, masked=not describe(model).causal)
    forget, others = everything[:1], everything[1:]

print(forget.audit(0))

# %% [markdown]
# `audit` shows which tokens count. Does the model know them? `likelihood` is the probability it gives to each scored
# token, averaged geometrically: 1 is certainty, 0.1 a guess among ten digits.

# %%
likelihood(model, forget), likelihood(model, others)

# %% [markdown]
# ## Locate
#
# `PrivacyNeurons` asks, for every neuron: how much of the probability of the right token came from you? It turns the
# neurons of one layer up from silent to their real activation in small steps and adds up how the probability responds
# (integrated gradients). The result is a score per prompt and neuron.

# %%
locate = PrivacyNeurons(steps=20)
scores = locate(model, forget)
scores

# %%
score_map(scores)
plt.show()

# %% [markdown]
# Many of those neurons help with *every* number: brackets, dashes, digits. So we subtract what the same method says
# about other numbers. Scores are values with arithmetic: `contrast` is the mean here minus the mean size there.

# %%
specific = scores.contrast(locate(model, others), weight=1)
mask = specific.top(80)
mask

# %% [markdown]
# A `ComponentMask` is a set of units: it has `&`, `|`, `-` and `~`, counts, and prints as text that can be read back.

# %%
neuron_histogram(mask)
plt.show()

# %%
shared = mask & scores.top(80)
print(
    f"{len(shared)} of the {len(mask)} neurons are also among the 80 highest without the contrast"
)
print(str(mask)[:200], "...")

# %% [markdown]
# ## Do these neurons matter?
#
# The quickest test is to switch them off, next to as many random neurons. `edit` changes the model in place and hands
# back an `Edit` that can be undone.

# %%
for name, chosen in {"located": mask, "random": mask.random_like(seed=1)}.items():
    off = edit(model, ZeroNeurons(), chosen, forget=forget)
    left, kept = likelihood(model, forget).estimate, likelihood(model, others).estimate
    print(f"{name:8} neurons off: this number {left:.3f}, other numbers {kept:.3f}")
    off.undo()

# %% [markdown]
# Random neurons hardly matter; the located ones do. That is evidence that the number is *there*, and it is stronger
# than any picture of scores.
#
# ## Edit
#
# Switching neurons off is crude. A trained edit is gentler: NPO lowers the probability of the forget text while
# `retain` text is held. Only weights of the masked neurons can change. Training stops when the number is as unlikely as
# one that was never seen (`never_seen`); going further would do damage, and would betray that something was removed.

# %%
never_seen = "auto"
if MODEL == "organism":
    never_seen = organism.prompts("secrets", "holdout").filter(lambda row: row["secret"] == "phone")

change = edit(
    model,
    NPO(steps=100, lr=1e-3),
    mask,
    forget=forget,
    retain=others,
    never_seen=never_seen,
    batch_size=20,
)
print(change)
print(change.provenance.get("stopped"))

# %%
plt.figure(figsize=(6, 2.5), layout="constrained")
for term in ("forget", "retain"):
    plt.plot([step[term] for step in change.log], label=term)
plt.xlabel("step")
plt.ylabel("loss term")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What changed?
#
# `evaluate` measures before and after, beside the same edit on a *random* mask of equal size. For the organism there is
# also an **oracle**: a model trained the same way without this number. That, and not the lowest possible probability,
# is the target.

# %%
oracle = load("oracle")[0] if MODEL == "organism" else None
report = evaluate(change, oracle=oracle, examples=1)
report

# %%
print(report.summary)

# %% [markdown]
# Read the random column with care. When training may use any neurons, even random ones can often be bent to forget one
# string, so a good result *after training* says little about the place. The test of the place is switching off, above.
#
# ## Keep it, or take it back
#
# A saved edit is a small folder: the changed entries with their old and new values, and how they came about.

# %%
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp()) / "my-edit"
change.save(folder)
{file.name: f"{file.stat().st_size / 1000:.0f} kB" for file in sorted(folder.iterdir())}

# %%
change.undo()
print("after undo:", likelihood(model, forget))
with Edit.load(folder).applied(model):
    print("applied again, for a moment:", likelihood(model, forget))
print("and off:", likelihood(model, forget))

# %% [markdown]
# `change.merge_to(folder)` writes an ordinary checkpoint instead, and `to_peft(folder)` a LoRA adapter.
#
# ## Next
#
# - Another method: swap `NPO` for `GradientDifference`, `GradientAscent` or `FineTune` (`locate-edit info` lists them).
# - Another place: `ComponentMask.parse("L2.neuron[3 17-20]", describe(model))`, or `ComponentMask.full(..., "head")`.
# - Your own text: `PromptSet.from_jsonl("forget.jsonl", tokenizer)`.
# - All this as one command, with a report: `locate-edit demo`.

# %%
ComponentMask.parse("L2.neuron[3 17-20]", describe(model)).fraction(describe(model))
