"""Changes a policy from a command, which runs no event loop."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.core.settings import Settings
from services.policies.service import PolicyService

T = TypeVar("T")


def change_policy(
    settings: Settings, change: Callable[[PolicyService], Awaitable[T]], *, warn: Callable[[str], object]
) -> T:
    """Make a change and notify every process. If Redis does not answer, `warn` gets a sentence that says so."""

    async def run() -> T:
        async with PolicyService.open(settings, warn=warn) as service:
            return await change(service)

    return asyncio.run(run())
