"""Try the claims: `python -m benchmarks.claims [FILE ...] --save`.

Every finished seed is kept in ``--folder`` and not run again unless the claim's file (or one that it shares with other
claims, whose name begins with an underscore) has changed, so the command can be interrupted and given again. After a
change of the package itself, empty the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.claims.claim import DEVICE, Claim, Figures, PreconditionFailed, Trial, markdown
from benchmarks.machine import describe_machine
from benchmarks.tables import write_between
from circuits.atomic import atomic_file

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
PAGE = HERE.parent / "CLAIMS.md"


def files(only: Sequence[str] = ()) -> list[str]:
    """The names of the files that hold a claim, or those asked for.

    Raises:
        SystemExit: one that is asked for is not there.
    """
    found = [
        path.stem
        for path in sorted(HERE.glob("[!_]*.py"))
        if "\nCLAIM = " in path.read_text(encoding="utf-8")
    ]
    if unknown := sorted(set(only) - set(found)):
        raise SystemExit(f"no claim called {', '.join(unknown)}; there are {', '.join(found)}")
    return [name for name in found if not only or name in only]


def load(name: str) -> Claim:
    """The claim of one file."""
    claim: Claim = importlib.import_module(f"benchmarks.claims.{name}").CLAIM
    return claim


def checked(claim: Claim, figures: Figures) -> dict[str, float]:
    """The figures as plain numbers.

    Raises:
        ValueError: one is not a finite number, or one that a check names is missing.
    """
    found = {name: float(value) for name, value in figures.items()}
    if bad := [name for name, value in found.items() if not math.isfinite(value)]:
        raise ValueError(f"figures that are not finite: {', '.join(bad)}")
    for check in claim.checks:
        if missing := [name for name in check.figures if name not in found]:
            raise ValueError(f"{check.says!r} needs figures that were not measured: {missing}")
        check.margin(found)
    return found


def digest(name: str) -> str:
    """Of the claim's file and of the shared ones that it, or one of those, names."""
    own, shared = [HERE / f"{name}.py"], sorted(HERE.glob("_[!_]*.py"))
    for path in own:  # grows while it is read
        text = path.read_text(encoding="utf-8")
        own += [other for other in shared if other.stem in text and other not in own]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(own))).hexdigest()[:12]


def tried(name: str, claim: Claim, seed: int, folder: Path) -> Trial:
    """One seed of a claim, from ``folder`` if it was finished before with the same file."""
    kept = folder / f"{name}-{seed}-{digest(name)}-{DEVICE}.json"
    if kept.is_file():
        return Trial(**json.loads(kept.read_text(encoding="utf-8")))
    started = time.process_time()
    try:
        found = Trial(seed, checked(claim, claim.measure(seed)))
    except PreconditionFailed as reason:
        found = Trial(seed, None, precondition=str(reason))
    except Exception as problem:  # the others go on; the table says that this one broke, and why
        traceback.print_exc()
        return Trial(seed, None, error=f"{type(problem).__name__}: {problem}")
    trial = replace(found, seconds=round(time.process_time() - started, 1))
    with atomic_file(kept) as place:
        place.write_text(json.dumps(asdict(trial)), encoding="utf-8")
    return trial


def main() -> None:
    """Run what is asked for, print the table, and with --save write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="which claims; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=RESULTS / "claims-cells")
    parser.add_argument("--save", action="store_true", help="write the page and the numbers")
    given = parser.parse_args()
    if given.save and given.files:
        parser.error("--save writes the page of all claims: leave the file names out")
    given.folder.mkdir(parents=True, exist_ok=True)
    names = files(given.files)
    claims = {name: load(name) for name in names}
    trials: dict[str, list[Trial]] = {}
    for name, claim in claims.items():
        trials[claim.system] = []
        for seed in range(given.seeds):
            trial = tried(name, claim, seed, given.folder)
            trials[claim.system].append(trial)
            said = trial.figures or trial.precondition or trial.error
            print(f"{name}, seed {seed}, {trial.seconds:.0f} s: {said}", file=sys.stderr)
    table = markdown(list(claims.values()), trials)
    print(table)
    if given.save:
        about = {
            "machine": describe_machine(DEVICE),
            "trials": {system: [asdict(t) for t in found] for system, found in trials.items()},
        }
        (RESULTS / "claims.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        write_between(PAGE, "claims", table)
    if any(trial.error for found in trials.values() for trial in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
