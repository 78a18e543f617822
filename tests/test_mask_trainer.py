"""Masks in models of transformers and under its Trainer: checkpoints, resuming, saving, groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainingArguments

import tiny
from tersor.errors import TersorError
from tersor.pruning import Magnitude, Movement, Schedule, SoftMovement
from tersor.sparsity import Sparsity
from tersor.surgery.shrink import shrink_checkpoint
from tersor.training.masking import HoldZeros, MaskTraining, Structured, prune_by_gradient

STEPS = 10
SCHEDULE = Schedule(warmup=2, ramp=5, cooldown=2)


class Texts(torch.utils.data.Dataset):
    """Sixteen texts of random tokens."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.ids = torch.randint(2, tiny.VOCAB, (16, 12), generator=draw)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[at], "labels": self.ids[at]}


def trainer(model: nn.Module, folder: Path, callbacks: list[Any], **settings: Any) -> Trainer:
    pytest.importorskip("accelerate")
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    arguments = TrainingArguments(str(folder), **(defaults | settings))
    return Trainer(model, arguments, train_dataset=Texts(), callbacks=callbacks)


def run(model: nn.Module, masks: MaskTraining, steps: int) -> None:
    """A plain loop."""
    ids = Texts().ids
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    for step in range(steps):
        part = ids[step % 4 :: 4].contiguous()
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.step()


def reopened(folder: Path, auto: type = AutoModelForCausalLM) -> nn.Module:
    """By plain transformers, which must miss nothing and find nothing more."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    made: nn.Module = model
    return made


@pytest.mark.parametrize(
    "criterion", ["movement", "magnitude", SoftMovement(20.0, rate=0.2, threshold=0.4)]
)
def test_a_resumed_training_gives_the_same_bits(criterion: Any, tmp_path: Path) -> None:
    soft = isinstance(criterion, SoftMovement)
    sparsity = None if soft else Sparsity(0.75)
    whole, again = tiny.model("llama"), tiny.model("llama")
    trainer(
        whole,
        tmp_path / "whole",
        [MaskTraining(sparsity, SCHEDULE, criterion)],
        save_strategy="steps",
        save_steps=4,
    ).train()
    masks = MaskTraining(sparsity, SCHEDULE, criterion)
    resumed = trainer(again, tmp_path / "again", [masks])
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert masks.model is None and type(again.model.layers[0].mlp.up_proj) is nn.Linear
    theirs = again.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    for block in whole.model.layers:
        zero = int((block.mlp.up_proj.weight == 0).sum()) / block.mlp.up_proj.weight.numel()
        assert 0 < zero < 1 if soft else zero == 0.75


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_what_is_saved_is_an_ordinary_checkpoint(kind: str, tmp_path: Path) -> None:
    model = tiny.model(kind)
    names = list(model.state_dict())
    masks = MaskTraining(Sparsity(pattern=(2, 4)), SCHEDULE).attach(model.train())
    run(model, masks, STEPS)
    with torch.no_grad():
        before = model.eval()(input_ids=Texts().ids).logits
    pruned = masks.finish()
    assert list(model.state_dict()) == names
    assert pruned.sparsity == 0.5
    model.save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    other = reopened(tmp_path, auto)
    with torch.no_grad():
        assert torch.equal(other(input_ids=Texts().ids).logits, before)
    for name in pruned.layers:
        linear = other.get_submodule(name)
        w = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
        assert bool(((w.reshape(-1, 4) == 0).sum(1) == 2).all()), name


def test_the_callback_trains_as_the_loop_does(tmp_path: Path) -> None:
    """The trainer's own loss, in one batch a step, with its order of texts and no clipping."""
    settings = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16}
    mine, its = tiny.model("llama").train(), tiny.model("llama")
    masks = MaskTraining(Sparsity(0.5), SCHEDULE)
    trainer(
        its,
        tmp_path,
        [masks],
        **settings,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        train_sampling_strategy="sequential",
    ).train()
    loop = MaskTraining(Sparsity(0.5), SCHEDULE).attach(mine)
    optimizer = torch.optim.AdamW(mine.parameters(), 1e-3, weight_decay=0.1)
    ids = Texts().ids
    for _ in range(STEPS):
        mine(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loop.step()
    loop.finish()
    both = zip(mine.model.layers, its.model.layers, strict=True)
    for a, b in both:
        agree = (a.mlp.up_proj.weight == 0) == (b.mlp.up_proj.weight == 0)
        assert float(agree.float().mean()) > 0.99  # norms are not decayed by the trainer


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_teaches_the_same(reentrant: bool) -> None:
    heard = []
    for checkpointing in (False, True):
        model = tiny.model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        MaskTraining(Sparsity(0.5), Schedule(2)).attach(model)
        model(input_ids=Texts().ids, labels=Texts().ids).loss.backward()
        heard.append(model.model.layers[1].mlp.up_proj.parametrizations.weight[0].unit.heard)
    assert bool(heard[0].any())
    torch.testing.assert_close(heard[0], heard[1])


def test_training_after_pruning_under_the_trainer(tmp_path: Path) -> None:
    model = tiny.model("llama")
    MaskTraining(Sparsity(pattern=(2, 4)), Schedule(), Magnitude()).attach(model).finish()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    held = HoldZeros()
    training = trainer(
        model, tmp_path, [held], max_grad_norm=0.5, save_strategy="steps", save_steps=4
    )
    training.train()
    assert held.model is None
    after = {name: t.clone() for name, t in model.state_dict().items()}
    assert list(after) == list(before)
    for name, tensor in before.items():
        if "_proj" in name:
            assert torch.equal(after[name] == 0, tensor == 0), name
            assert not torch.equal(after[name], tensor)
    with torch.no_grad():  # resumed, the same
        model.load_state_dict(before)
    resumed = trainer(model, tmp_path / "again", [HoldZeros()], max_grad_norm=0.5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, after[name]), name
    training.save_model(str(tmp_path / "saved"))
    reopened(tmp_path / "saved")


def test_trainings_that_do_not_fit_the_masks(tmp_path: Path) -> None:
    masks = MaskTraining(Sparsity(0.5), Schedule(2, 5, cooldown=4))
    with pytest.raises(TersorError, match="the schedule has 11 steps and the training 10"):
        trainer(tiny.model("llama"), tmp_path, [masks]).train()
    dense = tmp_path / "dense"
    trainer(tiny.model("llama"), dense, [], save_strategy="steps", save_steps=4).train()
    masks = MaskTraining(Sparsity(0.5), SCHEDULE)
    training = trainer(tiny.model("llama"), tmp_path, [masks])
    with pytest.raises(TersorError, match="begins at step 4 and the masks have done 0"):
        training.train(resume_from_checkpoint=str(dense / "checkpoint-4"))
    other = MaskTraining(Sparsity(0.5), SCHEDULE).attach(tiny.model("llama"))
    with pytest.raises(TersorError, match="another model than the one with the masks"):
        trainer(tiny.model("llama"), tmp_path, [other]).train()


def test_a_training_that_stops_early_keeps_the_masks(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    model = tiny.model("llama")
    masks = MaskTraining(Sparsity(0.5), SCHEDULE)
    with pytest.raises(TersorError, match=r"prunes for 7 steps and 4 are done.*early=True"):
        trainer(model, tmp_path, [masks, Stop()]).train()
    assert masks.done == 4
    share = 0.5 * (1 - (1 - 2 / 5) ** 3)
    assert masks.finish(early=True).sparsity == pytest.approx(share, abs=1e-3)


# Groups.


def test_the_gradient_of_a_group_is_that_of_a_factor_on_it() -> None:
    """Σ g W over a head is the derivative of the loss by a number that multiplies all of its
    weights, by central differences."""
    model = tiny.model("llama", torch.float64)
    ids = Texts().ids
    MaskTraining(Structured(heads=0.5, ffn=0.5), Schedule(3), Movement(adam=False)).attach(model)
    block = model.model.layers[1]

    def entropy() -> Tensor:  # transformers' own is in float32
        logits = model(input_ids=ids).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    entropy().backward()

    def loss(parts: list[tuple[Tensor, slice | tuple[slice, slice]]], factor: float) -> float:
        with torch.no_grad():
            for weight, at in parts:
                weight[at] *= factor
            value = float(entropy())
            for weight, at in parts:
                weight[at] /= factor
        return value

    def stored(linear: nn.Module) -> Tensor:
        weight: Tensor = linear.parametrizations.weight.original
        return weight

    attention, mlp = block.self_attn, block.mlp
    one, two = slice(16, 32), slice(32, 64)  # the second key-value head, and its two query heads
    head = [
        (stored(attention.q_proj), two),
        (stored(attention.k_proj), one),
        (stored(attention.v_proj), one),
        (stored(attention.o_proj), (slice(None), two)),
    ]
    at = slice(7, 8)
    channel = [
        (stored(mlp.gate_proj), at),
        (stored(mlp.up_proj), at),
        (stored(mlp.down_proj), (slice(None), at)),
    ]
    for linear, group, parts in ((attention.o_proj, 1, head), (mlp.down_proj, 7, channel)):
        slope = (loss(parts, 1 + 3e-3) - loss(parts, 1 - 3e-3)) / 6e-3
        heard = linear.parametrizations.weight[0].unit.heard
        assert float(heard[0, group]) == pytest.approx(slope, rel=5e-3)  # its norms are in float32


@pytest.mark.parametrize("criterion", ["movement", "taylor", "magnitude"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_pruned_groups_are_zero_and_can_be_cut_out(
    kind: str, criterion: str, tmp_path: Path
) -> None:
    model = tiny.model(kind)
    wanted = Structured(heads=0.5, ffn=0.33)  # 31.7 of 96 channels
    masks = MaskTraining(wanted, SCHEDULE, criterion).attach(model.train())
    run(model, masks, STEPS)
    pruned = masks.finish()
    for name, groups in pruned.groups.items():
        columns = model.get_submodule(name).weight
        size = 1 if columns.shape[1] == 96 else columns.shape[1] // 2
        dead = (columns == 0).all(0).view(-1, size).all(1)
        assert dead.nonzero().flatten().tolist() == groups
        assert len(groups) == len(dead) // (3 if size == 1 else 2)
    assert len(pruned.groups) == 4
    folder, small = tmp_path / "whole", tmp_path / "small"
    model.eval().save_pretrained(folder)
    whole = reopened(folder)
    shares = {"heads": wanted.heads, "ffn": wanted.ffn}
    shrink_checkpoint(folder, small, **shares, multiple=1, importance="magnitude", update="none")
    other = reopened(small)
    assert sum(p.numel() for p in other.parameters()) < sum(p.numel() for p in whole.parameters())
    with torch.no_grad():
        ids = Texts().ids
        torch.testing.assert_close(other(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_groups_over_all_blocks_and_in_one_shot() -> None:
    model = tiny.model("llama")
    ids = Texts().ids
    batches = [{"input_ids": part, "labels": part} for part in ids.split(8)]
    scores = []
    reference = tiny.model("llama")
    for block in reference.model.layers:
        total = torch.zeros(96, dtype=torch.float64)
        for part in batches:
            reference.zero_grad()
            reference(**part).loss.backward()
            down = (block.mlp.down_proj.weight * block.mlp.down_proj.weight.grad).double().sum(0)
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                down += (linear.weight * linear.weight.grad).double().sum(1)
            total += down.abs()
        scores.append(total)
    pruned = prune_by_gradient(model, batches, Structured(ffn=0.25), per="global")
    lowest = torch.cat(scores).argsort()[:48].sort().values.tolist()
    found = [
        96 * number + group
        for number in range(2)
        for group in pruned.groups[f"model.layers.{number}.mlp.down_proj"]
    ]
    assert found == lowest


@pytest.mark.parametrize(
    ("kind", "reader", "holder"),
    [
        ("gpt2", "attn.c_proj", "attn.c_attn"),
        ("gpt_neox", "attention.dense", "attention.query_key_value"),
    ],
)
def test_heads_of_linears_that_hold_q_k_and_v(kind: str, reader: str, holder: str) -> None:
    """They can be masked, though no smaller model of the class could do without them. GPT-2 has q
    above k above v, GPT-NeoX all three of a head together."""
    model = tiny.model(kind)
    masks = MaskTraining(Structured(heads=0.5), SCHEDULE, "movement").attach(model.train())
    run(model, masks, STEPS)
    pruned = masks.finish().groups
    assert len(pruned) == 2
    for name, groups in pruned.items():
        assert name.endswith(reader)
        block = model.get_submodule(name.removesuffix(f".{reader}"))
        heads = model.config.num_attention_heads
        read, held = (block.get_submodule(each).weight for each in (reader, holder))
        if kind == "gpt2":  # Conv1D
            read, held = read.T, held.T
        width = read.shape[1] // heads
        parts = held.view(3, heads, width, -1) if kind == "gpt2" else None
        parts = held.view(heads, 3, width, -1).transpose(0, 1) if parts is None else parts
        zero = [h for h in range(heads) if not read[:, h * width : (h + 1) * width].any()]
        assert zero == groups == [h for h in range(heads) if not parts[:, h].any()]
        assert len(groups) == heads // 2


def test_groups_that_cannot_be() -> None:
    with pytest.raises(TersorError, match=r"heads=0.25 of the 2 groups .* rounds to none; use 0.5"):
        MaskTraining(Structured(heads=0.25), Schedule(1)).attach(tiny.model("llama"))
    model = tiny.model("llama")
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
