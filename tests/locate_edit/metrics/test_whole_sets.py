"""Numbers about whole sets as rows of a report: equal to the functions behind them, and withheld with a reason."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import pytest

from locate_edit import PromptSet, evaluate, organism
from locate_edit.catalog import entries
from locate_edit.editing import edit
from locate_edit.errors import PromptError
from locate_edit.methods.npo import NPO
from locate_edit.metrics.counterfact import (
    edit_score,
    efficacy,
    neighbourhood_success,
    paraphrase_success,
)
from locate_edit.metrics.forget_quality import forget_quality
from locate_edit.metrics.likelihood import likelihood, nll, normalised_probability
from locate_edit.metrics.membership import (
    auc,
    gradient_norm,
    min_k,
    min_k_plus_plus,
    privleak,
    reference_loss,
    zlib_loss,
)
from locate_edit.metrics.model_utility import model_utility
from locate_edit.metrics.predictions import Predictions
from locate_edit.metrics.rouge import rouge
from locate_edit.metrics.truth_ratio import truth_ratio
from locate_edit.metrics.whole_sets import (
    EditScore,
    ForgetQuality,
    Icat,
    MembershipAuc,
    ModelUtility,
    PrivLeak,
    Score,
    WholeSets,
)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return organism.load()[0], organism.load("oracle")[0]


@pytest.fixture(scope="module")
def facts() -> dict[str, PromptSet]:
    return {
        "forget": organism.prompts("facts", "forget10")[:24],
        "retain": organism.prompts("facts", "retain")[::40],
        "holdout": organism.prompts("facts", "holdout")[:24],
    }


def test_rows_are_what_the_functions_give(
    models: tuple[Any, Any], facts: dict[str, PromptSet]
) -> None:
    model, oracle = models
    forget, retain, holdout = facts.values()
    made = edit(model, NPO(steps=3, lr=1e-3), None, forget=forget, retain=retain)
    utility = ModelUtility(kept=("retain",), chosen=("holdout",))
    metrics: list[Any] = [likelihood, ForgetQuality(), MembershipAuc(), PrivLeak(), utility]
    report = evaluate(made, metrics, others={"holdout": holdout}, oracle=oracle, random=False)

    def of(net: Any, prompts: PromptSet, metric: Any) -> Any:
        return metric(Predictions(net, prompts))

    after = of(model, forget, truth_ratio)
    leak = [of(model, s, partial(min_k, k=0.4)) for s in (forget, holdout)]
    known = [of(oracle, s, partial(min_k, k=0.4)) for s in (forget, holdout)]
    wanted: dict[str, Any] = {
        "privleak": privleak(*leak, *known),
        "auc": auc(of(model, forget, min_k), of(model, holdout, min_k)),
        "utility": model_utility(
            {
                "retain": [
                    of(model, retain, likelihood),
                    of(model, retain, rouge),
                    of(model, retain, partial(truth_ratio, aggregate="better")),
                ],
                "holdout": [
                    of(model, holdout, normalised_probability),
                    of(model, holdout, rouge),
                    of(model, holdout, partial(truth_ratio, aggregate="better")),
                ],
            }
        ),
    }
    with made.off():
        before = of(model, forget, truth_ratio)
        first = auc(of(model, forget, min_k), of(model, holdout, min_k))
    reference = of(oracle, forget, truth_ratio)
    quality = forget_quality(after, reference, before=before)
    made.undo()

    line = report.line("forget_quality")
    assert line.value("after") == quality.estimate
    assert line.direction == "closeness"
    assert line.cells["before"].value == forget_quality(before, reference).estimate
    assert line.cells["oracle"].withheld == "the oracle is what the others are compared with"
    assert report.value("priv_leak") == wanted["privleak"].estimate
    assert report.line("priv_leak").cells["after"].low == wanted["privleak"].interval()[0]
    assert report.value("membership_auc", column="before") == first.estimate
    assert report.value("membership_auc") == wanted["auc"].estimate
    cell = report.line("model_utility", "retain, holdout").cells["after"]
    assert (cell.value, cell.items) == (wanted["utility"].estimate, len(retain) + len(holdout))
    again = type(report).from_json(report.to_json())
    assert again.value("forget_quality") == quality.estimate
    assert "closer" in report.to_html()
    assert "closer" in report.to_markdown()


def test_every_membership_score(models: tuple[Any, Any], facts: dict[str, PromptSet]) -> None:
    model, oracle = models
    forget, holdout = facts["forget"][:12], facts["holdout"][:12]
    scores: dict[str, Any] = {
        "nll": nll,
        "zlib_loss": zlib_loss,
        "min_k": partial(min_k, k=0.6),
        "min_k_plus_plus": partial(min_k_plus_plus, k=0.6),
        "reference_loss": reference_loss,
        "gradient_norm": gradient_norm,
    }
    assert set(scores) == set(get_args(Score))
    for name, score in scores.items():
        row = MembershipAuc(score=name, k=0.6 if "min_k" in name else None)  # type: ignore[arg-type]
        report = evaluate(
            model, row, forget=forget, others={"holdout": holdout}, oracle=oracle, random=False
        )
        both = (score(Predictions(model, p, reference=oracle)) for p in (forget, holdout))
        assert report.value("membership_auc", column="before") == auc(*both).estimate, name
    with pytest.raises(PromptError, match="zlib_loss has no fraction k"):
        MembershipAuc(score="zlib_loss", k=0.2)
    with pytest.raises(PromptError, match="expected a score among nll, "):
        MembershipAuc(score="loss")  # type: ignore[arg-type]


def test_numbers_of_other_toolkits(models: tuple[Any, Any], facts: dict[str, PromptSet]) -> None:
    model, oracle = models
    forget, holdout = facts["forget"][:12], facts["holdout"][:12]
    name: Any = "open-unlearning"
    sets: Any = {"forget": forget, "others": {"holdout": holdout}}

    def of(metric: Any, net: Any, prompts: PromptSet, **settings: Any) -> Any:
        return metric(net, prompts, compat=name, **settings)

    alone = evaluate(model, PrivLeak(compat=name), **sets)
    theirs = privleak(
        of(min_k, model, forget, k=0.4), of(min_k, model, holdout, k=0.4), compat=name
    )
    assert alone.value("priv_leak", column="before") == theirs.estimate
    assert PrivLeak().needs[0][1].keywords == {"k": 0.4}  # type: ignore[attr-defined]
    assert (
        evaluate(model, PrivLeak(compat="muse"), **sets).value("priv_leak", column="before") is None
    )

    row = ModelUtility(kept=("forget",), chosen=("holdout",), compat=name)
    utility = model_utility({
        "forget": (
            likelihood(model, forget), rouge(model, forget, max_new_tokens=200),
            of(truth_ratio, model, forget, aggregate="better"),
        ),
        "holdout": (
            of(normalised_probability, model, holdout), rouge(model, holdout, max_new_tokens=200),
            of(truth_ratio, model, holdout, aggregate="better"),
        ),
    })  # fmt: skip
    (line,) = evaluate(model, row, **sets).lines
    assert line.value("before") == utility.estimate

    quality = forget_quality(of(truth_ratio, model, forget), of(truth_ratio, oracle, forget))
    both = evaluate(model, ForgetQuality(compat=name), oracle=oracle, **sets)
    assert both.value("forget_quality", column="before") == quality.estimate
    with pytest.raises(PromptError, match="expected compat to be 'open-unlearning' or 'tofu'"):
        evaluate(model, ForgetQuality(compat="muse"), **sets)  # type: ignore[arg-type]


def test_rewritten_facts(models: tuple[Any, Any], facts: dict[str, PromptSet]) -> None:
    model, _ = models
    rows = [{**row, "neighbours": [facts["retain"][0]["prompt"]]} for row in facts["forget"].rows]
    prompts = facts["forget"].reread(rows)
    report = evaluate(model, EditScore(), forget=prompts)
    seen = Predictions(model, prompts)
    by_hand = edit_score(efficacy(seen), paraphrase_success(seen), neighbourhood_success(seen))
    assert report.value("edit_score", column="before") == by_hand.estimate


@pytest.mark.parametrize("entry", entries("statistic"), ids=lambda entry: entry.name)
def test_each_says_what_it_lacks(entry: Any, models: tuple[Any, Any]) -> None:
    metric = entry.load()()
    assert isinstance(metric, WholeSets)
    only = PromptSet([("Orvin plays", " golf")], organism.load()[1])
    report = evaluate(models[0], entry.name, others={"something else": only})
    (line,) = [line for line in report.lines if line.prompts == metric.prompts]
    (cell,) = line.cells.values()
    assert cell.value is None
    assert "needs: " in cell.withheld
    assert line.definition


def test_sets_that_differ_in_more_than_membership(
    models: tuple[Any, Any], facts: dict[str, PromptSet]
) -> None:
    model, oracle = models
    longer = organism.prompts("general", "holdout")
    for metric in (MembershipAuc(others="text"), PrivLeak(others="text")):
        report = evaluate(
            model, metric, forget=facts["forget"], others={"text": longer}, oracle=oracle
        )
        (line,) = [
            line
            for line in report.lines
            if line.prompts == "forget" and "oracle" not in line.metric
        ]
        assert "differ in nothing but membership" in line.cells["before"].withheld


def test_what_cannot_be_asked_for(models: tuple[Any, Any], facts: dict[str, PromptSet]) -> None:
    with pytest.raises(PromptError, match=r"expected a metric like Icat\(\), got the class"):
        evaluate(models[0], [Icat], forget=facts["forget"])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="'icat' is given twice"):
        evaluate(models[0], [Icat(), Icat()], forget=facts["forget"])
