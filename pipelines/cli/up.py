"""`sluice up` and `sluice demo`: run the service on this machine."""

import time
from typing import Annotated

import typer

from pipelines.local.env_file import keep_env_file
from pipelines.reporting.timed_progress import TimedProgress

# Each command imports only the modules that it uses: `sluice submit` need not wait for Ray.
# ruff: noqa: PLC0415


def up(
    embedded: Annotated[
        bool,
        typer.Option("--embedded", help="Also start a stream, a cache and an S3 server, unless the settings name one."),
    ] = False,
) -> None:
    """Run the service in the foreground until SIGINT or SIGTERM, then drain it."""
    from pipelines.local.up import ShutdownRequested, run_service

    progress = TimedProgress()
    try:
        with (
            run_service(embed=embedded, progress=progress) as (settings, variables),
            keep_env_file(settings, variables),
        ):
            progress(f"ready: reading {settings.submissions_stream}; other commands in this folder find the service")
            while True:  # SIGINT and SIGTERM raise ShutdownRequested here
                time.sleep(3600)
    except ShutdownRequested:
        progress("stopped")


def demo() -> None:
    """Judge some drawn images, from submission to verdict, on embedded backends."""
    from pipelines.local.demo import demonstrate
    from pipelines.local.up import ShutdownRequested

    try:
        all_settled = demonstrate(TimedProgress())
    except ShutdownRequested:
        raise typer.Exit(130) from None
    raise typer.Exit(0 if all_settled else 1)
