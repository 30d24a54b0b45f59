"""Make the organism and its oracles: `python -m locate_edit.organism.train --out FOLDER`.

Three processes of one thread each train side by side; an interrupted run continues where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from locate_edit.organism.documents import Repeats, documents, training_rows
from locate_edit.organism.measure import measure
from locate_edit.organism.tokenizer import build_tokenizer
from locate_edit.organism.training import TrainConfig, new_model, timed, train_model
from locate_edit.organism.world import World, WorldSize, make_world, summary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Role:
    """What tells one model from another: whether it sees forget10, and its seed."""

    forget: bool
    seed: int


ROLES: Mapping[str, Role] = {
    "organism": Role(forget=True, seed=0),
    "oracle": Role(forget=False, seed=0),
    "oracle2": Role(forget=False, seed=1),
}


@dataclass(frozen=True)
class Recipe:
    """Everything the three models are a function of."""

    world_seed: int = 1
    size: WorldSize = field(default_factory=WorldSize)
    repeats: Repeats = field(default_factory=Repeats)
    config: TrainConfig = field(default_factory=TrainConfig)


def tokenizer_of(world: World, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer of a world: trained on each of its documents once."""
    texts = sorted({d.text for d in documents(world, recipe.repeats)})
    return build_tokenizer(texts, recipe.config.vocab_size)


def train_role(
    name: str, recipe: Recipe, out: Path, *, stop_at: int | None = None, save_every: int = 500
) -> None:
    """Train one model (or go on training it) and write it to `out/name` as half precision."""
    torch.set_num_threads(1)
    role, config = ROLES[name], recipe.config
    world = make_world(recipe.world_seed, recipe.size)
    tokenizer = tokenizer_of(world, recipe)
    data = training_rows(
        world,
        recipe.repeats,
        tokenizer,
        forget=role.forget,
        seed=role.seed,
        length=config.row_tokens,
    )
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    model = new_model(config, ids, role.seed)
    log.info(
        "%s: %.2f M parameters, %.2f M tokens",
        name,
        model.num_parameters() / 1e6,
        data[0].size / 1e6,
    )
    seconds = train_model(
        model,
        data,
        config,
        out / "checkpoints" / name,
        digest=f"{world.digest} {json.dumps(asdict(recipe.repeats))} {role}",
        stop_at=stop_at,
        save_every=save_every,
        on_step=timed(name),
    )
    save(model, tokenizer, out / name)
    record = {"seconds": round(seconds, 1), "tokens": int(data[0].size), "rows": len(data[0])}
    (out / name / "training.json").write_text(json.dumps(record), "utf-8")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a model in half precision and its tokenizer as `save_pretrained` folders do."""
    model.half()
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_card(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Measure the three saved models and write `card.json` and `world.json`."""
    torch.set_num_threads(1)
    world = make_world(recipe.world_seed, recipe.size)
    (out / "world.json").write_text(world.to_json(), "utf-8")
    card: dict[str, Any] = {
        "recipe": asdict(recipe),
        "world": summary(world),
        "digest": world.digest,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "training": {},
        "measured": {},
    }
    for name in ROLES:
        if not (out / name).exists():
            continue
        model = LlamaForCausalLM.from_pretrained(out / name, dtype=torch.float32).eval()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / name)
        record = json.loads((out / name / "training.json").read_text("utf-8"))
        card["training"][name] = record | {"parameters": model.num_parameters()}
        card["measured"][name] = {
            k: round(v, 4) for k, v in measure(model, tokenizer, world).items()
        }
    (out / "card.json").write_text(json.dumps(card, indent=1), "utf-8")
    return card


def train_all(out: Path) -> None:
    """Train every role in a process of its own and wait for all.

    Raises:
        RuntimeError: If one of them fails; the others are left to finish.
    """
    # One thread each: two spinning thread pools on shared cores are far slower than one thread.
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "locate_edit.organism.train", "--out", str(out), "--only"]
    running = {name: subprocess.Popen([*command, name], env=env) for name in ROLES}
    try:
        failed = [name for name, process in running.items() if process.wait()]
    except KeyboardInterrupt:
        for process in running.values():
            process.terminate()
        raise
    if failed:
        raise RuntimeError(f"training of {', '.join(failed)} failed; run again to continue")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("organism-run"), help="folder to write")
    parser.add_argument("--only", choices=ROLES, help="train one model, in this process")
    parser.add_argument("--card", action="store_true", help="only measure what is in the folder")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    recipe = Recipe()
    if options.only:
        train_role(options.only, recipe, options.out)
        return
    if not options.card:
        train_all(options.out)
    write_card(recipe, options.out)
    log.info("measured; see %s", options.out / "card.json")


if __name__ == "__main__":
    main()
