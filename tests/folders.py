"""What the tests of the pipeline share: folders read as a stranger would read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from tersor.formats import FORMATS, parse_config
from tersor.qweight import QWeight


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def weights(folder: Path) -> dict[str, QWeight]:
    """Every quantized weight of a folder by the name of its module, read as a stranger would."""
    stored = tensors(folder)
    config = parse_config(json.loads((folder / "config.json").read_text()))
    found = {}
    for stem in (name.removesuffix(".weight_scale") for name in stored if "weight_scale" in name):
        group = config.group_for(stem)
        assert group is not None
        local = {n.rpartition(".")[2]: t for n, t in stored.items() if n.startswith(stem + ".")}
        found[stem] = FORMATS[group.format].unpack(local, group.scheme.weight)
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the timings, which differ from run to run."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "tersor_timings.json"}


def plain(folder: Path, **arguments: Any) -> Any:
    """As anyone opens it; nothing may be missing, left over or of another shape."""
    masked = json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(info.values()), info
    return model.eval()
