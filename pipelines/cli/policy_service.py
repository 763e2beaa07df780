"""Makes one change to a policy from a command."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import typer

from services.core.settings import Settings
from services.policies.service import PolicyService

T = TypeVar("T")


def change_policy(settings: Settings, change: Callable[[PolicyService], Awaitable[T]]) -> T:
    """Make a change and notify every process. Where Redis does not answer, a line on stderr says so."""

    async def run() -> T:
        async with PolicyService.open(settings, warn=lambda line: typer.echo(line, err=True)) as service:
            return await change(service)

    return asyncio.run(run())
