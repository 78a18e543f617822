"""When weights go: dense first, then ever more slowly fewer, then a mask that stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tersor.errors import TersorError


@dataclass(frozen=True)
class Schedule:
    """Sparsity over a training, in optimizer steps:

        s_t = s_f + (s_i - s_f) (1 - (t - warmup) / ramp)³,  warmup <= t <= warmup + ramp

    (arXiv:1710.01878), s_i before and s_f after it (arXiv:2005.07683).

    warmup: steps at the initial sparsity. ramp: steps from there to the final one. hold: steps at
    that, in which weights may still change places. cooldown: steps that shall follow with a mask
    that no longer changes; there may be more of them.
    every: steps from one mask to the next in ramp and hold; the end of each always has one.
    initial: s_i, as a share of s_f.
    """

    warmup: int = 0
    ramp: int = 0
    hold: int = 0
    cooldown: int = 0
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self)[:5]:
            value, least = getattr(self, field.name), int(field.name == "every")
            if type(value) is not int or value < least:
                raise TersorError(
                    f"{field.name} is a whole number of steps, {least} or more, not {value!r}"
                )
        if not 0 <= self.initial < 1:
            raise TersorError(
                f"initial is a share of the final sparsity, from 0 to less than 1, not "
                f"{self.initial!r}"
            )

    @property
    def frozen(self) -> int:
        """The number of steps after which the mask stays as it is."""
        return self.warmup + self.ramp + self.hold

    @property
    def steps(self) -> int:
        """The steps that a training must have."""
        return self.frozen + self.cooldown

    def share(self, step: int) -> float:
        """s_t / s_f for the step with this number, counted from 0."""
        if step >= self.warmup + self.ramp:
            return 1.0
        if step < self.warmup:
            return self.initial
        left = 1 - (step - self.warmup) / self.ramp
        return 1 + (self.initial - 1) * left**3

    def changes(self, step: int) -> bool:
        """Whether the step with this number has a mask of its own."""
        since = step - self.warmup
        if since in (self.ramp, self.ramp + self.hold):
            return True
        return 0 <= since < self.ramp + self.hold and since % self.every == 0
