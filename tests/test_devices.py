"""Runs on a GPU, from folder to folder: the choice of a device, and that all that meets there is
there. Without a GPU the CPU passes for one, with the solver's kernels emulated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import emulated
import tiny
from folders import weights
from pretend_gpu import is_there, pretend_gpu
from tersor import (
    GPTQ,
    ActSpec,
    QSpec,
    QuantizationTraining,
    QuantLinear,
    Scheme,
    SparseGPT,
    Sparsity,
    TersorError,
    Wanda,
    _core,
    cuda,
    prune_checkpoint,
    quantize_checkpoint,
    quantize_model,
)
from tersor.calibrate import Calibration
from tersor.devices import find_device
from tersor.report import Report
from test_cuda_layer import calls, library  # noqa: F401, fixtures of `linears`

TEXT = Calibration(texts=(tiny.text(),), samples=12, seq_len=64)
W4 = Scheme(QSpec(4, 32))
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def solver(tmp_path_factory):
    if emulated.compiler() is None:
        pytest.skip("there is no C++ compiler")
    return emulated.build(tmp_path_factory.mktemp("emulated"), "emulate_solve")


@pytest.fixture
def gpu(monkeypatch, request):
    """A GPU, real or pretended, while the test lasts."""
    if torch.cuda.is_available():
        yield
        return
    emulated.use_solver(request.getfixturevalue("solver"), monkeypatch)
    with pretend_gpu(monkeypatch):
        yield


@pytest.fixture
def linears(monkeypatch, request):
    """QuantLinear there too."""
    if not torch.cuda.is_available():
        request.getfixturevalue("calls")
        monkeypatch.setattr(cuda._core, "cuda_refuses", _core.cuda_refuses, raising=False)
        monkeypatch.setattr(cuda, "linear", _linear)


def _linear(x, packed, bias, grid, outliers=None, scale=None, shared=None):
    return cuda._linear(x, packed, bias, *grid.fields(), outliers, scale[0] if scale else None)


# --- the choice -----------------------------------------------------------------------------------


@no_gpu
def test_without_a_gpu_the_cpu_is_taken():
    assert find_device() == find_device("cpu") == torch.device("cpu")


@no_gpu
@pytest.mark.parametrize("named", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there(named):
    with pytest.raises(TersorError, match=rf"{named} cannot be used: .*; use --device cpu"):
        find_device(named)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("gpu", "auto, cpu, cuda or cuda:N, not 'gpu'"),
        (3.5, "auto, cpu, cuda or cuda:N, not 3.5"),
        ("mps", "no kernels for mps"),
        ("meta", "no kernels for meta"),
    ],
)
def test_what_is_no_device(named, said):
    with pytest.raises(TersorError, match=said):
        find_device(named)


def test_with_a_gpu_it_is_taken(gpu):
    assert find_device().type == find_device("cuda").type == "cuda"
    assert find_device("cpu").type == "cpu"
    with pytest.raises(TersorError, match=r"there is no cuda:99, of \d+ here"):
        find_device("cuda:99")


@no_gpu
def test_the_pretended_gpu_is_a_strict_one(gpu):
    """Or the tests below would show nothing."""
    there, here = torch.zeros(3, 4, device="cuda"), torch.ones(3, 4)
    assert there.is_cuda and there[1:].t().device.type == "cuda" and not here.is_cuda
    assert is_there(here.to(there.device)) and not is_there(there.cpu())
    for wrong in (lambda: there + here, lambda: torch.cat([here, there]), lambda: there.numpy()):
        with pytest.raises((RuntimeError, TypeError), match=r"one device|cuda:0"):
            wrong()


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_architecture_on_a_gpu(gpu, kind, tmp_path):
    """The same codes as on the CPU, but for ties: sums have another order."""
    source = tiny.save(tmp_path / "m", kind)

    def run(device: str) -> Report:
        out = tmp_path / device
        return quantize_checkpoint(source, out, scheme=W4, calibration=TEXT, device=device)

    here, there = run("cpu"), run("cuda")
    assert "device" in there.settings and "device" not in here.settings
    same_weights(tmp_path / "cpu", tmp_path / "cuda")
    for a, b in zip(here.layers, there.layers, strict=True):
        assert a.name == b.name and a.tokens == b.tokens
        assert b.error == pytest.approx(a.error, rel=0.05)


def same_weights(here: Path, there: Path) -> None:
    """A tie in one linear changes what the next ones are calibrated on by a little."""
    ours, theirs = weights(here), weights(there)
    assert ours.keys() == theirs.keys() and ours
    for name, q in ours.items():
        assert torch.equal(q.scales, theirs[name].scales), name
        assert (q.codes == theirs[name].codes).double().mean() >= 0.95, name


@pytest.mark.parametrize(
    "method",
    [GPTQ(act_order=True), "rtn", SparseGPT(Sparsity(0.5)), SparseGPT(Sparsity(0.5), refit=True),
     SparseGPT(Sparsity(pattern=(2, 4))), SparseGPT(Sparsity(pattern=(16, 32))),
     Wanda(Sparsity(0.5))],
    ids=str,
)  # fmt: skip
def test_every_solver_on_a_gpu(gpu, method, tmp_path):
    source = tiny.save(tmp_path / "m")
    sparse = not isinstance(method, str) and method.sparsity is not None

    def run(device: str) -> Report:
        given = {"calibration": TEXT, "device": device, "scheme": W4}
        if sparse:
            return prune_checkpoint(source, tmp_path / device, method=method, **given)
        return quantize_checkpoint(source, tmp_path / device, method=method, **given)

    here, there = run("cpu"), run("cuda")
    if not getattr(method, "refit", False):  # whose conjugate gradients end where they are good
        same_weights(tmp_path / "cpu", tmp_path / "cuda")
    assert there.sparsity == pytest.approx(here.sparsity, abs=0.01)
    for a, b in zip(here.layers, there.layers, strict=True):
        assert b.error == pytest.approx(a.error, rel=0.05)


@pytest.mark.parametrize("allocation", ["owl", "global"])
def test_ratios_that_are_spread(gpu, allocation, tmp_path):
    """Without a grid: weights that stay in 16 bits, with zeros."""
    source, method = tiny.save(tmp_path / "m"), SparseGPT(Sparsity(0.5))

    def run(device: str) -> Report:
        return prune_checkpoint(
            source, tmp_path / device, method=method, allocation=allocation, calibration=TEXT,
            device=device,
        )  # fmt: skip

    here, there = run("cpu"), run("cuda")
    for a, b in zip(here.layers, there.layers, strict=True):
        assert b.sparsity == pytest.approx(a.sparsity, abs=0.01)


def test_a_stopped_run_goes_on_there_and_not_elsewhere(gpu, tmp_path, monkeypatch):
    source, out = tiny.save(tmp_path / "m"), tmp_path / "out"
    import tersor.pipeline as pipeline

    real, done = pipeline.compress_block, []

    def stopping(*given):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*given)

    def run(device: str) -> Report:
        return quantize_checkpoint(source, out, scheme=W4, calibration=TEXT, device=device)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compress_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            run("cuda")
    with pytest.raises(TersorError, match="device"):
        run("cpu")
    assert len(run("cuda").layers) == 14


# --- models in memory -----------------------------------------------------------------------------


ACTIVATIONS = ActSpec(outliers=6.0), ActSpec(dynamic=False)


@pytest.mark.parametrize(
    "scheme", [W4, *(Scheme(QSpec(8, None), how) for how in ACTIVATIONS)], ids=str
)
def test_a_model_that_is_there_is_quantized_there(linears, gpu, scheme):
    ids = torch.randint(2, tiny.VOCAB, (4, 48), generator=torch.Generator().manual_seed(0))
    here, there = tiny.model("llama"), tiny.model("llama").to("cuda")
    quantize_model(here, ids, scheme=scheme)
    report = quantize_model(there, ids, scheme=scheme)
    assert "device" in report.settings and len(report.layers) == 14
    for name, layer in there.named_modules():
        if isinstance(layer, QuantLinear):
            assert layer.grid is not None and layer.packed.is_cuda
            assert (layer.input_scale is not None) == scheme.static
            assert layer.static_scale == here.get_submodule(name).static_scale
            ours = here.get_submodule(name).qweight().codes
            assert (layer.qweight().codes.cpu() == ours).double().mean() >= 0.95
    with torch.no_grad():
        expected, found = here(ids).logits, there(ids.to("cuda")).logits.cpu()
    assert (found - expected).norm() < 0.05 * expected.norm()
    back = there.to("cpu")
    with torch.no_grad():
        assert (back(ids).logits - expected).norm() < 0.05 * expected.norm()


def test_a_training_ends_there(linears, gpu):
    model = tiny.model("llama").to("cuda")
    training = QuantizationTraining(W4).attach(model)
    assert training.finish().scheme == W4
    layers = [each for each in model.modules() if isinstance(each, QuantLinear)]
    assert len(layers) == 14 and all(each.packed.is_cuda for each in layers)


def test_a_model_that_could_not_stay_there(gpu):
    model = tiny.model("llama").to("cuda")
    with pytest.raises(TersorError, match=r"q_proj, 64 x 64, cannot be .*group must be 32.*\.cpu"):
        quantize_model(model, scheme=Scheme(QSpec(4, 16)), method="rtn")
    model.model.layers[1].to("cpu")
    with pytest.raises(TersorError, match=r"layers\.1\..* is on cpu; .*all of it to one GPU"):
        quantize_model(model, scheme=W4, method="rtn")
