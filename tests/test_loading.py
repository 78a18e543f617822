"""Quantized folders as models: every architecture against the same model with the dequantized
weights, in float64; both ways of loading; and folders that are wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tersor
import tiny
from tersor import QuantLinear, TersorConfig, TersorError
from tersor.formats import FORMATS, quantization_config
from tersor.formats.config import default_format
from tersor.qweight import ActSpec, QSpec, Scheme
from tersor.solvers.rtn import RTN

W4 = Scheme(QSpec(4, 32))
IDS = torch.arange(40).view(2, 20)
FLOAT = torch.float32
DTYPE = "dtype" if transformers.__version__ >= "4.56" else "torch_dtype"
# Not quantized: embeddings, norms, heads, and what chooses the experts.
KEPT = (
    "embed",
    "wte",
    "wpe",
    "norm",
    "ln_",
    "lm_head",
    "cls",
    "predictions",
    ".gate.weight",
    "_gate.weight",
)


def is_linear(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.dim() == 2 and not any(part in name for part in KEPT)


def quantized(
    source: Path,
    out: Path,
    scheme: Scheme = W4,
    keep: Callable[[str], bool] = lambda name: False,
    format: str | None = None,
) -> Path:
    """`out`: the folder with its linears rounded, in a format that other packages write too.
    `out`-dense: the same function as an ordinary model."""
    tensors = load_file(source / "model.safetensors")
    transposed = json.loads((source / "config.json").read_text())["model_type"] == "gpt2"
    packed, dense, ignore = {}, {}, ["lm_head"]
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not is_linear(name, tensor) or keep(module):
            packed[name] = dense[name] = tensor
            ignore.append(module)
            continue
        weight = tensor.t().contiguous() if transposed else tensor
        q = RTN()(weight, None, scheme.weight)
        written = FORMATS[format or default_format(scheme)].pack(q)
        packed |= {f"{module}.{local}": value for local, value in written.items()}
        back = q.dequantize()
        dense[name] = back.t().contiguous() if transposed else back
    config = json.loads((source / "config.json").read_text())
    changes = {"quantization_config": quantization_config(scheme, ignore, format)}
    for folder, contents, extra in (
        (out, packed, changes),
        (out.parent / f"{out.name}-dense", dense, {}),
    ):
        folder.mkdir()
        save_file(contents, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | extra))
    return out


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(IDS).logits
    return result


def from_pretrained(folder: Path, **settings: object) -> nn.Module:
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    settings = {DTYPE: FLOAT, "output_loading_info": True} | settings
    model, info = getattr(transformers, kind).from_pretrained(folder, **settings)
    if (
        transformers.__version__ < "4.57"
    ):  # lists tensors of quantized layers, which are loaded later
        info["unexpected_keys"] = []
    assert not any(info.values()), info
    return model.eval()


def check_against_dense(folder: Path, model: nn.Module) -> None:
    """The float64 model is the truth; ours may err four times as much as torch's float32 does."""
    dense = from_pretrained(folder.parent / f"{folder.name}-dense")
    if hasattr(dense, "set_experts_implementation"):
        dense.set_experts_implementation("eager")  # the others have no float64
    plain = logits(dense)
    truth = logits(dense.double())
    allowed = 4 * (plain - truth).abs().max() + 1e-6
    assert float((logits(model) - truth).abs().max()) <= float(allowed)


def layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> quantized folder, made once."""
    base = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            source = tiny.save(base / kind, kind)
            made[kind] = quantized(source, base / f"{kind}-w4")
        return made[kind]

    return get


@pytest.fixture
def llama(folders, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folders("llama"), tmp_path / "llama")


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, object]], object]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- every architecture ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in tiny.CONFIGS if kind in CONFIG_MAPPING])
def test_load(kind, folders):
    folder = folders(kind)
    model = tersor.load(folder, FLOAT)
    stored = load_file(folder / "model.safetensors")
    assert len(layers(model)) == sum(name.endswith("weight_packed") for name in stored)
    assert not model.training
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    check_against_dense(folder, model)


@pytest.mark.parametrize("kind", [kind for kind in tiny.CONFIGS if kind in CONFIG_MAPPING])
def test_from_pretrained(kind, folders):
    pytest.importorskip("compressed_tensors")
    folder = folders(kind)
    model = from_pretrained(folder, quantization_config=TersorConfig())
    ours = tersor.load(folder, FLOAT)
    assert layers(model).keys() == layers(ours).keys()
    assert torch.equal(logits(model), logits(ours))


SCHEMES = {
    "w8a16": Scheme(QSpec(8, None)),
    "w3a16_asymmetric": Scheme(QSpec(3, 32, symmetric=False)),
    "w8a8": Scheme(QSpec(8, None), ActSpec()),
    "w4a8": Scheme(QSpec(4, 16), ActSpec()),
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_schemes(scheme, folders, tmp_path):
    source = folders("llama").parent / "llama"
    folder = quantized(source, tmp_path / "q", scheme)
    model = tersor.load(folder, FLOAT)
    assert all(each.scheme == scheme for each in layers(model).values())
    if scheme.activation is None:
        check_against_dense(folder, model)
        return
    # With rounded activations: the same model with a layer that rounds them in plain torch.
    for name, each in layers(model).items():
        model.set_submodule(name, RoundedInputs(each))
    expected = logits(model)
    actual = logits(tersor.load(folder, FLOAT))
    # Where float32 puts a value on another side of a tie, one code differs by one step.
    assert float((actual - expected).abs().mean()) <= 1e-3 * float(expected.abs().mean())


class RoundedInputs(nn.Module):
    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.weight = layer.qweight().dequantize(torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        # In float32, as the definition has it: the largest value sits on a tie, -127.5 steps.
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        codes = torch.round(x / scale).clamp(max=127)
        return (codes.double() * scale.double() @ self.weight.T).float()


@pytest.mark.parametrize("format", FORMATS)
def test_mixture_with_some_experts_kept(format, folders, tmp_path):
    """Experts are taken apart; the linears that are not quantized are loaded all the same."""
    source = folders("mixtral").parent / "mixtral"

    def keep(module: str) -> bool:
        return "experts.1." in module or module.endswith("experts.2.w2")

    folder = quantized(source, tmp_path / "q", keep=keep, format=format)
    model = tersor.load(folder, FLOAT)
    assert not any("experts.1." in name or "experts.2.w2" in name for name in layers(model))
    assert sum("experts.2." in name for name in layers(model)) == 2 * 2
    check_against_dense(folder, model)
    pytest.importorskip("compressed_tensors")
    other = from_pretrained(folder, quantization_config=TersorConfig())
    assert torch.equal(logits(other), logits(model))


def test_tied_head(tmp_path):
    folder = quantized(tiny.save(tmp_path / "m", tie_word_embeddings=True), tmp_path / "q")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = tersor.load(folder, FLOAT)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    check_against_dense(folder, model)


def test_sharded_folder(llama):
    tensors = load_file(llama / "model.safetensors")
    names = sorted(tensors)
    expected = logits(tersor.load(llama, FLOAT))
    (llama / "model.safetensors").unlink()
    where = {}
    for number in range(3):
        part = {name: tensors[name] for name in names[number::3]}
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file(part, llama / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (llama / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    assert torch.equal(logits(tersor.load(llama, FLOAT)), expected)
    pytest.importorskip("compressed_tensors")
    model = from_pretrained(llama, quantization_config=TersorConfig())
    assert torch.equal(logits(model), expected)


# --- what comes of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_dtype(dtype, llama):
    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("norm.weight"):
                tensors[name] = tensors[name].bfloat16()

    edit(llama, narrow)
    model = tersor.load(llama, dtype)
    wanted = dtype or FLOAT  # what config.json says
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert model.dtype == wanted
    assert all(each.dtype == wanted for each in layers(model).values())
    # Scales are those of the file, whatever the dtype of the rest.
    scales = {each.qweight().scales.dtype for each in layers(model).values()}
    assert scales == {FLOAT}
    assert logits(model).dtype == wanted


def test_scales_are_not_rounded_by_from_pretrained(llama):
    pytest.importorskip("compressed_tensors")
    model = from_pretrained(llama, quantization_config=TersorConfig(), **{DTYPE: torch.bfloat16})
    stored = load_file(llama / "model.safetensors")
    for name, each in layers(model).items():
        assert torch.equal(each.qweight().scales, stored[f"{name}.weight_scale"])


def test_saves_an_ordinary_folder(llama, tmp_path):
    model = tersor.load(llama, FLOAT)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (llama, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((llama / "config.json").read_text())["quantization_config"]
    assert torch.equal(logits(tersor.load(tmp_path / "again", FLOAT)), logits(model))


def test_generates_with_the_folders_settings(llama):
    GenerationConfig(max_new_tokens=5, do_sample=False).save_pretrained(llama)
    model = tersor.load(llama)
    assert model.generation_config.max_new_tokens == 5
    out = model.generate(IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0)
    assert out.shape == (2, 25)
    again = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, use_cache=False
    )
    assert torch.equal(out, again)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_what_can_be_trained_is_as_from_pretrained_has_it(kind, folders):
    pytest.importorskip("compressed_tensors")
    dense = from_pretrained(Path(f"{folders(kind)}-dense"))
    ours = tersor.load(folders(kind), FLOAT)
    theirs = from_pretrained(folders(kind), quantization_config=TersorConfig())
    frozen = {name for name, each in dense.named_parameters() if not each.requires_grad}
    for model in (ours, theirs):
        assert {n for n, each in model.named_parameters() if not each.requires_grad} == frozen
        assert not any(each.requires_grad for each in model.buffers())


def test_gradient_reaches_the_embeddings(llama):
    model = tersor.load(llama, FLOAT)
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=x).logits.sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert float(x.grad.abs().max()) > 0


def test_importing_changes_nothing():
    code = """
import sys
import tersor
assert not {"torch", "transformers", "tersor._core"} & set(sys.modules), "import tersor is heavy"
from transformers.quantizers import auto
before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
import tersor.loading, tersor.linear
assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
assert set(tersor.__all__) <= set(dir(tersor))
for name in tersor.__all__:
    getattr(tersor, name)
assert tersor.__version__
try:
    tersor.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise SystemExit("a wrong name is found")
print("nothing")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "nothing\n", done.stderr


# --- folders that are wrong -----------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.weight_packed"), f"{UP}: weight_packed: missing"),
        (lambda t: t.pop(f"{UP}.weight_shape"), f"{UP}: weight_shape: missing"),
        (lambda t: t.pop(f"{UP}.weight_scale"), f"{UP}: weight_scale: missing"),
        (lambda t: t.pop("model.norm.weight"), "no tensor for model.norm.weight"),
        (lambda t: t.update(strange=torch.ones(1)), "holds strange, for which"),
        (
            lambda t: t.update({f"{UP}.weight_global_scale": torch.ones(1)}),
            f"{UP}: weight_global_scale is no tensor of pack-quantized",
        ),
        (lambda t: t.update({f"{UP}.bias": torch.ones(96)}), f"{UP}: the bias is one too many"),
        (
            lambda t: t.update({"model.layers.7.mlp.up_proj.weight_scale": torch.ones(96, 2)}),
            "holds model.layers.7.mlp.up_proj quantized, but the model has no such linear",
        ),
        (
            lambda t: t.update({f"{UP}.weight_shape": torch.tensor([96, 56])}),
            f"{UP}: .*group 32 does not divide",
        ),
        (
            lambda t: t.update(
                {k: t[k.replace("up", "down")].clone() for k in list(t) if k.startswith(UP)}
            ),
            f"{UP}: the weight is 64 x 96, config.json asks for 96 x 64",
        ),
        (
            lambda t: t.update({f"{UP}.weight_scale": torch.full((96, 2), float("nan"))}),
            f"{UP}: weight_scale: holds NaN",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(65)}),
            "model.norm.weight.* shape",
        ),
    ],
)
def test_wrong_tensors(change, message, llama):
    with pytest.raises(TersorError, match=message):
        tersor.load(edit(llama, change))


def test_from_pretrained_checks_quantized_tensors_too(llama):
    pytest.importorskip("compressed_tensors")
    edit(llama, lambda t: t.pop(f"{UP}.weight_packed"))
    with pytest.raises(TersorError, match=f"{UP}: weight_packed: missing"):
        from_pretrained(llama, quantization_config=TersorConfig())


def test_config_that_disagrees_with_the_files(llama):
    edit_config(llama, lambda c: c["quantization_config"]["ignore"].append(UP))
    with pytest.raises(TersorError, match=f"the files hold {UP} quantized, but config.json"):
        tersor.load(llama)


def test_a_plain_linear_among_quantized_ones_is_reported(llama, folders):
    dense = load_file(folders("llama").parent / "llama-w4-dense" / "model.safetensors")

    def restore(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(UP)]:
            del tensors[name]
        tensors[f"{UP}.weight"] = dense[f"{UP}.weight"]

    edit(llama, restore)
    with pytest.warns(UserWarning, match=f"{UP} is quantized according to config.json but not"):
        model = tersor.load(llama, FLOAT)
    assert UP not in layers(model)
    torch.testing.assert_close(logits(model), logits(tersor.load(folders("llama"), FLOAT)))


def test_folders_of_other_kinds(folders, tmp_path):
    plain = folders("llama").parent / "llama-w4-dense"
    with pytest.raises(TersorError, match="is not quantized, and no linear of it"):
        tersor.load(plain)
    with pytest.raises(TersorError, match="there is no folder"):
        tersor.load(tmp_path / "none")
    pytest.importorskip("compressed_tensors")
    with pytest.raises(TersorError, match="the folder is not quantized"):
        from_pretrained(plain, quantization_config=TersorConfig())


def test_code_in_a_folder_is_not_run(llama):
    (llama / "evil.py").write_text("raise SystemExit('run')")

    def change(config: dict[str, object]) -> None:
        config |= {
            "model_type": "evil",
            "architectures": ["Evil"],
            "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        }

    with pytest.raises(TersorError, match="brings code of its own, which tersor does not run"):
        tersor.load(edit_config(llama, change))


def test_a_place_that_is_chosen_for_it(llama):
    pytest.importorskip("compressed_tensors")
    model = from_pretrained(llama, quantization_config=TersorConfig(), device_map="auto")
    place = "cuda" if torch.cuda.is_available() else "cpu"
    assert {each.packed.device.type for each in layers(model).values()} == {place}
    assert torch.equal(logits(model.cpu()), logits(tersor.load(llama, FLOAT)))


def test_places_without_kernels(llama):
    pytest.importorskip("compressed_tensors")
    for place in ("disk", "mps") + (() if torch.cuda.is_available() else (0, "cuda")):
        with pytest.raises(TersorError, match="name devices that are here, or leave it out"):
            AutoModelForCausalLM.from_pretrained(
                llama, quantization_config=TersorConfig(), device_map={"": place}
            )
    if not torch.cuda.is_available():
        with pytest.raises(TersorError, match=r"device_map with 3: (?!kernels run)"):
            AutoModelForCausalLM.from_pretrained(
                llama, quantization_config=TersorConfig(), device_map=3
            )
    with pytest.raises(TersorError, match="float64; convert it"):
        tersor.load(llama, torch.float64)
