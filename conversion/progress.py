"""What a long run says on standard error: progress bars in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


SECONDS_BETWEEN_LINES = 10.0
SECONDS_TO_INSIST = 1.0


class Voice:
    """Sentences and progress on standard error, which leave standard output to results.

    Args:
        silent: Say nothing, as all processes of a conversion but one do.
    """

    def __init__(self, silent: bool = False) -> None:
        terminal = sys.stderr.isatty()
        self.silent = silent
        self.console = Console(
            stderr=True, width=None if terminal else 160, highlight=False, soft_wrap=not terminal, quiet=silent
        )

    def say(self, text: str) -> None:
        self.console.print(escape(text))

    @contextmanager
    def progress(self, what: str, total: int | None, done: int = 0) -> Iterator[Bar]:
        """A bar for `total` steps, of which `done` are behind; `None` where the end is not known."""
        bar = Bar(self, what, total, done)
        with bar:
            yield bar


class Bar:
    """One bar. In a terminal rich draws it; elsewhere a line comes every ten seconds at most."""

    def __init__(self, voice: Voice, what: str, total: int | None, done: int) -> None:
        self.voice, self.what, self.total, self.start = voice, what, total, done
        self.began = self.printed = time.monotonic()
        self.drawn: Progress | None = None
        if voice.console.is_terminal and not voice.silent:
            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            ]
            times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
            self.drawn = Progress(*columns, *times, console=voice.console)
            self.task = self.drawn.add_task(what, total=total, completed=done, note="")

    def __enter__(self) -> Bar:
        if self.drawn is not None:
            self.drawn.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.drawn is not None:
            self.drawn.stop()

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` steps are behind."""
        if self.drawn is not None:
            self.drawn.update(self.task, completed=done, note=escape(note))
            return
        now = time.monotonic()
        if now - self.printed < SECONDS_BETWEEN_LINES and done != self.total:
            return
        self.printed = now
        of = f" of {self.total:,}" if self.total is not None else ""
        left = ""
        if self.total is not None and self.start < done < self.total:
            left = f", {clock((now - self.began) / (done - self.start) * (self.total - done))} left"
        self.voice.say(f"{self.what}: {done:,}{of}{f', {note}' if note else ''}{left}")


def clock(seconds: float) -> str:
    """`"1:02:03"`, or `"2:03"` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that what is half done is cleared away."""

    def obey(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # Python delivers signals to the main thread only, and refuses handlers from any other.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, obey)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Interruption:
    """Ctrl-C and SIGTERM noted instead of obeyed, so that a step is never cut in two; a later second one is obeyed."""

    def __init__(self) -> None:
        self.asked = False
        self._asked_at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # A terminal signals all processes, and a launcher among them signals its own once more at the same time.
        if self.asked and now - self._asked_at >= SECONDS_TO_INSIST:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._asked_at = True, now
