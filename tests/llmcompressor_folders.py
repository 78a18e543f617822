"""Folders as llm-compressor writes them, by running it: one-shot GPTQ on a small random Llama.

`python tests/llmcompressor_folders.py OUT` made tests/data/llmcompressor, with llmcompressor
0.14.0.1 and compressed-tensors 0.20.0. Where llmcompressor is installed, the tests make the folders
anew.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tiny

SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
    "w4a16_asym": {
        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}
    },
    "w8a8": {
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
    },
}
VOCAB = 48
IDS = torch.arange(VOCAB).view(2, -1)


def make(out: Path, name: str, source: Path) -> None:
    """out/name: what llm-compressor makes of the model in `source`, and expected.safetensors: the
    logits of that model, still in memory, in float32."""
    from compressed_tensors.quantization import QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    samples = torch.randint(0, VOCAB, (16, 32), generator=torch.Generator().manual_seed(1))
    data = {"input_ids": samples.tolist(), "attention_mask": torch.ones_like(samples).tolist()}
    scheme = QuantizationScheme(targets=["Linear"], **SCHEMES[name])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    oneshot(
        model=model,
        dataset=Dataset.from_dict(data),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=32,
        num_calibration_samples=len(samples),
    )
    model.save_pretrained(out / name, save_compressed=True)
    (out / name / "recipe.yaml").unlink()
    with torch.no_grad():
        logits = model.float()(IDS).logits
    save_file({"logits": logits}, out / name / "expected.safetensors")


def small_model(folder: Path) -> Path:
    return tiny.save(folder, "llama", torch.bfloat16, num_hidden_layers=1, vocab_size=VOCAB)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        source = small_model(Path(temporary))
        for name in SCHEMES:
            make(Path(sys.argv[1]), name, source)
