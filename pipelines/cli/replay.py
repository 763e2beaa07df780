"""`sluice replay`: judge the image of a verdict again."""

import asyncio
from typing import Annotated

import typer

from pipelines.cli.output import print_json, print_lines, print_progress
from services.core import settings as settings_module
from services.core.errors import SluiceError

# Each command imports only the modules that it uses: `sluice submit` need not wait for Ray.
# ruff: noqa: PLC0415


def replay(
    verdict_id: Annotated[str, typer.Argument(metavar="VERDICT_ID")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON object.")] = False,
) -> None:
    """Judge the image of a verdict again and compare the two verdicts. The command publishes no verdicts.

    `sluice dead-letters replay` is another command: it publishes failed submissions again.
    """
    from pipelines.policy_testing import rejudge

    settings = settings_module.load("stream_url", "policy_bucket", "ray_address")
    verdict = asyncio.run(rejudge.find_verdict(verdict_id, settings))
    replayed = rejudge.rejudge(verdict, settings, progress=print_progress)
    if as_json:
        print_json(replayed.to_json())
    else:
        print_lines(replayed.lines())
    for note in replayed.notes:
        print_progress(f"note: {note}")
    if not replayed.reproduced:
        raise SluiceError(f"verdict {verdict_id} was not reproduced; fields that differ: {len(replayed.differences)}")
    print_progress(f"verdict {verdict_id} was reproduced")
