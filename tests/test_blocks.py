"""A model run block by block computes what the model computes."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from tersor.blocks import Calls, HiddenFile, batches, catch
from tersor.errors import TersorError

BLOCKS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "bert": "bert.encoder.layer",
}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_blocks_one_by_one_are_the_model(kind: str) -> None:
    model = tiny.model(kind)
    model.config.use_cache = False
    blocks = attrgetter(BLOCKS.get(kind, "model.layers"))(model)
    ids = torch.randint(2, tiny.VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    outputs: list[torch.Tensor] = []
    handles = [
        b.register_forward_hook(
            lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for b in blocks
    ]
    with torch.no_grad():
        model(ids)
        for handle in handles:
            handle.remove()
        # Calls caught with other text, as in a run where they are caught once.
        hidden, _ = catch(model, blocks, ids)
        _, calls = catch(model, blocks, ids.flip(1))
        for block, call, want in zip(blocks, calls, outputs, strict=True):
            hidden = call(block, hidden)
            assert torch.equal(hidden, want)


def test_batches_of_other_sizes_are_apart() -> None:
    windows = torch.zeros(130, 32, dtype=torch.int64)
    assert [len(b) for b in batches(windows)] == [64, 64, 2]
    assert [len(b) for b in batches(torch.zeros(2, 5000))] == [1, 1]


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers[0](self.embed(ids))


def test_each_block_keeps_its_own_call() -> None:
    """As where windowed and full attention take turns, and whatever the blocks return."""

    class Alternating(Forgetful):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(ids)
            for i, layer in enumerate(self.layers):
                hidden = layer(hidden, i, mask=f"mask {i}")[0]
            return hidden

    model = Alternating()
    ids = torch.tensor([[1, 2, 3]])
    hidden, calls = catch(model, model.layers, ids)
    assert torch.equal(hidden, model.embed(ids))
    assert [(call.args, call.kwargs) for call in calls] == [
        ((0,), {"mask": "mask 0"}),
        ((1,), {"mask": "mask 1"}),
    ]


def test_a_block_that_is_not_called_is_an_error() -> None:
    model = Forgetful()
    with pytest.raises(TersorError, match="calls 1 of its 2 blocks"):
        catch(model, model.layers, torch.zeros(1, 3, dtype=torch.int64))
    assert "forward" not in vars(model.layers[0])


def test_a_model_that_fails_on_the_way_is_an_error() -> None:
    class Unpacking(Forgetful):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden, attention = self.layers[0](self.embed(ids))
            return self.layers[1](hidden + attention)

    model = Unpacking()
    with pytest.raises(TersorError, match=r"up to its last block \(ValueError: not enough values"):
        catch(model, model.layers, torch.zeros(1, 3, dtype=torch.int64))


def test_calls_that_depend_on_the_text_are_refused() -> None:
    class PerToken(Forgetful):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(ids)
            for layer in self.layers:
                hidden = layer(hidden, ids)
            return hidden

    model, calls = PerToken(), Calls()
    calls.add(1, catch(model, model.layers, torch.tensor([[1, 2, 3]]))[1])
    calls.add(1, catch(model, model.layers, torch.tensor([[1, 2, 3]]))[1])
    with pytest.raises(TersorError, match="block 0 of this model is given more than hidden states"):
        calls.add(1, catch(model, model.layers, torch.tensor([[1, 2, 4]]))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_return_from_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    states = [torch.randn(n, 5, 3).to(dtype) for n in (4, 4, 1)]
    file = HiddenFile(tmp_path / "h", [4, 4, 1], (5, 3), dtype)
    file.write(iter(states))
    assert all(torch.equal(a, b) for a, b in zip(file, states, strict=True))
    with pytest.raises(TersorError, match="models whose hidden states change"):
        file.write(iter([state[:, :4] for state in states]))
    (tmp_path / "h").write_bytes((tmp_path / "h").read_bytes()[:-1])
    with pytest.raises(TersorError, match="changed while it was in use"):
        list(file)
