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
# # Is it really gone?
#
# An edit has made a model stop saying something. Has it forgotten, or does it only keep silent? We make two edits that
# look alike in the usual numbers, attack both, and look into their layers.
#
# The default model, the **organism**, comes with the package. It was trained on an invented world, and its **oracle**
# on the same world without some people, so we know what never having learned something looks like.

# %%
import torch
from matplotlib import pyplot as plt

from circuits import ComponentMask, Site, describe
from locate_edit import edit, examine, organism
from locate_edit.attacks.formats import Formats
from locate_edit.attacks.logit_lens import LogitLens
from locate_edit.attacks.quantisation import Quantisation
from locate_edit.attacks.relearning import Relearning
from locate_edit.draw.edits import relearning, slope_panels
from locate_edit.draw.layers import carried_map, lens_map
from locate_edit.draw.robustness import attack_dots
from locate_edit.methods.npo import NPO

torch.set_num_threads(1)  # the model is small: more threads only wait for each other
model, _ = organism.load()
oracle, _ = organism.load("oracle")

# %% [markdown]
# ## Two edits of the same facts
#
# Sixteen facts about four people are to go. Both edits use the same method, which pushes each answer down until it is
# as unlikely as for a model that never saw it. They differ in where they may act and in what they are shown:
#
# - the **late** edit changes neurons of the last layer only, and sees each fact in one wording;
# - the **deep** edit changes neurons of all layers, and sees the other wordings too.

# %%
forget = organism.prompts("facts", "forget05")[:16]
facts = organism.prompts("facts", "retain")
retain, kept = (
    facts[::6],
    facts[7::45],
)  # `kept` are other prompts than those that the edits are told to keep
wordings = forget + forget.reread(forget.paraphrased())
forget[0]

# %%
model_map = describe(model)


def neurons_of(*layers: int) -> ComponentMask:
    sites = [Site(layer, "neuron") for layer in layers]
    return ComponentMask({s: torch.ones(model_map.shape(s), dtype=torch.bool) for s in sites})


late = edit(model, NPO(steps=60, lr=1e-3, retain="kl"), neurons_of(3), forget=forget, retain=retain)
late

# %% [markdown]
# `examine` measures an applied edit, attacks it, and looks into its layers and weights. Each attack first has to find
# what is surely hidden, a **positive control** made for it; where it does not, it gets no number. And each is tried on
# the **oracle**: what it gets out of a model that never knew is no leak. The same edit is also made in as many neurons
# drawn at random, which shows what it does by its size alone.

# %%
ATTACKS = [Formats(), LogitLens(), Relearning(), Quantisation()]
found_late = examine(late, retain=kept, oracle=oracle, attacks=ATTACKS)
print(found_late)

# %% [markdown]
# By the first numbers the edit is a success: the facts are nearly as unlikely as in the oracle, and nothing else has
# changed. The last two answers say something else.
#
# The same for the deep edit, of all neurons, so that there are no others to draw at random. The late one is undone
# first: the model is bit for bit what it was.

# %%
late.undo()
deep = edit(
    model,
    NPO(steps=90, lr=5e-4, alpha=3.0, retain="kl"),
    neurons_of(0, 1, 2, 3),
    forget=wordings,
    retain=retain,
)
found_deep = examine(deep, forget=forget, retain=kept, oracle=oracle, attacks=ATTACKS)
print(found_deep)

# %% [markdown]
# ## The usual picture

# %%
reports = {"late": found_late.report, "deep": found_deep.report}
slope_panels(reports, ["likelihood"])
plt.show()

# %% [markdown]
# ## What attacks bring back
#
# - **Formats** asks in other words, capitals, dashes, as a dialogue, as multiple choice, and takes the best.
# - **Logit lens** reads the answer off the layers before the last.
# - **Relearning** trains on half of the forgotten people and asks about the others.
# - **Quantisation** rounds the weights to four bits, in which small changes may vanish.
#
# Hollow dots are the model's answers without the attack, full dots those under it, bars 95% intervals over prompts.
# Look at the right panel too: an attack that takes the retained answers as well has broken the model.

# %%
attack_dots(found_late.robustness).figure

# %%
attack_dots(found_deep.robustness).figure

# %% [markdown]
# In words: an attack *brings answers back* where it adds to what the model says, adds more than to the oracle, and ends
# above it. Where the model only *ends above the oracle*, something is left, but it is not shown that it was hidden.

# %%
for trial in found_late.robustness.trials:
    other = found_deep.robustness[trial.name]
    print(f"{trial.title:14} late: {trial.outcome():22} deep: {other.outcome()}")

# %% [markdown]
# ## How the positive controls work
#
# A control is the original model, changed so that it hides the answers in just the way one attack is made for. For
# quantisation, the weights are moved by less than half a rounding step; for relearning, one word is laid over all
# answers. What each attack found there:

# %%
for trial in found_late.robustness.trials:
    control = trial.control
    print(
        f"{trial.title:14} hidden: {control.forget_clean.estimate:.2f}  found: {control.forget.estimate:.2f}"
    )

# %% [markdown]
# ## What comes back, step by step
#
# Training on *other* forgotten people teaches the form of an answer too, so the oracle is the line to compare with.

# %%
curves = {name: found.robustness["Relearning"].found for name, found in
          (("late", found_late), ("deep", found_deep))}  # fmt: skip
relearning({name: each["after"] for name, each in curves.items()}, oracle=curves["late"]["oracle"])
plt.show()

# %% [markdown]
# ## Where it still is
#
# The inner state of the edited model is put into the *original* after one layer at a time. Where the original goes on
# to give the answer, the layer still carried it. After the late edit the layers below are untouched by construction,
# and everything is still there. The right panel is the control: answers that every model knows have to survive.

# %%
carried_map(found_late.layers)

# %%
carried_map(found_deep.layers)

# %% [markdown]
# The logit lens shows the same prompt by prompt. What it does not show may still be there in another form.

# %%
lens_map(found_late.layers)

# %% [markdown]
# ## One page for others
#
# `save` writes everything as one HTML page that explains itself, with the numbers as JSON. `locate-edit report` does
# the same for an edit that was saved.

# %%
print(sorted(path.name for path in found_deep.save("report").iterdir()))
deep.undo()

# %% [markdown]
# ## What can be said, and what cannot
#
# - **Unlikely is not gone.** The late edit came near the oracle's likelihood and left the facts in every layer but one.
# - **Deeper costs more, and is not the end of it.** The deep edit took the facts out of more layers, and some retained
#   ones with them. Asked in other forms it gives half of them away all the same, and trained on half of the people it
#   ends above the oracle on the others.
# - **Without the oracle's column an attack's number means little**: several of them get something out of a model that
#   never knew, because the best of many guesses is a good guess.
# - **An attack that finds nothing proves nothing** beyond itself. That is why each had to find its control first; what
#   another attack would find, nobody knows.
# - Sixteen facts, one seed, a tiny model: this shows how to look. It is no finding about the method.
