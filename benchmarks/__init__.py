"""Measurements of speed and memory. Each module is one command: `python -m benchmarks.engine`."""

from __future__ import annotations

import os

# Before torch is imported: its profiler, which reads off memory here, otherwise logs every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
