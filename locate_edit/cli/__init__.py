"""The command line: one command a file, in the order of `locate-edit --help`.

Every command is a thin layer over the library: read names and files, call the verb, write the result, say what was
done. Torch is imported inside the commands, so that `--help` answers at once; what a command needs besides stands in
the module of its name with an underscore. What a command has to say goes to standard output; with `--json` that is one
JSON object and nothing else. Progress and errors go to standard error.
"""

# The order of --help.
# isort: off
from locate_edit.cli import demo, audit, locate, edit, evaluate, attack, report, compare, ensemble
from locate_edit.cli import plot, compare_masks, undo, info

# isort: on
from locate_edit.cli.program import app, main

COMMANDS = (
    demo,
    audit,
    locate,
    edit,
    evaluate,
    attack,
    report,
    compare,
    ensemble,
    plot,
    compare_masks,
    undo,
    info,
)
"""The modules of the commands; importing one adds its command to the program."""

__all__ = ["COMMANDS", "app", "main"]
