"""Train one model on a packed stream: deterministic, one thread, resumable, no pickle."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from locate_edit.organism.documents import Packed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """Size of the model and the recipe; the same for the organism and both oracles."""

    vocab_size: int = 2048
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp_size: int = 640
    row_tokens: int = 128
    batch_rows: int = 8
    lr: float = 2e-3
    final_lr: float = 0.02  # as a fraction of lr
    warmup: int = 150
    weight_decay: float = 0.02
    beta2: float = 0.98
    clip: float = 1.0
    init_std: float = 0.04


def new_model(config: TrainConfig, token_ids: Mapping[str, int], seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama-type model, a function of `config` and `seed` only.

    Weights are normal; the projections that write into the residual stream are scaled by
    1 / sqrt(2 * layers) as in GPT-2 (Radford et al. 2019, section 2.3).
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=token_ids.get("bos_token_id"),
            eos_token_id=token_ids.get("eos_token_id"),
            pad_token_id=token_ids.get("pad_token_id"),
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
                continue
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = config.init_std / (math.sqrt(2 * config.layers) if writes else 1.0)
            parameter.normal_(0.0, std, generator=generator)
    return model


def document_mask(segments: Tensor) -> Tensor:
    """Boolean causal attention `row 1 query key` within documents; padding sees itself.

    Args:
        segments: Document number of each token, `row token`, -1 for padding.
    """
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril()


def document_positions(segments: Tensor) -> Tensor:
    """Position of each token within its document, `row token`."""
    index = torch.arange(segments.shape[1]).expand_as(segments)
    start = torch.ones_like(segments, dtype=torch.bool)
    start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - torch.where(start, index, 0).cummax(1).values


def loss_of(model: LlamaForCausalLM, ids: Tensor, segments: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the label tokens of packed rows, each in its own document."""
    hidden = model.model(
        input_ids=ids,
        attention_mask=document_mask(segments),
        position_ids=document_positions(segments),
        use_cache=False,
    ).last_hidden_state
    # Logits only where a label follows: padding and unlabelled prompts cost no vocabulary matmul.
    predicts = torch.zeros_like(labels)
    predicts[:, :-1] = labels[:, 1:]
    logits = model.lm_head(hidden[predicts])
    return torch.nn.functional.cross_entropy(logits.float(), ids[labels])


def rate(step: int, steps: int, config: TrainConfig) -> float:
    """Learning rate at `step` of `steps`: linear warm-up, then cosine to `final_lr * lr`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def train_model(
    model: LlamaForCausalLM,
    data: Packed,
    config: TrainConfig,
    checkpoint: Path,
    *,
    digest: str = "",
    stop_at: int | None = None,
    save_every: int = 500,
    on_step: Callable[[int, int, float], None] | None = None,
) -> float:
    """Train `model` in place for one pass over `data`; returns the CPU seconds it took in all.

    Continues from `checkpoint` if that folder holds one, with the bits it would have had without
    the interruption.

    Args:
        model: The model, freshly made.
        data: The packed stream.
        config: The recipe.
        checkpoint: Folder of the checkpoint, which need not exist.
        digest: Fingerprint of the data; a checkpoint of other data is refused.
        stop_at: Stop (and save) after this many steps in all, as an interruption would.
        save_every: Steps between checkpoints.
        on_step: Called with step, number of steps and loss.

    Raises:
        ValueError: If the checkpoint belongs to another recipe or other data.
    """
    ids, segments, labels = (torch.from_numpy(a) for a in data)
    ids, segments = ids.long(), segments.long()
    steps = len(ids) // config.batch_rows
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(0.9, config.beta2),
        weight_decay=0.0,
        fused=True,
    )
    identity = {"config": asdict(config), "digest": digest, "steps": steps}
    step, seconds = load_checkpoint(checkpoint, model, optimizer, identity)
    start = time.process_time() - seconds
    model.train()
    end = steps if stop_at is None else min(stop_at, steps)
    while step < end:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, config)
        rows = slice(step * config.batch_rows, (step + 1) * config.batch_rows)
        loss = loss_of(model, ids[rows], segments[rows], labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if on_step is not None:
            on_step(step, steps, loss.item())
        if step % save_every == 0 or step == end:
            seconds = time.process_time() - start
            save_checkpoint(checkpoint, model, optimizer, step, seconds, identity)
    model.eval()
    return seconds


def save_checkpoint(
    folder: Path,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    identity: Mapping[str, Any],
) -> None:
    """Write weights, optimizer state and step as safetensors and JSON, replacing the last ones."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    names: dict[torch.Tensor, str] = {p: n for n, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{key}.{names[parameter]}"] = value
    # One file renamed into place: a kill in the middle leaves the previous checkpoint whole.
    metadata = {"state": json.dumps({"step": step, "seconds": seconds, **identity})}
    temporary = folder / "checkpoint.tmp"
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
    temporary.replace(folder / "checkpoint.safetensors")


def load_checkpoint(
    folder: Path,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> tuple[int, float]:
    """Restore what `save_checkpoint` wrote; returns its step and seconds, zeros if there is none.

    Raises:
        ValueError: If the checkpoint's recipe or data is not `identity`.
    """
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0

    with safe_open(path, "pt") as handle:
        state = json.loads(handle.metadata()["state"])
    step, seconds = int(state.pop("step")), float(state.pop("seconds"))
    expected = json.loads(json.dumps(identity))
    if state != expected:
        wrong = sorted(k for k in expected if state.get(k) != expected[k])
        raise ValueError(
            f"checkpoint {path} was made with another {', '.join(wrong)}: expected "
            f"{[expected[k] for k in wrong]}, got {[state.get(k) for k in wrong]}; "
            "delete it or choose another folder"
        )
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in tensors]
            optimizer.state[parameter] = {k: tensors[f"{k}.{name}"] for k in keys}
    return step, seconds


def timed(which: str, every: float = 20.0) -> Callable[[int, int, float], None]:
    """A step callback that logs progress, mean loss and the time left every `every` seconds."""
    start = last = time.monotonic()
    first, recent = -1, []

    def report(step: int, steps: int, loss: float) -> None:
        nonlocal last, first, recent
        now = time.monotonic()
        if first < 0:
            first = step - 1
        recent.append(loss)
        if now - last < every and step < steps:
            return
        left = (now - start) / max(1, step - first) * (steps - step)
        mean = sum(recent) / len(recent)
        log.info("%s: step %d/%d  loss %.3f  %.0f s left", which, step, steps, mean, left)
        last, recent = now, []

    return report
