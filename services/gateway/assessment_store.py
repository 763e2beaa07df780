"""Assessments in Redis: clients ask for them later, and an idempotency key is judged once.

Each assessment is a state machine with two states, PENDING and DONE:

    (absent) ── create, claim, replace ──► PENDING ── finish ──► DONE (status `done` or `failed`)
                                            │   ▲
                                            └───┘ renewing, while a process judges it

DONE is final: `create` and renewals do not change it. If a request waits for its verdict, its assessment is finished
without being pending; a `create` that comes too late changes nothing.

A pending assessment that no process renews is abandoned: its process has ended, or Redis created it although the
process saw an error. `get` then reports the problem `interrupted`. The time to live in Redis tells when the assessment
was last renewed.

Keys in Redis:

    assessment:<id>         JSON: tenant, status, then the verdict or the problem
    idempotency:<digest>    JSON: the digest of the request, and the id of its assessment
    alive:<process>         exists while the process runs, and a few seconds longer
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
from services.core.redis import RedisClient
from services.core.tasks import cancel_and_wait
from services.core.values import WireModel
from services.gateway.problems import HttpProblem

_ALIVE_S: Final = 10
_HEARTBEAT_S: Final = 3.0
_PENDING_S: Final = 3600
"""Time to live of a pending assessment, from its creation or renewal."""
_UNSAVED_LIMIT: Final = 1000
"""Finished assessments that this process keeps while Redis is unavailable. None is created meanwhile, so the first ones
are those that clients can ask for."""

_CREATE: Final = "redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2])"
_FINISH: Final = "redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])"
_GET: Final = "return {redis.call('GET', KEYS[1]), redis.call('TTL', KEYS[1])}"
_RENEW: Final = """
redis.call('SET', KEYS[1], '1', 'EX', ARGV[1])
for n = 2, #KEYS do
  if redis.call('GET', KEYS[n]) == ARGV[n + 1] then redis.call('EXPIRE', KEYS[n], ARGV[2]) end
end
"""
"""The first key is the process; the others are assessments. Each is renewed if it is still the pending one of ARGV."""
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
    """One assessment in one of its states."""

    id: str
    tenant: str
    status: Literal["pending", "done", "failed"]
    process: str = ""
    """The process that judges it, while it is pending."""
    verdict: Verdict | None = None
    problem: dict[str, Any] | None = None

    @property
    def is_pending(self) -> bool:
        return self.status == "pending"

    def done(self, verdict: Verdict) -> "StoredAssessment":
        """This assessment, DONE with a verdict."""
        return StoredAssessment(id=self.id, tenant=self.tenant, status="done", verdict=verdict)

    def failed(self, problem: HttpProblem) -> "StoredAssessment":
        """This assessment, DONE with a problem."""
        return StoredAssessment(id=self.id, tenant=self.tenant, status="failed", problem=problem.document())


class Claim(WireModel):
    """The request and the assessment of an idempotency key."""

    request: str
    """SHA-256 of the first request with the key."""
    assessment: str


class AssessmentStore:
    """The assessments of one deployment. To be used as an async context manager.

    All asynchronous methods but `finish` raise RedisUnavailable if Redis does not answer.
    """

    def __init__(self, shared: RedisClient, *, keep_s: int) -> None:
        """`keep_s`: time to live of finished assessments and of idempotency keys."""
        self._shared = shared
        self._keep_s = keep_s
        self._renewed: dict[str, str] = {}
        self._unsaved: dict[str, StoredAssessment] = {}
        self.process = uuid.uuid4().hex

    async def __aenter__(self) -> Self:
        with suppress(RedisUnavailable):
            await self._renew()
        self._task = asyncio.create_task(self._heartbeat_loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._task)
        with suppress(RedisUnavailable):
            await self._save_finished()
            await self._shared.run("redis.call('DEL', KEYS[1])", [self._key("alive", self.process)])

    def pending(self, tenant: str) -> StoredAssessment:
        """A new assessment of this process. Redis has it after `create`, `claim` or `replace`."""
        return StoredAssessment(id=uuid.uuid4().hex, tenant=tenant, status="pending", process=self.process)

    async def create(self, pending: StoredAssessment) -> None:
        """absent -> PENDING. An assessment that is DONE already stays so."""
        name = self._key("assessment", pending.id)
        await self._shared.run(_CREATE, [name], pending.model_dump_json(), _PENDING_S)

    async def claim(self, key: str, request: str, pending: StoredAssessment) -> Claim:
        """absent -> PENDING, if this is the first request with the idempotency key. Returns the key's claim."""
        claim, names = self._claim(key, request, pending)
        body = pending.model_dump_json()
        known = await self._shared.run(_CLAIM, names, claim.model_dump_json(), body, self._keep_s, _PENDING_S)
        return Claim.model_validate_json(known) if known else claim

    async def replace(self, key: str, known: Claim, pending: StoredAssessment) -> bool:
        """absent -> PENDING, in place of the claim's assessment. False if another request has replaced it before."""
        claim, names = self._claim(key, known.request, pending)
        bodies = (claim.model_dump_json(), pending.model_dump_json(), known.model_dump_json())
        return bool(await self._shared.run(_REPLACE, names, *bodies, self._keep_s, _PENDING_S))

    @contextmanager
    def renewing(self, pending: StoredAssessment) -> Iterator[None]:
        """PENDING -> PENDING: each heartbeat renews the assessment until the block ends."""
        self._renewed[pending.id] = pending.model_dump_json()
        try:
            yield
        finally:
            del self._renewed[pending.id]

    async def finish(self, done: StoredAssessment) -> None:
        """PENDING -> DONE. While Redis is unavailable, this process keeps the result and saves it later."""
        try:
            await self._save(done)
        except RedisUnavailable as error:
            log.warning("Redis could not save assessment %s: %s. It is saved when Redis is back.", done.id, error)
            if len(self._unsaved) < _UNSAVED_LIMIT:
                self._unsaved[done.id] = done

    async def get(self, assessment_id: str) -> StoredAssessment | None:
        """An assessment, or None if it is absent. An abandoned one is failed."""
        if unsaved := self._unsaved.get(assessment_id):
            return unsaved
        body, left_s = await self._shared.run(_GET, [self._key("assessment", assessment_id)])
        if body is None:
            return None
        try:
            stored = StoredAssessment.model_validate_json(body)
        except ValidationError:
            return None
        if stored.is_pending and not await self._owner_alive(stored, left_s):
            return stored.failed(HttpProblem("interrupted", "the process that judged it has ended; send it again"))
        return stored

    def _claim(self, key: str, request: str, pending: StoredAssessment) -> tuple[Claim, list[str]]:
        """The claim of a new assessment, and the names in Redis of the idempotency key and the assessment."""
        names = [self._key("idempotency", _digest(key)), self._key("assessment", pending.id)]
        return Claim(request=request, assessment=pending.id), names

    async def _owner_alive(self, pending: StoredAssessment, left_s: int) -> bool:
        """Whether a process still judges it. `left_s`: the rest of its time to live."""
        if pending.id in self._renewed:
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
                await self._renew()
                await self._save_finished()
            except RedisUnavailable as error:
                log.warning("Redis could not renew the pending assessments: %s. Retrying in %g s.", error, _HEARTBEAT_S)

    async def _renew(self) -> None:
        names = [self._key("alive", self.process), *(self._key("assessment", each) for each in self._renewed)]
        await self._shared.run(_RENEW, names, _ALIVE_S, _PENDING_S, *self._renewed.values())

    async def _save_finished(self) -> None:
        for done in list(self._unsaved.values()):
            await self._save(done)
            del self._unsaved[done.id]

    async def _save(self, done: StoredAssessment) -> None:
        name = self._key("assessment", done.id)
        await self._shared.run(_FINISH, [name], done.model_dump_json(), self._keep_s)

    def _key(self, *parts: str) -> str:
        return self._shared.key("gateway", *parts)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
