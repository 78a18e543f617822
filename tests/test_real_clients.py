"""Real clients of the files. What we write is loaded by transformers with compressed-tensors, in a
process that never imports tersor; what compressed-tensors and llm-compressor write is read by us.
Weights must agree bit for bit, logits within the rounding of the arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import llmcompressor_folders
import tiny
from tersor.formats import FORMATS, parse_config, quantization_config
from tersor.formats.config import default_format
from tersor.qweight import ActSpec, QSpec, QWeight, Scheme

pytest.importorskip("compressed_tensors", minversion="0.19")
pytest.importorskip("accelerate")

DATA = Path(__file__).parent / "data" / "llmcompressor"
IDS = torch.arange(48).view(2, 24)
# Logits after two rounding steps of bfloat16 (8 significant bits), relative to the largest.
BF16_TOLERANCE = 2.0**-7


class Ours(NamedTuple):
    """A folder that we write."""

    scheme: Scheme
    format: str | None = None
    dtype: torch.dtype = torch.bfloat16
    width: int = 96  # of the MLP; 100 is no multiple of 8 codes and leaves padding


OURS = {
    "w4a16_g32": Ours(Scheme(QSpec(4, 32))),
    "w4a16_rows": Ours(Scheme(QSpec(4, None)), width=100),
    "w4a16_float16": Ours(Scheme(QSpec(4, 32)), dtype=torch.float16),
    "w3a16_rows": Ours(Scheme(QSpec(3, None)), width=100),
    "w2a16_g16": Ours(Scheme(QSpec(2, 16))),
    "w8a16_g32": Ours(Scheme(QSpec(8, 32))),
    "w8a16_unpacked": Ours(Scheme(QSpec(8, None)), format="int-quantized"),
    "w4a16_g32_asymmetric": Ours(Scheme(QSpec(4, 32, symmetric=False))),
    "w4a16_rows_asymmetric": Ours(Scheme(QSpec(4, None, symmetric=False)), width=100),
    "w8a16_asymmetric": Ours(Scheme(QSpec(8, 32, symmetric=False))),
    "w4a16_unpacked_asymmetric": Ours(
        Scheme(QSpec(4, 32, symmetric=False)), format="int-quantized"
    ),
    "w8a8": Ours(Scheme(QSpec(8, None), ActSpec()), dtype=torch.float32),
    "w8a8_asymmetric": Ours(Scheme(QSpec(8, 32, symmetric=False), ActSpec()), dtype=torch.float32),
    "w4a8": Ours(Scheme(QSpec(4, 32), ActSpec()), dtype=torch.float32),
    "w4a8_packed": Ours(
        Scheme(QSpec(4, 32), ActSpec()), format="pack-quantized", dtype=torch.float32
    ),
}
PACKED_ASYMMETRIC = [
    name
    for name, ours in OURS.items()
    if not ours.scheme.weight.symmetric and (ours.format or default_format(ours.scheme))[0] == "p"
]

# Loads each folder, writes its logits and parameters, or the error that it met.
CLIENT = """
import inspect, json, pathlib, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

torch.set_num_threads(1)
new = "dequantize" in inspect.signature(CompressedTensorsConfig).parameters
dense = CompressedTensorsConfig(**({"dequantize": True} if new else {"run_compressed": False}))
ids = torch.tensor(json.loads(sys.argv[1]))
for job in map(json.loads, sys.argv[2:]):
    folder = pathlib.Path(job["folder"])
    options = {"quantization_config": dense} if job["dequantize"] else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, job["dtype"]), **options
        )
        with torch.no_grad():
            logits = model(ids).logits
    except Exception as error:
        folder.joinpath(job["name"] + ".error").write_text(repr(error))
        continue
    weights = {n: p.clone() for n, p in model.state_dict().items() if n.endswith("weight")}
    save_file({"logits": logits} | weights, folder / (job["name"] + ".safetensors"))
assert not any(name.split(".")[0] == "tersor" for name in sys.modules)
"""


def run_client(*jobs: dict[str, Any]) -> None:
    """All jobs in one process: importing transformers takes longer than the models."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(IDS.tolist()), *map(json.dumps, jobs)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def job(folder: Path, dtype: torch.dtype, dequantize: bool, name: str = "client") -> dict[str, Any]:
    dtype_name = str(dtype).removeprefix("torch.")
    return {"folder": str(folder), "dtype": dtype_name, "dequantize": dequantize, "name": name}


def rtn(weight: Tensor, spec: QSpec) -> QWeight:
    """Plain rounding, by definition: the grid spans each group's range."""
    n, k = weight.shape
    x = weight.double().view(n, spec.groups(k), -1)
    if spec.symmetric:
        scales = (x.abs().amax(-1) / spec.midpoint).to(weight.dtype)
        zeros = torch.full(scales.shape, spec.midpoint)
    else:
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        scales = ((high - low) / (spec.levels - 1)).to(weight.dtype)
        zeros = (-low / scales.double()).round().clamp(0, spec.levels - 1)
    codes = (x / scales.double().unsqueeze(-1) + zeros.unsqueeze(-1)).round()
    codes = codes.clamp(0, spec.levels - 1).to(torch.uint8).view(n, k)
    return QWeight(spec, codes, scales, None if spec.symmetric else zeros.to(torch.uint8))


def write_ours(folder: Path, ours: Ours) -> nn.Module:
    """Our folder, and beside it in `dense` the same model with the weights that it stands for."""
    model = tiny.model("llama", intermediate_size=ours.width)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay in float32
        parameter.data = parameter.data.to(ours.dtype)
    model.config.dtype = ours.dtype
    fmt = FORMATS[ours.format or default_format(ours.scheme)]
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            q = rtn(module.weight.data, ours.scheme.weight)
            tensors[f"{name}.weight"] = module.weight.data = q.dequantize(ours.dtype)
            packed = fmt.pack(q)
            tensors.pop(f"{name}.weight")
            tensors |= {f"{name}.{local}": tensor for local, tensor in packed.items()}
    model.save_pretrained(folder / "dense")
    config = json.loads((folder / "dense" / "config.json").read_text())
    config["quantization_config"] = quantization_config(ours.scheme, ["lm_head"], ours.format)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every folder of OURS, loaded by the client: once as it is, once dequantized at load, and its
    dense twin; and the folder that compressed-tensors writes for an asymmetric scheme."""
    root = tmp_path_factory.mktemp("ours")
    folders = {name: root / name for name in [*OURS, "theirs"]}
    jobs = []
    for name, ours in OURS.items():
        write_ours(folders[name], ours)
        jobs += [
            job(folders[name], ours.dtype, dequantize=False),
            job(folders[name], ours.dtype, dequantize=True, name="dequantized"),
            job(folders[name] / "dense", ours.dtype, dequantize=False),
        ]
    write_theirs(folders["theirs"], THEIRS["w4a16_asymmetric"])
    run_client(*jobs, job(folders["theirs"], torch.bfloat16, dequantize=False))
    return folders


@contextmanager
def quantized_inputs(model: nn.Module, config: Any) -> Iterator[None]:
    """Inputs of the layers that `config` gives int8 activations, rounded per token."""

    def round_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        step = args[0].abs().amax(-1, keepdim=True) / 127.5
        return ((args[0] / step).round().clamp(-128, 127) * step,)

    hooks = []
    for name, module in model.named_modules():
        scheme = config.scheme_for(name, type(module).__name__)
        if scheme is not None and scheme.activation is not None:
            hooks.append(module.register_forward_pre_hook(round_input))
    yield
    for hook in hooks:
        hook.remove()


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    bound = tolerance * float(expected.abs().max())
    assert float((got.float() - expected.float()).abs().max()) <= bound


@pytest.mark.parametrize("name", [name for name in OURS if name not in PACKED_ASYMMETRIC])
def test_transformers_runs_what_we_write(name: str, loaded: dict[str, Path]) -> None:
    folder = loaded[name]
    got = load_file(folder / "client.safetensors")
    dense = load_file(folder / "dense" / "client.safetensors")
    expected = dense.pop("logits")
    for weight, tensor in dense.items():
        assert torch.equal(got[weight], tensor), weight
    if OURS[name].scheme.activation is None:
        assert_close(got["logits"], expected, BF16_TOLERANCE)
        return
    # The client rounds activations too. In float32 the two computations differ by float32 rounding,
    # and by whole steps where that tips a value over a rounding boundary, which is rare. Leaving
    # the rounding out must show.
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    config = parse_config(json.loads((folder / "config.json").read_text()))
    with torch.no_grad(), quantized_inputs(model, config):
        rounded = model(IDS).logits
    assert_close(got["logits"], rounded, 2e-3)
    with pytest.raises(AssertionError):
        assert_close(got["logits"], expected, 2e-3)


@pytest.mark.parametrize("name", OURS)
def test_transformers_dequantizes_what_we_write(name: str, loaded: dict[str, Path]) -> None:
    got = load_file(loaded[name] / "dequantized.safetensors")
    dense = load_file(loaded[name] / "dense" / "client.safetensors")
    assert_close(got["logits"], dense.pop("logits"), BF16_TOLERANCE)
    for weight, tensor in dense.items():
        assert torch.equal(got[weight], tensor), weight


@pytest.mark.parametrize("name", PACKED_ASYMMETRIC)
def test_packed_zero_points_fare_as_their_own(name: str, loaded: dict[str, Path]) -> None:
    """Releases up to 0.20 of compressed-tensors cannot load packed zero points unless they
    dequantize at load, not even their own. Ours must do neither better nor worse."""
    theirs = loaded["theirs"] / "client.error"
    ours = loaded[name] / "client.error"
    assert ours.exists() == theirs.exists()
    if ours.exists():
        assert ours.read_text() == theirs.read_text()


# --- folders that others wrote --------------------------------------------------------------------

INT8_TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True}
THEIRS: dict[str, list[dict[str, Any]]] = {
    "w4a16": [{"weights": {"num_bits": 4, "group_size": 32}}],
    "w4a16_asymmetric": [{"weights": {"num_bits": 4, "group_size": 32, "symmetric": False}}],
    "w4a16_static": [{"weights": {"num_bits": 4, "group_size": 32, "actorder": "static"}}],
    "w3a16": [{"weights": {"num_bits": 3, "strategy": "channel", "symmetric": False}}],
    "w8a16": [{"weights": {"num_bits": 8, "group_size": 16}}],
    "w4a16_tensor": [{"weights": {"num_bits": 4, "strategy": "tensor", "symmetric": False}}],
    "w8a8_tensor": [{"weights": {"num_bits": 8}, "input_activations": INT8_TOKENS}],
    "w8a8": [{"weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": INT8_TOKENS}],
    "w4a8": [
        {
            "weights": {"num_bits": 4, "group_size": 32, "symmetric": False},
            "input_activations": INT8_TOKENS,
        }
    ],
    "mixed": [
        {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}},
        {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 4, "group_size": 32}},
        {
            "targets": ["model.layers.1.mlp.down_proj"],
            "weights": {"num_bits": 8, "strategy": "channel"},
            "input_activations": INT8_TOKENS,
        },
    ],
}


def write_theirs(folder: Path, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A folder through the classes that llm-compressor calls to save; the quantized weights."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    model = tiny.model("llama", torch.bfloat16)
    config = QuantizationConfig(
        config_groups={
            f"group_{i}": QuantizationScheme(**({"targets": ["Linear"]} | group))
            for i, group in enumerate(groups)
        },
        ignore=["re:.*lm_head"],
    )
    apply_quantization_config(model, config, show_progress=False)
    weights = {}
    for name, module in model.named_modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is None:
            continue
        args, weight = scheme.weights, module.weight.data
        grouped = {
            "group": lambda w, args=args: w.unflatten(-1, (-1, args.group_size)),
            "channel": lambda w: w.unsqueeze(1),
            "tensor": lambda w: w.view(1, -1),
        }[args.strategy](weight)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        module.weight_scale.data = scale.view(module.weight_scale.shape)
        module.weight_zero_point.data = zero.view(module.weight_zero_point.shape)
        module.quantization_status = QuantizationStatus.FROZEN
        weights[name] = fake_quantize(
            weight, module.weight_scale, module.weight_zero_point, args
        ).clone()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return weights


def read_folder(folder: Path) -> tuple[Any, dict[str, QWeight], dict[str, Tensor]]:
    """The config, the quantized weights by module name, and the other tensors."""
    config = parse_config(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    quantized: dict[str, QWeight] = {}
    for name in sorted(n.removesuffix(".weight_scale") for n in tensors if "weight_scale" in n):
        fmt = FORMATS[config.format_for(name)]
        local = {
            key: tensors.pop(f"{name}.{key}") for key in fmt.tensors if f"{name}.{key}" in tensors
        }
        quantized[name] = fmt.unpack(local, config.scheme_for(name).weight)
        repacked = fmt.pack(quantized[name])
        if local["weight_scale"].shape == repacked["weight_scale"].shape:
            assert repacked.keys() == local.keys()
            assert all(torch.equal(repacked[key], local[key]) for key in local)
    return config, quantized, tensors


def run_float32(folder: Path, ids: Tensor) -> Tensor:
    """Logits of a folder from the weights that our formats read, in a plain model."""
    config, quantized, tensors = read_folder(folder)
    settings = AutoConfig.from_pretrained(folder)
    del settings.quantization_config
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    tensors |= {f"{name}.weight": q.dequantize() for name, q in quantized.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    with torch.no_grad(), quantized_inputs(model, config):
        return model(ids).logits


@pytest.mark.parametrize("name", THEIRS)
def test_we_read_what_compressed_tensors_writes(name: str, tmp_path: Path) -> None:
    expected = write_theirs(tmp_path, THEIRS[name])
    config, quantized, tensors = read_folder(tmp_path)
    assert quantized.keys() == expected.keys()
    for module, weight in expected.items():
        assert torch.equal(quantized[module].dequantize(torch.bfloat16), weight), module
        bits = {g["weights"]["num_bits"] for g in THEIRS[name]}
        assert quantized[module].spec.bits in bits
    assert config.scheme_for("lm_head") is None
    assert not any("weight_" in rest for rest in tensors)
    if name == "mixed":
        schemes = {module: str(config.scheme_for(module)) for module in quantized}
        assert schemes["model.layers.0.self_attn.q_proj"] == "W4A16"
        assert schemes["model.layers.1.mlp.down_proj"] == "W8A8"
        assert schemes["model.layers.0.mlp.down_proj"] == "W8A16"
        assert config.format_for("model.layers.1.mlp.down_proj") == "int-quantized"


def check_llmcompressor_folder(folder: Path, name: str) -> None:
    expected = load_file(folder / "expected.safetensors")["logits"]
    # float32 throughout; int8 activations may tip over a rounding boundary, see above.
    tolerance = 2e-3 if "a8" in name else 1e-5
    assert_close(run_float32(folder, llmcompressor_folders.IDS), expected, tolerance)


@pytest.mark.parametrize("name", llmcompressor_folders.SCHEMES)
def test_we_read_what_llmcompressor_wrote(name: str) -> None:
    check_llmcompressor_folder(DATA / name, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", llmcompressor_folders.SCHEMES)
def test_we_read_what_llmcompressor_writes(name: str, tmp_path: Path) -> None:
    """The same with a fresh run of the installed release."""
    pytest.importorskip("llmcompressor", reason="llmcompressor is not installed")
    source = llmcompressor_folders.small_model(tmp_path / "source")
    llmcompressor_folders.make(tmp_path, name, source)
    check_llmcompressor_folder(tmp_path / name, name)
