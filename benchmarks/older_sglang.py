"""Sluice on an older SGLang than its own, for measurements on a machine whose PyTorch is older too.

The benchmark of the guard calls `adapt`. Production has the version of `pyproject.toml`.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import httpx

from services.guard.sglang_command import LaunchConfig
from services.guard.sglang_server import SglangServer

_MISSING_FLAGS: Final = {"0.5.17": ("--allowed-media-domains",)}
"""Flags of Sluice with one value that the version does not know. It fetches images of any domain, from anyone with the
API key."""
_READY_PATH: Final = {"0.5.17": "/model_info"}
"""A path that answers when the server listens, in place of `/ready`."""


def installed_version() -> str:
    return version("sglang")


def adapt(release: str | None = None) -> None:
    """Change Sluice's classes in this process, if the installed version needs it."""
    release = release or installed_version()
    if missing := _MISSING_FLAGS.get(release):
        whole = LaunchConfig.command

        def command(self: LaunchConfig, *, port: int, secrets: Path) -> list[str]:
            return drop_flags(whole(self, port=port, secrets=secrets), missing)

        LaunchConfig.command = command  # type: ignore[method-assign]
    if path := _READY_PATH.get(release):

        async def is_listening(self: Any) -> bool:
            try:
                response = await self._client.get(path, timeout=5)
            except httpx.HTTPError:
                return False
            return bool(response.status_code == httpx.codes.OK)

        SglangServer._is_listening = is_listening  # type: ignore[method-assign]


def drop_flags(argv: list[str], flags: tuple[str, ...]) -> list[str]:
    """The argv without these flags and their values."""
    return [
        word for number, word in enumerate(argv) if word not in flags and (not number or argv[number - 1] not in flags)
    ]
