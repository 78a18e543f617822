"""Reports of recipes as they come out of a run, made without one: the numbers are plausible and
mean nothing."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from tersor.recipes.stages import RecipeReport, Stage

LINEARS = {  # out and in features, in units of the hidden width
    "self_attn.q_proj": (1.0, 1.0),
    "self_attn.k_proj": (0.25, 1.0),
    "self_attn.v_proj": (0.25, 1.0),
    "self_attn.o_proj": (1.0, 1.0),
    "mlp.gate_proj": (2.75, 1.0),
    "mlp.up_proj": (2.75, 1.0),
    "mlp.down_proj": (1.0, 2.75),
}


def estimate(mean: float, error: float | None) -> dict[str, float | None]:
    return {"mean": mean, "error": error}


def quality(perplexity: float, kl: float, draw: random.Random) -> dict[str, Any]:
    """As Quality.to_dict() gives it."""
    return {
        "perplexity": estimate(perplexity, 0.012 * perplexity),
        "windows": 64,
        "tokens": 64 * 255,
        "nll": estimate(math.log(perplexity), 0.012),
        "delta": estimate(0.7 * kl, 0.05 * kl),
        "kl": estimate(kl, 0.03 * kl),
        "kl_99": 9 * kl,
        "top1": max(0.0, 1 - 1.2 * kl**0.5 * draw.uniform(0.9, 1.1)),
        "flips": min(1.0, 0.5 * kl**0.5),
    }


def speed(prefill: float, decode: float, weights: int) -> dict[str, Any]:
    return {
        "prefill": prefill,
        "decode": decode,
        "prompt": 256,
        "generated": 32,
        "runs": 5,
        "weights": weights,
        "resident": weights + 400_000_000,
        "peak": weights + 460_000_000,
    }


def layers(
    blocks: int, hidden: int, bits: float, scheme: str, method: str, sparsity: float, scale: float
) -> list[dict[str, Any]]:
    """Errors grow with depth, and more in down_proj, as they do."""
    draw, out = random.Random(blocks), []
    for block in range(blocks):
        for name, (n, k) in LINEARS.items():
            rows, columns = int(n * hidden), int(k * hidden)
            steep = 6 if "down" in name else 1
            out.append(
                {
                    "name": f"model.layers.{block}.{name}",
                    "shape": [rows, columns],
                    "scheme": scheme,
                    "method": method,
                    "error": scale * steep * (1 + block) ** 0.7 * draw.uniform(0.6, 1.6),
                    "sparsity": sparsity,
                    "tokens": 32768,
                    "bytes": int(rows * columns * bits / 8),
                    "notes": [],
                }
            )
    return out


def full(blocks: int = 6, hidden: int = 256) -> RecipeReport:
    """Every section: a pruning, a healing by distillation, a quantization, and a search."""
    draw = random.Random(0)
    weights = sum(int(n * hidden) * int(k * hidden) for n, k in LINEARS.values()) * blocks
    rest = 2 * 2048 * hidden * 2
    names = [layer["name"] for layer in layers(blocks, hidden, 16, "", "", 0, 1)]
    dense = {layer["name"]: layer["bytes"] for layer in layers(blocks, hidden, 16, "", "", 0, 1)}
    last = layers(blocks, hidden, 4.127, "W4A16", "gptq", 0.5, 2e-3)

    def measured(code: tuple[float, float], prose: tuple[float, float]) -> dict[str, Any]:
        return {"code": quality(*code, draw), "prose": quality(*prose, draw)}

    stages = [
        Stage(
            name="original",
            step=None,
            bytes=2 * weights + rest,
            parameters=weights + rest // 2,
            quality=measured((11.21, 0.0), (33.4, 0.0)),
            speed=speed(4210, 212, 2 * weights + rest),
            linears=dense,
        ),
        Stage(
            name="1 prune",
            step="prune",
            settings={"method": "sparsegpt", "pattern": "2:4", "damp": 0.01, "blocksize": 128},
            seconds=21.4,
            peak_bytes=812_000_000,
            bytes=2 * weights + rest,
            parameters=weights + rest // 2,
            sparsity=0.5,
            quality=measured((17.9, 0.431), (52.3, 0.512)),
            speed=speed(4630, 301, 2 * weights + rest),
            layers=layers(blocks, hidden, 16, "W16A16", "sparsegpt", 0.5, 8e-3),
            linears=dense,
            notes=["model.layers.0.mlp.down_proj: 3 of 704 inputs never fired in calibration"],
        ),
        Stage(
            name="2 heal by distillation",
            step="distill",
            settings={
                "loss": "reverse_kl",
                "alpha": 0.9,
                "temperature": 1.0,
                "learning_rate": 5e-5,
                "steps": 300,
                "text": ["corpora/python-standard-library/calibration-a.jsonl:content"] * 3,
            },
            seconds=4210.0,
            peak_bytes=1_912_000_000,
            bytes=2 * weights + rest,
            parameters=weights + rest // 2,
            sparsity=0.5,
            quality=measured((12.4, 0.094), (37.9, 0.133)),
            speed=speed(4590, 298, 2 * weights + rest),
            losses=[
                (
                    s,
                    {
                        "loss": 0.09 + 0.5 * math.exp(-s / 60) + 0.02 * draw.random(),
                        "distillation": 0.05 + 0.4 * math.exp(-s / 60) + 0.02 * draw.random(),
                    },
                )
                for s in range(0, 301, 5)
            ],
            linears=dense,
        ),
        Stage(
            name="3 quantize",
            step="quantize",
            settings={"bits": 4, "group": 128, "method": "gptq", "order": True, "clip": False},
            seconds=74.0,
            peak_bytes=690_000_000,
            bytes=int(weights * 4.127 / 8) + rest,
            parameters=weights + rest // 2,
            bits_per_weight=4.127,
            sparsity=0.5,
            quality=measured((12.9, 0.128), (39.5, 0.171)),
            speed=speed(6120, 455, int(weights * 4.127 / 8) + rest),
            layers=last,
            linears={name: layer["bytes"] for name, layer in zip(names, last, strict=True)},
        ),
    ]
    front = [
        {
            "bytes": int(1.6e6 * size),
            "kl": 0.9 / size**1.6 * draw.uniform(1, 1.5),
            "latency": 0.002 + 0.0004 * size * draw.uniform(0.9, 1.1),
        }
        for size in [1 + 0.25 * i for i in range(24)]
    ]
    return RecipeReport(
        model="demo-llama",
        recipe="edge-memory",
        steps=[
            {"prune": {"method": "sparsegpt", "pattern": "2:4"}},
            {"distill": {"loss": "reverse_kl", "steps": 300, "learning_rate": 5e-5}},
            {"quantize": {"bits": 4, "group": 128, "method": "gptq"}},
        ],
        versions={"python": "3.11.9", "tersor": "0.1.0", "torch": "2.13.0"},
        machine={"processor": "Some Processor 9000 @ 3.00GHz", "threads": 8, "isa": "avx512vnni"},
        stages=stages,
        front=front,
    )


def crowded() -> RecipeReport:
    """Forty blocks, eight stages, four texts and names as long as they come."""
    report = full(blocks=40, hidden=2048)
    report.model = "an-organisation__a-model-with-a-very-long-name-7b-instruct-v0.3-2026-11"
    last = report.stages[-1]
    texts = [f"{number} of a corpus" for number in ("one", "two", "three", "four")]
    for number in range(4, 8):
        step = replace(
            last,
            name=f"{number} a step that somebody has named at great length, again",
            quality=dict.fromkeys(texts, last.quality["code"]),
            settings={f"setting_number_{i}": "value" * i for i in range(9)},
        )
        report.stages.append(step)
    return report


def bare() -> RecipeReport:
    """The least that a run can leave: sizes of one step, nothing measured."""
    return RecipeReport(
        model="m",
        recipe="r.yaml",
        steps=[{"quantize": {"bits": 8}}],
        versions={},
        machine={},
        stages=[
            Stage("original", None, bytes=1000, parameters=500),
            Stage("1 quantize", "quantize", bytes=600, parameters=500, bits_per_weight=8.5),
        ],
    )
