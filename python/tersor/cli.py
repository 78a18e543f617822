"""The command `tersor`: its arguments and its errors; commands does the work. It is argparse,
since the parser of the standard library starts at once and is one dependency less.

Nothing is imported here that would make --help wait for torch.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tersor import commands
from tersor.errors import TersorError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    "search": "tersor search ./Llama-3.2-1B --out ./Llama-3.2-1B-mixed --constraint "
    "'size<=0.3x,latency<=0.6x' --calibration text.txt",
    "eval": "tersor eval ./Llama-3.2-1B-INT4 --baseline ./Llama-3.2-1B --text held-out.txt",
    "inspect": "tersor inspect ./Llama-3.2-1B-INT4",
    "generate": 'tersor generate ./Llama-3.2-1B-INT4 "Once upon a time"',
    "kernels": "tersor kernels --shape 1 4096 4096 --activations int8",
    "bench": "tersor bench --shape 4096 4096 --tokens 1 8",
    "demo": "tersor demo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code: 0, 2 for bad input, 1 for what ought not to happen, 130 when
    interrupted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # tersor says itself what is wrong
    warnings.filterwarnings("ignore", module="transformers")
    if not sys.stderr.isatty():  # transformers' bars, which it draws into logs as well
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    args = argparse.Namespace(debug=False, stopped="stopped")
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
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
    return 0


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
    _add_files(sub)
    add = sub.add_argument
    add(
        "--method",
        default="gptq",
        metavar="NAME",
        help="gptq (the default), rtn, which needs no text, or another of tersor.solvers.SOLVERS",
    )
    add("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="of a weight; default: 4")
    _add_grid(sub)
    _add_text(sub, bos)
    _add_settings(sub, "act_order", "damp", "clip")

    sub = command(
        "prune",
        commands.prune,
        "make weights of a Hugging Face checkpoint zero, or cut parts of it out",
        stopped=again,
    )
    _add_files(sub)
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
        type=_structured,
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
    _add_grid(sub)
    _add_text(sub, bos)
    _add_settings(sub, "refit", "per", "act_order", "damp", "clip")
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
        type=_whole(1),
        metavar="N",
        help="of which the channels left are a multiple; default: as the model's, up to 128",
    )
    add(
        "--update",
        choices=("least-squares", "bias", "none"),
        help="new values for what reads heads and channels, or a new bias where it has one; "
        "default: least-squares",
    )

    sub = command(
        "search",
        commands.search,
        "choose bits and zeros for each layer of a checkpoint, under bounds on size and latency",
        stopped="stopped; the same command again goes on and measures nothing twice",
    )
    commands.add_search_options(sub)
    _add_grid(sub)
    _add_text(sub, bos)

    add = command(
        "eval", commands.evaluate, "measure the quality of a model on a text"
    ).add_argument
    add("folder", metavar="DIR", help="model, quantized or not")
    add("--baseline", metavar="MODEL", help="the original, to compare with")
    add(
        "--text",
        metavar="FILE",
        required=True,
        help="text that no one calibrated on: plain text, or FILE.jsonl:FIELD",
    )
    add(
        "--seq-len", type=_whole(2), metavar="N", help="tokens in a window; default: as in quantize"
    )
    add("--samples", type=_whole(1), metavar="N", help="windows; default: all of the text")
    add("--bos", **bos)
    add("--speed", action="store_true", help="measure tokens per second too")
    add("--json", action="store_true", help="print JSON instead of a table")

    add = command(
        "inspect", commands.inspect, "show what is in a folder and which kernels would run it"
    ).add_argument
    add("folder", metavar="DIR", help="model, quantized or not")

    add = command("generate", commands.generate, "continue a prompt").add_argument
    add("folder", metavar="DIR", help="model, quantized or not")
    add("prompt", metavar="PROMPT", help="text to go on from")
    add(
        "--max-tokens",
        type=_whole(1),
        default=100,
        metavar="N",
        help="the most tokens to write; default: 100",
    )
    add(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="draw tokens at this temperature; default: 0, always the likeliest",
    )
    add("--seed", type=_whole(0), default=0, metavar="N", help="of the draw; default: 0")
    add(
        "--prune-tokens",
        type=_shares,
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
        type=_whole(1),
        metavar=("M", "N", "K"),
        help="tokens, output and input features of a linear; the other options go with it",
    )
    add("--bits", type=int, default=4, choices=(2, 3, 4, 8), help="of a weight; default: 4")
    add(
        "--group",
        type=_group,
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
        type=_whole(1),
        metavar=("N", "K"),
        help="output and input features of a linear, in place of a model",
    )
    add(
        "--tokens",
        nargs="+",
        type=_whole(1),
        default=[1, 8, 128],
        metavar="M",
        help="tokens in a call; default: 1 8 128",
    )
    add(
        "--group",
        type=_group,
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
    return parser


def _add_files(sub: Parser) -> None:
    add = sub.add_argument
    add("model", metavar="MODEL", help="folder with config.json and safetensors")
    add("--out", metavar="DIR", required=True, help="folder to make")
    add("--ignore", nargs="+", default=[], metavar="GLOB", help="modules to leave as they are")
    add("--strict", action="store_true", help="fail if a module cannot be treated as asked")
    add(
        "--speed",
        action="store_true",
        help="measure tokens per second before and after; both models are loaded whole for it",
    )


def _add_grid(sub: Parser) -> None:
    add = sub.add_argument
    add(
        "--group",
        type=_group,
        metavar="N",
        default=argparse.SUPPRESS,
        help="columns that share a scale, or 'row'; default: 128, or row for W8A8",
    )
    add("--asymmetric", action="store_true", help="store a zero point for each group")
    add("--activations", choices=("int8",), help="quantize activations too, in the call")


def _add_text(sub: Parser, bos: dict[str, Any]) -> None:
    add = sub.add_argument
    add(
        "--calibration",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text to calibrate on: files of plain text, or FILE.jsonl:FIELD",
    )
    add("--samples", type=_whole(1), default=128, metavar="N", help="windows of text; default: 128")
    add(
        "--seq-len",
        type=_whole(2),
        metavar="N",
        help="tokens in a window; default: 2048, or the model's context if that is less",
    )
    add(
        "--seed",
        type=_whole(0),
        default=0,
        metavar="N",
        help="which parts of the text are taken; default: 0",
    )
    add("--bos", **bos)
    add("--sequential", action="store_true", help="observe each input after those before it")


# Each is a field of a solver of that name, and None where it is not given.
SETTINGS: dict[str, dict[str, Any]] = {
    "act_order": {
        "action": "store_true",
        "default": None,
        "help": "gptq, sparsegpt: the most active columns first",
    },
    "damp": {
        "type": float,
        "metavar": "D",
        "help": "damping of the inputs, as a share of their mean square; default: 0.01",
    },
    "clip": {
        "action": argparse.BooleanOptionalAction,
        "help": "search each group's range for the least error; default: for all but rtn",
    },
    "refit": {
        "action": "store_true",
        "default": None,
        "help": "then the best values for the weights that are left, by least squares",
    },
    "per": {
        "choices": ("layer", "row"),
        "help": "magnitude, wanda: over what --sparsity is kept; default: layer, wanda: row",
    },
}


def _add_settings(sub: Parser, *names: str) -> None:
    group = sub.add_argument_group("settings of the method")
    for name in names:
        group.add_argument("--" + name.replace("_", "-"), **SETTINGS[name])
    sub.set_defaults(settings=names)


def _structured(text: str) -> dict[str, Any]:
    shares = ("heads", "query_heads", "ffn", "hidden", "experts")
    types: dict[str, Any] = dict.fromkeys(shares, float) | {"layers": int}
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name in found:
            raise argparse.ArgumentTypeError(f"{name} is given twice")
        try:
            found[name] = types[name](value)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(
                f"{part!r} is none of {', '.join(f'{n}=SHARE' for n in shares)}, layers=NUMBER"
            ) from None
    return found


def _group(text: str) -> int | None:
    if text == "row":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of columns nor 'row'")


def _whole(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from `least` to what an int64 holds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(
                f"give a whole number from {least} to 2**63 - 1, not {text!r}"
            )
        return value

    return parse


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"give 0 or a positive number, not {text!r}")
    return value


def _shares(text: str) -> dict[int, float]:
    try:
        pairs = (part.split("=") for part in text.split(","))
        return {int(layer): float(share) for layer, share in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"give layers with the share that leaves, such as 8=0.5,16=0.5, not {text!r}"
        ) from None
