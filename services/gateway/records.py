"""Assessments as they are remembered in Redis, so that they can be asked for later and are not made twice.

assessment:<id>            JSON: tenant, status, then the verdict or the problem
idempotency:<digest>       JSON: the digest of the request, and the id of its assessment
alive:<process>            that the process which judges is there; gone a few seconds after it
"""

import asyncio
import hashlib
import logging
import uuid
from contextlib import suppress
from typing import Any, Final, Literal, Self

from pydantic import ValidationError

from services.background import ended
from services.contracts import Verdict, WireModel
from services.gateway.problems import Problem
from services.policies.shared import CacheUnavailable, SharedCopies

_ALIVE_S: Final = 10
_BEAT_S: Final = 3.0

_CLAIM: Final = """
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[3]) then return redis.call('GET', KEYS[1]) end
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[3])
return false
"""
_REPLACE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[4])
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[4])
return 1
"""

log = logging.getLogger(__name__)


class Record(WireModel):
    """One assessment."""

    id: str
    tenant: str
    status: Literal["pending", "done", "failed"]
    process: str = ""
    """Who judges it."""
    verdict: Verdict | None = None
    problem: dict[str, Any] | None = None


class Claim(WireModel):
    """What an idempotency key stands for."""

    request: str
    """SHA-256 of the request that came with it first."""
    assessment: str


class Records:
    """The records of one deployment. To be used as an async context manager.

    Any method raises CacheUnavailable where Redis does not answer.
    """

    def __init__(self, shared: SharedCopies, *, keep_s: int) -> None:
        """`keep_s`: how long an assessment and an idempotency key are remembered."""
        self._shared = shared
        self._keep_s = keep_s
        self.process = uuid.uuid4().hex

    async def __aenter__(self) -> Self:
        with suppress(CacheUnavailable):
            await self._beat()
        self._task = asyncio.create_task(self._live())
        return self

    async def __aexit__(self, *_: object) -> None:
        await ended(self._task)
        with suppress(CacheUnavailable):
            await self._shared.run("redis.call('DEL', KEYS[1])", [self._key("alive", self.process)])

    async def keep(self, record: Record) -> None:
        """Remember an assessment, or what has become of it."""
        body = record.model_dump_json()
        await self._shared.run(
            "redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])",
            [self._key("assessment", record.id)],
            body,
            self._keep_s,
        )

    async def get(self, assessment_id: str) -> Record | None:
        """An assessment; one whose process has ended meanwhile has failed. None where nothing is known of it."""
        body = await self._shared.run("return redis.call('GET', KEYS[1])", [self._key("assessment", assessment_id)])
        if body is None:
            return None
        try:
            record = Record.model_validate_json(body)
        except ValidationError:
            return None
        if record.status == "pending" and record.process != self.process and not await self._is_alive(record.process):
            problem = Problem("interrupted", "the process that judged it has ended; send it again")
            return record.model_copy(update={"status": "failed", "problem": problem.document()})
        return record

    async def claim(self, key: str, request: str, pending: Record) -> Claim:
        """What an idempotency key stands for: `pending`, kept with it from now on, or what it stood for before."""
        claim, names = self._claim(key, request, pending)
        body = pending.model_dump_json()
        known = await self._shared.run(_CLAIM, names, claim.model_dump_json(), body, self._keep_s)
        return Claim.model_validate_json(known) if known else claim

    async def replace(self, key: str, known: Claim, pending: Record) -> bool:
        """Let an idempotency key stand for another assessment; whether nobody else did so before."""
        claim, names = self._claim(key, known.request, pending)
        bodies = (claim.model_dump_json(), pending.model_dump_json(), known.model_dump_json())
        return bool(await self._shared.run(_REPLACE, names, *bodies, self._keep_s))

    def _claim(self, key: str, request: str, pending: Record) -> tuple[Claim, list[str]]:
        names = [self._key("idempotency", _digest(key)), self._key("assessment", pending.id)]
        return Claim(request=request, assessment=pending.id), names

    async def _is_alive(self, process: str) -> bool:
        return bool(await self._shared.run("return redis.call('EXISTS', KEYS[1])", [self._key("alive", process)]))

    async def _live(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            try:
                await self._beat()
            except CacheUnavailable as error:
                log.warning("assessments cannot be remembered: %s", error)

    async def _beat(self) -> None:
        await self._shared.run(
            "redis.call('SET', KEYS[1], '1', 'EX', ARGV[1])", [self._key("alive", self.process)], _ALIVE_S
        )

    def _key(self, *parts: str) -> str:
        return self._shared.key("gateway", *parts)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
