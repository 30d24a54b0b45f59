"""Figures of what attacks bring back: by attack and model, and as one attack gets stronger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from circuits.draw._style import Row, count_of, provide
from locate_edit.draw._style import COLOURS, free_figure
from locate_edit.draw.edits import relearning
from locate_edit.errors import EditError
from locate_edit.reports.states import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from locate_edit.metrics.values import Values
    from locate_edit.reports.robustness import Robustness, Trial

__all__ = ["attack_curves", "attack_dots"]


def attack_dots(found: Robustness, *, model: str = "") -> Axes:
    """Two panels, forget and retain: for each attack and model a hollow dot without the attack and a full one under it.

    A thin bar is the 95% interval over prompts under the attack; beside the attack's name stands how many forget
    prompts it was tested on. Withheld attacks keep their row, without dots. The axes returned are those of the forget
    panel; the numbers of both belong to them.

    Args:
        found: the attacks.
        model: what to call the model in the footer; by default what the settings say, if they say it.

    Raises:
        EditError: no attack has numbers.
    """
    from matplotlib.lines import Line2D

    states = found.models
    if not states:
        raise EditError("no attack has numbers to draw; the table says why")
    spread = 0.7 / len(states)
    height = 1.6 + len(found.trials) * max(0.45, 0.2 * len(states))
    figure = free_figure(8.4, height)
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    for row, trial in enumerate(found.trials):
        for panel in panels:
            if row % 2:
                panel.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", zorder=0, lw=0)
            if trial.withheld:
                panel.text(
                    0.5, row, "withheld", ha="center", va="center", size=8, color="#777777",
                    style="italic", transform=panel.get_yaxis_transform(),
                )  # fmt: skip
        for place, state in enumerate(states):
            if (attacked := trial.found.get(state)) is None:
                continue
            at = row + (place - (len(states) - 1) / 2) * spread
            _pair(panels[0], at, attacked.forget_clean, attacked.forget, COLOURS[state])
            _pair(panels[1], at, attacked.retain_clean, attacked.retain, COLOURS[state])
    for panel, title in zip(panels, ("forget", "retain"), strict=True):
        panel.set_title(title)
        panel.set_xlabel("given away (such as likelihood)")
        panel.set_xlim(-0.03, 1.03)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(found.trials)), [_label(t) for t in found.trials], size=8)
    panels[0].set_ylim(len(found.trials) - 0.5, -0.5)
    handles: list[Any] = [
        Line2D([], [], marker="o", ls="", color=COLOURS[state], label=TITLES[state])
        for state in states
    ]
    handles.append(
        Line2D([], [], marker="o", ls="", mfc="white", color="#555555", label="without the attack")
    )
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8
    )
    figure.supxlabel("; ".join(_about(found, model)), fontsize=7.5, color="#5f6368")
    first: Axes = panels[0]
    provide(first, lambda: _rows(found))
    return first


def _rows(found: Robustness) -> list[Row]:
    """A dictionary for each attack and state: the dots of both panels."""
    return [
        {
            "attack": trial.name,
            "state": state,
            "prompts": len(attacked.forget),
            **{
                what: None if (values := getattr(attacked, what)) is None else values.estimate
                for what in ("forget_clean", "forget", "retain_clean", "retain")
            },
        }
        for trial in found.trials
        for state, attacked in trial.found.items()
    ]


def _about(found: Robustness, model: str) -> list[str]:
    """Of which model the figure is, and what its marks are."""
    retain = found.settings.get("retain", {}).get("prompts")
    said = [model or str(found.settings.get("model", "")), "n: forget prompts tested"]
    said.append("" if retain is None else f"retain: {count_of(retain, 'prompt')} at most")
    return [each for each in (*said, "bars: 95% interval over prompts") if each]


def attack_curves(trial: Trial, ax: Axes | None = None, *, model: str = "") -> Axes:
    """What comes back as one attack gets stronger, a line for each state of the model (`draw.edits.relearning`).

    States without a curve, such as the mean of several random masks may be, are left out.

    Args:
        trial: the attack on every state.
        ax: where to draw.
        model: what to call the model in the footer.

    Raises:
        EditError: no state has strengths.
    """
    drawn = {state: found for state, found in trial.found.items() if found.curve}
    states = [state for state in drawn if state != "oracle"]
    return relearning(
        {TITLES[state]: drawn[state] for state in states},
        oracle=drawn.get("oracle"),
        hues=[COLOURS[state] for state in states],
        model=model,
        ax=free_figure(7.4, 3.6).add_subplot() if ax is None else ax,
    )


def _pair(axes: Axes, at: float, clean: Values | None, under: Values | None, colour: str) -> None:
    """Hollow and full dot of one model, joined, with the interval of the full one."""
    before = None if clean is None else clean.estimate
    after = None if under is None else under.estimate
    if before is None or after is None or under is None:
        return
    axes.plot([before, after], [at, at], color=colour, lw=1.2, alpha=0.5, zorder=1)
    if (interval := under.interval()) is not None:
        axes.plot(
            interval, [at, at], color=colour, lw=4, alpha=0.2, solid_capstyle="butt", zorder=1
        )
    axes.plot([after], [at], "o", color=colour, ms=5, zorder=3)
    axes.plot([before], [at], "o", mfc="white", mec=colour, ms=5, zorder=2)


def _label(trial: Trial, width: int = 28) -> str:
    """The name of an attack, cut where it is long, and on how many prompts it was tested."""
    name = trial.title if len(trial.title) <= width else f"{trial.title[: width - 1]}…"
    if not trial.found:
        return name
    tested = trial.found.get("after", next(iter(trial.found.values())))
    return f"{name}\nn = {len(tested.forget)}"
