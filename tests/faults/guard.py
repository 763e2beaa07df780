"""A scripted guard in processes of its own, which can be killed, and what an intake member holds instead of it.

    python -m tests.faults.guard PORT REFUSED

What it says depends on the image's SHA-256 alone; it refuses the image whose SHA-256 is REFUSED.
"""

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from typing import Final

from services.core.errors import GuardFailed, GuardUnavailable
from services.core.values import CATEGORIES, NO_CATEGORY, Assessment, Detail, Policy, PreparedImage, Priority, Rating
from tests.support.fake_guard import MODEL

_TAKES_S: Final = (0.002, 0.012)
_DEADLINE_S: Final = 10.0


def rating_of(sha256: str) -> Rating:
    """What the guard says about an image."""
    return "Unsafe" if int(sha256[:2], 16) % 2 else "Safe"


def assessment_of(sha256: str) -> Assessment:
    """The same with everything that belongs to it."""
    if rating_of(sha256) == "Safe":
        return Assessment(rating="Safe", category=NO_CATEGORY, rationale=None, score=0.02, model=MODEL)
    category = CATEGORIES[int(sha256[2:4], 16) % len(CATEGORIES)]
    return Assessment(rating="Unsafe", category=category, rationale="As scripted.", score=0.98, model=MODEL)


class GuardClient:
    """Asks any replica that answers; see `services.moderation.ports.GuardClient`."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: Priority
    ) -> list[Assessment]:
        """One connection for each call, so that a replica that dies ends the calls that it has."""
        try:
            async with asyncio.timeout(_DEADLINE_S):
                is_refused = await self._is_refused(image.sha256)
        except (OSError, TimeoutError) as error:
            raise GuardUnavailable(f"The guard's replica is away ({type(error).__name__}).") from None
        if is_refused:
            raise GuardFailed("the engine refuses the image")
        return [assessment_of(image.sha256)] * len(policies)

    async def _is_refused(self, sha256: str) -> bool:
        reader, writer = await self._connect()
        try:
            writer.write(f"{sha256}\n".encode())
            line = await reader.readline()
        finally:
            writer.transport.abort()
        if not line.endswith(b"\n"):
            raise ConnectionResetError
        answer: bool = json.loads(line)["refused"]
        return answer

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for port in random.sample(self._ports, len(self._ports)):
            try:
                return await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
        raise ConnectionRefusedError


async def _serve(port: int, refused: str) -> None:
    async def judge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            sha256 = (await reader.readline()).decode().strip()
            await asyncio.sleep(random.uniform(*_TAKES_S))
            writer.write(json.dumps({"refused": sha256 == refused}).encode() + b"\n")
            await writer.drain()
        except ConnectionError:
            pass  # the member was killed
        finally:
            writer.close()

    server = await asyncio.start_server(judge, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("refused")
    given = parser.parse_args()
    asyncio.run(_serve(given.port, given.refused))
