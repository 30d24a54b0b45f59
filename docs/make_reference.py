"""Write the reference pages of this folder from the docstrings: `python docs/make_reference.py`.

methods.md, localizers.md, metrics.md, attacks.md and ensembles.md.

A test fails when they differ from what the code says.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locate_edit import catalog

ROOT = Path(__file__).parent
PAGES: dict[str, tuple[catalog.Kind, str, str]] = {
    "methods.md": (
        "method",
        "Edit methods",
        "Each runs restricted to any mask (or none): `edit(model, Method(...), mask, forget=..., retain=...)`, or "
        "`locate-edit edit --method NAME --set option=value`.",
    ),
    "localizers.md": (
        "localizer",
        "Localizers",
        "Each returns scores of units, of which a mask is selected: `Localizer(...)(model, prompts).top(200)`, or "
        "`locate-edit locate --method NAME --set option=value`.",
    ),
}
METRICS = "metrics.md"
ATTACKS = "attacks.md"
ENSEMBLES = "ensembles.md"
STATISTICS = (
    "membership.membership", "membership.auc", "membership.privleak", "forget_quality.forget_quality",
    "model_utility.model_utility", "bias.icat", "bias.crows", "bias.equalised_odds", "counterfact.edit_score",
    "oracle_distance.oracle_distance", "unlearning_depth.unlearning_depth",
)  # fmt: skip
"""Functions that make a number of several sets or models."""
VARIANTS: tuple[tuple[str, str, str], ...] = (
    ("TOFU", "probability of an answer", "likelihood(p)"),
    ("TOFU", "probability on real authors and world facts", "normalised_probability(p)"),
    ("TOFU", "ROUGE-L recall, 200 new tokens", "rouge(p, max_new_tokens=200)"),
    ("TOFU", "truth ratio, forget set", "truth_ratio(q, aggregate='closer')"),
    ("TOFU", "truth ratio, other sets", "truth_ratio(q, aggregate='better')"),
    ("TOFU", "truth ratio as the paper prints it", "truth_ratio(q, mean='arithmetic')"),
    ("TOFU", "forget quality", "forget_quality(truth_ratio(q), truth_ratio(q_oracle))"),
    ("TOFU", "model utility, of three such sets (two with `normalised_probability`)",
     "model_utility({'retain': (likelihood(p), rouge(p, max_new_tokens=200), truth_ratio(q, aggregate='better'))})"),
    ("open-unlearning", "probability", "likelihood(p)"),
    ("open-unlearning", "normalised probability", "normalised_probability(p, compat='open-unlearning')"),
    ("open-unlearning", "truth ratio, forget set", "truth_ratio(q, aggregate='closer', compat='open-unlearning')"),
    ("open-unlearning", "truth ratio, other sets", "truth_ratio(q, aggregate='better', compat='open-unlearning')"),
    ("open-unlearning", "truth ratio, `prob_mean`", "truth_ratio(q, aggregate='share', compat='open-unlearning')"),
    ("open-unlearning", "ROUGE of TOFU", "rouge(p, max_new_tokens=200)"),
    ("open-unlearning", "forget quality",
     "forget_quality(truth_ratio(q, compat='open-unlearning'), truth_ratio(q_oracle, compat='open-unlearning'))"),
    ("open-unlearning", "model utility, of three such sets (two with `normalised_probability`)",
     "model_utility({'retain': (likelihood(p), rouge(p, max_new_tokens=200), "
     "truth_ratio(q, aggregate='better', compat='open-unlearning'))})"),
    ("open-unlearning", "exact memorisation", "exact_memorization(p, compat='open-unlearning')"),
    ("open-unlearning", "extraction strength", "extraction_strength(p, compat='open-unlearning')"),
    ("open-unlearning", "loss attack", "auc(nll(p), nll(holdout))"),
    ("open-unlearning", "zlib attack", "auc(zlib_loss(p), zlib_loss(holdout))"),
    ("open-unlearning", "reference attack", "auc(reference_loss(p), reference_loss(holdout))"),
    ("open-unlearning", "Min-K% attack", "min_k(p, k=0.4, compat='open-unlearning')"),
    ("open-unlearning", "Min-K%++ attack", "min_k_plus_plus(p, k=0.4, compat='open-unlearning')"),
    ("open-unlearning", "gradient-norm attack", "gradient_norm(p, compat='open-unlearning')"),
    ("open-unlearning", "PrivLeak without a retain log", "privleak(members, others, compat='open-unlearning')"),
    ("open-unlearning", "ROUGE of MUSE, verbatim", "rouge(p, part='f1', max_new_tokens=128)"),
    ("open-unlearning", "ROUGE of MUSE, questions", "rouge(p, part='f1', max_new_tokens=32, stop=MUSE_STOP)"),
    ("MUSE", "verbatim memorisation", "rouge(p, part='f1', stemmer=False, max_new_tokens=128)"),
    ("MUSE", "knowledge memorisation", "rouge(p, part='f1', stemmer=False, max_new_tokens=32, stop=MUSE_STOP)"),
    ("MUSE", "Min-40%", "min_k(p, k=0.4)"),
    ("MUSE", "PrivLeak", "privleak(members, others, oracle_members, oracle_others)"),
    ("Min-K% Prob", "its own fraction", "min_k(p, k=0.2)"),
    ("Min-K%++", "its own fraction", "min_k_plus_plus(p, k=0.2)"),
    ("Knowledge unlearning", "memorisation accuracy", "exact_memorization(p)"),
    ("Knowledge unlearning", "extraction likelihood, equation", "extraction_likelihood(p, n=10)"),
    ("Knowledge unlearning", "extraction likelihood, published code",
     "extraction_likelihood(p, n=10, compat='knowledge-unlearning')"),
    ("DEPN", "exposure", "exposure(p, estimator='depn')"),
    ("DEPN", "mean reciprocal rank of names", "reciprocal_rank(p, sensitive=True)"),
    ("StereoSet", "SS, LMS and ICAT over target terms",
     "icat(stereotype_score(p, by_group=True), language_modelling_score(p, by_group=True))"),
    ("CrowS-Pairs", "metric score", "crows(more, less)"),
    ("KGA", "Jensen-Shannon divergence, LPD, PDLP", "(jensen_shannon(p), perplexity_shift(p), perplexity_rose(p))"),
    ("KGA", "perplexity of each item, averaged", "perplexity(p, average='item')"),
)  # fmt: skip
"""What is published under which name, and what gives it here; p are predictions, q those on paraphrased answers."""
_LISTED = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")
MODULES = tuple(
    f"locate_edit.{name}"
    for name in ("ensembles.shards", "ensembles.sisa", "ensembles.leave_one_out", "ensembles.fair_votes", "fusion")
)  # fmt: skip
_ATTRIBUTE = re.compile(r"^ {4}(\w+(?:, \w+)*): ")
_STATED = re.compile(r"(?:^|(?<=\. ))(Direction|Needs|Cost|Deviations): ")


def page(name: str) -> str:
    """One page as Markdown: a section for each entry of the catalogue."""
    kind, title, intro = PAGES[name]
    entries = catalog.entries(kind)
    parts = [f"# {title}", intro, "Made from the docstrings by `docs/make_reference.py`."]
    parts.append(
        "\n".join(f"- [{e.attribute}](#{e.attribute.lower()}): {e.summary}" for e in entries)
    )
    parts += [section(entry) for entry in entries]
    return "\n\n".join(parts) + "\n"


def ensembles() -> str:
    """The page of ensembles as Markdown: a section for each module, with its public classes and functions."""
    parts = [
        "# Ensembles and fused edits",
        "Several models over one base, as small changes of it: delete training rows exactly, let the models vote, "
        "forget with teachers that never saw a text, and merge the adapters of several requests. On the command line: "
        "`locate-edit ensemble train | delete | predict | forget`.",
        "Made from the docstrings by `docs/make_reference.py`.",
        "\n".join(
            f"- `{name}`: " + ", ".join(f"`{t.__name__}`" for t in public(name)) for name in MODULES
        ),
    ]
    for name in MODULES:
        parts += [f"## {name}", indented(inspect.getdoc(importlib.import_module(name)) or "")]
        for target in public(name):
            parts += described(target, "###")
            if inspect.isclass(target):
                for key, member in vars(target).items():
                    function = getattr(member, "__func__", member)
                    if inspect.isfunction(function) and (key == "__call__" or key[0] != "_"):
                        parts += described(function, "####")
    return "\n\n".join(part for part in parts if part) + "\n"


def public(module: str) -> list[Any]:
    """The public classes and functions that a module defines, in its order."""
    found = vars(importlib.import_module(module)).items()
    return [
        each
        for name, each in found
        if name[0] != "_"
        and (inspect.isclass(each) or inspect.isfunction(each))
        and each.__module__ == module
    ]


def described(target: Any, heading: str) -> list[str]:
    """Name, signature and docstring of a class or function, as parts of a page."""
    made = inspect.isclass(target) and "__dataclass_fields__" not in vars(target)
    names = list(inspect.signature(target).parameters)
    name = target.__qualname__
    shown = "" if made else "(" + ", ".join(n for n in names if n != "self") + ")"
    return [f"{heading} {name}", f"`{name}{shown}`", indented(inspect.getdoc(target) or "")]


def indented(docstring: str) -> str:
    """A Google docstring as Markdown: its sections as lists, its examples as they stand."""
    lines: list[str] = []
    within = False
    for line in docstring.splitlines():
        if line in _LISTED:
            within = True
            lines += [f"**{line[:-1]}**", ""]
        elif within and line.startswith("        "):
            lines[-1] += f" {line.strip()}"
        elif within and line.startswith("    "):
            lines.append(f"- {line.strip()}")
        else:
            within = within and not line
            lines.append(line)
    return "\n".join(lines)


def metrics() -> str:
    """The page of metrics as Markdown: all of them in a table, a section for each, and what others call what."""
    entries = catalog.entries("metric")
    single = [entry.load() for entry in entries]
    whole = [
        getattr(importlib.import_module(f"locate_edit.metrics.{module}"), name)
        for module, name in (path.split(".") for path in STATISTICS)
    ]
    rows = catalog.entries("statistic")
    parts = [
        "# Metrics",
        "A metric is a function: `metric(model, prompts)`, or `metric(predictions)` with "
        "`predictions = Predictions(model, prompts)`, which run the model once for all of them. It gives one number an "
        "item, its average and an interval, or the reason why there is none. Made from the docstrings by "
        "`docs/make_reference.py`; a test counts the stated forward passes and compares the stated directions.",
        "**Direction** says what a larger number means: *up* and *down* are for better known (or what stands behind "
        "it), *distance* and *closeness* are to another model. Forgetting is not the far end of a direction but the "
        "value that a model has which never learned. **Needs** is the precondition; where it fails, the number is "
        "withheld. **Cost**: *shared forward* is the one pass over the data that all metrics on the same `Predictions` "
        "have in common (`benchmarks/EVALUATION.md` has what it takes), and so are forwards of wrong answers and of a "
        "reference, and samples with the same settings.",
        "On the command line: `locate-edit evaluate --metric min-k --set min-k.k=0.4`. What can be read inside a model "
        "is measured by `unlearning_depth` below, by `locate_edit.reports.layers`, and by two attacks, which have a "
        "positive control: the logit lens and linear probes that were trained on retained facts (`docs/attacks.md`).",
        table(single),
        "## Numbers about whole sets",
        "Made from the values of several sets or models. As rows of a report they are "
        + ", ".join(f"`{entry.attribute}`" for entry in rows)
        + " (end of this page), which say which metric on which prompt set goes in.",
        table(whole),
        "## As published elsewhere",
        "The same name stands for different numbers. `p` are predictions on the prompts, `q` on paraphrased answers "
        "(TOFU's general sets have none: there they are the answers), `q_oracle` those of the oracle, `members`, "
        "`others` and their oracles' values of a score. `compat=` takes the names of toolkits that have the metric. "
        "ROUGE and TOFU's numbers are checked against logs "
        "of real models, the others against literal versions of the published formulas.",
        "\n".join(
            ["| in | what | here |", "| --- | --- | --- |"]
            + [f"| {who} | {what} | `{call}` |" for who, what, call in VARIANTS]
        ),
        "Some differences remain. Where several answers are given, make a row of each. open-unlearning and MUSE decode "
        "with the padding and the precision of their models' settings; here logits are float32 and padding hides "
        "nothing. Items without a token to score are left out and counted, where they score 0 there. MUSE cuts its "
        "verbatim references at 128 tokens: give them so.",
        "## One by one",
        *map(function_section, [*single, *whole]),
        "## Rows of a report",
        *(section(entry, "###") for entry in rows),
    ]
    return "\n\n".join(parts) + "\n"


def table(functions: Sequence[Any]) -> str:
    """What functions compute, with direction, precondition and cost, as a Markdown table."""
    lines = [
        "| metric | definition | direction | needs | cost |",
        "| --- | --- | --- | --- | --- |",
    ]
    for function in functions:
        said = stated(inspect.getdoc(function) or "")
        cells = [f"[`{function.__name__}`](#{function.__name__})", summary(function)]
        cells += [said[word].removesuffix(".") for word in ("Direction", "Needs", "Cost")]
        lines.append(row(cells))
    return "\n".join(lines)


def row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def function_section(function: Any) -> str:
    """What a metric says about itself, with its options."""
    about, options = split(inspect.getdoc(function) or "", "Args")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("predictions", "prompts")
    }
    rows = [
        f"| `{name}` | {shown(default)} | {options.get(name, '')} |"
        for name, default in defaults.items()
    ]
    parts = [f"### {function.__name__}", f"`{function.__module__}`", laid_out(about)]
    if rows:
        parts.append("\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts)


def shown(default: Any) -> str:
    """The default of an argument, a function by its name; empty where it must be given."""
    if default is inspect.Parameter.empty:
        return ""
    return f"`{getattr(default, '__name__', repr(default))}`"


def attacks() -> str:
    """The page of attacks as Markdown: all of them in a table, and a section for each."""
    entries = catalog.entries("attack")
    lines = ["| attack | the attacker | cost | found in the control |", "| --- | --- | --- | --- |"]
    for entry in entries:
        target = entry.load()
        cost = stated(inspect.getdoc(target) or "")["Cost"]
        first = f"[`{entry.attribute}`](#{entry.attribute.lower()})<br>{entry.summary}"
        lines.append(row([first, f"{attacker(target)}.", cost, f"{control(target)}."]))
    parts = [
        "# Attacks",
        "What an edit removed may only be hidden. Each attack is given the model, the forgotten prompts and prompts "
        "that should stay: `Attack(...)(model, forget, retain=retain)`, or `locate-edit attack`. It leaves the model "
        "as it was. Its **control** is a model that knows the answers and hides them in the way the attack is made "
        "for: where it finds nothing there, its number is withheld. Read every number beside that of a model that "
        "never knew, and beside retain: `benchmarks/ATTACKS.md` has them on one edit.",
        "Made from the docstrings by `docs/make_reference.py`.",
        "\n".join(lines),
        *(section(entry) for entry in entries),
    ]
    return "\n\n".join(parts) + "\n"


def attacker(target: Any) -> str:
    """What the attacker may do, from the sentence of a docstring that begins with "The attacker"."""
    for paragraph in (inspect.getdoc(target) or "").split("\n\n"):
        text = " ".join(paragraph.split()).replace("``", "`")
        if found := re.search(r"The attacker (.+?)(?:\.(?=\s|$)|:$)", text):
            return found[1]
    raise ValueError(f"{target.__name__}: say in a sentence what 'The attacker' may do")


def control(target: Any) -> str:
    """What the positive control is, from the first sentence of the docstring of `hide`."""
    first = summary(target.hide)
    if not first.startswith("A positive control: "):
        raise ValueError(
            f"{target.__name__}.hide: expected 'A positive control: ...', got {first!r}"
        )
    return first.removeprefix("A positive control: ").removesuffix(".")


def summary(target: Any) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join((inspect.getdoc(target) or "").split("\n\n")[0].split())
    found = re.match(r"(.+?[.!?])(?=\s|$)", paragraph.replace("``", "`"))
    return found[1] if found else paragraph


def laid_out(about: str) -> str:
    """A docstring's text with `Direction:`, `Needs:` and `Cost:` as a list, where they stand together."""
    parts = []
    for paragraph in about.split("\n\n"):
        said = stated(paragraph)
        lines = "\n".join(f"- {word}: {text}" for word, text in said.items())
        parts.append(lines if len(said) > 1 else paragraph)
    return "\n\n".join(parts)


def section(entry: catalog.Entry, heading: str = "##") -> str:
    """What an entry of the catalogue says about itself, with its hyperparameters and their defaults as a table."""
    target = entry.load()
    about, options = split(inspect.getdoc(target) or "")
    parts = [f"{heading} {entry.attribute}", f"`{entry.name}`, `{entry.module}`"]
    module = inspect.getdoc(sys.modules[entry.module]) or ""
    parts += [part.replace("\n", " ") for part in module.split("\n\n") if part.startswith("Paper")]
    parts.append(laid_out(about))
    if entry.kind == "attack":
        parts.append(f"Positive control: {control(target)}.")
    rows = [
        f"| `{name}` | `{field.default!r}` | {options.get(name, '')} |".replace("\n", " ")
        for name, field in catalog.hyperparameters(target).items()
    ]
    if rows:
        parts.append("\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts)


def stated(docstring: str) -> dict[str, str]:
    """What a docstring says in paragraphs of `Direction:`, `Needs:`, `Cost:` and `Deviations:`, by these words."""
    found: dict[str, str] = {}
    for paragraph in docstring.replace("``", "`").split("\n\n"):
        before, *parts = _STATED.split(" ".join(paragraph.split()))
        if not before:
            found |= {
                word: text.strip() for word, text in zip(parts[::2], parts[1::2], strict=True)
            }
    return found


def split(docstring: str, title: str = "Attributes") -> tuple[str, dict[str, str]]:
    """A Google docstring's text without its sections, and what it says about each attribute (or argument)."""
    text, _, rest = docstring.partition(f"\n{title}:\n")
    options: dict[str, str] = {}
    names: list[str] = []
    for line in rest.splitlines():
        if match := _ATTRIBUTE.match(line):
            names = match[1].split(", ")
            options |= dict.fromkeys(names, line[match.end() :].strip())
        elif line.strip() and line.startswith("        "):
            for name in names:
                options[name] += f" {line.strip()}"
        elif line.strip():
            break
    escaped = {name: text.replace("|", "\\|") for name, text in options.items()}
    return re.split("\n(?:Raises|Returns):\n", text)[0].strip(), escaped


if __name__ == "__main__":
    for file in PAGES:
        (ROOT / file).write_text(page(file), encoding="utf-8")
    for file, made in {METRICS: metrics, ATTACKS: attacks, ENSEMBLES: ensembles}.items():
        (ROOT / file).write_text(made(), encoding="utf-8")
