"""Progress on stderr with the time that has passed."""

import time

import typer

from services.core.text import escape_lines


class TimedProgress:
    """Prints lines on stderr, each with the seconds since this object was created."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, line: str) -> None:
        typer.echo(f"[{time.monotonic() - self._started:5.1f} s] {escape_lines(line)}", err=True)
