"""Qwen2 (biases on q, k and v) and Qwen3 (norms on q and k): to a tap, both are Llama."""

from dataclasses import replace

from tersor.models.llama import LLAMA

QWEN2 = replace(LLAMA, name="qwen2")
QWEN3 = replace(LLAMA, name="qwen3")
