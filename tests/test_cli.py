"""The command line: what it prints, where errors go, and what it must not do before it has to."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file

import tiny
from tersor import calibrate, cli
from tersor.commands import folders
from tersor.errors import TersorError
from tersor.steps import Quantize

if TYPE_CHECKING:
    from tersor.demo_model import DemoModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and the model quantized through the command line; models with positions in a
    table (opt), that only read (bert), that lack a tensor, have tensors of another shape than
    config.json says, another vocabulary, a config.json that transformers refuses (odd), and no
    tokenizer (mute)."""
    home = tmp_path_factory.mktemp("cli")
    model = tiny.save(home / "model")
    tiny.save(home / "wide", vocab_size=2 * tiny.VOCAB)
    tiny.save(home / "opt", "opt")
    tiny.tokenizer(bos=False).save_pretrained(home / "opt")
    shutil.copytree(model, home / "odd")
    change_config(home / "odd", num_hidden_layers="two")
    tiny.save(home / "bert", "bert")
    shutil.copytree(model, home / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    shutil.copytree(model, home / "missing")
    save_file(tensors, home / "missing" / "model.safetensors", {"format": "pt"})
    shutil.copytree(model, home / "narrow")
    change_config(home / "narrow", intermediate_size=64)
    (home / "text.txt").write_text(tiny.text())
    arguments = ["--group", "32", "--samples", "8", "--calibration", str(home / "text.txt")]
    assert cli.main(["quantize", str(home / "model"), "--out", str(home / "int4"), *arguments]) == 0
    return home


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as end:  # argparse: bad arguments, --help and --version
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- every command -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.EXAMPLES)
def test_help_and_its_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert " ".join(cli.EXAMPLES[command].split()) in " ".join(out.split())
    args = cli.build_parser().parse_args(shlex.split(cli.EXAMPLES[command])[1:])
    assert args.run is not None


def test_quantize_prints_the_errors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "rtn", "--bits", "3", "--group", "row", "--asymmetric", "--clip"]
    code, out, _ = run(
        capsys, "quantize", folder / "model", "--out", tmp_path / "q", *options,
        "--ignore", "*.down_proj", "*.0.*.up_proj",
    )  # fmt: skip
    assert code == 0
    for word in ("model.layers.0", "model.layers.1", "q_proj", "gate_proj", "bits per quantized"):
        assert word in out
    assert "down_proj" not in out
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["symmetric"]) == (3, "channel", False)
    settings = json.loads((tmp_path / "q" / "tersor_report.json").read_text())["settings"]
    assert settings["clip"] is True


def test_options_reach_the_solver_and_the_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(
        capsys, "quantize", folder / "model", "--out", tmp_path / "q", "--bits", "8",
        "--activations", "int8", "--act-order", "--damp", "0.05", "--no-clip", "--sequential",
        "--calibration", folder / "text.txt", "--samples", "4", "--seq-len", "32", "--seed", "3",
        "--bos", "never", "--strict",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads((tmp_path / "q" / "tersor_report.json").read_text())
    asked = {"bits": 8, "group": None, "activations": 8, "method": "gptq", "act_order": True,
             "damp": 0.05, "clip": False, "sequential": True}  # fmt: skip
    assert asked.items() <= report["settings"].items()
    text = {"samples": 4, "seq_len": 32, "seed": 3, "bos": "never", "tokens": 128}
    assert text.items() <= report["calibration"].items()
    assert report["calibration"]["sources"] == [str(folder / "text.txt")]


def test_eval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", folder / "int4", "--baseline", folder / "model"]
    arguments += ["--text", folder / "text.txt", "--samples", "6", "--seq-len", "32"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "perplexity" in out
    code, out, _ = run(capsys, *arguments, "--json", "--speed")
    result = json.loads(out)
    assert result.keys() == {str(folder / "int4"), str(folder / "model")}
    quality = result[str(folder / "int4")]["quality"]
    assert quality["windows"] == 6
    assert 0 < quality["kl"]["mean"] < 0.1
    assert result[str(folder / "model")]["quality"]["top1"] == 1
    assert result[str(folder / "int4")]["speed"]["decode"] > 0


def test_eval_tasks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", folder / "int4", "--baseline", folder / "model", "--samples", "2"]
    arguments += ["--seq-len", "32", "--text"]
    code, _, err = run(capsys, *arguments, folder / "text.txt", "--tasks", "python", "mmlu")
    assert code == 2 and "name no others beside it" in err
    code, _, err = run(capsys, *arguments, folder / "text.txt", "--tasks", "python")
    assert code == 2 and "give more Python source" in err
    source = tmp_path / "source.txt"
    source.write_text("\n".join(inspect.getsource(each) for each in (argparse, inspect, shutil)))
    code, _, err = run(capsys, *arguments, source, "--tasks", "python")
    assert code == 1 and "nothing is left of the choice" in err  # nonsense words are all it knows


@pytest.mark.slow
def test_eval_tasks_of_the_demo_model(
    demo_model: DemoModel, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", demo_model.folder, "--text", demo_model.held_out["code"]]
    arguments += ["--samples", "2", "--seq-len", "32", "--tasks", "python"]
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    scores = json.loads(out)[str(demo_model.folder)]["tasks"]
    assert scores.keys() == {f"python_{task}" for task in ("name", "indent", "bracket", "order")}
    assert all(score["items"] == 100 and 0 < score["acc"]["mean"] <= 1 for score in scores.values())
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "acc_norm" in out and "python_indent" in out


def test_eval_begins_windows_as_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {}
    for bos in ("auto", "always", "never"):
        code, out, _ = run(
            capsys, "eval", folder / "model", "--text", folder / "text.txt", "--samples", 2,
            "--bos", bos, "--json",
        )  # fmt: skip
        assert code == 0
        figures[bos] = json.loads(out)
    assert figures["auto"] == figures["always"] != figures["never"]  # the tokenizer adds <s>
    assert cli.BOS == calibrate.BOS


def test_the_whole_context_of_a_model_with_a_table_of_positions(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(
        capsys, "eval", folder / "opt", "--text", folder / "text.txt", "--speed",
        "--seq-len", tiny.CONTEXT, "--samples", 2,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert f"{2 * tiny.CONTEXT} tokens in 2 windows of {tiny.CONTEXT}" in out
    assert "(32 tokens), decode" in out
    tokens = len(tiny.tokenizer(bos=False)("terso")["input_ids"])
    arguments = ["generate", folder / "opt", "terso", "--max-tokens"]
    assert run(capsys, *arguments, tiny.CONTEXT - tokens)[0] == 0
    assert run(capsys, *arguments, tiny.CONTEXT - tokens + 1)[0] == 2


def test_eval_reads_json_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"text": tiny.text(99, seed), "other": tiny.text(99, seed + 3)} for seed in range(3)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    figures = []
    for source in ("text.jsonl", "text.jsonl:text", "text.jsonl:other"):
        code, out, _ = run(
            capsys, "eval", folder / "model", "--text", folder / source, "--seq-len", "8", "--json"
        )
        assert code == 0
        figures.append(json.loads(out))
    assert figures[0] == figures[1] != figures[2]


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", folder / "int4")
    assert code == 0
    for word in ("W4A16", "pack-quantized", "14 linears", "method gptq, calibrated on 512 tokens"):
        assert word in out
    assert "LlamaForCausalLM, 2 blocks\n" in out
    assert "as asked" not in out
    code, out, _ = run(capsys, "inspect", folder / "model")
    assert code == 0
    nbytes = sum(t.nbytes for t in load_file(folder / "model" / "model.safetensors").values())
    assert out.endswith(f"\nnot quantized: {nbytes / 1e6:.2f} MB of float32\n")


def test_inspect_misses_a_weight(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(folder / "int4", tmp_path / "int4"))
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    lost = "model.layers.0.mlp.up_proj.weight_packed"
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    for index in model.glob("*.index.json"):
        content = json.loads(index.read_text())
        del content["weight_map"][lost]
        index.write_text(json.dumps(content))
    code, _, err = run(capsys, "inspect", model)
    assert code == 2
    assert f"and no {lost}; its files are incomplete" in err


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for draw in ([], [], ["--temperature", "1.5", "--seed", "1"]):
        code, out, _ = run(
            capsys, "generate", folder / "int4", "terso", "--max-tokens", "12", *draw
        )
        assert code == 0
        assert out.startswith("terso")
        texts.append(out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_prunes_the_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(tiny.text(45).split())
    count = len(tiny.tokenizer()(text)["input_ids"])
    how = ("--max-tokens", "3", "--prune-tokens", "0=0.2")
    code, out, err = run(capsys, "generate", folder / "int4", text, *how)
    assert (code, err) == (0, f"prompt: layer 0: {count} -> {count - count // 5} tokens\n")
    assert out.startswith(text)


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "kernels")
    assert code == 0
    assert "w4a8_scalar" in out
    code, out, _ = run(capsys, "kernels", "--shape", 1, 4096, 4096, "--activations", "int8")
    assert code == 0
    sentence, table = out.split("\n", 1)
    serving = sentence.split()[0]
    assert sentence.startswith(f"{serving} serves 1 x 4096 x 4096: W4A8, a scale per group of 128,")
    (row,) = (line for line in table.splitlines() if " serves " in line)
    assert serving in row


@pytest.mark.parametrize(
    ("command", "variable", "value"),
    [
        ("kernels", "TERSOR_THREADS", "-3"),
        ("kernels", "TERSOR_THREADS", "abc"),
        ("kernels", "TERSOR_ISA", "abc"),
        ("generate {folder}/int4 terso", "TERSOR_THREADS", "0"),
    ],
)
def test_a_wrong_environment(folder: Path, command: str, variable: str, value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tersor", *command.format(folder=folder).split()],
        capture_output=True,
        text=True,
        env=os.environ | {variable: value},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tersor: error: {variable}")
    assert value in done.stderr
    assert done.stderr.count("\n") == 1


def test_version_and_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tersor", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("tersor 0.")


@pytest.mark.parametrize(
    "command",
    [
        "quantize --help",
        "quantize model --out .",
        "eval x --text .",
        "demo --json .",
        "kernels 512",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path: Path, command: str) -> None:
    code = (
        "import sys, tersor.cli\ntry: tersor.cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    argv = [sys.executable, "-c", code, *command.split()]
    assert subprocess.run(argv, capture_output=True, cwd=tmp_path).returncode == 0


def test_every_argument_is_explained() -> None:
    parser = cli.build_parser()
    assert parser._subparsers is not None
    (action,) = parser._subparsers._group_actions
    assert isinstance(action.choices, dict)
    for name, sub in action.choices.items():
        for action in sub._actions:
            assert action.help, (name, action.dest)


def test_a_solver_from_the_table_takes_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line in SOLVERS is enough for --method, and a field for an option of its name."""
    from tersor import solvers

    @dataclass(frozen=True)
    class Mine:
        damp: float = 0.5

    monkeypatch.setitem(solvers.SOLVERS, "mine", Mine)

    def solver(*options: str) -> object:
        command = ["quantize", "x", "--out", "y", "--method", "mine", *options]
        args = cli.build_parser().parse_args(command)
        return Quantize(**folders.settings_of(args, Quantize)).call()[1]["method"]

    assert solver() == Mine()
    assert solver("--damp", "0.1") == Mine(0.1)
    with pytest.raises(TersorError, match="--clip changes nothing for --method mine"):
        solver("--clip")
    with pytest.raises(TersorError, match="use rtn or gptq or mine"):
        solver("--method", "other")


# --- errors --------------------------------------------------------------------------------------


QUANTIZE = "quantize {model} --out {out}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{QUANTIZE} --group 32", "needs text to calibrate on; give --calibration FILE"),
        ("quantize {model} --out {model} --method rtn --group 32", "exists already"),
        (f"{QUANTIZE} --bits 5", "invalid choice: 5"),
        (f"{QUANTIZE} --group many", "neither a number of columns nor 'row'; see tersor quantize"),
        (f"{QUANTIZE} --group 24", "multiple of 16"),
        (f"{QUANTIZE} --method rtn", "group 128 does not divide"),
        (f"{QUANTIZE} --method rtn --act-order", "--act-order changes nothing"),
        (f"{QUANTIZE} --method awq", "--method awq is unknown; use rtn or gptq"),
        ("quantize {model}", "arguments are required: --out"),
        ("quantize --out o --calibration a.txt m", "MODEL; put it before options that take"),
        ("quantize {out} --out {out}", "there is no folder"),
        ("inspect {out}", "there is no folder"),
        ("eval {model} --text {out}", "there is no text file"),
        ("eval {model} --text {model}/config.json --seq-len 9999", "use 64 or less"),
        ("eval {model} --text x --samples 0", "--samples: give a whole number from 1 to"),
        ("eval {model} --text x --seq-len 1", "--seq-len: give a whole number from 2 to"),
        ("eval {model} --text {text} --baseline {wide}", "a vocabulary of 160 tokens and the base"),
        ("eval {text} --text {text}", "is not a folder"),
        ("eval {odd} --text {text}", "transformers cannot load {odd} ("),
        ("eval {bert} --text {text}", "a BertForMaskedLM, which does not predict the next token"),
        ("eval {model} --text {text} --baseline {odd}", "transformers cannot load {odd} ("),
        ("eval {mute} --text {text}", "the tokenizer in {mute} cannot be loaded"),
        ("eval {model} --text {text} --bos maybe", "invalid choice: 'maybe'"),
        ("eval {missing} --text {text}", "has no tensor for model.layers.0.mlp.up_proj.weight;"),
        ("eval {model} --text {text} --baseline {missing}", "has no tensor for model.layers.0"),
        ("generate {missing} hello", "has no tensor for model.layers.0.mlp.up_proj.weight;"),
        ("generate {narrow} hello", "mlp.down_proj.weight in another shape (and 5 more);"),
        ("generate {model} hello --max-tokens 0", "--max-tokens: give a whole number from 1 to"),
        ("generate {model} hello --temperature -1", "give 0 or a positive number, not '-1'"),
        ("generate {model} hello --temperature nan", "give 0 or a positive number, not 'nan'"),
        ("generate {model} hello --seed -1", "--seed: give a whole number from 0 to"),
        ("generate {model} hello --prune-tokens half", "such as 8=0.5,16=0.5, not 'half'"),
        (
            "generate {model} hello --prune-tokens 1=0.5",
            "after layer 1: the model has the layers 0",
        ),
        ("generate {model} hello --prune-tokens 0=0.5", "fewer than keep_first + keep_last = 36"),
        (f"{QUANTIZE} --seed 9223372036854775808", "--seed: give a whole number from 0 to"),
        (f"{QUANTIZE} --samples many", "--samples: give a whole number from 1 to"),
        ("quantize {model} --out / --method rtn --group 32", "--out / is the root of all files"),
        ("kernels --shape 1 0 64", "--shape: give a whole number from 1 to"),
        ("generate {out} hello", "there is no folder"),
        ("generate {odd} hello", "transformers cannot load {odd} ("),
        ("generate {opt} terso --max-tokens 64", "the 64 positions of the model; use --max-tokens"),
        ("generate {opt} " + 70 * "terso", "shorten the prompt"),
        ("generate {opt} ''", "the prompt has no tokens"),
        ("kernels --shape 1 64 63", "use --group row (one scale per row)"),
        ("kernels --shape 1 64 192", "use --group 64 or --group row"),
        ("kernels 512x512", "unrecognized arguments: 512x512; see tersor kernels --help"),
        ("demo --json {out}/figures", "figures cannot be written"),
        ("squash", "invalid choice: 'squash'"),
        ("", "arguments are required: COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    names = ("model", "missing", "narrow", "wide", "opt", "odd", "mute", "bert")
    places = {name: folder / name for name in names}
    places |= {"text": folder / "text.txt", "out": tmp_path / "none"}
    code, out, err = run(capsys, *shlex.split(command.format(**places)))
    assert code == 2
    assert out == ""
    assert err.startswith("tersor: error: ")
    assert message.format(**places) in err
    assert err.count("\n") == 1


def test_transformers_adds_nothing_to_an_error(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder / "missing", tmp_path / "bad")
    change_config(model, bos_token_id=9999)  # transformers warns of it, and of what is missing
    done = subprocess.run(
        [sys.executable, "-m", "tersor", "generate", str(model), "hello"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tersor: error: ")
    assert done.stderr.count("\n") == 1


def test_an_interrupt_while_arguments_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupt)
    assert run(capsys, "inspect", "x") == (130, "", "tersor: stopped\n")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(TersorError, match="there is no folder"):
        cli.main(["inspect", str(tmp_path / "none"), "--debug"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "tersor: stopped\n"),
        (KeyError("x"), 1, "tersor: internal error: KeyError: 'x'; run again with --debug"),
        (OSError(5, "Input/output error", "disk"), 2, "tersor: error: disk: Input/output error\n"),
        (OSError("no room"), 2, "tersor: error: input or output: no room\n"),
    ],
)
def test_other_ends(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(args: object) -> None:
        raise error

    monkeypatch.setattr(cli.commands, "inspect", fail)
    got, _, err = run(capsys, "inspect", "x")
    assert got == code
    assert err.startswith(message)


def test_an_interrupted_run_says_that_it_continues(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tersor.pipeline.quantize_checkpoint", interrupt)
    code, _, err = run(
        capsys, "quantize", folder / "model", "--out", tmp_path / "q", "--method", "rtn"
    )
    assert code == 130
    assert "the same command again goes on" in err
