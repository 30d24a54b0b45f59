"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def option(*names: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    """An option of a command; ``show=False`` keeps its default out of the help."""
    return typer.Option(
        *names, help=help, metavar=metavar, show_default=more.pop("show", True), **more
    )


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, hub name, or organism.", show_default=False)
]
Setting = Annotated[
    list[str] | None,
    option(
        "--set", metavar="NAME=VALUE", help="Set a hyperparameter of the method; repeat for more."
    ),
]
Steps = Annotated[int | None, option(min=1, help="Same as --set steps=N.")]
Also = Annotated[
    list[str] | None,
    option(
        "--also",
        metavar="NAME=FILE",
        help="JSONL file of further prompts to measure; repeat for more.",
    ),
]
Metrics = Annotated[
    list[str] | None,
    option("--metric", metavar="NAME", help="A metric of locate-edit info; repeat for more."),
]
Oracle = Annotated[
    str | None,
    option(metavar="MODEL", help="A model retrained without what was to be forgotten."),
]
OtherOracle = Annotated[
    str | None,
    option(
        "--other-oracle",
        metavar="MODEL",
        help="The same with another seed: the unit of the distance.",
    ),
]
Random = Annotated[
    int | None,
    option(
        "--random",
        metavar="N",
        min=0,
        help="Make the edit again on so many random masks of equal size, and measure these too.",
    ),
]
Attacks = Annotated[
    list[str] | None,
    option(
        "--attack",
        metavar="NAME",
        help="An attack of locate-edit info, or package.module:Name; repeat for more. Default: all.",
    ),
]
MostSteps = Annotated[int | None, option("--steps", min=1, help="No attack takes more steps.")]
Seconds = Annotated[
    float | None, option("--seconds", min=0, help="No attack is begun after this time.")
]
NamedSetting = Annotated[
    list[str] | None,
    option(
        "--set",
        metavar="NAME.KEY=VALUE",
        help="Set a hyperparameter of one of them, such as npo.beta=0.1 or relearning.steps=20; repeat for more.",
    ),
]
MetricSetting = Annotated[
    list[str] | None,
    option(
        "--set",
        metavar="NAME.KEY=VALUE",
        help="Set an option of one metric, such as min-k.k=0.1 or worst-reward.reward=lexicon:word,word; repeat for "
        "more.",
    ),
]
Mask = Annotated[
    str | None,
    option(
        "--mask",
        metavar="FILE|UNITS",
        help="A mask file, or units such as 'L4.neuron[3 17-20]'; default: all weights.",
    ),
]
Gone = Annotated[
    Path,
    option("--forget", metavar="FILE", help="JSONL file of what should be forgotten.", show=False),
]
Kept = Annotated[
    Path,
    option(
        "--retain", metavar="FILE", help="JSONL file of what it should know anyway.", show=False
    ),
]
Retain = Annotated[
    Path | None, option(metavar="FILE", help="JSONL file of what should stay as it is.")
]
Chat = Annotated[
    bool,
    option(
        "--chat",
        help="Read prompt and target as a user's and an assistant's turn, as the chat template writes them.",
        rich_help_panel="Prompts",
    ),
]
Eos = Annotated[
    bool,
    option(
        "--eos",
        help="Score the end of every target too: the end-of-sequence token, or with --chat the end of the turn.",
        rich_help_panel="Prompts",
    ),
]
BatchSize = Annotated[
    int, option(min=1, help="Prompts in one forward pass.", rich_help_panel="Running")
]
Seed = Annotated[int, option(help="Seed of everything random.", rich_help_panel="Running")]
Device = Annotated[str, option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel="Running")]
Dtype = Annotated[
    str, option(help="auto (as stored), float32, bfloat16 or float16.", rich_help_panel="Running")
]
Json = Annotated[
    bool,
    option("--json", help="Print one JSON object and nothing else.", rich_help_panel="Running"),
]
