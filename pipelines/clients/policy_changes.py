"""Tells every process of a change to a policy at once, where Redis is there; else they find out by looking."""

import asyncio
from collections.abc import Callable
from typing import Any

import typer

from services.core.errors import Unavailable
from services.core.settings import Settings
from services.policies.redis_cache import PolicyRedisCache


def announce(settings: Settings, what: Callable[[PolicyRedisCache], Any]) -> None:
    """Do `what` with the copies that processes share; that Redis does not answer is said, and no failure."""
    if not settings.redis_url:
        return

    async def tell() -> None:
        shared = PolicyRedisCache(settings.redis_url, settings.policy_bucket)
        try:
            await what(shared)
        finally:
            await shared.close()

    try:
        asyncio.run(tell())
    except Unavailable as error:
        typer.echo(f"{error}: workers will know within {settings.policy_refresh_s:g} s", err=True)
