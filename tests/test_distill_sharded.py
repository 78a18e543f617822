"""Weights that processes share out among them (FSDP, version 2, on CPUs): the training is the one
that a single process does, for a plain student and for one with a grid that learns."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerState, __version__

pytest.importorskip("accelerate")

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from tersor import HoldZeros, QSpec, QuantLinear, Scheme, TersorError
from tersor.training import Distillation
from tersor.training.finite import StopAtNaN, is_sharded
from tersor.training.qat import QuantizationTraining
from tersor.training.trainer import DistillTrainer
from test_distill_trainer import args, examples, pair, weights

GRID = Scheme(QSpec(4, 32))
LOGGED = ("loss", "distillation", "cross_entropy", "grad_norm")


class Sharding(DistillTrainer):
    """accelerate shards among devices of the kinds that it knows, and CPUs are none of them, though
    torch can: so for as long as it looks, these processes are of another kind."""

    def create_accelerator_and_postprocess(self) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        assert self.is_fsdp_enabled and self.accelerator.is_fsdp2


def trainer(folder: Path, processes: int, student: Any, teacher: Any, **given: Any) -> Any:
    """Two steps of eight rows in all, whose numbers of tokens differ."""
    how: dict[str, Any] = {
        "per_device_train_batch_size": 8 // processes,
        "per_device_eval_batch_size": 8 // processes,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.5,
    }
    kind = DistillTrainer
    if processes > 1:
        kind = Sharding
        how |= {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"version": 2}}
    rows = examples()
    return kind(
        student, teacher, args=args(folder, **how), train_dataset=rows, eval_dataset=rows, **given
    )


def distilled(folder: Path, processes: int) -> dict[str, Tensor]:
    """What was logged and measured; the model is saved."""
    student, teacher = pair()
    made = trainer(folder, processes, student, teacher)
    made.train()
    assert is_sharded(next(student.parameters())) == (processes > 1)
    found = made.evaluate()
    logs = [log for log in made.state.log_history if "loss" in log]
    assert len(logs) == 2
    made.save_model(str(folder / "model"))
    measured = [found[f"eval_{name}"] for name in LOGGED[:3]]
    return {
        "logs": torch.tensor([[log[name] for name in LOGGED] for log in logs]),
        "measured": torch.tensor(measured),
    }


def loaded(folder: Path) -> Tensor:
    """What was logged with a student of which each process has loaded its part."""
    from transformers.distributed import DistributedConfig

    student, teacher = pair()
    how = args(folder, ddp_backend="gloo", per_device_train_batch_size=4, optim="sgd",
               learning_rate=0.1, max_grad_norm=0.5)  # fmt: skip
    if torch.distributed.get_rank() == 0:
        student.save_pretrained(folder / "model")
    torch.distributed.barrier()
    parts = AutoModelForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(fsdp_size=2)
    )
    assert all(map(is_sharded, parts.parameters()))
    made = DistillTrainer(parts, teacher, args=how, train_dataset=examples())
    made.train()
    logs = [log for log in made.state.log_history if "loss" in log]
    return torch.tensor([[log[name] for name in LOGGED] for log in logs])


def aware(folder: Path, processes: int) -> nn.Module:
    """A student that was trained for a grid, and is quantized if one process has all of it."""
    student, teacher = pair()
    training = QuantizationTraining(GRID).attach(student)
    settings = Distillation(alpha=1.0)
    made = trainer(folder, processes, student, teacher, distillation=settings, callbacks=[training])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made.train()
    assert any("still to be quantized" in str(each.message) for each in told) == (processes > 1)
    if processes > 1:
        made.save_model(str(folder / "model"))
        with pytest.raises(TersorError, match="no process has all of them"):
            training.finish()
    return student


def refused(folder: Path, processes: int) -> None:
    """What needs whole weights, or whole gradients."""
    student, teacher = pair()
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    held = trainer(folder, processes, student, teacher, callbacks=[HoldZeros()])
    with pytest.raises(TersorError, match="held in whole weights"):
        held.train()

    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (processes,))
    module = nn.Linear(1, 4, bias=False)
    module.weight = nn.Parameter(distribute_tensor(torch.ones(4, 1), mesh, [Shard(0)]))
    gradient = torch.tensor([[0.0], [0.0], [0.0], [float("inf")]])  # in the last process alone
    module.weight.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    with pytest.raises(TersorError, match="the gradient is inf in step 1"):
        StopAtNaN().on_pre_optimizer_step(args(folder), TrainerState(), None, model=module)


@pytest.mark.slow
@pytest.mark.skipif(int(__version__.split(".")[0]) < 5, reason="its Trainer has no FSDP 2")
def test_two_processes_are_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wanted = distilled(tmp_path / "one", 1)
    found = load_file(tmp_path / "result.safetensors")
    if "loaded" in found:
        torch.testing.assert_close(found.pop("loaded"), wanted["logs"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("two", "one")
    ]
    torch.testing.assert_close(*map(weights, models), rtol=1e-4, atol=1e-6)
    config = json.loads((tmp_path / "two" / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]

    one, two = aware(tmp_path / "three", 1), pair()[0]
    training = QuantizationTraining(GRID).attach(two)
    begun = {n.removeprefix("model."): q for n, q in training.qweights().items()}
    two.load_state_dict(load_file(tmp_path / "four" / "model" / "model.safetensors"))
    training.finish()
    assert linears(two).keys() == linears(one).keys() == begun.keys()
    for name, linear in linears(two).items():
        ours, theirs = linear.qweight(), linears(one)[name].qweight()
        assert torch.equal(ours.codes, theirs.codes), name
        torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-5, atol=1e-8)
        assert not torch.equal(ours.scales, begun[name].scales), name


def linears(model: Any) -> dict[str, Any]:
    """Those in the blocks."""
    kinds = (nn.Linear, QuantLinear)
    return {n: m for n, m in model.model.named_modules() if isinstance(m, kinds)}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    result = distilled(root / "two", 2)
    if find_spec("transformers.distributed.fsdp") is not None:
        result["loaded"] = loaded(root / "six")
    if torch.distributed.get_rank() == 0:
        save_file(result, root / "result.safetensors")
    aware(root / "four", 2)
    refused(root / "five", 2)
