"""The CUDA kernels on the GPU of this machine: built, checked, and timed against torch.

    python bench/cuda_linear.py [--quick] [--no-build] [--no-sanitizer]

Needs an NVIDIA GPU, nvcc, and Torch for CUDA. Builds tersor for this GPU into build/cuda (unless
--no-build says that the installed one is to be taken), and then, each in a process of its own:

1. checks every kernel at many shapes against float64, results poisoned before every call, and runs
   a part of that under compute-sanitizer (memcheck, racecheck);
2. runs the tests of the package that need a GPU;
3. measures what the device can do: a large copy, and a large product;
4. times one linear: graphs of several calls, on copies of the weight that are more than the caches
   hold, medians; against cuBLAS (torch's linear), torch's `_weight_int4pack_mm`, and bitsandbytes'
   NF4 where it is installed; with int8 activations on free group scales, on a two-level grid and
   with one scale a row too;
5. decodes and prefills Llama shapes of 1.1 and 8 billion random weights.

Writes bench/results/cuda_linear.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import gpu

GROUP = 128
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))  # n, k
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
CHECKED = ((64, 64), (80, 96), (256, 4112), (1040, 2048), (4096, 4096))
COPIES_BYTES = 400 << 20  # of a weight, so that no cache holds what comes next
MODELS = {  # Llama shapes: hidden, layers, heads, key-value heads, intermediate, vocabulary
    "1.1 B": (2048, 22, 32, 4, 5632, 32000),
    "8 B": (4096, 32, 32, 8, 14336, 128256),
}
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


# --- 1. right ------------------------------------------------------------------------------------


def weight(n: int, k: int, spec: Any, seed: int = 0) -> Any:
    from tersor.oracle import random_qweight

    return random_qweight(n, k, spec, torch.bfloat16, seed=seed)


def multiples(q: Any) -> Any:
    """The weight with scales on a two-level grid."""
    draw = torch.Generator().manual_seed(0)
    multipliers = torch.randint(1, 16, q.scales.shape, generator=draw)
    q.scales = (multipliers * 2.0**-9).bfloat16()
    return q


def int8(x: Tensor) -> Tensor:
    """The values that int8 activations stand for, float64 [m, k]."""
    scale = x.float().abs().amax(1, keepdim=True) / 127.5
    codes = (x.float() / scale).round().clamp(-128, 127)
    return codes.double() * scale.double()


def check(quick: bool) -> dict[str, Any]:
    """The largest error of each kernel in units of what float32 sums and one rounding allow; fails
    where it is more than one."""
    from tersor import ActSpec, QSpec, QuantLinear

    worst: dict[str, float] = {}
    specs = (QSpec(4, 32), QSpec(4, 64, False), QSpec(4, 128), QSpec(4, None, False),
             QSpec(8, 32, False), QSpec(8, 128), QSpec(8, None))  # fmt: skip
    draw = torch.Generator("cuda").manual_seed(time.time_ns() % (1 << 31))
    for n, k in CHECKED[: 3 if quick else None]:
        fitting = [spec for spec in specs if k % (spec.group or k) == 0]
        plain = [weight(n, k, spec) for spec in fitting]
        cases = [(q, activation) for q in plain for activation in (None, ActSpec())]
        cases += [
            (multiples(weight(n, k, spec)), ActSpec())
            for spec in fitting
            if spec.bits == 4 and spec.symmetric
        ]
        for q, activation in cases:
            layer = QuantLinear(q, activation=activation).to("cuda")
            w = layer.qweight().dequantize(torch.float64)
            for dtype in HALVES.values():
                for m in (1, 3, 8, 9, 16, 17, 32, 64, 65, 100, 128, 300):
                    x = torch.randn(m, k, device="cuda", generator=draw).to(dtype)
                    poison = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
                    del poison  # what the allocator hands out next
                    y = layer(x)
                    again = layer(x)
                    meant = x.double() if activation is None else int8(x)
                    exact, terms = meant @ w.T, meant.abs() @ w.abs().T
                    unit = torch.finfo(dtype).eps / 2
                    bound = (k + 8) * 2.0**-24 * terms + unit * exact.abs() + 1e-7
                    dense = m > 128 and activation is None
                    if dense:
                        bound += unit * terms
                    share = float(((y.double() - exact).abs() / bound).max())
                    name = f"{layer.scheme} {dtype} {'dequantized' if dense else 'kernel'}"
                    worst[name] = max(worst.get(name, 0.0), share)
                    same = torch.equal(y, again)
                    if not share <= 1 or not same:
                        what = f"{n} x {k}, {layer}, {dtype}, {m} tokens"
                        raise SystemExit(f"{what}: {share} of the bound, the same twice: {same}")
    worst |= check_codebooks(quick)
    return {name: round(share, 4) for name, share in worst.items()}


def codebook_layer(n: int, k: int, spec: Any) -> Any:
    from tersor import NF4Linear

    draw = torch.Generator("cuda").manual_seed(0)
    dense = torch.nn.Linear(k, n, bias=False, device="meta").to_empty(device="cuda")
    with torch.no_grad():
        dense.weight.normal_(generator=draw)
    return NF4Linear.from_linear(dense, spec)


def check_codebooks(quick: bool) -> dict[str, float]:
    """As check; values in 16 bits are off by half a unit in the last place."""
    from tersor import FP4, NF4

    worst: dict[str, float] = {}
    specs = (NF4(32), NF4(64), NF4(128, False), FP4(64))
    draw = torch.Generator("cuda").manual_seed(time.time_ns() % (1 << 31))
    for n, k in (*CHECKED[: 3 if quick else None], (37, 256)):
        for spec in specs:
            if k % spec.block:
                continue
            layer = codebook_layer(n, k, spec)
            w = layer.dequantize(torch.float64)
            for dtype in HALVES.values():
                for m in (1, 3, 8, 9, 16, 17, 32, 64):
                    x = torch.randn(m, k, device="cuda", generator=draw).to(dtype)
                    poison = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
                    del poison
                    y = layer(x)
                    exact, terms = x.double() @ w.T, x.double().abs() @ w.abs().T
                    unit = torch.finfo(dtype).eps / 2
                    bound = ((k + 10) * 2.0**-24 + 1.01 * unit) * terms + unit * exact.abs() + 1e-7
                    share = float(((y.double() - exact).abs() / bound).max())
                    name = f"{spec} {dtype}"
                    worst[name] = max(worst.get(name, 0.0), share)
                    same = torch.equal(y, layer(x))
                    if not share <= 1 or not same:
                        what = f"{n} x {k}, {spec}, {dtype}, {m} tokens"
                        raise SystemExit(f"{what}: {share} of the bound, the same twice: {same}")
    return worst


# --- 2. fast -------------------------------------------------------------------------------------


def weights(n: int, k: int) -> dict[str, Any]:
    from tersor import QSpec

    return {
        "tersor W4": weight(n, k, QSpec(4, GROUP)),
        "tersor W8": weight(n, k, QSpec(8, GROUP)),
        "tersor W4A8": weight(n, k, QSpec(4, GROUP)),
        "tersor W4A8 two-level": multiples(weight(n, k, QSpec(4, GROUP))),
        "tersor W8A8 row": weight(n, k, QSpec(8, None)),
    }


def candidates(n: int, k: int, x: Tensor) -> dict[str, list[Callable[[], object]]]:
    """For each engine a call on each of its copies of the weight."""
    from tersor import NF4, ActSpec, QuantLinear

    made: dict[str, list[Callable[[], object]]] = {}
    firsts: dict[str, tuple[Any, str]] = {
        name: (QuantLinear(q, activation=ActSpec() if "A8" in name else None).to("cuda"), "packed")
        for name, q in weights(n, k).items()
    }
    firsts["tersor NF4"] = (codebook_layer(n, k, NF4(64)), "ordered")
    for name, (first, tensor) in firsts.items():
        count = max(2, COPIES_BYTES // getattr(first, tensor).numel() + 1)
        layers = [first]
        for _ in range(count - 1):
            twin = type(first).__new__(type(first))
            twin.__dict__ = first.__dict__ | {"_buffers": dict(first._buffers)}
            setattr(twin, tensor, getattr(first, tensor).clone())
            layers.append(twin)
        made[name] = [lambda layer=layer: layer(x) for layer in layers]
    made |= bitsandbytes(n, k, x)
    dense = torch.randn(n, k, device="cuda").to(x.dtype)
    copies = [dense.clone() for _ in range(max(2, COPIES_BYTES // (2 * n * k) + 1))]
    made["torch"] = [lambda w=w: F.linear(x, w) for w in copies]
    if x.dtype == torch.bfloat16:
        made |= int4pack(n, k, x)
    return made


def int4pack(n: int, k: int, x: Tensor) -> dict[str, list[Callable[[], object]]]:
    bytes_ = torch.randint(256, (n, k // 2), dtype=torch.uint8, device="cuda")
    grid = torch.randn(k // GROUP, n, 2, device="cuda", dtype=torch.bfloat16)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
        torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, grid)
    except RuntimeError as error:
        print(f"_weight_int4pack_mm: {error}", file=sys.stderr)
        return {}
    copies = [packed.clone() for _ in range(max(2, COPIES_BYTES // (n * k // 2) + 1))]
    mm = torch.ops.aten._weight_int4pack_mm
    return {"torch int4pack": [lambda w=w: mm(x, w, GROUP, grid) for w in copies]}


def bitsandbytes(n: int, k: int, x: Tensor) -> dict[str, list[Callable[[], object]]]:
    """NF4 in blocks of 64 with double quantization, where the package is installed."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return {}
    dense = torch.randn(n, k, device="cuda").to(x.dtype)
    packed, state = bnb.functional.quantize_4bit(
        dense, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    copies = [packed.clone() for _ in range(max(2, COPIES_BYTES // packed.numel() + 1))]
    return {"bitsandbytes": [lambda w=w: bnb.matmul_4bit(x, w.t(), state) for w in copies]}


def kernels(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for n, k in SHAPES[: 1 if quick else None]:
        for m in TOKENS[:: 4 if quick else 1]:
            for name, dtype in HALVES.items():
                x = torch.randn(m, k, device="cuda").to(dtype)
                taken = {each: gpu.seconds(calls) for each, calls in candidates(n, k, x).items()}
                rows.append({"n": n, "k": k, "m": m, "dtype": name, "seconds": taken})
                torch.cuda.empty_cache()
    return rows


# --- 3. whole models -----------------------------------------------------------------------------


def models(quick: bool) -> list[dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    import tersor

    rows = []
    for name in list(MODELS)[: 1 if quick else None]:
        hidden, layers, heads, kv, ffn, vocabulary = MODELS[name]
        config = LlamaConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv, intermediate_size=ffn, vocab_size=vocabulary,
            max_position_embeddings=8192, torch_dtype="float16",
        )  # fmt: skip
        with torch.device("cuda"):
            torch.set_default_dtype(torch.float16)
            model = LlamaForCausalLM(config).eval()
            torch.set_default_dtype(torch.float32)
        for engine in ("float16", "tersor W4"):
            if engine != "float16":
                scheme = tersor.Scheme(tersor.QSpec(4, GROUP))
                tersor.swap_linears(model.cpu(), scheme, ignore=["lm_head"])
                model.cuda()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            rows.append({"model": name, "engine": engine, **whole(model, vocabulary)})
        del model
        torch.cuda.empty_cache()
    return rows


@torch.inference_mode()
def whole(model: Any, vocabulary: int, prompt: int = 2048, new: int = 64) -> dict[str, float]:
    ids = torch.randint(vocabulary, (1, prompt), device="cuda")

    def timed(call: Callable[[], object]) -> float:
        call()
        taken = []
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return median(taken)

    short = ids[:, :16]
    generate = {
        "do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0,
        "cache_implementation": "static",
    }  # fmt: skip
    return {
        "prefill_tokens_per_second": prompt / timed(lambda: model(ids, logits_to_keep=1)),
        "decode_tokens_per_second": new / timed(lambda: model.generate(short, **generate)),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


# --- the report ----------------------------------------------------------------------------------


def shown(rows: list[dict[str, Any]], limit: dict[str, float]) -> Table:
    table = Table(title="seconds of torch's float16 linear over ours; bytes of W4 over bandwidth")
    engines = ("W4", "W8", "W4A8", "W4A8 two-level", "W8A8 row", "NF4")
    heads = ("n", "k", "m", "dtype", *engines, "int4pack / W4", "bitsandbytes / NF4",
             "of bandwidth")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        taken, n, k = row["seconds"], row["n"], row["k"]
        moved = n * k * (4 + 16 / GROUP) / 8 + 2 * row["m"] * (n + k)
        share = moved / taken["tersor W4"] / limit["copy_bytes_per_second"]
        pack, peer = taken.get("torch int4pack"), taken.get("bitsandbytes")
        table.add_row(
            str(n), str(k), str(row["m"]), row["dtype"],
            *(f"{taken['torch'] / taken[f'tersor {engine}']:.2f}" for engine in engines),
            f"{pack / taken['tersor W4']:.2f}" if pack else "",
            f"{peer / taken['tersor NF4']:.2f}" if peer else "", f"{share:.0%}",
        )  # fmt: skip
    return table


def show(found: dict[str, Any]) -> None:
    out = Console()
    if isinstance(found.get("kernels"), list):
        out.print(shown(found["kernels"], found["limits"]))
    for name in found.keys() - {"kernels"}:
        out.print(f"{name}: {found[name]}", highlight=False)


if __name__ == "__main__":
    parts = {"check": check, "kernels": kernels, "models": models}
    gpu.run(__doc__, "cuda_linear", parts, ["test_cuda.py"], show)
