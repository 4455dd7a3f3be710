"""How far a long step is: a bar on a terminal, a line every tenth of the way (at most one a second) elsewhere."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .units import count, duration, rate

QUIET_SECONDS = 1.0  # between two lines


class Ticker:
    """Call it with (done, total); `bar` is the context in which it is shown."""

    def __init__(self, console: Console, what: str, unit: str, clock: Callable[[], float] = time.monotonic):
        self.console, self.what, self.unit, self.clock = console, what, unit, clock
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal or console.quiet, transient=True)
        self.task = self.bar.add_task(what, total=None, state="")
        self.created = self.said = clock()
        self.first: tuple[int, float] | None = None
        self.tenth = 0

    def __call__(self, done: int, total: int) -> None:
        now, tenth = self.clock(), 10 * done // max(total, 1)
        if self.first is None:
            # Rates count from here: a resumed step starts in the middle, and the first part includes warming up.
            self.first, self.tenth = (done, now), min(tenth, 9)
        state = self._state(done, total, now)
        self.bar.update(self.task, completed=done, total=total, state=state)
        due = tenth > self.tenth and (now - self.said >= QUIET_SECONDS or done == total)
        if due and not self.console.is_terminal:
            self.tenth, self.said = tenth, now
            self.console.print(f"  {self.what}: {state}", markup=False, highlight=False, soft_wrap=True)

    def _state(self, done: int, total: int, now: float) -> str:
        """`39,819 of 396,359 rows, 9,800/s, 36 s left`; at the end how long it took."""
        state = f"{count(done)} of {count(total)} {self.unit}"
        assert self.first is not None
        before, began = self.first
        if done > before and now > began:
            speed = (done - before) / (now - began)
            state += f", {rate(speed)}"
            if done < total:
                state += f", {duration((total - done) / speed)} left"
        return state if done < total else f"{state}, took {duration(now - self.created)}"
