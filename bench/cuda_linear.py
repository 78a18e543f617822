"""The CUDA kernels on the GPU of this machine: built, checked, and timed against torch.

    python bench/cuda_linear.py [--quick] [--no-build] [--no-sanitizer]

Needs an NVIDIA GPU, nvcc, and Torch for CUDA. Builds tersor for this GPU into build/cuda (unless
--no-build says that the installed one is to be taken), and then, each in a process of its own:

1. checks every kernel at many shapes against float64, results poisoned before every call, and runs
   a part of that under compute-sanitizer (memcheck, racecheck);
2. runs the tests of the package that need a GPU;
3. measures what the device can do: a large copy, and a large product;
4. times one linear: graphs of several calls, on copies of the weight that are more than the caches
   hold, medians: all kinds of layers; against cuBLAS (torch's linear and `_int_mm`), torch's
   `_weight_int4pack_mm` and 2:4, and where they are installed Marlin and bitsandbytes;
5. decodes and prefills Llama shapes of 1.1 and 8 billion random weights;
6. asks Nsight Compute, where it is installed, what bounds the kernels.

Writes bench/results/cuda_linear.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    multipliers = torch.randint(1, 16, q.scales.shape, generator=draw).to(q.scales.device)
    q.scales = (multipliers * 2.0**-9).bfloat16()
    return q


def int8(x: Tensor, threshold: float = float("inf"), scale: Tensor | None = None) -> Tensor:
    """The values that int8 activations stand for, float64 [m, k]; columns with a larger one than
    the threshold stay as they are. scale: of static ones."""
    beyond = (x.float().abs() > threshold).any(0)
    rest = x.float().masked_fill(beyond, 0)
    if scale is None:
        scale = rest.abs().amax(1, keepdim=True) / 127.5
    codes = (rest / torch.where(scale > 0, scale, 1)).round().clamp(-128, 127)
    return torch.where(beyond, x.double(), codes.double() * scale.double())


@dataclass
class Case:
    """layer: on the GPU. w: float64 [n, k]. meant: what x stands for. dense: the tokens from which
    on the weight is dequantized to 16 bits; rounds: whether its values always are."""

    name: str
    layer: Any
    w: Tensor
    meant: Callable[[Tensor], Tensor] = Tensor.double
    dense: int | None = 129
    rounds: bool = False


def cases(n: int, k: int) -> Iterator[Case]:
    from tersor import FP4, NF4, ActSpec, QSpec, QuantLinear, SparseLinear, use_sparse
    from tersor.kernels import PATTERN
    from tersor.oracle import random_qweight, random_values

    def case(
        q: Any, activation: Any = None, name: str = "", scale: Any = None, **rest: Any
    ) -> Case:
        layer = QuantLinear(q, activation=activation, input_scale=scale).to("cuda")
        w = layer.qweight().dequantize(torch.float64)
        return Case(name or str(layer.scheme), layer, w, **rest)

    def outlying(x: Tensor) -> Tensor:
        return int8(x, 2.5)

    def fixed(x: Tensor) -> Tensor:
        return int8(x, scale=torch.tensor(0.013, device=x.device))

    for spec in (QSpec(4, 32), QSpec(4, 64, False), QSpec(4, 128), QSpec(4, None, False),
                 QSpec(8, 32, False), QSpec(8, 128), QSpec(8, None)):  # fmt: skip
        if k % (spec.group or k):
            continue
        yield case(weight(n, k, spec))
        yield case(weight(n, k, spec), ActSpec(), meant=int8, dense=None)
        static, scale = ActSpec(dynamic=False), torch.tensor(0.013)
        yield case(weight(n, k, spec), static, scale=scale, meant=fixed, dense=None)
        mixed = ActSpec(outliers=2.5)
        yield case(weight(n, k, spec), mixed, "LLM.int8()", meant=outlying, dense=None)
        if spec.bits == 4 and spec.symmetric:
            q = multiples(weight(n, k, spec))
            yield case(q, ActSpec(), "W4A8 two-level", meant=int8, dense=None)
        if spec.bits == 4:
            use_sparse("always")
            q = random_qweight(n, k, spec, torch.bfloat16, pattern=PATTERN)
            yield case(q, name="W4 2:4")
            use_sparse("auto")
    for dtype in HALVES.values():
        sparse = SparseLinear(random_values(n, k, dtype).cuda())
        yield Case("W16 2:4", sparse, sparse.weight.double())
    for book in (NF4(32), NF4(64), NF4(128, False), FP4(64)):
        if k % book.block == 0:
            layer = codebook_layer(n, k, book)
            w = layer.dequantize(torch.float64)
            yield Case(str(book), layer, w, dense=65, rounds=True)


def check(quick: bool) -> dict[str, Any]:
    """The largest error of each kernel in units of what float32 sums and one rounding allow; fails
    where it is more than one."""
    worst: dict[str, float] = {}
    draw = torch.Generator("cuda").manual_seed(time.time_ns() % (1 << 31))
    for n, k in CHECKED[: 3 if quick else None]:
        for each in cases(n, k):
            for dtype in HALVES.values():
                if each.name == "W16 2:4" and each.layer.dtype != dtype:
                    continue
                for m in (1, 3, 8, 9, 16, 17, 32, 64, 65, 100, 128, 300):
                    share = error(each, m, dtype, draw)
                    dense = each.dense is not None and m >= each.dense
                    name = f"{each.name} {dtype} {'dequantized' if dense else 'kernel'}"
                    worst[name] = max(worst.get(name, 0.0), share)
                    if not share <= 1:
                        what = f"{n} x {k}, {each.layer}, {dtype}, {m} tokens"
                        raise SystemExit(f"{what}: {share} of the bound")
    return {name: round(share, 4) for name, share in worst.items()}


def error(each: Case, m: int, dtype: torch.dtype, draw: torch.Generator) -> float:
    """The largest share of the bound; infinite where two calls differ."""
    n, k = each.w.shape
    x = torch.randn(m, k, device="cuda", generator=draw).to(dtype)
    poison = torch.full((m, n), float("nan"), device="cuda", dtype=dtype)
    del poison  # what the allocator hands out next
    y = each.layer(x)
    if not torch.equal(y, each.layer(x)):
        return float("inf")
    meant = each.meant(x)
    exact, terms = meant @ each.w.T, meant.abs() @ each.w.abs().T
    unit = torch.finfo(dtype).eps / 2
    bound = (k + 10) * 2.0**-23 * terms + unit * exact.abs() + 1e-7
    if each.rounds or (each.dense is not None and m >= each.dense):
        bound += 1.01 * unit * terms
    return float(((y.double() - exact).abs() / bound).max())


def codebook_layer(n: int, k: int, spec: Any) -> Any:
    from tersor import NF4Linear

    torch.manual_seed(0)
    dense = torch.nn.Linear(k, n, bias=False, device="cuda")
    return NF4Linear.from_linear(dense, spec)


# --- 2. fast -------------------------------------------------------------------------------------


Calls = list[Callable[[], object]]
Engine = Callable[[Tensor], Calls]  # for a call on x a call of each copy of the weight; or none


def random_weight(n: int, k: int, spec: Any, sparse: bool = False) -> Any:
    """A symmetric weight made on the GPU. sparse: with 2:4 zeros."""
    from tersor import QWeight

    codes = torch.randint(spec.levels, (n, k), dtype=torch.uint8, device="cuda")
    if sparse:
        order = torch.rand(n, k // 4, 4, device="cuda").argsort(-1).view(n, k)
        codes[order > 1] = spec.midpoint
    scales = torch.rand(n, spec.groups(k), device="cuda") / 256 + 2.0**-9
    return QWeight(spec, codes, scales.bfloat16())


def copies_of(layer: Any, tensor: str) -> list[Any]:
    """The layer as often as no cache holds it. tensor: of the weight."""
    layers = [layer]
    for _ in range(max(1, COPIES_BYTES // getattr(layer, tensor).nbytes)):
        twin = type(layer).__new__(type(layer))
        twin.__dict__ = layer.__dict__ | {"_buffers": dict(layer._buffers)}
        setattr(twin, tensor, getattr(layer, tensor).clone())
        layers.append(twin)
    return layers


def each_layer(layers: list[Any]) -> Engine:
    return lambda x: [lambda layer=layer: layer(x) for layer in layers]


def sharing(layers: list[Any]) -> Engine:
    """The first makes int8 of x for all, as the first of those that read it does in a model."""
    from tersor.cuda_int8 import share

    share(layers)
    return each_layer(layers)


def ours(n: int, k: int, dtype: torch.dtype) -> dict[str, Engine]:
    from tersor import NF4, ActSpec, QSpec, QuantLinear, SparseLinear, use_sparse

    w4, w8, row, int8_ = QSpec(4, GROUP), QSpec(8, GROUP), QSpec(8, None), ActSpec()
    static, scale = ActSpec(dynamic=False), torch.tensor(0.03)
    use_sparse("never")
    made = {
        "W4": QuantLinear(random_weight(n, k, w4)),
        "W8": QuantLinear(random_weight(n, k, w8)),
        "W4A8": QuantLinear(random_weight(n, k, w4), activation=int8_),
        "W4A8 two-level": QuantLinear(multiples(random_weight(n, k, w4)), activation=int8_),
        "W8A8 row": QuantLinear(random_weight(n, k, row), activation=int8_),
        "W8A8 static": QuantLinear(random_weight(n, k, row), None, static, input_scale=scale),
    }
    use_sparse("always")
    made["W4 2:4"] = QuantLinear(random_weight(n, k, w4, sparse=True))
    made["W16 2:4"] = SparseLinear(two_four(n, k, dtype))
    use_sparse("auto")
    engines = {name: each_layer(copies_of(layer, "packed")) for name, layer in made.items()}
    engines["NF4"] = each_layer(copies_of(codebook_layer(n, k, NF4(64)), "ordered"))
    engines["W8A8 shared"] = sharing(copies_of(made["W8A8 row"], "packed"))
    outliers = ActSpec(outliers=6.0)
    mixed = QuantLinear(random_weight(n, k, row), activation=outliers)
    engines["LLM.int8()"] = with_outliers(copies_of(mixed, "packed"))
    return {f"tersor {name}": engine for name, engine in engines.items()}


def two_four(n: int, k: int, dtype: torch.dtype) -> Tensor:
    order = torch.rand(n, k // 4, 4, device="cuda").argsort(-1).view(n, k)
    return torch.randn(n, k, device="cuda", dtype=dtype).masked_fill_(order > 1, 0)


def with_outliers(layers: list[Any]) -> Engine:
    """Every 512th column of x holds a large value."""

    def calls(x: Tensor) -> Calls:
        x = x.clone()
        x[:, ::512] *= 20
        x[0, ::512] = 20
        return [lambda layer=layer: layer(x) for layer in layers]

    return calls


def peers(n: int, k: int, dtype: torch.dtype) -> dict[str, Engine]:
    dense = torch.randn(n, k, device="cuda", dtype=dtype)
    copies = [dense.clone() for _ in range(max(2, COPIES_BYTES // dense.nbytes + 1))]
    engines: dict[str, Engine] = {
        "torch": lambda x: [lambda w=w: F.linear(x, w) for w in copies],
        "torch int8": torch_int8(n, k),
    }
    made = {
        "torch 2:4": lambda: torch_sparse(two_four(n, k, dtype)),
        "torch int4pack": lambda: int4pack(n, k, dtype),
        "Marlin": lambda: marlin(n, k, dtype),
        "bitsandbytes NF4": lambda: bitsandbytes_nf4(dense),
        "bitsandbytes LLM.int8()": lambda: bitsandbytes_int8(dense),
    }
    for name, make in made.items():
        try:
            engine = make()
            engine(torch.randn(32, k, device="cuda", dtype=dtype))[0]()
        except (ImportError, RuntimeError, NotImplementedError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0][:120]}", file=sys.stderr)
        else:
            engines[name] = engine
    return engines


def torch_int8(n: int, k: int) -> Engine:
    """cuBLAS's product of int8 alone, without scales and the rounding of x; from 17 tokens on."""
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
    copies = [w.clone() for _ in range(max(2, COPIES_BYTES // w.nbytes + 1))]

    def calls(x: Tensor) -> Calls:
        codes = torch.randint(-128, 128, x.shape, dtype=torch.int8, device="cuda")
        return [lambda w=w: torch._int_mm(codes, w.t()) for w in copies if len(x) > 16]

    return calls


def torch_sparse(w: Tensor) -> Engine:
    """cuSPARSELt, or CUTLASS, through torch."""
    first = torch.sparse.to_sparse_semi_structured(w)
    copies = [first]
    for _ in range(max(1, COPIES_BYTES // w.nbytes)):
        copies.append(torch.sparse.to_sparse_semi_structured(w.clone()))
    return lambda x: [lambda w=w: F.linear(x, w) for w in copies]


def int4pack(n: int, k: int, dtype: torch.dtype) -> Engine:
    if dtype != torch.bfloat16:
        raise NotImplementedError("it takes bfloat16 alone")
    bytes_ = torch.randint(256, (n, k // 2), dtype=torch.uint8, device="cuda")
    grid = torch.randn(k // GROUP, n, 2, device="cuda", dtype=torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
    copies = [packed.clone() for _ in range(max(2, COPIES_BYTES // packed.nbytes + 1))]
    mm = torch.ops.aten._weight_int4pack_mm
    return lambda x: [lambda w=w: mm(x, w, GROUP, grid) for w in copies]


def marlin(n: int, k: int, dtype: torch.dtype) -> Engine:
    from marlin import Layer

    if dtype != torch.float16:
        raise NotImplementedError("it takes float16 alone")
    layer = Layer(k, n, GROUP).cuda()
    layer.B.random_()
    layer.s.normal_()
    return each_layer(copies_of(layer, "B"))


def bitsandbytes_nf4(dense: Tensor) -> Engine:
    """Blocks of 64 with double quantization."""
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(
        dense, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    copies = [packed.clone() for _ in range(max(2, COPIES_BYTES // packed.nbytes + 1))]
    return lambda x: [lambda w=w: bnb.matmul_4bit(x, w.t(), state) for w in copies]


def bitsandbytes_int8(dense: Tensor) -> Engine:
    import bitsandbytes as bnb

    n, k = dense.shape
    layers = []
    for _ in range(max(2, COPIES_BYTES // (n * k) + 1)):
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.load_state_dict({"weight": dense.half().cpu()})
        layers.append(layer.cuda())
    return with_outliers(layers)


def kernels(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for n, k in SHAPES[: 1 if quick else None]:
        for name, dtype in HALVES.items():
            engines = ours(n, k, dtype) | peers(n, k, dtype)
            for m in TOKENS[:: 4 if quick else 1]:
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                calls = {each: engine(x) for each, engine in engines.items()}
                taken = {each: gpu.seconds(made) for each, made in calls.items() if made}
                rows.append({"n": n, "k": k, "m": m, "dtype": name, "seconds": taken})
            del engines, calls
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


@torch.inference_mode()
def profile(quick: bool) -> None:
    """A call of each of our kernels at one shape, for few tokens and for many."""
    n, k = SHAPES[1]
    for m in (1, 64)[: 1 if quick else None]:
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)
        for engine in ours(n, k, torch.float16).values():
            engine(x)[0]()


# --- the report ----------------------------------------------------------------------------------


RATIOS = {  # a peer's seconds over ours
    "W4": ("torch", "tersor W4"),
    "W8": ("torch", "tersor W8"),
    "W4A8": ("torch", "tersor W4A8"),
    "two-level": ("torch", "tersor W4A8 two-level"),
    "W8A8": ("torch", "tersor W8A8 row"),
    "static": ("torch", "tersor W8A8 static"),
    "x shared": ("torch", "tersor W8A8 shared"),
    "W8A8 / int8": ("torch int8", "tersor W8A8 row"),
    "LLM.int8()": ("bitsandbytes LLM.int8()", "tersor LLM.int8()"),
    "NF4": ("torch", "tersor NF4"),
    "NF4 / bnb": ("bitsandbytes NF4", "tersor NF4"),
    "W4 / int4pack": ("torch int4pack", "tersor W4"),
    "W4 / Marlin": ("Marlin", "tersor W4"),
    "W4 2:4": ("torch", "tersor W4 2:4"),
    "2:4 / W4": ("tersor W4", "tersor W4 2:4"),
    "W16 2:4": ("torch", "tersor W16 2:4"),
    "W16 / torch 2:4": ("torch 2:4", "tersor W16 2:4"),
}


def shown(rows: list[dict[str, Any]], limit: dict[str, float]) -> Table:
    """Of torch's 16-bit linear where a column names no other."""
    table = Table(title="seconds of a peer over ours; of a copy's bytes, and cuBLAS's flop, W4")
    for head in ("n", "k", "m", "dtype", *RATIOS, "of bandwidth", "of tensor cores"):
        table.add_column(head, justify="right")
    for row in rows:
        taken, n, k = row["seconds"], row["n"], row["k"]
        moved = n * k * (4 + 16 / GROUP) / 8 + 2 * row["m"] * (n + k)
        share = moved / taken["tersor W4"] / limit["copy_bytes_per_second"]
        ratios = (
            f"{taken[peer] / taken[mine]:.2f}" if peer in taken and mine in taken else ""
            for peer, mine in RATIOS.values()
        )
        done = 2 * n * k * row["m"] / taken["tersor W4"] / limit["float16_flop_per_second"]
        shares = f"{share:.0%}", f"{done:.0%}"
        table.add_row(str(n), str(k), str(row["m"]), row["dtype"], *ratios, *shares)
    return table


def show(found: dict[str, Any]) -> None:
    out = Console()
    if isinstance(found.get("kernels"), list):
        out.print(shown(found["kernels"], found["limits"]))
    for name in found.keys() - {"kernels"}:
        out.print(f"{name}: {found[name]}", highlight=False)


if __name__ == "__main__":
    parts = {"check": check, "kernels": kernels, "models": models, "profile": profile}
    tested = ["test_cuda.py", "test_gpu_codebook.py", "test_gpu_sparse.py"]
    gpu.run(__doc__, "cuda_linear", parts, tested, show)
