"""Models from folders that somebody named on the command line, and where answers go."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tersor.errors import TersorError

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """On a terminal as wide as it is. In a file or pipe wide enough for every table, and with each
    sentence on one line, for who looks for it there."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console()
    return Console(width=160, soft_wrap=True)


def check_config(folder: str) -> None:
    """Whether it is of a causal language model, before anything large is loaded, and before the
    tokenizer: transformers reads config.json for that too, and would blame the tokenizer."""
    import transformers

    from tersor.checkpoint import Checkpoint
    from tersor.loading import refused

    Checkpoint.open(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise refused(folder, error) from error
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if cls is not None and not cls.can_generate():
            raise TersorError(
                f"{folder} holds a {name}, which does not predict the next token; give a causal "
                "language model"
            )


def load_model(folder: str, outliers: float | None = None) -> Any:
    """tersor.loading.load_any, where the threads that were asked for can be had."""
    from tersor.kernels import thread_count
    from tersor.loading import load_any

    thread_count()  # or TersorError
    return load_any(folder, outliers)
