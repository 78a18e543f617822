"""A student made of its teacher's blocks computes what the teacher would without the others."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tersor
import tiny
from tersor import TersorError
from tersor.training.students import student_of

DENSE = [kind for kind in tiny.KINDS if "mixtral" not in kind and "moe" not in kind]


@pytest.mark.parametrize("kind", DENSE)
def test_blocks(kind: str, tmp_path: Path) -> None:
    changes: dict[str, object] = {"num_hidden_layers": 4}
    if kind == "gpt2":
        changes["n_layer"] = 4
    if "layer_types" in tiny.CONFIGS[kind]:
        changes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    teacher = tiny.model(kind, **changes)
    if kind == "gemma2" and not getattr(teacher.config, "layer_types", None):
        pytest.skip("blocks differ by their number in this version of transformers")
    student = student_of(teacher, [0, 3])
    cut = copy.deepcopy(teacher)
    lists = [m for m in cut.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4]
    (blocks,) = lists
    del blocks[1:3]
    if types := getattr(cut.config, "layer_types", None):
        cut.config.layer_types = [types[0], types[3]]
    cut.config.num_hidden_layers = 2
    ids = torch.randint(0, tiny.VOCAB, (2, 20), generator=torch.manual_seed(1))
    given = {} if kind == "bert" else {"use_cache": False}
    with torch.no_grad():
        torch.testing.assert_close(student(ids, **given).logits, cut(ids, **given).logits)
    assert not student.training and teacher.config.num_hidden_layers == 4
    ours, theirs = (next(m.parameters()) for m in (student, teacher))
    assert ours.data_ptr() != theirs.data_ptr()
    if kind == "llama":
        student.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(ids).logits, student(ids).logits)


def test_spread() -> None:
    teacher = tiny.model("llama", dtype=torch.bfloat16, num_hidden_layers=6)
    for count, wanted in ((1, [0]), (2, [0, 5]), (3, [0, 2, 5]), (6, [0, 1, 2, 3, 4, 5])):
        student = student_of(teacher, count)
        assert student.dtype == torch.bfloat16 and len(student.model.layers) == count
        for block, number in zip(student.model.layers, wanted, strict=True):
            weight = teacher.model.layers[number].mlp.up_proj.weight
            assert block.mlp.up_proj.weight.equal(weight)


def test_refusals() -> None:
    teacher = tiny.model("llama")
    for layers in (0, 3):
        with pytest.raises(TersorError, match=f"layers is {layers}; the teacher has 1 to 2"):
            student_of(teacher, layers)
    for which in ([], [1, 0], [0, 0], [0, 2], [-1]):
        with pytest.raises(TersorError, match="in ascending order"):
            student_of(teacher, which)
    with pytest.raises(TersorError, match="is not known"):
        student_of(tiny.model("mixtral"), 1)
    tersor.quantize_model(teacher, scheme=tersor.Scheme(tersor.QSpec(4, 16)), method="rtn")
    with pytest.raises(TersorError, match="quantized, or has adapters"):
        student_of(teacher, 1)
