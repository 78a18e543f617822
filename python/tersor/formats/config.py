"""quantization_config, the part of config.json that says which modules are quantized and how.

`quantization_config` writes it as compressed-tensors does; `parse_config` reads what that package,
llm-compressor and their older releases write, and refuses what tersor cannot compute, by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from tersor.errors import TersorError
from tersor.formats.targets import Targets
from tersor.qweight import BITS, ActSpec, QSpec, Scheme

VERSION = "0.20.0"  # the release of compressed-tensors whose layout is written
DENSE_3_BIT_SINCE = (0, 18)
PACKED, UNPACKED = "pack-quantized", "int-quantized"
FORMAT_NAMES = {PACKED: PACKED, UNPACKED: UNPACKED, "naive-quantized": UNPACKED}
# Schemes that compressed-tensors lets a config name instead of spelling out.
PRESETS = {
    **{f"W{bits}A16": Scheme(QSpec(bits, 128)) for bits in BITS},
    **{f"W{bits}A8": Scheme(QSpec(bits, 128), ActSpec()) for bits in BITS},
    "W4A16_ASYM": Scheme(QSpec(4, 128, symmetric=False)),
    "W8A8": Scheme(QSpec(8, None), ActSpec()),
    "INT8": Scheme(QSpec(8, None), ActSpec()),
}


def default_format(scheme: Scheme) -> str:
    """The format that compressed-tensors chooses for a scheme: packed for weights alone, one byte
    per code as soon as activations are quantized (W4A8 too)."""
    return UNPACKED if scheme.activation else PACKED


def quantization_config(
    schemes: Scheme | Mapping[str, Scheme],
    ignore: Sequence[str] = (),
    format: str | None = None,
    actorder: str | None = None,
) -> dict[str, Any]:
    """What config.json gets under "quantization_config".

    schemes: one scheme for every Linear that is not ignored, or a scheme for each module by name,
        and then no other module is quantized.
    ignore: names of modules, or "re:" and a regular expression, that stay as they are.
    format: a key of FORMATS for all weights, or None for each scheme's `default_format`.
    actorder: "weight" where columns were solved in activation order (a remark, nothing changes for
        the reader); "group" where weights have an `order`. Releases of compressed-tensors from
        0.19 on refuse "group", so that they do not misread such a folder.

    Outliers of activations (see ActSpec) are left out, with a warning.
    """
    if format is not None and format not in (PACKED, UNPACKED):
        raise TersorError(f"format must be {PACKED} or {UNPACKED}, not {format}")
    if actorder not in (None, "weight", "group"):
        raise TersorError(f"actorder must be None, 'weight' or 'group', not {actorder!r}")
    targets: dict[Scheme, list[str]] = {}
    if isinstance(schemes, Scheme):
        targets[_stored(schemes)] = ["Linear"]
    else:
        for name, scheme in schemes.items():
            targets.setdefault(_stored(scheme), []).append(name)
    given = [schemes] if isinstance(schemes, Scheme) else schemes.values()
    activations = [each.activation for each in given if each.activation]
    if outliers := [each.outliers for each in activations if each.outliers is not None]:
        warnings.warn(
            "config.json has no field for the outliers of activations, which are how a layer runs; "
            f"load the folder with tersor.load(folder, outliers={max(outliers):g})",
            stacklevel=2,
        )
    if not targets:
        raise TersorError("no module is quantized; give at least one a scheme")
    groups = {
        f"group_{i}": _write_group(scheme, names, format or default_format(scheme), actorder)
        for i, (scheme, names) in enumerate(targets.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _stored(scheme: Scheme) -> Scheme:
    """What of a scheme a folder holds."""
    if scheme.activation is None:
        return scheme
    return replace(scheme, activation=replace(scheme.activation, outliers=None))


def _write_group(
    scheme: Scheme, targets: Sequence[str], format: str, actorder: str | None
) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.weight.bits,
        "type": "int",
        "symmetric": scheme.weight.symmetric,
        "strategy": "channel" if scheme.weight.group is None else "group",
        "group_size": scheme.weight.group,
        "dynamic": False,
    }
    if actorder is not None:
        weights["actorder"] = actorder
    activations = None
    if scheme.activation is not None:
        activations = {
            "num_bits": scheme.activation.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "tensor" if scheme.static else "token",
            "group_size": None,
            "dynamic": not scheme.static,
        }
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": format,
    }


@dataclass(frozen=True)
class Group:
    """Modules that are treated alike: how, and in which format (a key of FORMATS)."""

    scheme: Scheme
    format: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class FormatConfig:
    """A quantization_config that has been read. Ask it about a module by name and class name."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    _targets: Targets = field(init=False, repr=False, compare=False)
    _ignored: Targets = field(init=False, repr=False, compare=False)
    _group_of: dict[str, Group] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Later groups override earlier ones that name the same target, as in compressed-tensors.
        group_of = {target: group for group in self.groups for target in group.targets}
        object.__setattr__(self, "_group_of", group_of)
        object.__setattr__(self, "_targets", Targets(group_of))
        object.__setattr__(self, "_ignored", Targets(self.ignore))

    def group_for(
        self, name: str, module_class: str = "Linear", shards: Sequence[str] = ()
    ) -> Group | None:
        """The group of a module, or None where it is not quantized.

        shards: names under which the checkpoint may hold the parts of a module that the loader has
        fused (q_proj, k_proj and v_proj of a qkv_proj); they are asked instead of `name`.
        TersorError where they disagree, for one module cannot have two schemes.
        """
        found = [self._group_for(part, module_class) for part in shards or (name,)]
        if len({(group.scheme, group.format) if group else None for group in found}) > 1:
            raise TersorError(
                f"{name} is fused from {', '.join(shards)}, which config.json quantizes in "
                f"different ways; quantize them alike or load them apart"
            )
        return found[0]

    def _group_for(self, name: str, module_class: str) -> Group | None:
        target = self._targets.match(name, module_class)
        if target is None or self._ignored.match(name, module_class) is not None:
            return None
        return self._group_of[target]

    def scheme_for(self, name: str, module_class: str = "Linear") -> Scheme | None:
        """What the module's weight became, or None where it is not quantized."""
        group = self.group_for(name, module_class)
        return group.scheme if group else None

    def format_for(self, name: str, module_class: str = "Linear") -> str | None:
        """The key of FORMATS that the module's tensors are in, or None as for `scheme_for`."""
        group = self.group_for(name, module_class)
        return group.format if group else None


def parse_config(config: Mapping[str, Any]) -> FormatConfig:
    """Read a quantization_config, or a whole config.json that holds one (older folders call it
    "compression_config"). TersorError names what is wrong, unknown or not supported."""
    for key in ("quantization_config", "compression_config"):
        if isinstance(config.get(key), Mapping):
            config = config[key]
    method = config.get("quant_method", "compressed-tensors")
    if method not in ("compressed-tensors", "sparseml"):
        _refuse(f"quant_method {method!r}", "compressed-tensors")
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        _refuse(f"quantization_status {status!r} (weights that are not compressed)", "'compressed'")
    for key, what in (
        ("kv_cache_scheme", "a quantized key-value cache"),
        ("transform_config", "transforms that run with the model"),
    ):
        if config.get(key):
            _refuse(f"{key} ({what})", "a config without it")
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        _refuse("compressed sparsity (sparsity_config)", "dense storage")

    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise TersorError(
            "quantization_config has no config_groups; the folder is not a compressed-tensors "
            "checkpoint, load it as an ordinary model"
        )
    ignore = config.get("ignore") or []
    return FormatConfig(
        groups=tuple(_read_group(name, group, config) for name, group in groups.items()),
        ignore=_names(ignore, "ignore"),
    )


def _refuse(what: str, supported: str) -> NoReturn:
    raise TersorError(
        f"{what} is not supported, only {supported}; load the folder with another runtime or "
        f"quantize the original model with tersor"
    )


def _names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        value = [None]
    if not all(isinstance(name, str) for name in value):
        raise TersorError(
            f"{where} in quantization_config must be a list of module names; correct config.json"
        )
    return tuple(value)


def _read_group(name: str, group: Any, config: Mapping[str, Any]) -> Group:
    """A group spelled out, or one whose name is a preset and whose value is its targets, such as
    {"W4A16": ["Linear"]}."""
    if isinstance(group, Mapping):
        if group.get("output_activations"):
            _refuse(f"{name}: quantized output_activations", "quantized inputs")
        scheme = Scheme(
            _read_weights(f"{name}.weights", group.get("weights")),
            _read_activations(f"{name}.input_activations", group.get("input_activations")),
        )
        targets, format = _names(group.get("targets"), f"{name}.targets"), group.get("format")
    else:
        if name.upper() not in PRESETS:
            _refuse(f"config group {name!r} (a preset scheme)", ", ".join(PRESETS))
        scheme, targets, format = PRESETS[name.upper()], _names(group, name), None
    if scheme.weight.bits == 3 and _version(config.get("version")) < DENSE_3_BIT_SINCE:
        _refuse(
            f"{name}: the 3-bit layout of compressed-tensors {config['version']}",
            f"that of {'.'.join(map(str, DENSE_3_BIT_SINCE))} and later",
        )
    return Group(scheme, _read_format(name, format, config, scheme), targets)


def _read_weights(where: str, args: Any) -> QSpec:
    if not isinstance(args, Mapping):
        _refuse(f"{where} {args!r}", "groups that quantize weights")
    bits, kind = args.get("num_bits", 8), str(args.get("type", "int")).lower()
    if kind != "int" or type(bits) is not int or bits not in BITS:
        _refuse(f"{where}: {kind} with {bits} bits", f"int with {', '.join(map(str, BITS))} bits")
    if args.get("dynamic"):
        _refuse(f"{where}: dynamic weight scales", "scales that are stored")
    actorder = args.get("actorder")
    if actorder not in (None, False, True, "weight", "static", "group", "dynamic"):
        _refuse(f"{where}: actorder {actorder!r}", "'weight', 'static', 'group' or 'dynamic'")
    group = args.get("group_size")
    if group in (None, -1):
        group = None
    elif not isinstance(group, int) or isinstance(group, bool):
        _refuse(f"{where}: group_size {group!r}", "a number")
    strategy = args.get("strategy") or ("group" if group else "channel")
    if strategy not in ("tensor", "channel", "group"):
        _refuse(f"{where}: strategy {strategy!r}", "'group', 'channel' or 'tensor'")
    if (strategy == "group") != (group is not None):
        _refuse(f"{where}: strategy {strategy!r} with group_size {group}", "one that has both")
    symmetric = args.get("symmetric", True)
    if not isinstance(symmetric, bool):
        _refuse(f"{where}: symmetric {symmetric!r}", "true or false")
    # One scale for the whole tensor reads as the same scale for every row.
    return QSpec(bits, group, symmetric)


def _read_activations(where: str, args: Any) -> ActSpec | None:
    if args is None:
        return None
    if not isinstance(args, Mapping):
        _refuse(f"{where} {args!r}", "a mapping")
    defaults = {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False,
    }  # fmt: skip
    got = {key: args.get(key, default) for key, default in defaults.items()}
    for strategy, dynamic in (("token", True), ("tensor", False)):
        known = {**defaults, "strategy": strategy, "dynamic": dynamic}
        if got == known and all(type(got[key]) is type(known[key]) for key in known):
            return ActSpec(dynamic=dynamic)
    _refuse(
        f"{where}: " + ", ".join(f"{key} {value!r}" for key, value in got.items()),
        "8-bit int, symmetric, one dynamic scale per token or one static scale",
    )


def _read_format(name: str, format: Any, config: Mapping[str, Any], scheme: Scheme) -> str:
    """The group's own format, else the config's, else what compressed-tensors would choose."""
    format = format or config.get("format")
    if format in (None, "mixed-precision"):
        return default_format(scheme)
    if not isinstance(format, str) or format not in FORMAT_NAMES:
        _refuse(f"{name}: format {format!r}", ", ".join(sorted(FORMAT_NAMES)))
    return FORMAT_NAMES[format]


def _version(version: Any) -> tuple[int, ...]:
    """The first two numbers of a version; an absent or odd one counts as new."""
    match = re.match(r"(\d+)\.(\d+)", str(version))
    return tuple(map(int, match.groups())) if match else DENSE_3_BIT_SINCE
