"""Assessments as they are remembered in Redis, so that they can be asked for later and are not made twice.

A promise that Redis took without an answer has nobody who works on it. So whoever does work renews the record, and how
much of its life is left says for how long nobody did.

assessment:<id>            JSON: tenant, status, then the verdict or the problem
idempotency:<digest>       JSON: the digest of the request, and the id of its assessment
alive:<process>            that the process which judges is there; gone a few seconds after it
"""

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal, Self

from pydantic import ValidationError

from services.core.errors import RedisUnavailable
from services.core.messages import Verdict
from services.core.tasks import cancel_and_wait
from services.core.values import WireModel
from services.gateway.problems import HttpProblem
from services.policies.redis_cache import PolicyRedisCache

_ALIVE_S: Final = 10
_HEARTBEAT_S: Final = 3.0
_PENDING_S: Final = 3600
"""The life of a record that is pending, from when it was promised or renewed."""
_UNSAVED_LIMIT: Final = 1000
"""Ends that wait for Redis. Nothing can be promised while it is away, so the first of them are those that matter."""

_CREATE_PENDING: Final = "redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2])"
_SAVE: Final = "redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])"
_GET: Final = "return {redis.call('GET', KEYS[1]), redis.call('TTL', KEYS[1])}"
_HEARTBEAT: Final = """
redis.call('SET', KEYS[1], '1', 'EX', ARGV[1])
for n = 2, #KEYS do
  if redis.call('GET', KEYS[n]) == ARGV[n + 1] then redis.call('EXPIRE', KEYS[n], ARGV[2]) end
end
"""
"""The first key is the process, each other one a record, which is renewed only where it is still that of ARGV."""
_CLAIM: Final = """
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[3]) then return redis.call('GET', KEYS[1]) end
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[4])
return false
"""
_REPLACE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[4])
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[5])
return 1
"""

log = logging.getLogger(__name__)


class StoredAssessment(WireModel):
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


class AssessmentStore:
    """The records of one deployment. To be used as an async context manager.

    Any method but `keep` raises RedisUnavailable where Redis does not answer.
    """

    def __init__(self, shared: PolicyRedisCache, *, keep_s: int) -> None:
        """`keep_s`: how long an assessment and an idempotency key are remembered."""
        self._shared = shared
        self._keep_s = keep_s
        self._at_work: dict[str, str] = {}
        self._unsaved: dict[str, StoredAssessment] = {}
        self.process = uuid.uuid4().hex

    async def __aenter__(self) -> Self:
        with suppress(RedisUnavailable):
            await self._send_heartbeat()
        self._task = asyncio.create_task(self._heartbeat_loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._task)
        with suppress(RedisUnavailable):
            await self._retry_saves()
            await self._shared.run("redis.call('DEL', KEYS[1])", [self._key("alive", self.process)])

    async def create_pending(self, pending: StoredAssessment) -> None:
        """Remember that there is an assessment, unless it is known what has become of it."""
        name = self._key("assessment", pending.id)
        await self._shared.run(_CREATE_PENDING, [name], pending.model_dump_json(), _PENDING_S)

    @contextmanager
    def working(self, pending: StoredAssessment) -> Iterator[None]:
        """What was promised is being worked on for as long as the block runs."""
        self._at_work[pending.id] = pending.model_dump_json()
        try:
            yield
        finally:
            del self._at_work[pending.id]

    async def save(self, stored: StoredAssessment) -> None:
        """Remember what has become of an assessment. Where Redis is away it is known here until Redis is back."""
        try:
            await self._save(stored)
        except RedisUnavailable as error:
            log.warning("assessment %s cannot be remembered now: %s", stored.id, error)
            if len(self._unsaved) < _UNSAVED_LIMIT:
                self._unsaved[stored.id] = stored

    async def get(self, assessment_id: str) -> StoredAssessment | None:
        """An assessment; one that nobody works on any more has failed. None where nothing is known of it."""
        if late := self._unsaved.get(assessment_id):
            return late
        body, left_s = await self._shared.run(_GET, [self._key("assessment", assessment_id)])
        if body is None:
            return None
        try:
            stored = StoredAssessment.model_validate_json(body)
        except ValidationError:
            return None
        if stored.status == "pending" and not await self._owner_alive(stored, left_s):
            problem = HttpProblem("interrupted", "nobody judges it any more; send it again")
            return stored.model_copy(update={"status": "failed", "problem": problem.document()})
        return stored

    async def claim(self, key: str, request: str, pending: StoredAssessment) -> Claim:
        """What an idempotency key stands for: `pending`, kept with it from now on, or what it stood for before."""
        claim, names = self._claim(key, request, pending)
        body = pending.model_dump_json()
        known = await self._shared.run(_CLAIM, names, claim.model_dump_json(), body, self._keep_s, _PENDING_S)
        return Claim.model_validate_json(known) if known else claim

    async def replace(self, key: str, known: Claim, pending: StoredAssessment) -> bool:
        """Let an idempotency key stand for another assessment; whether nobody else did so before."""
        claim, names = self._claim(key, known.request, pending)
        bodies = (claim.model_dump_json(), pending.model_dump_json(), known.model_dump_json())
        return bool(await self._shared.run(_REPLACE, names, *bodies, self._keep_s, _PENDING_S))

    def _claim(self, key: str, request: str, pending: StoredAssessment) -> tuple[Claim, list[str]]:
        names = [self._key("idempotency", _digest(key)), self._key("assessment", pending.id)]
        return Claim(request=request, assessment=pending.id), names

    async def _owner_alive(self, pending: StoredAssessment, left_s: int) -> bool:
        """`left_s`: of its life, in seconds."""
        if pending.id in self._at_work:
            return True
        if _PENDING_S - left_s > _ALIVE_S:
            return False
        name = self._key("alive", pending.process)
        return pending.process == self.process or bool(
            await self._shared.run("return redis.call('EXISTS', KEYS[1])", [name])
        )

    async def _heartbeat_loop(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            try:
                await self._send_heartbeat()
                await self._retry_saves()
            except RedisUnavailable as error:
                log.warning("assessments cannot be remembered: %s", error)

    async def _send_heartbeat(self) -> None:
        names = [self._key("alive", self.process), *(self._key("assessment", each) for each in self._at_work)]
        await self._shared.run(_HEARTBEAT, names, _ALIVE_S, _PENDING_S, *self._at_work.values())

    async def _retry_saves(self) -> None:
        for stored in list(self._unsaved.values()):
            await self._save(stored)
            del self._unsaved[stored.id]

    async def _save(self, stored: StoredAssessment) -> None:
        name = self._key("assessment", stored.id)
        await self._shared.run(_SAVE, [name], stored.model_dump_json(), self._keep_s)

    def _key(self, *parts: str) -> str:
        return self._shared.key("gateway", *parts)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
