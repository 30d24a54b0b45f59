"""The attacks on the page: what each shows stands beside it, with everything that it follows from."""

from __future__ import annotations

from dataclasses import replace

from locate_edit.attacked import Attacked, Point
from locate_edit.metrics.values import Values
from locate_edit.reports.examination import Examination
from locate_edit.reports.report import Report
from locate_edit.reports.robustness import Robustness, Trial
from tests.locate_edit.reports.test_report import read


def values(*numbers: float) -> Values:
    return Values.make("likelihood", list(numbers), unit="probability", direction="up")


def attacked(clean: float, under: float, kept: float = 1.0) -> Attacked:
    return Attacked(
        values(under - 0.1, under + 0.1), values(clean, clean), values(kept), values(1.0),
        (Point(0, clean), Point(5, under)), "steps",
    )  # fmt: skip


FOUND = {
    "before": attacked(0.9, 0.9),
    "after": attacked(0.1, 0.6, 0.4),
    "oracle": attacked(0.1, 0.2),
}
GOOD = Trial("Good", "Good()", FOUND, control=attacked(0.38, 0.9), does="Reads <b>it</b>.")
SETTINGS = {"controls": True, "margin": 0.3, "forget": {"prompts": 9}, "retain": {"prompts": 4}}


def page(*trials: Trial, settings: object = SETTINGS) -> str:
    assert isinstance(settings, dict)
    html = Examination(Report(()), Robustness(trials, settings)).to_html()
    assert read(html).open == []
    return html


def test_what_an_attack_shows_stands_beside_it_with_what_it_follows_from() -> None:
    html = page(GOOD)
    head = html[html.index("<th>attack</th>") :]
    assert head.startswith(
        '<th>attack</th><th>what it shows of the edit</th><th class="n">before</th>'
    )
    assert "<b>it</b>" not in html
    for said in (
        "n = 2 of the 9 prompts",
        "control: 0.380 → 0.900",
        "adds: +0.500 (0.400\u00a0to\u00a00.600)",
        "more than to the oracle: +0.400",
        "above the oracle: +0.400",
        "back after 5 steps",
        "0.500 to 0.700",
        "without: 0.100",
        "retain: 1.000 → 0.400",
    ):
        assert f"{said}" in html
        assert "<small>" in html[: html.index(said)]
    assert "<b>brings answers back</b>" in html
    text = "".join(read(html).text)
    assert "An attack that adds less than 0.3 to its control has no number here." in text
    # Only what occurs is explained, with its threshold.
    assert "the 95% intervals of all three differences lie above 0" in text
    assert "less than 50% is left" not in text
    broken = replace(GOOD, found={"after": attacked(0.3, 0.1, 0.2), "oracle": attacked(0.1, 0.2)})
    assert "less than 50% is left" in "".join(read(page(broken)).text)
    free = page(GOOD, settings={**SETTINGS, "controls": False})
    assert "One that adds less" not in free


def test_why_there_is_no_number_is_there_to_be_read() -> None:
    failed = replace(
        GOOD, found={"after": FOUND["after"]}, failed={"oracle": "of <another> vocabulary"}
    )
    html = page(failed, GOOD, Trial("Bad", "Bad()", withheld="it finds nothing"))
    assert "-<small>of &lt;another&gt; vocabulary</small>" in html
    assert 'title="of' not in html
    text = "".join(read(html).text)
    assert "no number: it finds nothing" in text
    assert "there is no oracle to tell" in text
    assert "<b>rises</b>" in html


def test_the_page_prints_every_column() -> None:
    style = page(GOOD)
    style = style[style.index("<style>") : style.index("</style>")]
    assert "@media print" in style
    assert ".wide { overflow: visible; }" in style
