"""`sluice`: the command line. Results go to stdout, progress and errors to stderr."""

import os
import sys
from pathlib import Path
from traceback import format_exc

import typer

from pipelines.cli import annotate, dead_letters, doctor, evaluate, keys, plan, policy, replay, submit, up, verdicts
from pipelines.cli.output import print_line, print_progress
from pipelines.local.env_file import read_env_file
from services.core.errors import SluiceError
from services.core.logs import escape_unconfigured_log

app = typer.Typer(
    name="sluice",
    help=(
        "Moderate streams of images with LlavaGuard.\n\n"
        "Unless a variable is set, commands other than up and demo read it from .sluice/env in this folder. The file "
        "exists while a service that was started here runs."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line. On a failure print one sentence on stderr and exit with status 1."""
    escape_unconfigured_log()
    # Processes that libraries start import nothing from the present folder, which may be somebody else's.
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        app()
    except SluiceError as error:
        print_progress(f"sluice: {error}")
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output closed it. Without this, the interpreter's own flush at exit would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:  # noqa: BLE001 - a defect of Sluice; its message may contain untrusted text
        print_progress(format_exc().rstrip())
        sys.exit(1)


app.add_typer(policy.app, name="policy")
app.add_typer(dead_letters.app, name="dead-letters")
app.add_typer(keys.app, name="keys")
for command in (
    dead_letters.reconcile,
    plan.plan,
    evaluate.evaluate,
    evaluate.calibrate,
    annotate.annotate,
    up.demo,
    up.up,
    doctor.doctor,
    submit.submit,
    verdicts.verdicts,
    replay.replay,
):
    app.command()(command)


@app.callback()
def _load_env_file(context: typer.Context) -> None:
    if context.invoked_subcommand not in {"up", "demo"}:
        for name, value in read_env_file().items():
            os.environ.setdefault(name, value)


@app.command(hidden=True)
def schemas(folder: Path) -> None:
    """Export the JSON Schemas of submissions, verdicts and dead letters."""
    from services.core.json_schemas import export_schemas  # noqa: PLC0415 - no other command needs it

    for file in export_schemas(folder):
        print_line(str(file))
