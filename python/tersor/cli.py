"""The command `tersor`: its arguments and its errors; commands does the work. It is argparse,
since the parser of the standard library starts at once and is one dependency less.

Nothing is imported here that would make --help wait for torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tersor import commands
from tersor.errors import TersorError
from tersor.options import (
    add_device,
    add_files,
    add_grid,
    add_plan,
    add_search_options,
    add_settings,
    add_teacher,
    add_text,
    group,
    positive,
    shares,
    structured,
    temperature,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

BOS = ("auto", "always", "never")  # as in tersor.calibrate, which imports torch
IMPORTANCES = (  # as in tersor.surgery.shrink and tersor.surgery.experts
    *("output", "fluctuation", "magnitude", "activation"),
    *("taylor", "entropy", "frequency"),
)
DTYPES = ("float32", "bfloat16", "float16")

EXAMPLES = {
    "quantize": "tersor quantize ./Llama-3.2-1B --out ./Llama-3.2-1B-INT4 --calibration text.txt",
    "prune": "tersor prune ./Llama-3.2-1B --out ./Llama-3.2-1B-2of4 --pattern 2:4 --calibration "
    "text.txt",
    "distill": "tersor distill ./student --teacher ./Llama-3.2-1B --out ./distilled "
    "--calibration text.txt",
    "qat": "tersor qat ./Llama-3.2-1B --teacher ./Llama-3.2-1B --bits 3 --out ./int3 "
    "--calibration text.txt",
    "compress": "tersor compress ./Llama-3.2-1B --recipe mobile --out ./small "
    "--calibration text.txt --text held-out.txt",
    "search": "tersor search ./Llama-3.2-1B --out ./mixed --constraint "
    "'size<=0.3x,latency<=0.6x' --calibration text.txt",
    "eval": "tersor eval ./Llama-3.2-1B-INT4 --baseline ./Llama-3.2-1B --text held-out.txt",
    "inspect": "tersor inspect ./Llama-3.2-1B-INT4",
    "generate": 'tersor generate ./Llama-3.2-1B-INT4 "Once upon a time"',
    "kernels": "tersor kernels --shape 1 4096 4096 --activations int8",
    "bench": "tersor bench --shape 4096 4096 --tokens 1 8",
    "demo": "tersor demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code: 0, 2 for bad input, 1 for what ought not to happen and for
    results with something missing, 130 when interrupted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # tersor says itself what is wrong
    warnings.filterwarnings("ignore", module="transformers")
    if not sys.stderr.isatty():  # transformers' bars, which it draws into logs as well
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    args = argparse.Namespace(debug=False, stopped="stopped")
    try:
        args = build_parser().parse_args(argv)
        code: int = args.run(args) or 0
        return code
    except KeyboardInterrupt:
        return _fail(args.stopped, 130)
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, TersorError):
            return _fail(f"error: {error}", 2)
        if isinstance(error, OSError):
            return _fail(
                f"error: {error.filename or 'input or output'}: {error.strerror or error}", 2
            )
        kind = type(error).__name__
        return _fail(f"internal error: {kind}: {error}; run again with --debug and report it", 1)


def _fail(message: str, code: int) -> int:
    print("tersor:", " ".join(message.split()), file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """Errors are one line, like all others, and point to the help of the command they are of."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # a command's parser would leave them to the one above it
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: MODEL"):  # which an option that takes many has swallowed?
            message += "; put it before options that take several values"
        self.exit(2, f"tersor: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tersor", description="Compress language models and run the result.")
    parser.add_argument(
        "--version", action="version", version=f"tersor {metadata.version('tersor')}"
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    bos: dict[str, Any] = {
        "default": "auto",
        "choices": BOS,
        "help": "begin windows with the BOS token; default: auto, as the tokenizer does",
    }

    outliers: dict[str, Any] = {
        "type": positive,
        "metavar": "T",
        "help": "LLM.int8(): columns of int8 activations with values beyond T, such as 6.0, stay "
        "in 16 bits; default: none",
    }

    def command(name: str, run: Any, summary: str, stopped: str = "stopped") -> Parser:
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example: {EXAMPLES[name]}",
        )
        sub.add_argument("--debug", action="store_true", help="show a traceback for any error")
        sub.set_defaults(run=run, stopped=stopped)
        return sub

    again = "stopped; the same command again goes on after the last whole block"
    sub = command(
        "quantize", commands.quantize, "quantize a Hugging Face checkpoint", stopped=again
    )
    add_files(sub)
    add = sub.add_argument
    add(
        "--method",
        default="gptq",
        metavar="NAME",
        help="gptq (the default), rtn, which needs no text, or another of tersor.solvers.SOLVERS",
    )
    add("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="of a weight; default: 4")
    add_grid(sub)
    add_text(sub, bos)
    add_settings(sub, "act_order", "damp", "clip", "two_level")
    add_device(sub)

    sub = command(
        "prune",
        commands.prune,
        "make weights of a Hugging Face checkpoint zero, or cut parts of it out",
        stopped=again,
    )
    add_files(sub)
    add = sub.add_argument
    add(
        "--method",
        metavar="NAME",
        help="sparsegpt (the default), wanda, or magnitude, which needs no text; or another of "
        "tersor.solvers.PRUNERS",
    )
    how = sub.add_mutually_exclusive_group(required=True)
    how.add_argument("--sparsity", type=float, metavar="R", help="share of zeros, such as 0.5")
    how.add_argument(
        "--pattern", metavar="N:M", help="keep at most N of every M weights in a row, such as 2:4"
    )
    how.add_argument(
        "--structured",
        type=structured,
        metavar="WHAT=N,...",
        help="make the model smaller: heads, query_heads (of each head of keys and values) and ffn "
        "(channels of the MLPs) by a share, layers by a number: heads=0.2,ffn=0.25,layers=2; or, "
        "each in a run of its own, hidden (the width) or experts (of a mixture) by a share",
    )
    add(
        "--allocation",
        default="uniform",
        choices=("uniform", "owl", "global"),
        help="how --sparsity is spread: the same everywhere, less where there are outliers, or by "
        "magnitude over the whole model; default: uniform",
    )
    add(
        "--quantize",
        type=int,
        choices=(2, 3, 4, 8),
        metavar="BITS",
        help="quantize what is left, in the same pass",
    )
    add_grid(sub)
    add_text(sub, bos)
    add_settings(sub, "refit", "per", "act_order", "damp", "clip", "two_level")
    add_device(sub)
    add = sub.add_argument_group("settings of --structured").add_argument
    add(
        "--importance",
        choices=IMPORTANCES,
        help="by what heads, channels and experts are ranked; default: output, the error of "
        "leaving one out; taylor needs the whole model in memory, entropy is of heads alone, "
        "frequency of experts",
    )
    add("--head-importance", choices=IMPORTANCES, help="of heads, where it is another one")
    add(
        "--layer-importance",
        choices=("influence", "angular", "contiguous"),
        help="by what layers are ranked: how far a block moves its input, by 1 - cos (the "
        "default) or by the angle, or the angle of blocks that follow one another",
    )
    add(
        "--ranking",
        choices=("local", "global"),
        help="heads and channels within each block (the default), or over the whole model, which "
        "the configuration of no model yet can state",
    )
    add(
        "--multiple",
        type=whole(1),
        metavar="N",
        help="of which the channels left are a multiple; default: as the model's, up to 128",
    )
    add(
        "--update",
        choices=("least-squares", "bias", "none"),
        help="new values for what reads heads and channels, or a new bias where it has one; "
        "default: least-squares",
    )

    goes_on = "stopped; the same command again goes on after the last checkpoint of the training"
    sub = command(
        "distill", commands.distill, "train a model on what a teacher predicts", stopped=goes_on
    )
    add_files(sub, ignore=False)
    add_teacher(sub, required=True)
    add_text(sub, bos, sequential=False, samples=False)
    add_plan(sub)

    sub = command(
        "qat", commands.qat, "train a model with its weights as they will be once quantized",
        stopped=goes_on,
    )  # fmt: skip
    add_files(sub)
    sub.add_argument(
        "--bits", type=int, default=4, choices=(2, 3, 4, 8), help="of a weight; default: 4"
    )
    add_grid(sub, static=False)
    add_teacher(sub, required=False)
    add_text(sub, bos, sequential=False)
    add_plan(sub)
    add = sub.add_argument_group("settings of the quantization").add_argument
    add(
        "--scales",
        choices=("learned", "fixed"),
        help="learned with the weights (the default), or as they are at the start",
    )
    add(
        "--start",
        choices=("gptq", "rtn"),
        help="from the solution of GPTQ on the calibration text (the default), or from the weights",
    )
    add(
        "--output",
        choices=("codes", "weights"),
        help="codes: a quantized checkpoint (the default); weights: the trained ones, for another "
        "method to quantize",
    )

    sub = command(
        "compress",
        commands.compress,
        "run a recipe: several steps in a row, with a report of every stage",
        stopped="stopped; the same command again goes on where it was",
    )
    add_files(sub, ignore=False, speed="measure tokens per second of every stage")
    add = sub.add_argument
    add(
        "--recipe",
        required=True,
        metavar="FILE",
        help="a YAML file, or one of cloud (throughput), edge (memory), realtime (latency), mobile",
    )
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text that no one calibrated or trained on, to measure every stage on",
    )
    add("--teacher", metavar="MODEL", help="for steps that train; default: the model itself")
    add("--keep", choices=("last", "all"), help="which stages' models are kept; default: the last")
    add_text(sub, bos, sequential=False)
    sub.set_defaults(samples=None, seed=None, bos=None)  # those of the recipe

    sub = command(
        "search",
        commands.search,
        "choose bits and zeros for each layer of a checkpoint, under bounds on size and latency",
        stopped="stopped; the same command again goes on and measures nothing twice",
    )
    add_search_options(sub)
    add_grid(sub, static=False)
    add_text(sub, bos)

    add = command(
        "eval", commands.evaluate, "measure the quality of a model on a text"
    ).add_argument
    add("folder", metavar="DIR", help="model, quantized or not")
    add("--outliers", **outliers)
    add("--baseline", metavar="MODEL", help="the original, to compare with")
    add(
        "--text",
        metavar="FILE",
        required=True,
        help="text that no one calibrated on: plain text, or FILE.jsonl:FIELD",
    )
    add("--seq-len", type=whole(2), metavar="N", help="tokens in a window; default: as in quantize")
    add("--samples", type=whole(1), metavar="N", help="windows; default: all of the text")
    add("--bos", **bos)
    add("--speed", action="store_true", help="measure tokens per second too")
    add(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="downstream tasks: python makes four of the text, which is Python source then; others "
        "are names or YAML files for lm-eval",
    )
    add("--json", action="store_true", help="print JSON instead of a table")

    add = command(
        "inspect", commands.inspect, "show what is in a folder and which kernels would run it"
    ).add_argument
    add("folder", metavar="DIR", help="model, quantized or not")

    add = command("generate", commands.generate, "continue a prompt").add_argument
    add("folder", metavar="DIR", help="model, quantized or not")
    add("prompt", metavar="PROMPT", help="text to go on from")
    add("--outliers", **outliers)
    add(
        "--max-tokens",
        type=whole(1),
        default=100,
        metavar="N",
        help="the most tokens to write; default: 100",
    )
    add(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="draw tokens at this temperature; default: 0, always the likeliest",
    )
    add("--seed", type=whole(0), default=0, metavar="N", help="of the draw; default: 0")
    add(
        "--prune-tokens",
        type=shares,
        default={},
        metavar="LAYER=SHARE,...",
        help="this share of the prompt's tokens, the least attended, leaves after the layer",
    )

    add = command(
        "kernels", commands.kernels, "list the kernels, and which one serves a shape"
    ).add_argument
    add(
        "--shape",
        nargs=3,
        type=whole(1),
        metavar=("M", "N", "K"),
        help="tokens, output and input features of a linear; the other options go with it",
    )
    add("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="of a weight; default: 4")
    add(
        "--group",
        type=group,
        default=128,
        metavar="N",
        help="columns that share a scale, or 'row'; default: 128",
    )
    add("--asymmetric", action="store_true", help="there is a zero point for each group")
    add("--activations", choices=("int8",), help="activations are quantized too, in the call")
    add(
        "--dtype", default="bfloat16", choices=DTYPES, help="of input and output; default: bfloat16"
    )
    add(
        "--pattern",
        choices=("2:4",),
        help="the weight has these zeros: measure what a kernel gains that leaves them out",
    )

    add = command(
        "bench", commands.bench, "time linear layers here: torch's, quantized, with 2:4 zeros"
    ).add_argument
    add("model", metavar="MODEL", nargs="?", help="folder with config.json: its linears are timed")
    add(
        "--shape",
        nargs=2,
        type=whole(1),
        metavar=("N", "K"),
        help="output and input features of a linear, in place of a model",
    )
    add(
        "--tokens",
        nargs="+",
        type=whole(1),
        default=[1, 8, 128],
        metavar="M",
        help="tokens in a call; default: 1 8 128",
    )
    add(
        "--group",
        type=group,
        default=128,
        metavar="N",
        help="columns that share a scale, or 'row'; default: 128",
    )
    add("--dtype", default="bfloat16", choices=DTYPES[1:], help="of inputs; default: bfloat16")
    add("--json", action="store_true", help="print JSON instead of tables")

    add = command(
        "demo", commands.demo, "train a small model, quantize it, and show what it costs and gains"
    ).add_argument
    add("--json", type=Path, metavar="FILE", help="write all figures to a file")
    add(
        "--full",
        action="store_true",
        help="make it ten times smaller by a recipe: distil, prune, train for the grid, GPTQ",
    )
    add("--out", type=Path, metavar="DIR", help="of --full: keep the models and the page there")
    return parser
