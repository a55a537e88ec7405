"""Progress in the terminal: one line that updates in place, plain lines when not a terminal."""

import math
import shutil
import sys
import time
from collections.abc import Mapping
from typing import TextIO

MIN_INTERVAL_SECONDS = 0.1


class Progress:
    """Says where a run is. In a terminal each phase leaves one line, elsewhere each epoch does."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._in_place = self._stream.isatty()
        self._open_line = False
        self._last_time = -math.inf

    def update(
        self,
        *,
        seed: int,
        branch: str,
        phase: str,
        epoch: int,
        epochs: int,
        images_per_second: float | None = None,
        seconds_left: float | None = None,
        numbers: Mapping[str, float] | None = None,
        epoch_done: bool = False,
    ) -> None:
        """Shows the state of a run; cheap enough to call each step.

        Args:
          seed, branch, phase: what runs.
          epoch: the epoch that runs, from 1 to `epochs`.
          images_per_second: of training.
          seconds_left: until the whole run is done.
          numbers: the two or three that matter, by name.
          epoch_done: the epoch has ended; only then is a plain line printed.
        """
        now = time.monotonic()
        soon = now - self._last_time < MIN_INTERVAL_SECONDS
        if not epoch_done and (not self._in_place or soon):
            return
        self._last_time = now
        names = [branch] if branch == phase else [branch, phase]
        parts = [f"seed {seed}", *names, f"epoch {epoch:>{len(str(epochs))}}/{epochs}"]
        if seconds_left is not None:
            parts.append(f"{duration(seconds_left)} left")
        parts += [
            f"{name} {value:{'.2e' if 0 < abs(value) < 1e-3 else '.4f'}}"
            for name, value in (numbers or {}).items()
        ]
        if images_per_second is not None:
            digits = 0 if images_per_second >= 10 else 2
            parts.append(f"{images_per_second:,.{digits}f} images/s")
        self._show(parts)
        if self._in_place and epoch_done and epoch >= epochs:
            self.end_line()

    def say(self, text: str) -> None:
        """Prints a line of text without spoiling the line that updates."""
        if self._open_line:
            self._stream.write("\r\x1b[K")
            self._open_line = False
        self._stream.write(text + "\n")
        self._stream.flush()

    def end_line(self) -> None:
        """Keeps the line as it stands; what is printed next goes below it."""
        if self._open_line:
            self._stream.write("\n")
            self._stream.flush()
            self._open_line = False

    def _show(self, parts: list[str]) -> None:
        if not self._in_place:
            self.say("  ".join(parts))
            return
        # A line that wraps cannot be taken back, so what does not fit is left out, the last first;
        # one column stays free for the cursor.
        columns = shutil.get_terminal_size().columns - 1
        while len(parts) > 1 and len("  ".join(parts)) > columns:
            parts = parts[:-1]
        self._stream.write("\r\x1b[K" + "  ".join(parts)[:columns])
        self._stream.flush()
        self._open_line = True


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 2 h 05 min."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
