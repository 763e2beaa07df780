"""How commands report progress: lines on stderr, so that stdout holds results only."""

import time

import typer


def print_progress(line: str) -> None:
    """Print a line on stderr."""
    typer.echo(line, err=True)


class TimedProgress:
    """Prints lines on stderr, each with the seconds since this object was created."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, line: str) -> None:
        print_progress(f"[{time.monotonic() - self._started:5.1f} s] {line}")
