"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe_machine(device: str = "cpu") -> dict[str, str | int]:
    """Processor, memory, threads and versions, as they belong beside every figure."""
    about: dict[str, str | int] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads used": torch.get_num_threads(),
        "memory (GiB)": round(_memory_bytes() / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "peft"):
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = "not installed"
    if device.startswith("cuda"):
        about["GPU"] = torch.cuda.get_device_name(device)
        about["CUDA"] = str(torch.version.cuda)
    return about


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
