"""A short identity of a model's weights, so that an edit is not applied to a model it was not made for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from locate_edit.additions import installed

SAMPLES = 4096  # entries whose bits and places enter a parameter's checksum beside the sum over all of them
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Checksum of every parameter by name: dtype, shape, and a hash that any changed entry changes.

    The hash covers the 64-bit sum of all entries' bit patterns (one pass at memory speed, the
    same on every device) and 4096 evenly spaced entries in order. It recognises models; it is no
    protection against a forger. Additions that are in place and on count as parameters, with names
    of their own.
    """
    found = {name: _checksum(parameter.detach()) for name, parameter in model.named_parameters()}
    on = [each for placed in installed(model) if placed.on for each in placed.added()]
    for place, each in enumerate(on):
        for name, value in each.values.items():
            found[f"{name} of addition {place} ({each.what})"] = _checksum(value)
    return found


def difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """What distinguishes two fingerprints, in words, or None when they are equal."""
    if missing := [name for name in expected if name not in found]:
        return f"{len(missing)} parameters are missing, the first is {missing[0]}"
    if extra := [name for name in found if name not in expected]:
        return (
            f"{len(extra)} parameters are not in the model it was made for, the first is {extra[0]}"
        )
    changed = [name for name in expected if expected[name] != found[name]]
    if not changed:
        return None
    name = changed[0]
    was, now = expected[name].rsplit(" ", 1)[0], found[name].rsplit(" ", 1)[0]
    if was != now:
        return f"{name} was {was}, here it is {now}"
    return f"the values of {len(changed)} of {len(expected)} parameters differ, the first is {name}"


def _checksum(parameter: Tensor) -> str:
    flat = parameter.contiguous().view(-1)
    sample = flat.view(_INTEGER[flat.element_size()])[:: max(1, len(flat) // SAMPLES)]
    digest = hashlib.sha256(sample.to("cpu", torch.int64).numpy().tobytes())
    digest.update(str(_sum_of_bits(flat)).encode())
    dtype = str(parameter.dtype).removeprefix("torch.")
    return f"{dtype} {'x'.join(map(str, parameter.shape))} {digest.hexdigest()[:16]}"


def _sum_of_bits(flat: Tensor) -> int:
    """Sum of ``flat``'s memory read as 64-bit words (modulo 2**64), the last entries one by one.

    Whole words are an order of magnitude faster than widening every entry, and a single changed entry
    still changes exactly one word.
    """
    size = flat.element_size()
    whole = len(flat) - len(flat) % (8 // size)
    if flat.storage_offset() * size % 8:
        flat = flat.clone()  # words must be aligned
    words = flat[:whole].view(torch.int64).sum()
    rest = flat[whole:].view(_INTEGER[size]).sum(dtype=torch.int64)
    return int(words + rest)
