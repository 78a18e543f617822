"""Options that several commands of `tersor` have, and the types of their values."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LOSSES = (  # as in tersor.training, which imports torch
    *("forward_kl", "reverse_kl", "generalized_js", "skewed_kl", "skewed_reverse_kl"),
    *("total_variation", "logit_mse", "cosine"),
)
GRANULARITIES = ("linear", "input", "block", "kind")  # as in tersor.search, which imports torch
SAMPLERS = ("nsga2", "tpe")
SPEED = "measure tokens per second before and after; both models are loaded whole for it"


def add_files(sub: argparse.ArgumentParser, ignore: bool = True, speed: str = SPEED) -> None:
    add = sub.add_argument
    add("model", metavar="MODEL", help="folder with config.json and safetensors")
    add("--out", metavar="DIR", required=True, help="folder to make")
    if ignore:
        add("--ignore", nargs="+", default=[], metavar="GLOB", help="modules to leave as they are")
    add("--strict", action="store_true", help="fail if a module cannot be treated as asked")
    add("--speed", action="store_true", help=speed)


def add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda or cuda:N; default: an NVIDIA GPU where there is one",
    )


def add_teacher(sub: argparse.ArgumentParser, required: bool) -> None:
    add = sub.add_argument_group("what is learned from").add_argument
    alone = "" if required else "; without one, the text alone"
    add(
        "--teacher",
        metavar="MODEL",
        required=required,
        help=f"a model with the same vocabulary, quantized or not{alone}",
    )
    add(
        "--loss",
        choices=LOSSES,
        help="of the predictions; default: forward_kl",
    )
    add("--temperature", type=float, metavar="T", help="that softens both; default: 1")
    add(
        "--alpha",
        type=float,
        metavar="A",
        help="share of that loss beside the cross-entropy of the text; default: 1",
    )


def add_plan(sub: argparse.ArgumentParser) -> None:
    sub.set_defaults(samples=None)  # the steps say how much text is read
    add = sub.add_argument_group("settings of the training").add_argument
    add("--steps", type=whole(1), metavar="N", help="of the optimizer; default: 200")
    add("--batch", type=whole(1), metavar="N", help="windows in a pass; default: 8")
    add("--accumulate", type=whole(1), metavar="N", help="passes in a step; default: 1")
    add("--learning-rate", type=float, metavar="R", help="its peak; default: 2e-4")
    add("--warmup", type=float, metavar="SHARE", help="of the steps; default: 0.05")
    add(
        "--schedule",
        choices=("linear", "cosine", "constant_with_warmup"),
        help="of the rate after that; default: cosine",
    )
    add("--weight-decay", type=float, metavar="D", help="default: 0")
    add("--optimizer", metavar="NAME", help="as transformers knows it; default: adamw_torch")
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the products; weights are float32 always; default: float32",
    )
    add(
        "--checkpoint-every",
        type=whole(1),
        metavar="N",
        help="steps after which a stopped run can go on; default: 100",
    )
    add(
        "--training-text",
        nargs="+",
        metavar="FILE",
        help="text to train on; default: that of --calibration",
    )
    masks = sub.add_argument_group("zeros").add_mutually_exclusive_group()
    masks.add_argument(
        "--sparsity", type=float, metavar="R", help="share of weights to mask in the training"
    )
    masks.add_argument("--pattern", metavar="N:M", help="the same as a pattern, such as 2:4")


def add_search_options(sub: argparse.ArgumentParser) -> None:
    """All but those for text and grids, which other commands have too."""
    add = sub.add_argument
    add("model", metavar="MODEL", help="folder of a causal language model; it is loaded whole")
    add("--out", metavar="DIR", required=True, help="folder to make; front.json is in it as well")
    add(
        "--constraint",
        metavar="COST<=BOUND,...",
        required=True,
        help="size of the checkpoint and latency of its linears, of the original's (0.3x) or in "
        "units (500MB, 4ms), and sparsity>=0.5: size<=0.3x,latency<=0.8x",
    )
    add("--ignore", nargs="+", default=[], metavar="GLOB", help="modules to leave as they are")
    group = sub.add_argument_group("what a linear may become")
    add = group.add_argument
    add(
        "--bits",
        type=int,
        nargs="*",
        default=[2, 3, 4, 8],
        choices=(2, 3, 4, 8),
        help="of a weight, beside staying in 16; default: 2 3 4 8",
    )
    add("--pattern", nargs="+", default=[], metavar="N:M", help="zeros such as 2:4, beside none")
    add("--sparsity", type=float, nargs="+", default=[], metavar="R", help="shares of zeros")
    add(
        "--method",
        nargs="+",
        default=["gptq", "sparsegpt"],
        metavar="NAME",
        help="of tersor.solvers, for weights with zeros and without; several of a sort are tried "
        "against each other; default: gptq sparsegpt",
    )
    add(
        "--granularity",
        default="linear",
        choices=GRANULARITIES,
        help="what is chosen on its own: a linear, those that read the same input, a block, or "
        "those of one name; default: linear",
    )
    group = sub.add_argument_group("how to look")
    add = group.add_argument
    add(
        "--trials",
        type=whole(0),
        default=200,
        metavar="N",
        help="models to measure beside the sensitivities; 0: what these propose alone; "
        "default: 200",
    )
    add("--sampler", default="nsga2", choices=SAMPLERS, help="of trials; default: nsga2")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help="begin no trial once trials have taken that long; what comes before them (solving, "
        "timing and measuring the candidates) and writing the model are not counted",
    )
    add(
        "--sensitivity",
        default="kl",
        choices=("kl", "error"),
        help="of a layer: the KL of the model with it alone changed, or the error of its outputs; "
        "default: kl",
    )
    add(
        "--held-out",
        type=whole(0),
        default=8,
        metavar="N",
        help="windows of the text that KL is measured on, beyond --samples; default: 8",
    )
    add(
        "--latency-tokens",
        type=whole(0),
        default=1,
        metavar="M",
        help="tokens in a call that is timed; default: 1",
    )
    add("--differentiable", action="store_true", help="train logits in place of trials")


def add_grid(sub: argparse.ArgumentParser, static: bool = True) -> None:
    """static: whether the command can find static scales of activations."""
    add = sub.add_argument
    add(
        "--group",
        type=lambda text: group(text) or text,  # a step knows the word
        metavar="N",
        help="columns that share a scale, or 'row'; default: 128, or row for W8A8",
    )
    add("--asymmetric", action="store_true", help="store a zero point for each group")
    add(
        "--activations",
        choices=("int8", "int8-static") if static else ("int8",),
        help="quantize activations too: int8 with a scale for each token, found in the call"
        + "; int8-static with one that calibration finds" * static,
    )


def add_text(
    sub: argparse.ArgumentParser,
    bos: dict[str, Any],
    sequential: bool = True,
    samples: bool = True,
) -> None:
    """samples: whether --samples is offered; where it is not, its command says why."""
    add = sub.add_argument
    add(
        "--calibration",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text to calibrate on: files of plain text, or FILE.jsonl:FIELD",
    )
    about = "windows of text; default: 128" if samples else argparse.SUPPRESS
    add("--samples", type=whole(1), default=128, metavar="N", help=about)
    add(
        "--seq-len",
        type=whole(2),
        metavar="N",
        help="tokens in a window; default: 2048, or the model's context if that is less",
    )
    add(
        "--seed",
        type=whole(0),
        default=0,
        metavar="N",
        help="which parts of the text are taken; default: 0",
    )
    add("--bos", **bos)
    if sequential:
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
    "two_level": {
        "action": "store_true",
        "default": None,
        "help": "4 bits: scales that are multiples, up to 15, of one for each row, so that with "
        "int8 activations a GPU sums whole rows in integers",
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


def add_settings(sub: argparse.ArgumentParser, *names: str) -> None:
    group = sub.add_argument_group("settings of the method")
    for name in names:
        group.add_argument("--" + name.replace("_", "-"), **SETTINGS[name])
    sub.set_defaults(settings=names)


def structured(text: str) -> dict[str, Any]:
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


def group(text: str) -> int | None:
    if text == "row":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of columns nor 'row'")


def whole(least: int) -> Callable[[str], int]:
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


def temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"give 0 or a positive number, not {text!r}")
    return value


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"give a positive number, not {text!r}")
    return value


def shares(text: str) -> dict[int, float]:
    try:
        pairs = (part.split("=") for part in text.split(","))
        return {int(layer): float(share) for layer, share in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"give layers with the share that leaves, such as 8=0.5,16=0.5, not {text!r}"
        ) from None
