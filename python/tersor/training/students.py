"""A student to begin with: the teacher without some of its blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers import PreTrainedModel

from tersor.errors import TersorError
from tersor.models import config_value, find_arch
from tersor.surgery.cuts import renumbered, structure_of


def student_of(teacher: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A new model of the teacher's class with copies of some of its blocks, and of all else.

    Blocks of a trained model are a far better start than random ones (DistilBERT, Sanh et al.,
    arXiv:1910.01108). For other starts give any model with the same vocabulary: one of
    shrink_checkpoint's, or a class with a configuration of its own.

    layers: how many blocks, then evenly spread from the first to the last; or which, from 0.
    Raises TersorError for blocks that there are not, a quantized teacher, and an architecture of
    which it is not known how to leave blocks out.
    """
    found = find_arch(teacher)
    structure = structure_of(found)
    paths = [path for path, _ in found.blocks(teacher)]
    kept = _kept(layers, len(paths))
    lists = [name for name in structure.per_block if getattr(teacher.config, name, None)]
    by_number = [name for name in structure.by_number if config_value(teacher.config, name)]
    if by_number and not lists:
        raise TersorError(
            f"no block of {type(teacher).__name__} can be left out: {by_number[0]} in its "
            "configuration makes what a block does depend on its number"
        )
    config = copy.deepcopy(teacher.config)
    setattr(config, structure.depth, len(kept))
    for name in lists:
        items = getattr(teacher.config, name)
        setattr(config, name, [items[number] for number in kept])

    old = teacher.state_dict()
    blocks = tuple(f"{path}." for path in paths)
    state = {name: tensor for name, tensor in old.items() if not name.startswith(blocks)}
    for place, number in enumerate(kept):
        inside = [name for name in old if name.startswith(f"{paths[number]}.")]
        state |= {renumbered(found, name, place): old[name] for name in inside}
    student = type(teacher)(config)
    wanted = {name: tensor.shape for name, tensor in student.state_dict().items()}
    if wanted != {name: tensor.shape for name, tensor in state.items()}:
        raise TersorError(
            f"the tensors of this {type(teacher).__name__} are not those of its class (it is "
            "quantized, or has adapters); take the student from the model that it was made of"
        )
    student.to(dtype=teacher.dtype, device=teacher.device)
    student.load_state_dict(state)
    if getattr(teacher, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train(teacher.training)


def _kept(layers: int | Sequence[int], depth: int) -> list[int]:
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise TersorError(f"layers is {layers}; the teacher has 1 to {depth} blocks to give")
        if layers == 1:
            return [0]
        return [round(i * (depth - 1) / (layers - 1)) for i in range(layers)]
    kept = list(layers)
    if not kept or sorted(set(kept)) != kept or not 0 <= kept[0] <= kept[-1] < depth:
        raise TersorError(
            f"layers is {kept}; name blocks from 0 to {depth - 1} in ascending order, each once"
        )
    return kept
