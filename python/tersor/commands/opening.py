"""Models from folders that somebody named on the command line, and where answers go."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Any

from tersor.errors import TersorError

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """On a terminal as wide as it is; in a file or pipe, wide enough for every table."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def check_config(folder: str) -> None:
    """Whether it is of a causal language model, before anything large is loaded, and before the
    tokenizer: transformers reads config.json for that too, and would blame the tokenizer."""
    import transformers

    from tersor.checkpoint import Checkpoint

    Checkpoint.open(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise _refused(folder, error) from error
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if cls is not None and not cls.can_generate():
            raise TersorError(
                f"{folder} holds a {name}, which does not predict the next token; give a causal "
                "language model"
            )


def load_model(folder: str) -> Any:
    """A quantized folder on tersor's kernels; any other as transformers has it, but whole, its 2:4
    linears on a kernel where that is faster."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from tersor.checkpoint import Checkpoint
    from tersor.kernels import thread_count
    from tersor.loading import load
    from tersor.sparse_linear import swap_sparse_linears

    thread_count()  # or TersorError
    if "quantization_config" in Checkpoint.open(folder).config:
        return load(folder)
    disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            torch_dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
        )
    except Exception as error:  # whatever a config.json that it cannot use makes it raise
        raise _refused(folder, error) from error
    wrong = [f"no tensor for {name}" for name in sorted(info["missing_keys"])]
    wrong += [f"{name} in another shape" for name, *_ in sorted(info["mismatched_keys"])]
    if wrong:  # transformers has put random numbers in their place
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise TersorError(
            f"{folder} has {wrong[0]}{more}; its files are incomplete, or of another model than "
            "config.json: download it again"
        )
    swap_sparse_linears(model)
    return model.eval()


def _refused(folder: str, error: Exception) -> TersorError:
    cause = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
    return TersorError(
        f"transformers cannot load {folder} ({cause}); correct its config.json, or download the "
        "model again"
    )
