"""Settings every test runs under: no network, one thread, figures drawn to memory."""

from __future__ import annotations

import os

# On shared cores two OpenMP threads that wait for each other by spinning can be tens of times slower than one.
# Set before torch is imported, and again below in case a plug-in imported it first.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import torch

torch.set_num_threads(1)
