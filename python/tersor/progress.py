"""A progress bar with the time left, on stderr, where there is a terminal to show it."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar


class Progress:
    """Counts steps.

    shown: None means only on a terminal, so that logs and CI stay quiet.
    still: drawn only when a step is done, so that it takes no time of what is being timed.
    """

    def __init__(self, shown: bool | None = None, still: bool = False) -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (console.is_terminal if shown is None else shown),
            # Steps differ (text through a block, a linear solved): only long averages mean much.
            speed_estimate_period=3600,
            auto_refresh=not still,
        )
        self._still = still
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def expect(self, steps: int) -> None:
        """That many steps more are to come."""
        self._bar.update(self._task, total=(self._bar.tasks[0].total or 0) + steps)

    def say(self, what: str) -> None:
        """What is being done now."""
        self._bar.update(self._task, description=what)
        self._draw()

    def step(self) -> None:
        self._bar.advance(self._task)
        self._draw()

    def _draw(self) -> None:
        if self._still:
            self._bar.refresh()
