"""What a recipe did, stage by stage: `tersor_recipe.json` in the output folder.

The first stage is the original model; every step adds the one that it ended in.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tersor.checkpoint import Checkpoint
from tersor.errors import TersorError
from tersor.report import in_block

RECIPE_REPORT = "tersor_recipe.json"


@dataclass
class Stage:
    """A model on the way, and what the step before it did.

    name: "original" (or "model", where it is measured against another one), or the step with its
        number: "2 prune".
    step: the name of the step; None for the original. settings: what it was given.
    seconds: that the step took, None where it was interrupted and nobody timed all of it;
        peak_bytes: the most memory that was resident meanwhile, 0 where that is not known.
    bytes: of all tensors of its checkpoint. parameters: as if none were quantized.
    bits_per_weight: mean over all linears of the blocks, scales included, and those that were left
        in 16 bits with them; sparsity: share of zeros among the weights of the same.
    quality: text -> Quality.to_dict() of tersor.evaluate against the original; empty where it was
        not measured. speed: asdict(Speed), or None.
    layers: LayerReport dicts of tersor.report, of the linears that the step changed.
    linears: name -> bytes of what is stored for it, of every linear of the blocks (see
        linear_sizes); empty where it was not looked up.
    losses: of a training, [step, name -> value] in order; empty elsewhere.
    notes: what a reader should know: departures from what was asked first of all.
    """

    name: str
    step: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = 0.0
    peak_bytes: int = 0
    bytes: int = 0
    parameters: int = 0
    bits_per_weight: float = 16.0
    sparsity: float = 0.0
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)
    speed: dict[str, Any] | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    linears: dict[str, int] = field(default_factory=dict)
    losses: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class RecipeReport:
    """A whole run of a recipe.

    model: name of the original's folder. recipe: name, or file. steps: as written in YAML.
    machine: processor, threads, instruction set. stages: the original first.
    front: points of a search, where there was one (see tersor.search): dicts with at least
        bytes, kl and latency (seconds).
    no_page: why the page could not be drawn; "" where it was.
    """

    model: str
    recipe: str
    steps: list[dict[str, Any]]
    versions: dict[str, str]
    machine: dict[str, Any]
    stages: list[Stage] = field(default_factory=list)
    front: list[dict[str, Any]] = field(default_factory=list)
    no_page: str = ""

    def to_json(self) -> str:
        known = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)  # no NaN
        return json.dumps(known, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> RecipeReport:
        """The report in a folder; TersorError where there is none, or it is not one."""
        path = folder / RECIPE_REPORT
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            stages = [Stage(**stage) for stage in content.pop("stages")]
            return cls(stages=stages, **content)
        except FileNotFoundError:
            raise TersorError(
                f"{path} is not there; give a folder that tersor compress has made"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TersorError(f"{path} is no report of a recipe ({error}); make it again") from None


def linear_sizes(folder: Path) -> dict[str, int]:
    """name -> bytes of all that a checkpoint stores for it, of every linear of its blocks, whether
    quantized or not. Experts that are stored fused count as one linear. Reads headers alone."""
    checkpoint = Checkpoint.open(folder)
    metas = [checkpoint.metadata(name) for name in checkpoint.names]
    owner = {meta.name: meta.name.rpartition(".")[0] for meta in metas}
    matrices = {
        owner[meta.name] for meta in metas if len(meta.shape) > 1 and in_block(meta.name)[0]
    }
    sizes: dict[str, int] = {}
    for meta in metas:
        if owner[meta.name] in matrices:
            sizes[owner[meta.name]] = sizes.get(owner[meta.name], 0) + meta.nbytes
    return sizes
