"""transformers' assisted generation with a quantized model as the draft: the text is that of the
original alone, whatever the draft is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tersor
from conftest import all_cores
from tersor import demo
from tersor.demo_model import DemoModel
from tersor.qweight import QSpec, Scheme

PROMPT, NEW, PROPOSED = 48, 64, 4


@pytest.fixture(scope="module")
def original(demo_model: DemoModel) -> Any:
    model = demo.original(demo_model).float()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def prompts(demo_model: DemoModel) -> list[Tensor]:
    return [
        windows[number : number + 1, :PROMPT]
        for windows in demo.held_out_windows(demo_model).values()
        for number in (0, 20)
    ]


@pytest.fixture(scope="module")
def drafts(demo_model: DemoModel, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By bits."""
    made = {bits: tmp_path_factory.mktemp("drafts") / f"int{bits}" for bits in (4, 2)}
    with all_cores():
        for bits, out in made.items():
            tersor.quantize_checkpoint(
                demo_model.folder, out, scheme=Scheme(QSpec(bits)), method="rtn"
            )
    return made


def write(model: Any, ids: Tensor, draft: Any = None) -> tuple[Tensor, list[int]]:
    """The new tokens, and how many tokens the model read in each pass."""
    read: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW,
        assistant_model=draft,
    )
    hook.remove()
    return out[0, ids.shape[1] :], read


@pytest.mark.slow
def test_the_text_is_that_of_the_original(
    original: Any, drafts: dict[int, Path], prompts: list[Tensor]
) -> None:
    passes = {}
    plain = [write(original, ids) for ids in prompts]
    for bits, folder in drafts.items():
        draft = tersor.load(folder, torch.float32)
        draft.generation_config.eos_token_id = None
        draft.generation_config.num_assistant_tokens = PROPOSED
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        passes[bits] = 0
        for ids, (wanted, one_by_one) in zip(prompts, plain, strict=True):
            found, read = write(original, ids, draft)
            assert found.tolist() == wanted.tolist()
            assert len(one_by_one) == len(found) == NEW
            assert read[0] == PROMPT + PROPOSED  # the draft was asked
            assert max(read[1:]) == PROPOSED + 1
            passes[bits] += len(read)
    # A pass writes one token and what it accepts: one that is right more often takes fewer.
    fewest = len(prompts) * NEW / (PROPOSED + 1)
    assert fewest <= passes[4] < passes[2] < len(prompts) * NEW
