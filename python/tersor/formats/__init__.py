"""Portable storage of quantized weights, and the configuration that goes with it.

FORMATS maps the name that config.json uses to the format. To add one: a file with a class like
`PackQuantized`, and a line here; the contract tests run over the dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from tersor.formats.config import FormatConfig, parse_config, quantization_config
from tersor.formats.int_quantized import IntQuantized
from tersor.formats.pack_quantized import PackQuantized
from tersor.qweight import QSpec, QWeight


class Format(Protocol):
    """How the tensors of one layer are laid out in a checkpoint, on local names."""

    name: str
    tensors: tuple[str, ...]  # every name that pack may write, the codes first

    def pack(self, q: QWeight) -> dict[str, Tensor]: ...

    def unpack(self, tensors: Mapping[str, Tensor], spec: QSpec | None = None) -> QWeight: ...


FORMATS: dict[str, Format] = {
    "pack-quantized": PackQuantized(),
    "int-quantized": IntQuantized(),
}

__all__ = ["FORMATS", "Format", "FormatConfig", "parse_config", "quantization_config"]
