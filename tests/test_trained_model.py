"""The main job on the trained demo model, held against clients and formulas that are not ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import reference
import tersor
from conftest import all_cores
from tersor import demo
from tersor.calibrate import Calibration, load_tokenizer
from tersor.demo_model import DemoModel
from tersor.qweight import ActSpec, QSpec, Scheme
from test_real_clients import BF16_TOLERANCE, IDS, assert_close, job, run_client
from test_solve_native import gram_of, solve

SCHEMES = {
    "W4A16": Scheme(QSpec(4, 128)),
    "W3A16": Scheme(QSpec(3, 128)),
    "W8A16": Scheme(QSpec(8, 128)),
    "W8A8": Scheme(QSpec(8, None), ActSpec()),
}


def calibration(model: DemoModel, samples: int) -> Calibration:
    return Calibration((str(model.calibration),), samples=samples, seq_len=demo.WINDOW)


@pytest.fixture(scope="module")
def folders(demo_model: DemoModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model in every scheme by GPTQ, each run by transformers without tersor in the
    folder's own dtype and in float32."""
    made = {name: tmp_path_factory.mktemp("trained") / name for name in SCHEMES}
    with all_cores():
        for name, out in made.items():
            tersor.quantize_checkpoint(
                demo_model.folder, out, scheme=SCHEMES[name], calibration=calibration(demo_model, 8)
            )
    run_client(
        *(job(out, torch.float32, dequantize=False, name="float32") for out in made.values()),
        *(job(out, torch.bfloat16, dequantize=False, name="bfloat16") for out in made.values()),
    )
    return made


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_gives_the_same_logits_without_tersor(
    name: str, folders: dict[str, Path]
) -> None:
    theirs = load_file(folders[name] / "float32.safetensors")["logits"]
    model = tersor.load(folders[name], torch.float32)
    with torch.no_grad():
        ours = model(IDS).logits
    # float32 sums in another order; with int8 activations a value near a tie may fall either way,
    # which is rare and moves it by one step of 255.
    assert_close(ours, theirs, 1e-4 if SCHEMES[name].activation is None else BF16_TOLERANCE)


@pytest.mark.parametrize("name", [name for name in SCHEMES if SCHEMES[name].activation is None])
def test_in_bfloat16_we_are_no_further_from_float32_than_transformers(
    name: str, folders: dict[str, Path]
) -> None:
    exact = load_file(folders[name] / "float32.safetensors")["logits"]
    theirs = load_file(folders[name] / "bfloat16.safetensors")["logits"].float()
    with torch.no_grad():
        ours = tersor.load(folders[name], torch.bfloat16)(IDS).logits.float()
    assert_close(ours, exact, 4 * BF16_TOLERANCE)  # six blocks, each rounded several times
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def input_of(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    """What the linear reads, [tokens, k] in float32."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0].flatten(0, -2).float()


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("linear", ["0.self_attn.q_proj", "3.mlp.down_proj"])
def test_codes_equal_the_published_form(
    linear: str, act_order: bool, bits: int, demo_model: DemoModel
) -> None:
    model = demo.original(demo_model)
    name = f"model.layers.{linear}"
    ids = calibration(demo_model, 8).windows(load_tokenizer(demo_model.folder))
    gram = gram_of(input_of(model, name, ids))
    order = torch.argsort(gram.diagonal(), descending=True) if act_order else None
    weight = model.get_submodule(name).weight.detach().float()
    result = solve(weight, gram, 128, bits, True, order)
    assert reference.check_gptq_codes(*result, 2**bits) >= 0.98
