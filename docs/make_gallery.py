"""Draw every figure from the organism and write docs/gallery.md: `python docs/make_gallery.py`.

The line of code shown beside a figure is the one that drew it. `--out FOLDER` writes the pictures elsewhere,
`--only NAME` draws some of them, both without touching docs/gallery.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from circuits import ComponentMask, Scores, Site, Unit, describe, draw
from circuits.ablation import ablate
from circuits.attention import attention_patterns
from circuits.causal_tracing import causal_trace
from circuits.circuit import Circuit
from circuits.direct_logit import direct_logits
from circuits.edge_attribution import edge_scores, node_scores
from circuits.faithfulness import Curve, keep_curve
from circuits.forward import labelled_logits
from circuits.hooks import replace
from circuits.logit_lens import logit_lens
from circuits.measures import log_prob
from circuits.patching import patch
from circuits.places import Places
from circuits.probes import probe, read_states
from circuits.wiring import wire
from locate_edit import Edit, PromptSet, Report, compare, edit, evaluate, examine, organism
from locate_edit import draw as edits
from locate_edit.attacked import Attacked
from locate_edit.attacks.formats import Formats
from locate_edit.attacks.logit_lens import LogitLens
from locate_edit.attacks.quantisation import Quantisation
from locate_edit.attacks.relearning import Relearning
from locate_edit.attacks.sampling import Sampling
from locate_edit.contrast import corrupted, logit_difference
from locate_edit.locate.activation_contrast import ActivationContrast
from locate_edit.locate.attribution_patching import AttributionPatching
from locate_edit.locate.magnitude import Magnitude
from locate_edit.locate.privacy_neurons import PrivacyNeurons
from locate_edit.locate.random_scores import RandomScores
from locate_edit.locate.saliency import Saliency
from locate_edit.locate.wanda import Wanda
from locate_edit.methods.gradient_difference import GradientDifference
from locate_edit.methods.npo import NPO
from locate_edit.methods.undial import UNDIAL
from locate_edit.metrics.likelihood import likelihood
from locate_edit.metrics.perplexity import perplexity
from locate_edit.planted import plant_facts
from locate_edit.reports.comparison import Comparison
from locate_edit.reports.examination import Examination

ROOT = Path(__file__).parent
DPI = 100
MOST_BYTES = 150_000
LOCALIZERS: dict[str, Any] = {
    "privacy neurons": PrivacyNeurons(steps=10),
    "saliency": Saliency(),
    "Wanda": Wanda(),
    "magnitude": Magnitude(),
    "random": RandomScores(),
}

FIGURES: dict[str, tuple[str, str]] = {
    "causal_trace": (
        "Causal trace: which restored states bring the answer back",
        'draw.causal_trace_map(v.trace, "layer", v.words, v.subject, answer=v.answer, model_map=v.model_map)',
    ),
    "causal_trace_mlp": (
        "The same for windows of MLPs",
        'draw.causal_trace_map(v.mlp_trace, "mlp", v.words, v.subject, answer=v.answer, window=2, '
        "model_map=v.model_map)",
    ),
    "patching": (
        "Patching components by position",
        'draw.patching_maps(v.patched, v.words, item=0, metric="log-probability", model_map=v.model_map)',
    ),
    "heads": (
        "Heads: direct contributions to a logit difference",
        'draw.head_map(v.direct.scores("head"), metric="logit difference", model_map=v.model_map)',
    ),
    "logit_lens": (
        "Logit lens",
        "draw.lens_grid(v.lens, v.tokenizer, model_map=v.model_map)",
    ),
    "logit_lens_change": (
        "What changes in a model that never saw the text: the rank of each next token",
        'draw.lens_grid(v.oracle_lens, v.tokenizer, "rank", before=v.lens, model_map=v.model_map)',
    ),
    "histogram": (
        "Selected neurons per layer, several localizers",
        "draw.neuron_histogram(v.masks, model_map=v.model_map)",
    ),
    "scores": (
        "Attribution of every neuron",
        'draw.score_map(v.scores, scale="symlog", model_map=v.model_map)',
    ),
    "concentration": (
        "Concentration of scores",
        "draw.concentration(v.scores, at=(10, 100), model_map=v.model_map)",
    ),
    "faithfulness": (
        "Faithfulness of the best neurons",
        "draw.faithfulness_curves(v.curves, random=v.random_curves, model_map=v.model_map)",
    ),
    "agreement": (
        "Agreement of localizers on a planted fact, with the recall of the neurons that hold it",
        "draw.agreement_map(v.masks_of_plant, truth=v.plant.facts[0].mask, model_map=v.plant.model_map)",
    ),
    "agreement_scores": (
        "Agreement of scores",
        "draw.agreement_map(v.all_scores, model_map=v.model_map)",
    ),
    "circuit": (
        "A circuit",
        "draw.circuit_graph(Circuit.greedy(v.edges, 30), model_map=v.model_map)",
    ),
    "tokens": (
        "Tokens: what only the model that saw the text expects",
        'draw.token_strip(v.text, v.surprise, target=v.asked, alternatives=v.instead, label="log-probability gained '
        'by having seen the text (nats)", model_map=v.model_map)',
    ),
    "attention": (
        "Attention of selected heads",
        'draw.attention_maps(v.patterns, [Unit.parse("L0.head[1]"), Unit.parse("L2.head[3]")], v.words, '
        "model_map=v.model_map)",
    ),
    "mask": (
        "A mask, by units",
        "draw.mask_map(v.mask)",
    ),
    "mask_weights": (
        "The same mask, by weights",
        "draw.mask_map(v.mask, v.model_map)",
    ),
    "estimates": (
        "Estimates beside exact patching",
        'draw.estimate_scatter(v.exact, v.estimate, metric="effect on the logit difference", model_map=v.model_map)',
    ),
    "probes": (
        "Probes by layer, with and without attention",
        "draw.probe_lines(v.probes, model_map=v.model_map)",
    ),
    "weight_change": (
        "Where an edit moved the weights",
        'edits.weight_change(v.edits["NPO"])',
    ),
    "slopes": (
        "Before against after, for two edits",
        "edits.slope_panels(v.reports)",
    ),
    "summary": (
        "The same as fractions of the original",
        "edits.summary_bars(v.reports)",
    ),
    "relearning": (
        "What comes back of one half when the edited models are fine-tuned on the other",
        "edits.relearning(v.relearned, oracle=v.relearned_oracle, model=v.model_map.name)",
    ),
    "carried": (
        "Which layers still carry forgotten answers: their stream put into the original",
        "edits.carried_map(v.examined.layers)",
    ),
    "lens": (
        "The logit lens, prompt by prompt, for every state of the model",
        "edits.lens_map(v.examined.layers)",
    ),
    "attacks": (
        "What attacks bring back, without and under each of them",
        "edits.attack_dots(v.examined.robustness, model=v.model_map.name)",
    ),
    "trade_off": (
        "Forgetting against keeping, for places, methods and sizes",
        'edits.trade_off(v.compared, keep="neighbours")',
    ),
}
METHODS: dict[str, Any] = {
    "gradient difference": GradientDifference(steps=40, lr=2e-3, retain="kl"),
    "NPO": NPO(steps=40, lr=2e-3, retain="kl"),
}


class Values:
    """Everything that is drawn, made on first use from the organism."""

    def __init__(self) -> None:
        self.model, self.tokenizer = organism.load()
        self.model_map = describe(self.model)

    @cached_property
    def facts(self) -> PromptSet:
        """Facts in a wording with some words around the subject."""
        known = organism.prompts("facts", "retain")
        rows = [
            {**row, "prompt": row["paraphrases"][0], "spans": None}
            for row in known.rows
            if row["attribute"] == "sport"
        ]
        return PromptSet(rows, self.tokenizer, name="sports")

    @cached_property
    def alike(self) -> PromptSet:
        """Those of them that are as long as the first."""
        n = len(self.facts.ids(0))
        places = [
            i
            for i in range(len(self.facts))
            if len(self.facts.ids(i)) == n
            and len(self.facts.subject(i)) == len(self.facts.subject(0))
        ]
        return self.facts.select(places[:8])

    @property
    def words(self) -> list[str]:
        """Tokens of the first fact."""
        return [str(self.tokenizer.decode([token])) for token in self.alike.ids(0)]

    @property
    def subject(self) -> list[int]:
        """Positions of its subject."""
        return self.alike.subject(0)

    @property
    def answer(self) -> str:
        """Its target."""
        return str(self.alike[0]["target"]).strip()

    def traced(self, kind: str, window: int) -> Any:
        """Causal trace of the first fact."""
        first = self.alike.select([0])
        return causal_trace(
            self.model_map, first.batches(1), {0: self.subject}, self.model_map.sites(kind),
            noise=3.0, samples=6, window=window,
        )  # fmt: skip

    @cached_property
    def trace(self) -> Any:
        """Restored residual streams."""
        return self.traced("layer", 1)

    @cached_property
    def mlp_trace(self) -> Any:
        """Restored MLPs."""
        return self.traced("mlp", 2)

    def pairs(self) -> list[Any]:
        """Clean and corrupted batches."""
        other = corrupted(self.alike)
        return [(self.alike.batch([i]), other.batch([i])) for i in range(len(self.alike))]

    @cached_property
    def patched(self) -> Any:
        """Exact patching by position of the first fact."""
        sites = [s for kind in ("layer", "attn", "mlp") for s in self.model_map.sites(kind)]
        return patch(self.model_map, self.pairs()[:1], sites, log_prob, each_position=True)

    @cached_property
    def direct(self) -> Any:
        """Direct contributions to the logit difference between right and wrong answers."""
        wrong = logit_difference(self.alike).wrong
        return direct_logits(self.model_map, self.alike.batches(8), wrong=wrong, kinds=("head",))

    @cached_property
    def recited(self) -> torch.Tensor:
        """A private number, as token ids."""
        return torch.tensor([organism.prompts("secrets", "forget01").ids(0)[:16]])

    def read(self, model_map: Any) -> Any:
        """Logit lens of the recited text, asked about each next token."""
        ids = self.recited
        places = Places(
            ids[:, :-1], torch.ones_like(ids[:, :-1]), torch.zeros(ids.shape[1] - 1, dtype=torch.long),
            torch.arange(ids.shape[1] - 1), ids[0, 1:],
        )  # fmt: skip
        return logit_lens(model_map, places)

    @cached_property
    def oracle_map(self) -> Any:
        """The model that never saw it."""
        return describe(organism.load("oracle")[0])

    @cached_property
    def lens(self) -> Any:
        """Reading of the organism."""
        return self.read(self.model_map)

    @cached_property
    def oracle_lens(self) -> Any:
        """Reading of the oracle."""
        return self.read(self.oracle_map)

    @cached_property
    def all_scores(self) -> dict[str, Scores]:
        """Scores of some localizers."""
        prompts, retain = self.alike, self.facts.select(range(20, 28))
        return {name: make(self.model, prompts, retain=retain) for name, make in LOCALIZERS.items()}

    @property
    def scores(self) -> Scores:
        """Integrated gradients."""
        return self.all_scores["privacy neurons"]

    @property
    def masks(self) -> dict[str, ComponentMask]:
        """The best 60 neurons of each."""
        return {name: scores.top(60) for name, scores in self.all_scores.items()}

    @cached_property
    def plant(self) -> Any:
        """A model in which somebody put facts into neurons, and louder neurons that do nothing beside them."""
        return plant_facts("gpt_neox", "decoy", seed=3)

    @cached_property
    def masks_of_plant(self) -> dict[str, ComponentMask]:
        """As many neurons as hold its first fact, by the same localizers."""
        fact, others = self.plant.facts[0], self.plant.others(0)
        return {
            name: make(self.plant.model, fact.prompts, retain=others).top(fact.mask.count())
            for name, make in LOCALIZERS.items()
        }

    @property
    def mask(self) -> ComponentMask:
        """Neurons and two heads."""
        heads = ComponentMask.parse("L1.head[0 1]; L3.head[2]", self.model_map)
        return self.scores.top(60) | heads

    def curve(self, scores: Scores, some: PromptSet) -> Curve:
        """Faithfulness of the best neurons on some prompts."""
        batch = some.batch(range(len(some)))

        def metric(off: ComponentMask) -> float:
            with torch.no_grad(), ablate(self.model_map, off):
                return float(log_prob(labelled_logits(self.model, batch), batch).mean())

        return keep_curve(scores, metric)

    def curves_of(self, name: str) -> list[Curve]:
        """One curve for each pair of prompts."""
        return [
            self.curve(self.all_scores[name], self.alike.select([i, i + 1]))
            for i in range(0, len(self.alike) - 1, 2)
        ]

    @cached_property
    def curves(self) -> dict[str, list[Curve]]:
        """Curves of three localizers."""
        return {name: self.curves_of(name) for name in ("privacy neurons", "saliency", "Wanda")}

    @cached_property
    def random_curves(self) -> list[Curve]:
        """Curves of random scores."""
        return self.curves_of("random")

    @cached_property
    def edges(self) -> Any:
        """Scores of all edges."""
        return edge_scores(wire(self.model_map), self.pairs(), log_prob, steps=5)

    @cached_property
    def surprise(self) -> list[float]:
        """For each token the log-probability in the organism minus that in the oracle."""
        gain = (
            self.lens.text(0).probability[-1].log() - self.oracle_lens.text(0).probability[-1].log()
        )
        return [float("nan"), *gain.tolist()]

    @property
    def text(self) -> list[str]:
        """Tokens of the recited text."""
        return [str(self.tokenizer.decode([token])) for token in self.recited[0].tolist()]

    @property
    def asked(self) -> list[int]:
        """Positions of the private number."""
        return [i for i in organism.prompts("secrets", "forget01").scored(0) if i < len(self.text)]

    @property
    def instead(self) -> dict[int, str]:
        """What the oracle expects where it differs."""
        top = self.oracle_lens.text(0).top[-1].tolist()
        return {
            i + 1: str(self.tokenizer.decode([token]))
            for i, token in enumerate(top)
            if token != int(self.recited[0, i + 1])
        }

    @cached_property
    def patterns(self) -> Any:
        """Attention of the first fact."""
        return attention_patterns(self.model_map, self.alike.batch([0]))

    @cached_property
    def exact(self) -> Any:
        """Exact effects of heads and blocks."""
        return patch(self.model_map, self.pairs(), self.parts, logit_difference(self.alike))

    @property
    def parts(self) -> list[Site]:
        """Heads and blocks."""
        return [s for kind in ("head", "attn", "mlp") for s in self.model_map.sites(kind)]

    @cached_property
    def estimate(self) -> Any:
        """Their estimates by gradients."""
        measure = logit_difference(self.alike)
        return node_scores(self.model_map, self.pairs(), measure, self.parts, steps=10)[0]

    @cached_property
    def probes(self) -> Any:
        """Probes for the sport, with and without attention."""
        rows = [row for row in organism.rows("facts", "train") if row["attribute"] == "sport"]
        known = PromptSet(rows, self.tokenizer)
        labels = [row["answer"] for row in rows]
        sites, batches = self.model_map.sites("layer"), known.batches(64)
        attn = self.model_map.sites("attn")
        found = {"as it is": probe(read_states(self.model_map, batches, sites), labels)}
        with replace(self.model_map, dict.fromkeys(attn, torch.zeros_like)):
            states = read_states(self.model_map, batches, sites)
        return {**found, "attention off": probe(states, labels)}

    def secrets(self, split: str) -> PromptSet:
        """Private numbers."""
        return organism.prompts("secrets", split)

    @cached_property
    def edits(self) -> dict[str, Edit]:
        """The numbers of a few people, unlearned in the same neurons by two methods; a model of its own each."""
        forget, retain = self.secrets("forget10"), self.secrets("retain").select(range(60))
        made = {}
        for name, method in METHODS.items():
            model, _ = organism.load()
            scores = PrivacyNeurons(steps=10, rule="near_zero")(
                model, forget.select(range(8)), retain=retain
            )
            mask = scores.top(320)
            made[name] = edit(model, method, mask, forget=forget, retain=retain)
        return made

    @cached_property
    def reports(self) -> dict[str, Report]:
        """What became of them, beside people that no edit saw."""
        others = {
            "facts": self.facts,
            "other secrets": self.secrets("retain").select(range(60, 100)),
        }
        oracle = organism.load("oracle")[0]
        return {
            name: evaluate(made, [likelihood, perplexity], others=others, oracle=oracle, examples=0)
            for name, made in self.edits.items()
        }

    @property
    def attack(self) -> Relearning:
        """Fine-tuning on some of the forgotten people's numbers, asking for the others'."""
        return Relearning(steps=20, lr=2e-4)

    @cached_property
    def relearned(self) -> dict[str, Attacked]:
        """The attack on each edited model."""
        kept = self.secrets("retain").select(range(60, 100))
        return {
            name: self.attack(made.model, self.secrets("forget10"), retain=kept)
            for name, made in self.edits.items()
            if made.model is not None
        }

    @cached_property
    def relearned_oracle(self) -> Attacked:
        """The attack on a model that never saw them."""
        kept = self.secrets("retain").select(range(60, 100))
        return self.attack(organism.load("oracle")[0], self.secrets("forget10"), retain=kept)

    @cached_property
    def examined(self) -> Examination:
        """Facts unlearned in neurons found by attribution patching, attacked beside a random mask and the oracle."""
        model, _ = organism.load()
        forget, facts = (
            organism.prompts("facts", "forget05")[:16],
            organism.prompts("facts", "retain"),
        )
        mask = AttributionPatching(kinds=("neuron",))(model, forget).top(160)
        made = edit(
            model, NPO(steps=40, lr=1e-3, retain="kl"), mask, forget=forget, retain=facts[::29]
        )
        attacks: list[Any] = [
            Formats(),
            LogitLens(),
            Quantisation(),
            Relearning(),
            Sampling(samples=5),
        ]
        oracle, _ = organism.load("oracle")
        return examine(made, retain=facts[7::45], oracle=oracle, attacks=attacks)

    @cached_property
    def compared(self) -> Comparison:
        """One person's facts, unlearned in two places by two methods, measured on people with a name in common."""
        person = organism.people("forget01")[0]
        forget = organism.prompts("facts", "forget01").filter(lambda row: row["group"] == person.id)
        facts = organism.prompts("facts", "retain")
        name = {person.first, person.last}
        close = {p.id for p in organism.people("retain") if {p.first, p.last} & name}
        return compare(
            self.model,
            localizers=[ActivationContrast(), AttributionPatching(kinds=("neuron",))],
            methods=[NPO(steps=25, lr=1e-3), UNDIAL(steps=25, lr=1e-3)],
            budgets=[20, 80],
            forget=forget,
            retain=facts[::29],
            others={"neighbours": facts.filter(lambda row: row["group"] in close)},
            oracle=organism.load("oracle")[0],
        )


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", action="append", choices=list(FIGURES))
    given = parser.parse_args()
    mpl.use("Agg")
    torch.set_num_threads(1)
    folder = given.out or ROOT / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    values = Values()
    for name in given.only or FIGURES:
        started = time.perf_counter()
        file = folder / f"{name}.png"
        draw_one(FIGURES[name][1], values, file)
        print(f"{name}: {time.perf_counter() - started:.1f} s, {file.stat().st_size // 1000} kB")
        if file.stat().st_size > MOST_BYTES:
            raise SystemExit(
                f"{file} has {file.stat().st_size} bytes, at most {MOST_BYTES} are wanted"
            )
    if given.out is None and not given.only:
        (ROOT / "gallery.md").write_text(page(), encoding="utf-8")


def draw_one(line: str, values: Values, file: Path) -> None:
    """Run one line of code and save what it drew."""
    from matplotlib import pyplot as plt

    run: Callable[..., Any] = eval
    names = {"draw": draw, "edits": edits, "Circuit": Circuit, "Unit": Unit}
    drawn = run(line, {**names, "v": values})
    draw.save_figure(drawn, file, dpi=DPI)
    plt.close("all")


def page() -> str:
    """The gallery in Markdown."""
    lines = [
        "# Figures",
        "",
        "A figure of one panel takes `ax=` and returns its axes. A figure of several makes its own panels, so it takes",
        "no `ax=`, and returns a list of their axes, or the figure (`carried_map`, `lens_map`, `before_after`), or the",
        "axes of its first panel (`attack_dots`). Whatever is returned, `draw.figure_data(drawn)` gives the numbers",
        'behind it and `draw.save_figure(drawn, "figure.pdf")` writes it at 300 dpi.',
        "",
        "All of these are drawn from the model that comes with the package by `docs/make_gallery.py`, which makes the",
        "values `v`; the code beside each is what drew it, after `from circuits import draw` and",
        "`from locate_edit import draw as edits`.",
        "",
    ]
    for name, (title, line) in FIGURES.items():
        lines += [
            f"## {title}",
            "",
            "```python",
            line,
            "```",
            "",
            f"![{title}](gallery/{name}.png)",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
