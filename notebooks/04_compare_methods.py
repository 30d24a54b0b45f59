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
# # Which method, and which place?
#
# One question from start to end: **which methods and which places make one person's facts go, at the least cost to
# others?** `compare` edits the organism with every localizer, method and number of neurons, puts a random mask of the
# same size beside each, measures, and takes every edit back.
#
# It is small, so that it runs in a minute. [benchmarks/MATRIX.md](../benchmarks/MATRIX.md) asks the same of more
# people, localizers and methods.

# %%
from collections import defaultdict
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from locate_edit import organism
from locate_edit.draw.comparison import heat_map, trade_off
from locate_edit.locate.activation_contrast import ActivationContrast
from locate_edit.locate.saliency import Saliency
from locate_edit.methods.npo import NPO
from locate_edit.methods.undial import UNDIAL
from locate_edit.reports.comparison import RANDOM, compare

torch.set_num_threads(1)  # the model is small: more threads only wait for each other
model, _ = organism.load()
oracle, _ = organism.load("oracle")  # trained on the same text without this person

# %% [markdown]
# ## What is forgotten, what is kept, and what nobody looks after
#
# Methods get the `forget` and the `retain` prompts and train on both. So a good score on `retain` says little: the
# method was told. `neighbours` are people who share a first or last name with the person. No localizer and no method
# sees them, and if an edit spills over, it will be there.

# %%
person = organism.people("forget01")[0]
forget = organism.prompts("facts", "forget01").filter(lambda row: row["group"] == person.id)
facts = organism.prompts("facts", "retain")
retain = facts[::29]
kept = {row["group"] for row in retain}
close = {p.id for p in organism.people("retain") if {p.first, p.last} & {person.first, person.last}}
neighbours = facts.filter(lambda row: row["group"] in close - kept)
print(person.name, "|", len(forget), "facts to forget,", len(retain), "prompts to retain")
print(len(neighbours), "facts about people with a name in common:", sorted(close - kept))

# %% [markdown]
# ## All combinations
#
# Two seeds repeat everything: random masks and the order of the data change with them. Finished cells are kept in a
# folder, so an interrupted comparison goes on where it stopped.

# %%
found = compare(
    model,
    localizers=[ActivationContrast(), Saliency()],
    methods=[NPO(steps=25, lr=1e-3), UNDIAL(steps=25, lr=1e-3)],
    budgets=[20, 160],
    forget=forget,
    retain=retain,
    others={"neighbours": neighbours},
    oracle=oracle,
    folder=Path("cells"),
    seeds=(0, 1),
)
print(len(found.cells), "cells,", len(found.failures), "failed")
for row in found.table(["forget/likelihood", "retain/likelihood", "neighbours/likelihood"]):
    print(f"{row[0]:19}{row[1]:7}{row[2]:>6}  " + "  ".join(f"{part:24}" for part in row[3:]))

# %% [markdown]
# `likelihood` is the geometric mean of the probabilities of a target's tokens: 1 is certainty. In brackets: the least
# and the greatest of the seeds. The original knows everything; the oracle, which never met this person, guesses.
#
# ## Did the facts go?
#
# Distance from the oracle on the forget prompts, in nats a token. A small number says "like a model that never knew", a
# large one that something else is said now than such a model would say. Low likelihood alone cannot tell the two apart.


# %%
def new_axes(width: float, height: float) -> plt.Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


heat_map(found, "forget/oracle_kl", new_axes(5.5, 2.8))
print(f"before any edit: {found.original['forget/oracle_kl']:.2f} nats a token")
plt.show()

# %% [markdown]
# ## What did it cost?
#
# The same distance on people whom nobody looked after, beside those that the methods were told to keep.

# %%
for key in ("retain/oracle_kl", "neighbours/oracle_kl"):
    heat_map(found, key, new_axes(5.5, 2.8))
    print(f"{key}: before any edit {found.original[key]:.4f}")
    plt.show()

# %% [markdown]
# ## Both at once
#
# Every point is one place, method and size, a mean over the seeds. Right is better kept, down is more forgotten; the
# line joins the points that no other beats in both. In the shaded part, beyond the oracle, forgetting is no merit.

# %%
trade_off(found, keep="neighbours", ax=new_axes(6, 3.8))
plt.show()

# %% [markdown]
# ## Is the place better than chance?
#
# The only fair test of a localizer is a random mask of the same kind and size, with the same method and seed.

# %%
cells = {(c.localizer, c.method, c.budget, c.seed): c.values for c in found.cells}
better: dict[str, list[bool]] = defaultdict(list)
for (place, *rest), values in cells.items():
    if place != RANDOM:
        chance = cells[(RANDOM, *rest)]
        for key in ("forget/oracle_kl", "neighbours/oracle_kl"):
            better[f"{place}, {key}"].append(values[key] < chance[key])
for name, wins in better.items():
    print(
        f"{name:42} nearer to the oracle than the random mask in {sum(wins)} of {len(wins)} cells"
    )

# %% [markdown]
# ## What can be read off this, and what cannot
#
# - **Look at prompts that no method saw.** On the retain prompts most edits seem to be free, because the methods were
#   given them. The same edits are not free for the neighbours.
# - **The method decides what takes the place of the facts**, more than the neurons do: compare the columns of the first
#   map before its rows.
# - **Count the wins against random masks before you believe in a place.** Four in eight is a coin.
# - One person and two seeds show how to look, not what holds. A point on the line may be there by luck, and of many
#   cells the best is the luckiest. Choose on some people, and report on others.
