"""What every test shares."""

from __future__ import annotations

import os

# Before torch or tokenizers are loaded: tests run on small tensors, where more threads only cost,
# and a fork after tokenizers has started threads would print a warning.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)
