"""Result tables in markdown, and their place in the README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

_HEAD = (
    "| step | time (ms) | against dense masking | against SHiRA | FLOPs (forwards) | floor | "
    "added peak (MB) | against dense masking | optimizer state (MB) |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def engine_table(found: Mapping[str, Any]) -> str:
    """The results of `benchmarks.engine` as text."""
    model, machine = found["model"], found["machine"]
    dense_peak = found["variants"][0]["peak_added_bytes"]
    clock = "GPU" if found["dtype"] == "bfloat16" else "CPU"
    lines = [
        f"{model['parameters'] / 1e6:.1f} M parameters ({model['layers']} layers, d {model['d_model']}, "
        f"ff {model['d_mlp']}, vocabulary {model['vocab']:,}), {found['dtype']}, "
        f"{found['tokens_per_step']} tokens a step, {model['neurons']} of {model['d_mlp']} neurons a layer; "
        f"{clock} time, medians of {found['rounds']} rounds.",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in machine.items()) + ".",
        "",
        _HEAD,
    ]
    for row in found["variants"]:
        floor = f"{row['floor']:.2f} / {row['floor_with_head']:.2f}" if row["ours"] else ""
        lines.append(
            f"| {row['variant']} | {1e3 * median(row['seconds']):.0f} | {_ratio(row['vs_dense'])} | "
            f"{_ratio(row['vs_shira'])} | {row['forwards']:.2f} | {floor} | "
            f"{row['peak_added_bytes'] / 1e6:.0f} | {row['peak_added_bytes'] / dense_peak:.2f} | "
            f"{row['optimizer_state_bytes'] / 1e6:.1f} |"
        )
    npo = found["npo"]
    lines += [
        "",
        f"NPO's added peak: {npo['NPO'] / 1e6:.0f} MB, {npo['ratio']:.2f} of gradient ascent's. "
        f"`import locate_edit`: {found['import_seconds']:.3f} s of CPU time, torch "
        + ("loaded." if found["torch_loaded"] else "not loaded."),
    ]
    if "host_syncs" in found:
        places = sorted({place for places in found["host_syncs"].values() for place in places})
        lines.append(f"Host synchronisation inside a step: {', '.join(places) or 'none'}.")
    return "\n".join(lines)


def _ratio(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f} ({values['least']:.2f} to {values['most']:.2f})"


def write_between(path: Path, key: str, text: str) -> None:
    """Replace what stands between ``<!-- key -->`` and ``<!-- /key -->`` in the file at ``path``."""
    begin, end = f"<!-- {key} -->", f"<!-- /{key} -->"
    content = path.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise ValueError(
            f"{path.name} has no place for {key!r}: expected the lines {begin} and {end}"
        )
    before, rest = content.split(begin, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
