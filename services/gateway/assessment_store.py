"""Assessments in Redis: clients ask for them later, and an idempotency key is judged once.

Each assessment is a state machine with two states, PENDING and DONE:

    (absent) ── create, claim, replace ──► PENDING ── finish ──► DONE (status `done` or `failed`)
                                            │   ▲
                                            └───┘ renew, while a process judges it

DONE is final: `create` and renewals do not change it. A request that gets its verdict in time stores only
the DONE state: `finish` writes the result directly, and a later `create` changes nothing.

A pending assessment that no process renews is abandoned: its process has ended, or Redis created it although the
process saw an error. `get` then reports the problem `interrupted`. The time to live in Redis tells when the assessment
was last renewed.

Keys in Redis:

    assessment:<id>         JSON: tenant, status, then the verdict or the problem
    idempotency:<digest>    JSON: the digest of the request, and the id of its assessment
    alive:<process>         exists while the process runs, and a few seconds longer

Others may be able to write to Redis. With SLUICE_REDIS_SIGNING_KEY the JSON objects are signed, and entries without a
valid signature count as absent. So do entries that are larger than a gateway writes; Redis does not return them. A
signed claim or result has the time at which it expires, so that nobody can write it again after that.
"""

import asyncio
import hashlib
import logging
import math
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any, Final, Literal, Self

from pydantic import ConfigDict, Field, ValidationError

from services.core.errors import RedisUnavailable
from services.core.messages import Verdict
from services.core.redis import READ_FUNCTIONS, RedisClient
from services.core.redis_forgeries import ForgeryReporter
from services.core.redis_signatures import RedisSigner
from services.core.tasks import cancel_and_wait
from services.core.values import WireModel
from services.gateway.problems import HttpProblem

_ALIVE_S: Final = 10
"""A process counts as ended, and an assessment as abandoned, this long after the last heartbeat."""
_HEARTBEAT_S: Final = 3.0
_PENDING_S: Final = 3600
"""Time to live of a pending assessment, from its creation or renewal."""
_FAILED_KEEP_S: Final = 600
"""A request that fails costs little, so a client could otherwise fill Redis with failures."""
_MAX_CLAIMS: Final = 10_000
"""Claims of running assessments that this process remembers."""
_MAX_UNSAVED: Final = 1000
"""Finished assessments that this process keeps while Redis is unavailable. No assessment can be created during the
outage, so clients can ask only for the results of assessments created before it."""
_CLAIM_TRIES: Final = 3
_ASSESSMENT_LIMIT_BYTES: Final = 256 << 10
"""A verdict has at most 64 KiB of metadata, and some KB of other fields."""
_CLAIM_LIMIT_BYTES: Final = 4 << 10
_CLOCK_SKEW_S: Final = 60
"""An entry that is still in Redis this long after its end was written again: Redis had removed it."""

# A value above the limit, or of another type, becomes an empty one, which is invalid.
_CREATE_SCRIPT: Final = "redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[2])"
_FINISH_SCRIPT: Final = """
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
if KEYS[2] and redis.pcall('GET', KEYS[2]) == ARGV[3] then redis.call('EXPIRE', KEYS[2], ARGV[2]) end
"""
"""The second key, if any, is the idempotency key of a failed assessment, and its claim is the last argument."""
_GET_SCRIPT: Final = f"{READ_FUNCTIONS} return {{read(KEYS[1], ARGV[1], ''), redis.call('TTL', KEYS[1])}}"
_RENEW_SCRIPT: Final = """
redis.call('SET', KEYS[1], '1', 'EX', ARGV[1])
for n = 2, #KEYS do
  if redis.pcall('GET', KEYS[n]) == ARGV[n + 1] then redis.call('EXPIRE', KEYS[n], ARGV[2]) end
end
"""
"""The first key is the process; the others are assessments. Each is renewed if it is still the pending one of ARGV."""
_CLAIM_SCRIPT: Final = f"""{READ_FUNCTIONS}
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'EX', ARGV[3]) then return read(KEYS[1], ARGV[5], '') end
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[4])
return false
"""
_REPLACE_SCRIPT: Final = f"""{READ_FUNCTIONS}
if read(KEYS[1], ARGV[6], '') ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[4])
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[5])
return 1
"""

_ASSESSMENT: Final = "assessment"
_IDEMPOTENCY_KEY: Final = "idempotency_key"

log = logging.getLogger(__name__)


class StoredAssessment(WireModel):
    """One assessment, in one of its states."""

    id: str
    tenant: str
    status: Literal["pending", "done", "failed"]
    process: str = ""
    """The process that judges it, while it is pending."""
    verdict: Verdict | None = None
    problem: dict[str, Any] | None = None
    expires_s: int | None = None
    """Unix time after which a signed result is absent. None while it is pending, and without a signature."""

    @property
    def is_pending(self) -> bool:
        """Whether the state is PENDING."""
        return self.status == "pending"

    def with_verdict(self, verdict: Verdict) -> "StoredAssessment":
        """Return this assessment as DONE with a verdict."""
        return StoredAssessment(id=self.id, tenant=self.tenant, status="done", verdict=verdict)

    def with_problem(self, problem: HttpProblem) -> "StoredAssessment":
        """Return this assessment as DONE with a problem."""
        return StoredAssessment(id=self.id, tenant=self.tenant, status="failed", problem=problem.to_document())


class Claim(WireModel):
    """The request and the assessment of an idempotency key. In Redis, the fields have the names of release 0.1.0."""

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    request_digest: Annotated[str, Field(validation_alias="request", serialization_alias="request")]
    """SHA-256 of the first request with the key."""
    assessment_id: Annotated[str, Field(validation_alias="assessment", serialization_alias="assessment")]
    expires_s: int | None = None
    """Unix time after which a signed claim is absent. None without a signature."""


class AssessmentStore:
    """The assessments of one deployment. To be used as an async context manager.

    All asynchronous methods but `finish` raise RedisUnavailable if Redis does not answer.
    """

    def __init__(
        self, redis: RedisClient, signer: RedisSigner, *, keep_s: int, heartbeat_s: float = _HEARTBEAT_S
    ) -> None:
        """`keep_s`: time to live of finished assessments and of idempotency keys. At most 600 s after a failure."""
        self._redis = redis
        self._signer = signer
        self._forgeries = ForgeryReporter()
        self._keep_s = keep_s
        self._heartbeat_s = heartbeat_s
        self._renewed: dict[str, str] = {}
        self._unsaved: dict[str, StoredAssessment] = {}
        self._claims: dict[str, tuple[str, str]] = {}
        """By the id of a running assessment: the name of its idempotency key in Redis, and its claim there."""
        self.process = uuid.uuid4().hex

    async def __aenter__(self) -> Self:
        with suppress(RedisUnavailable):
            await self.send_heartbeat()
        self._task = asyncio.create_task(self._heartbeat_loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._task)
        with suppress(RedisUnavailable):
            await self._save_finished()
            await self._redis.run("redis.call('DEL', KEYS[1])", [self._redis_key("alive", self.process)])

    def build_pending(self, tenant: str) -> StoredAssessment:
        """Return a new assessment of this process. It is in Redis after `create`, `claim` or `replace`."""
        return StoredAssessment(id=uuid.uuid4().hex, tenant=tenant, status="pending", process=self.process)

    async def create(self, pending: StoredAssessment) -> None:
        """absent -> PENDING. An assessment that is DONE already stays so."""
        redis_key = self._redis_key("assessment", pending.id)
        await self._redis.run(_CREATE_SCRIPT, [redis_key], self._encode(pending), _PENDING_S)

    async def claim(self, idempotency_key: str, request_digest: str, pending: StoredAssessment) -> Claim:
        """absent -> PENDING, if this is the first request with the idempotency key. Returns the key's claim."""
        claim, redis_keys = self._claim(idempotency_key, request_digest, pending)
        encoded, body = self._encode_claim(idempotency_key, claim), self._encode(pending)
        limits = (self._keep_s, _PENDING_S, _CLAIM_LIMIT_BYTES)
        for _ in range(_CLAIM_TRIES):
            data: bytes | None = await self._redis.run(_CLAIM_SCRIPT, redis_keys, encoded, body, *limits)
            if data is None:
                self._remember_claim(pending, redis_keys[0], encoded)
                return claim
            if known := self._decode_claim(idempotency_key, data):
                return known
            if await self._redis.run(_REPLACE_SCRIPT, redis_keys, encoded, body, data, *limits):
                self._remember_claim(pending, redis_keys[0], encoded)
                return claim
        await self.create(pending)  # someone writes forged claims again and again: judge the image without a claim
        return claim

    async def replace(self, idempotency_key: str, known: Claim, pending: StoredAssessment) -> bool:
        """absent -> PENDING, in place of the claim's assessment. False if another request has replaced it before."""
        claim, redis_keys = self._claim(idempotency_key, known.request_digest, pending)
        claims = [self._encode_claim(idempotency_key, each) for each in (claim, known)]
        bodies = (claims[0], self._encode(pending), claims[1])
        limits = (self._keep_s, _PENDING_S, _CLAIM_LIMIT_BYTES)
        is_replaced = bool(await self._redis.run(_REPLACE_SCRIPT, redis_keys, *bodies, *limits))
        if is_replaced:
            self._remember_claim(pending, redis_keys[0], claims[0])
        return is_replaced

    def _remember_claim(self, pending: StoredAssessment, redis_key: str, encoded: str) -> None:
        self._claims[pending.id] = (redis_key, encoded)
        if len(self._claims) > _MAX_CLAIMS:
            del self._claims[next(iter(self._claims))]

    @contextmanager
    def renew(self, pending: StoredAssessment) -> Iterator[None]:
        """PENDING -> PENDING: renew the assessment with each heartbeat until the block ends."""
        self._renewed[pending.id] = self._encode(pending)
        try:
            yield
        finally:
            del self._renewed[pending.id]

    async def send_heartbeat(self) -> None:
        """Tell other processes that this process runs, renew the assessments that it judges, and save results."""
        redis_keys = [
            self._redis_key("alive", self.process),
            *(self._redis_key("assessment", each) for each in self._renewed),
        ]
        await self._redis.run(_RENEW_SCRIPT, redis_keys, _ALIVE_S, _PENDING_S, *self._renewed.values())
        await self._save_finished()

    async def finish(self, done: StoredAssessment) -> None:
        """PENDING -> DONE. While Redis is unavailable, this process keeps the result and saves it later."""
        try:
            await self._save(done)
        except RedisUnavailable as error:
            if len(self._unsaved) < _MAX_UNSAVED:
                log.warning("saving assessment %s failed; retrying with the next heartbeat: %s", done.id, error)
                self._unsaved[done.id] = done
            else:
                log.error(
                    "saving assessment %s failed; its result is lost, because %d results already wait for Redis; the "
                    "client must send the request again: %s",
                    done.id,
                    _MAX_UNSAVED,
                    error,
                )

    async def get(self, assessment_id: str) -> StoredAssessment | None:
        """Return an assessment, or None if it is absent. An abandoned assessment has failed."""
        if unsaved := self._unsaved.get(assessment_id):
            return unsaved
        redis_key = self._redis_key("assessment", assessment_id)
        body, left_s = await self._redis.run(_GET_SCRIPT, [redis_key], _ASSESSMENT_LIMIT_BYTES)
        if body is None:
            return None
        stored = self._decode(assessment_id, body)
        if stored is None:
            return None
        if stored.is_pending and not await self._has_live_owner(stored, left_s):
            return stored.with_problem(
                HttpProblem("interrupted", "the process that judged the image has ended; send the request again")
            )
        return stored

    def _claim(self, idempotency_key: str, request_digest: str, pending: StoredAssessment) -> tuple[Claim, list[str]]:
        """Return the claim of a new assessment, and the Redis keys of the idempotency key and the assessment."""
        redis_keys = [
            self._redis_key("idempotency", _digest(idempotency_key)),
            self._redis_key("assessment", pending.id),
        ]
        claim = Claim(request_digest=request_digest, assessment_id=pending.id, expires_s=self._find_end_s(self._keep_s))
        return claim, redis_keys

    async def _has_live_owner(self, pending: StoredAssessment, left_s: int) -> bool:
        """Return whether a process still judges an assessment. `left_s`: the rest of its time to live."""
        if pending.id in self._renewed:
            return True
        if _PENDING_S - left_s > _ALIVE_S:
            return False
        redis_key = self._redis_key("alive", pending.process)
        return pending.process == self.process or bool(
            await self._redis.run("return redis.call('EXISTS', KEYS[1])", [redis_key])
        )

    async def _heartbeat_loop(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            try:
                await self.send_heartbeat()
            except RedisUnavailable as error:
                log.warning("renewing assessments failed; retrying in %g s: %s", self._heartbeat_s, error)

    async def _save_finished(self) -> None:
        for done in list(self._unsaved.values()):
            await self._save(done)
            del self._unsaved[done.id]

    async def _save(self, done: StoredAssessment) -> None:
        redis_keys = [self._redis_key("assessment", done.id)]
        keep_s, claims = self._keep_s, []
        claim = self._claims.pop(done.id, None)
        if done.problem is not None:
            keep_s = min(keep_s, _FAILED_KEEP_S)
            if claim:
                redis_keys.append(claim[0])
                claims.append(claim[1])
        expiring = done.model_copy(update={"expires_s": self._find_end_s(keep_s)})
        try:
            await self._redis.run(_FINISH_SCRIPT, redis_keys, self._encode(expiring), keep_s, *claims)
        except RedisUnavailable:
            if claim:
                self._claims[done.id] = claim
            raise

    def _find_end_s(self, keep_s: int) -> int | None:
        """Return when a claim or a result that is written now expires; None if it cannot be signed."""
        return math.ceil(time.time()) + keep_s if self._signer.can_sign else None

    def _is_expired(self, kind: str, subject: str, expires_s: int | None) -> bool:
        """Return whether a signed claim or result has expired. One that has expired long ago is reported."""
        if not self._signer.can_sign:
            return False
        late_s = time.time() - (expires_s or 0)
        if late_s > _CLOCK_SKEW_S:
            self._forgeries.report(
                kind,
                f"the entry of {subject} in Redis expired {late_s:.0f} s ago; it counts as absent. Someone has written "
                "an old entry again, or a clock is wrong. Find out who can write to Redis, and compare the clocks.",
            )
        return late_s > 0

    def _encode(self, assessment: StoredAssessment) -> str:
        return self._signer.sign_json(_ASSESSMENT, assessment.id, _dump(assessment))

    def _decode(self, assessment_id: str, data: bytes) -> StoredAssessment | None:
        """Return the assessment; None if it was not written by a gateway, or has expired."""
        with suppress(ValidationError):
            if self._signer.accepts_json(_ASSESSMENT, assessment_id, data):
                stored = StoredAssessment.model_validate_json(data)
                if stored.is_pending:
                    return stored
                expired = self._is_expired(_ASSESSMENT, f"assessment {assessment_id}", stored.expires_s)
                return None if expired else stored.model_copy(update={"expires_s": None})
        self._report_forgery(_ASSESSMENT, f"assessment {assessment_id}", "it counts as absent")
        return None

    def _encode_claim(self, idempotency_key: str, claim: Claim) -> str:
        return self._signer.sign_json(_IDEMPOTENCY_KEY, _digest(idempotency_key), _dump(claim))

    def _decode_claim(self, idempotency_key: str, data: bytes) -> Claim | None:
        """Return the claim; None if it was not written by a gateway, or has expired."""
        with suppress(ValidationError):
            if self._signer.accepts_json(_IDEMPOTENCY_KEY, _digest(idempotency_key), data):
                claim = Claim.model_validate_json(data)
                return None if self._is_expired(_IDEMPOTENCY_KEY, "an idempotency key", claim.expires_s) else claim
        self._report_forgery(_IDEMPOTENCY_KEY, "an idempotency key", "the request is judged")
        return None

    def _report_forgery(self, kind: str, subject: str, effect: str) -> None:
        self._forgeries.report(
            kind,
            f"the entry of {subject} in Redis was not written by a gateway with the same SLUICE_REDIS_SIGNING_KEY; "
            f"{effect}. Find out who can write to Redis, unless this key was set or changed just now.",
        )

    def _redis_key(self, *parts: str) -> str:
        return self._redis.key("gateway", *parts)


def _dump(entry: StoredAssessment | Claim) -> str:
    """Return JSON as version 0.1.0 writes it, and the time of expiry if there is one."""
    return entry.model_dump_json(exclude={"expires_s"} if entry.expires_s is None else None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
