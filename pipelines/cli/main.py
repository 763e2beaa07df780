"""`sluice`: the command line. Results go to stdout, progress and errors to stderr."""

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli import annotate as dataset_commands
from pipelines.cli import dead_letters as dead_letter_commands
from pipelines.cli import evaluate as evaluation_commands
from pipelines.cli import keys as key_commands
from pipelines.cli import plan as plan_command
from pipelines.cli import policy as policy_commands
from pipelines.cli.env_file import env_file_written, read_env_file
from services.core import settings as settings_module
from services.core.errors import SluiceError

app = typer.Typer(
    name="sluice",
    help="Moderate streams of images with LlavaGuard.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Each command imports what it runs: `sluice submit` need not wait for Ray.
# ruff: noqa: PLC0415


def main() -> None:
    """Run the command line; a failure is one sentence on stderr and exit status 1."""
    try:
        app()
    except SluiceError as error:
        _say(f"sluice: {error}")
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output has seen enough; the interpreter's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


app.add_typer(policy_commands.app, name="policy")
app.add_typer(dead_letter_commands.app, name="dead-letters")
app.add_typer(key_commands.app, name="keys")
app.command()(dead_letter_commands.reconcile)
app.command()(plan_command.plan)
app.command()(evaluation_commands.evaluate)
app.command()(evaluation_commands.calibrate)
app.command()(dataset_commands.annotate)


@app.callback()
def _read_environment_file(context: typer.Context) -> None:
    if context.invoked_subcommand not in {"up", "demo"}:
        for name, value in read_env_file().items():
            os.environ.setdefault(name, value)


@app.command()
def demo() -> None:
    """Judge a handful of drawn images from submission to verdict, on embedded backends."""
    from pipelines.local.demo import demonstrate
    from pipelines.local.up import ShutdownRequested

    try:
        settled = demonstrate(_Progress())
    except ShutdownRequested:
        raise typer.Exit(130) from None
    raise typer.Exit(0 if settled else 1)


@app.command()
def up(
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Start a stream, a cache and an S3 server too, where none is set.")
    ] = False,
) -> None:
    """Run the service in the foreground until SIGINT or SIGTERM, then drain."""
    from pipelines.local.up import ShutdownRequested, running_service

    progress = _Progress()
    try:
        with (
            running_service(embed=embedded, progress=progress) as (settings, variables),
            env_file_written(settings, variables),
        ):
            progress(f"ready: reading {settings.submissions_stream}; other commands in this folder find the service")
            while True:
                time.sleep(3600)
    except ShutdownRequested:
        progress("stopped")


@app.command()
def submit(
    references: Annotated[
        list[str], typer.Argument(metavar="REF...", help="s3:// URIs or files; - reads submissions as JSON lines.")
    ],
    policy: Annotated[str, typer.Option(help="NAME for the active version, NAME@V for that one.")] = "default",
    tenant: Annotated[str, typer.Option()] = "default",
) -> None:
    """Submit images and print the id of each submission."""
    from pipelines.clients import streams as client

    settings = settings_module.load("stream_url")
    submissions = client.read_references(references, settings, policy=policy, tenant=tenant, lines=sys.stdin.buffer)
    asyncio.run(client.submit(submissions, settings, on_published=typer.echo))


@app.command()
def verdicts(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more at the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One verdict as JSON a line.")] = False,
) -> None:
    """Print the verdicts on the stream, oldest first."""
    from pipelines.clients import streams as client

    settings = settings_module.load("stream_url")
    try:
        asyncio.run(client.print_verdicts(settings, follow=follow, as_json=as_json, write=typer.echo, progress=_say))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def replay(
    verdict_id: Annotated[str, typer.Argument(metavar="VERDICT_ID")],
    as_json: Annotated[bool, typer.Option("--json", help="The comparison as one JSON object.")] = False,
) -> None:
    """Judge again what a verdict was about, and say whether the same comes of it. Nothing is published."""
    from pipelines.clients import streams as client
    from pipelines.policy_testing import rejudge as replaying

    settings = settings_module.load("stream_url", "policy_bucket", "ray_address")
    verdict = asyncio.run(replaying.find(verdict_id, settings))
    replayed = replaying.replay(verdict, settings, progress=_say)
    if as_json:
        typer.echo(replayed.to_json())
    else:
        found = map(str, replayed.differences) if replayed.differences else [client.one_line(replayed.after)]
        typer.echo("\n".join(found))
    for note in replayed.notes:
        _say(f"note: {note}")
    if not replayed.reproduced:
        raise SluiceError(f"verdict {verdict_id} was not reproduced; fields that differ: {len(replayed.differences)}")
    _say(f"verdict {verdict_id} was reproduced")


@app.command(hidden=True)
def schemas(folder: Path) -> None:
    """Export the JSON Schemas of the wire."""
    from pipelines.cli.schemas import export

    for file in export(folder):
        typer.echo(file)


class _Progress:
    """Progress lines on stderr, with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, line: str) -> None:
        _say(f"[{time.monotonic() - self._started:5.1f} s] {line}")


def _say(line: str) -> None:
    typer.echo(line, err=True)
