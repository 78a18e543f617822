"""search: what each linear of a model is to become, under bounds on what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tersor.commands.folders import calibration_of
from tersor.commands.opening import console
from tersor.errors import TersorError

if TYPE_CHECKING:
    import argparse


def search(args: argparse.Namespace) -> None:
    calibration = calibration_of(args)
    if calibration is None:
        raise TersorError("a search measures what it finds on text; give --calibration FILE")

    from tersor.kernels import thread_count
    from tersor.search import Differentiable, Effort, Space, search_checkpoint
    from tersor.sparsity import Sparsity
    from tersor.steps import ACTIVATIONS

    thread_count()  # or TersorError
    zeros = [*map(Sparsity.parse, args.pattern), *map(Sparsity, args.sparsity)]
    space = Space(
        bits=tuple(args.bits),
        group=None if args.group == "row" else args.group or "auto",
        symmetric=not args.asymmetric,
        activations=(ACTIVATIONS[args.activations] if args.activations else None,),
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
        calibration=calibration,
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
