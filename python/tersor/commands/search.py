"""search: what each linear of a model is to become, under bounds on what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tersor.commands.opening import console
from tersor.errors import TersorError

if TYPE_CHECKING:
    import argparse

GRANULARITIES = ("linear", "input", "block", "kind")  # as in tersor.search, which imports torch
SAMPLERS = ("nsga2", "tpe")


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
        type=_count,
        default=200,
        metavar="N",
        help="models to measure beside the sensitivities; 0: what these propose alone; "
        "default: 200",
    )
    add("--sampler", default="nsga2", choices=SAMPLERS, help="of trials; default: nsga2")
    add("--seconds", type=float, metavar="S", help="begin no trial after that long")
    add(
        "--sensitivity",
        default="kl",
        choices=("kl", "error"),
        help="of a layer: the KL of the model with it alone changed, or the error of its outputs; "
        "default: kl",
    )
    add(
        "--held-out",
        type=_count,
        default=8,
        metavar="N",
        help="windows of the text that KL is measured on, beyond --samples; default: 8",
    )
    add(
        "--latency-tokens",
        type=_count,
        default=1,
        metavar="M",
        help="tokens in a call that is timed; default: 1",
    )
    add("--differentiable", action="store_true", help="train logits in place of trials")


def _count(text: str) -> int:
    import argparse

    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"give a whole number from 0 on, not {text!r}")
    return int(text)


def search(args: argparse.Namespace) -> None:
    if not args.calibration:
        raise TersorError("a search measures what it finds on text; give --calibration FILE")

    from tersor.calibrate import Calibration
    from tersor.kernels import thread_count
    from tersor.qweight import ActSpec
    from tersor.search import Differentiable, Effort, Space, search_checkpoint
    from tersor.sparsity import Sparsity

    thread_count()  # or TersorError
    zeros = [*map(Sparsity.parse, args.pattern), *map(Sparsity, args.sparsity)]
    space = Space(
        bits=tuple(args.bits),
        group=getattr(args, "group", 128),
        symmetric=not args.asymmetric,
        activations=(ActSpec() if args.activations else None,),
        sparsities=tuple(zeros),
        methods=tuple(args.method),
        granularity=args.granularity,
    )
    effort = Effort(
        trials=args.trials,
        seconds=args.seconds,
        sampler=args.sampler,
        sensitivity=args.sensitivity,
        windows=args.held_out,
        tokens=args.latency_tokens,
        seed=args.seed,
    )
    front = search_checkpoint(
        *(args.model, args.out, args.constraint),
        calibration=Calibration(
            tuple(args.calibration),
            samples=args.samples,
            seq_len=args.seq_len,
            seed=args.seed,
            bos=args.bos,
        ),
        space=space,
        effort=effort,
        differentiable=Differentiable(seed=args.seed) if args.differentiable else None,
        ignore=args.ignore,
        sequential=args.sequential,
    )
    _show(args.out, front)


def _show(out: str, front: Any) -> None:
    from tersor.search.front import table

    shown = console()
    shown.print(table(front))
    for note in front.notes:
        shown.print(f"not as asked: {note}", highlight=False)
    assert front.written is not None  # by search_checkpoint
    shown.print(
        f"{out}: {front.original['size'] / 1e6:.1f} MB -> {front.written['bytes'] / 1e6:.1f} MB, "
        f"KL {front.written['kl']:.4f} from the original as it was written; {front.evaluated} "
        "models measured, those that no other one beats are in front.json",
        highlight=False,
    )
