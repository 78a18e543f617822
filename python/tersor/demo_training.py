"""Trains the demo model: a byte-level BPE tokenizer and a small Llama, in about two minutes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 512  # positions that the saved model claims; rotary embeddings reach beyond training


@dataclass(frozen=True)
class Training:
    """The model's shape and how it is trained.

    Every input width (hidden, intermediate) is a multiple of 128, so that the usual groups fit.
    muon, adamw: peak learning rates of the block matrices, and of embeddings and norms.
    seconds: where this is not enough for all the steps, the schedule is compressed into it. It is
        several times what they take, so that the number of steps and not the clock makes the model,
        on a slow or busy machine too.
    """

    hidden: int = 256
    intermediate: int = 768
    layers: int = 6
    heads: int = 4
    key_value_heads: int = 2
    length: int = 256
    batch: int = 8
    steps: int = 260
    warmup: int = 10
    muon: float = 0.03
    adamw: float = 0.01
    seconds: float = 600.0
    seed: int = 0


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. It adds no special tokens to a text by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )


def train(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], recipe: Training
) -> tuple[LlamaForCausalLM, dict[str, object]]:
    """A trained model in float32, and a record of the training.

    Windows of the texts are drawn in a fixed order; the global random state is left as it was.
    """
    windows = _windows(tokenizer, texts, recipe.length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _model(tokenizer, recipe)
        batches = windows[torch.randperm(len(windows))].split(recipe.batch)
    return model, _optimize(model, batches, recipe)


def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    recipe: Training,
) -> dict[str, object]:
    """Goes on training a model, such as one that was made smaller, in place; a record of it.

    model: in float32. recipe: its rates, steps, batches and seed; the model has its own shape.
        Rates are best a part of those that the model was first trained with.
    """
    windows = _windows(tokenizer, texts, recipe.length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))
    return _optimize(model, windows[order].split(recipe.batch), recipe)


def _optimize(
    model: LlamaForCausalLM, batches: Sequence[Tensor], recipe: Training
) -> dict[str, object]:
    """Muon for the matrices of the blocks and AdamW for the rest, in place; the model is in
    evaluation mode afterwards."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    ids_of_matrices = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids_of_matrices]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    dtype = _faster_dtype(recipe)
    muon = Muon(matrices, dtype)

    losses: list[float] = []
    start = time.perf_counter()
    console = Console(stderr=True)
    steps = track(range(recipe.steps), "training", console=console, disable=not console.is_terminal)
    for step in steps:
        # How much of the training is over: by the steps, unless the clock is ahead of them.
        done = max(step / recipe.steps, (time.perf_counter() - start) / recipe.seconds)
        if done >= 1:
            break
        ids = batches[step % len(batches)]
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        rate = min((step + 1) / recipe.warmup, 1 - done)
        muon.step(rate * recipe.muon)
        adamw.param_groups[0]["lr"] = rate * recipe.adamw
        adamw.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    record: dict[str, object] = {
        "steps": len(losses),
        "steps_planned": recipe.steps,
        "tokens": len(losses) * recipe.batch * recipe.length,
        "seconds": round(time.perf_counter() - start, 1),
        "loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "autocast": str(dtype).removeprefix("torch."),
    }
    model.eval()
    return record


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """An ordinary Hugging Face checkpoint in bfloat16, with its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _windows(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> Tensor:
    """All texts, each after an end of text, as int64 [count, length]."""
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    ids = [token for text in encoded for token in (tokenizer.bos_token_id, *text)]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def _model(tokenizer: PreTrainedTokenizerFast, recipe: Training) -> LlamaForCausalLM:
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def _faster_dtype(recipe: Training) -> torch.dtype:
    """bfloat16 where this processor multiplies it faster than float32, which not all do."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(recipe.batch * recipe.length, recipe.hidden, dtype=dtype)
        w = torch.ones(recipe.hidden, recipe.intermediate, dtype=dtype)
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            x @ w
            taken.append(time.perf_counter() - start)
        return min(taken)

    return min((torch.bfloat16, torch.float32), key=seconds)


class Muon:
    """Momentum whose update is the nearest orthogonal matrix (Jordan et al., 2024,
    https://kellerjordan.github.io/posts/muon). With so few tokens it learns about twice as much
    from each as AdamW. Matrices of one shape are stacked, so that a step is a few large products.
    """

    def __init__(
        self, matrices: list[nn.Parameter], dtype: torch.dtype, momentum: float = 0.95
    ) -> None:
        self.dtype, self.momentum = dtype, momentum
        self.stacks: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in matrices:
            self.stacks.setdefault((min(p.shape), max(p.shape)), []).append(p)
        self.means = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.stacks.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, parameters in self.stacks.items():
            # Wide matrices, whose products with their own transpose are the small ones.
            turned = [tuple(p.shape) != shape for p in parameters]
            pairs = list(zip(parameters, turned, strict=True))
            grad = torch.stack([p.grad.mT if turn else p.grad for p, turn in pairs])
            mean = self.means[shape].lerp_(grad, 1 - self.momentum)
            updates = orthogonal(grad.lerp(mean, self.momentum).to(self.dtype))
            for (p, turn), update in zip(pairs, updates, strict=True):
                scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.sub_(update.mT if turn else update, alpha=rate * scale)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Roughly U Vᵀ of each x = U S Vᵀ, [..., rows, columns] with rows ≤ columns: singular values
    between 0.7 and 1.2, by a quintic Newton-Schulz iteration."""
    y = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = y @ y.mT
        y = 3.4445 * y + (2.0315 * square @ square - 4.775 * square) @ y
    return y
