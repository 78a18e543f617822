"""A checkpoint larger than the memory it is quantized in, and a run that is killed ten times.

    python bench/streaming.py [--quick] [--layers 28 --hidden 3072 ...] [--folder DIR]

Makes a Llama of random weights shard by shard (by default the shape of a 3-billion-parameter one),
quantizes it with `tersor quantize`, and reads the peak of that process's resident memory from the
system. Then does it again with SIGKILL at ten random moments, each time started anew with the same
arguments, and compares all files by SHA-256. Writes bench/results/streaming.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import machine
from tersor.demo_model import library_documents
from tersor.demo_training import train_tokenizer
from tersor.report import TIMINGS

GIB = 1 << 30


def shapes(shape: argparse.Namespace) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Every shard of the checkpoint, by file name, as tensor names with their shapes."""
    h, i = shape.hidden, shape.intermediate
    kv = h // shape.heads * shape.kv_heads
    yield (
        "embeddings",
        {
            "model.embed_tokens.weight": (shape.vocabulary, h),
            "model.norm.weight": (h,),
        },
    )
    for layer in range(shape.layers):
        block = {
            "self_attn.q_proj.weight": (h, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, h),
            "mlp.gate_proj.weight": (i, h),
            "mlp.up_proj.weight": (i, h),
            "mlp.down_proj.weight": (h, i),
            "input_layernorm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
        }
        yield (
            f"layer-{layer:03d}",
            {f"model.layers.{layer}.{name}": size for name, size in block.items()},
        )


def make_checkpoint(folder: Path, shape: argparse.Namespace, device: str = "cpu") -> int:
    """Writes the checkpoint, one shard in memory at a time; returns its number of weights. device:
    that draws them."""
    folder.mkdir(parents=True)
    draw = torch.Generator(device).manual_seed(0)

    def tensor(size: tuple[int, ...]) -> Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        made = torch.empty(size, dtype=torch.bfloat16, device=device)
        return made.normal_(0, size[1] ** -0.5, generator=draw).cpu()

    index, weights = {}, 0
    for name, tensors in shapes(shape):
        file = f"model-{name}.safetensors"
        made = {key: tensor(size) for key, size in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        weights += sum(each.numel() for each in made.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 2 * weights}, "weight_map": index})
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    texts = library_documents()[:100]
    train_tokenizer(texts, min(2048, shape.vocabulary)).save_pretrained(folder)
    return weights


def memory_bound(model: Path, shape: argparse.Namespace) -> dict[str, int]:
    """One block, its Gram matrices (float32, one for each distinct input), one shard, and 1 GiB."""
    block = next(tensors for name, tensors in shapes(shape) if name != "embeddings")
    parts = {
        "block": 2 * sum(torch.Size(size).numel() for size in block.values()),
        "gram_matrices": 4 * (3 * shape.hidden**2 + shape.intermediate**2),
        "shard": max(file.stat().st_size for file in model.glob("*.safetensors")),
        "allowance": GIB,
    }
    return parts | {"bound": sum(parts.values())}


class Run:
    """`tersor quantize` in a process of its own; polls the peak of its resident memory."""

    def __init__(self, model: Path, out: Path, text: Path, settings: argparse.Namespace) -> None:
        self.peak = 0
        self.work = out.with_name(out.name + ".partial")
        self.begun: float | None = None  # seconds until there was something to lose
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tersor", "quantize", str(model), "--out", str(out)),
                *("--calibration", str(text), "--samples", str(settings.samples)),
                *("--seq-len", str(settings.seq_len)),
            ],
            stdout=subprocess.DEVNULL,
        )

    def wait(self, seconds: float | None = None) -> bool:
        """Until the process ends (True), or for so long."""
        while self.process.poll() is None:
            if seconds is not None and self.seconds > seconds:
                return False
            self.peak = max(self.peak, _peak_resident(self.process.pid))
            if self.begun is None and self.work.exists():
                self.begun = self.seconds
            time.sleep(0.02)
        if self.process.returncode:
            raise SystemExit(f"tersor quantize failed with {self.process.returncode}")
        return True

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def _peak_resident(pid: int) -> int:
    """VmHWM: ru_maxrss would count the memory of this process, which the child begins as."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return (
        1024 * int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) if "VmHWM" in status else 0
    )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, but for the one that holds seconds."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != TIMINGS:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            found[path.name] = digest.hexdigest()
    return found


def measure(folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    model, text = folder / "model", folder / "text.txt"
    start = time.perf_counter()
    weights = make_checkpoint(model, settings)
    text.write_text("\n\n".join(library_documents()[:100]), encoding="utf-8")
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(
        f"{weights / 1e9:.2f} billion weights, {stored / 1e9:.2f} GB, made in "
        f"{time.perf_counter() - start:.0f} s",
        flush=True,
    )

    whole = Run(model, folder / "whole", text, settings)
    whole.wait()
    seconds, bound = whole.seconds, memory_bound(model, settings)
    print(
        f"uninterrupted: {seconds:.0f} s, peak {whole.peak / GIB:.2f} GiB, bound "
        f"{bound['bound'] / GIB:.2f} GiB",
        flush=True,
    )

    draw, killed, peak = random.Random(settings.seed), [], 0
    while True:
        run = Run(model, folder / "killed", text, settings)
        # Together less than one whole run, so that there is something left to kill each time.
        begun = whole.begun or 0.0
        span = (seconds - begun) / settings.kills
        after = begun + draw.uniform(0, span) if len(killed) < settings.kills else None
        finished = run.wait(after)
        peak = max(peak, run.peak)
        if finished:
            break
        run.kill()
        killed.append(round(after or 0, 2))
        print(f"killed after {after:.1f} s", flush=True)
    first, second = digests(folder / "whole"), digests(folder / "killed")
    return {
        "weights": weights,
        "bytes": stored,
        "seconds": round(seconds, 1),
        "peak_resident_bytes": whole.peak,
        "bound_bytes": bound,
        "killed_after_seconds": killed,
        "peak_resident_bytes_of_killed_runs": peak,
        "identical": first == second,
        "sha256": first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few million weights")
    defaults = {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "kv-heads": 8}
    defaults |= {"vocabulary": 128256, "samples": 16, "seq-len": 256, "kills": 10, "seed": 0}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    settings = parser.parse_args()
    if settings.quick:
        settings.layers, settings.hidden, settings.intermediate = 4, 256, 768
        settings.heads, settings.kv_heads, settings.vocabulary = 4, 2, 4096
    folder = Path(tempfile.mkdtemp(prefix="streaming-", dir=settings.folder))
    try:
        result = measure(folder, settings)
    finally:
        shutil.rmtree(folder)
    bound = result["bound_bytes"]["bound"]
    under = (
        max(result["peak_resident_bytes"], result["peak_resident_bytes_of_killed_runs"]) <= bound
    )
    print(
        f"killed {len(result['killed_after_seconds'])} times and resumed: files "
        f"{'identical' if result['identical'] else 'DIFFER'}; peak "
        f"{'under' if under else 'OVER'} the bound"
    )
    if not settings.quick:
        shape = {name: value for name, value in vars(settings).items() if name != "folder"}
        print(machine.save("streaming", {"shape": shape, **result}))
    sys.exit(not (under and result["identical"]))


if __name__ == "__main__":
    main()
