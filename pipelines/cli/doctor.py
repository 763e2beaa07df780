"""`sluice doctor`: check everything that the service needs."""

from typing import Annotated

import typer

from pipelines.cli.output import print_json, print_line, print_progress


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per check.")] = False,
) -> None:
    """Check the settings, the stream, Redis, the buckets, the model, the GPU and this machine.

    Each check prints its line: what was found, or what is wrong and what to do. The exit status is 1 if anything is
    wrong. No check changes submissions or policies.
    """
    from pipelines.doctor.report import diagnose  # noqa: PLC0415 - other commands need not wait for its libraries

    wrong = 0
    for result in diagnose():
        wrong += not result.is_ok
        if as_json:
            print_json(result.to_json())
        else:
            print_line(result.line())
    if wrong:
        print_progress(f"{wrong} {'check' if wrong == 1 else 'checks'} failed")
        raise typer.Exit(1)
