"""Each process keeps a local copy of the policies, so that a submission needs no network for its policy.

The truth is in the policy bucket. Redis, which all processes of a deployment share, is not trusted: others may write to
it. A copy of a rollout in Redis is used only if it is signed with SLUICE_REDIS_SIGNING_KEY. A copy of a version is used
only if it is signed or has the digest that a trusted rollout names. An announced change is a reason to look, and is
never applied itself. A periodic refresh finds the changes whose announcement was lost.

If Redis is down, the bucket is used. If the bucket is down, signed copies are used. If there are none, the last known
versions are used, and a new process waits.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, MutableMapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Self, TypeVar

from services.core import telemetry
from services.core.errors import (
    ConfigurationError,
    PolicyOutOfScope,
    PolicyUnavailable,
    RedisUnavailable,
    UnknownPolicy,
)
from services.core.messages import ImageRequest
from services.core.redis_forgeries import ForgeryReporter
from services.core.tasks import cancel_and_wait
from services.core.tenancy import UNLIMITED, Scope
from services.core.values import DEFAULT_POLICY, TENANTS, Policy, PolicyChoice, PolicyIdentity
from services.policies.document import PolicyDocument
from services.policies.redis_cache import CachedChange, CachedVersion, PolicyRedisCache
from services.policies.reference import PolicyReference
from services.policies.registry import PolicyRegistry, StoredVersion
from services.policies.rollout import Rollout, RolloutChange
from services.policies.tenants import TenantsDocument

_COPIES_LIMIT: Final = 1024
_MISSING_TTL_S: Final = 1.0
"""How long a negative lookup is cached."""
_LEASE_WAIT_S: Final = 6.0
"""How long to wait for another process's lease before reading the bucket without one."""
_POLL_S: Final = 0.02
_CHECK_PAUSE_S: Final = 0.2
"""The least time between two checks of announced changes of one policy. It bounds the reads that a flood can cause."""

log = logging.getLogger(__name__)
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class _CachedRollout:
    """The cached rollout of one policy."""

    number: int
    change: RolloutChange | None
    rollout: Rollout
    checked_at: float


class PolicyCache:
    """Chooses the policy version of each submission. Use it as an async context manager."""

    def __init__(
        self, registry: PolicyRegistry, redis_cache: PolicyRedisCache | None, *, refresh_s: float = 5.0
    ) -> None:
        """`refresh_s`: period of the refresh."""
        self._registry = registry
        self._redis_cache = redis_cache
        self._refresh_s = refresh_s
        self._rollouts: dict[str, _CachedRollout] = {}
        self._policies: dict[tuple[str, int], Policy] = {}
        self._tenants: dict[tuple[str, int], TenantsDocument] = {}
        self._missing_since: dict[tuple[str, int], float] = {}
        self._running_lookups: dict[Hashable, asyncio.Task[Any]] = {}
        self._announced: dict[str, CachedChange] = {}
        """The last announced change of each policy that is not checked yet."""
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._forgeries = ForgeryReporter()
        self._redis_recovered_at = float("-inf")
        """Copies in Redis from before then may lack the changes made while Redis was down."""
        self._closing = AsyncExitStack()

    async def __aenter__(self) -> Self:
        loops = [self._refresh, self._listen] if self._redis_cache else [self._refresh]
        for task in [asyncio.create_task(_repeat(loop)) for loop in loops]:
            self._closing.push_async_callback(cancel_and_wait, task)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._closing.aclose()
        for check in list(self._checks.values()):
            await cancel_and_wait(check)

    def choose(self, request: ImageRequest, scope: Scope = UNLIMITED) -> Coroutine[Any, Any, PolicyChoice]:
        """The version that judges a submission, and its shadow. Needs no network if both are known.

        Raises:
            UnknownPolicy: there is no such policy or version, or the reference is malformed.
            PolicyOutOfScope: `scope` does not allow the policy. With a scope that limits policies, the sentence is the
                same for a policy that does not exist.
            PolicyUnavailable: the policy is not known here, and neither Redis nor the policy bucket answers.
        """
        # Each submission waits for this, so what is known is used without a further coroutine.
        if scope.limits and scope.has_policy_limit:
            return self._choose_in_scope(request, scope)
        return self._choose(request)

    async def _choose_in_scope(self, request: ImageRequest, scope: Scope) -> PolicyChoice:
        reference = _parse(request.policy)
        detail = (
            f"the policy {str(reference)!r} does not exist, is not active, or may not be used by this tenant or API key"
        )
        own = await self._find_own_policy(request.tenant)
        names_own = reference.name == DEFAULT_POLICY and reference.version is None
        if not scope.allows_policy(own if names_own else reference.name, own):
            raise PolicyOutOfScope(detail)
        try:
            return await self._choose(request)
        except UnknownPolicy:
            raise UnknownPolicy(detail) from None

    async def is_in_scope(self, name: str, scope: Scope, tenant: str) -> bool:
        """Whether a scope of a tenant allows a policy. The answer does not depend on whether the policy exists.

        Raises:
            PolicyUnavailable: the tenants document is needed, and neither Redis nor the policy bucket answers.
        """
        return not scope.has_policy_limit or scope.allows_policy(name, await self._find_own_policy(tenant))

    async def get_assignments(self) -> Mapping[str, str]:
        """The policy of each tenant in the active tenants document. Raises PolicyUnavailable."""
        document = await self._get_tenants()
        return document.tenants if document else {}

    async def _choose(self, request: ImageRequest) -> PolicyChoice:
        reference = _parse(request.policy)
        name, version = reference.name, reference.version
        if version is not None:
            return PolicyChoice(await self._get_policy(name, version))
        tenants, is_own = self._rollouts.get(TENANTS), name == DEFAULT_POLICY
        has_no_tenants = tenants is not None and tenants.rollout.active is None
        if is_own and not has_no_tenants:
            name = await self._find_tenant_policy(request.tenant)
        known = self._rollouts.get(name)
        rollout = known.rollout if known and known.rollout.active is not None else await self._get_rollout(name)
        version = rollout.choose_version(name, request.id, request.tenant)
        if version is None:
            raise UnknownPolicy(f"there is no policy {name!r} with an active version")
        shadow = rollout.choose_shadow(name, request.id)
        policy = self._policies.get((name, version)) or await self._get_policy(name, version)
        is_counted = policy.block_rate is not None and (
            is_own
            or (request.tenant == "default" if has_no_tenants else await self._is_own_policy(request.tenant, name))
        )
        return PolicyChoice(
            policy,
            await self._get_policy(name, shadow) if shadow is not None and shadow != version else None,
            request.tenant if is_counted else None,
        )

    async def resolve(self, reference: str) -> Policy:
        """The policy of a reference: `name` (the active version) or `name@7`. Raises as `choose`."""
        parsed = _parse(reference)
        name, version = parsed.name, parsed.version
        if version is None and (version := (await self._get_rollout(name)).active) is None:
            raise UnknownPolicy(f"there is no policy {name!r} with an active version")
        return await self._get_policy(name, version)

    async def get_rollout(self, name: str) -> Rollout:
        """The present rollout of a name. Raises PolicyUnavailable."""
        return await self._get_rollout(name)

    def is_tripped(self, policy: PolicyIdentity) -> bool:
        """Whether the last known rollout says that the circuit breaker of a version is open."""
        known = self._rollouts.get(policy.name)
        return known is not None and policy.version in known.rollout.tripped

    def apply_change(self, change: RolloutChange) -> None:
        """Apply a change that this process has written to the policy bucket, unless a newer one is known."""
        known = self._rollouts.get(change.name)
        if known is None or change.number > known.number:
            self._keep_rollout(change.name, change)

    async def _get_rollout(self, name: str) -> Rollout:
        known = self._rollouts.get(name)
        if known is None or (known.rollout.active is None and name != TENANTS and self._age(known) > _MISSING_TTL_S):
            await self._refresh_rollout(name)
            known = self._rollouts[name]
        return known.rollout

    async def _find_tenant_policy(self, tenant: str) -> str:
        """The policy of a tenant, by the active tenants document."""
        version = (await self._get_rollout(TENANTS)).active
        if version is None:
            return DEFAULT_POLICY
        document = self._tenants.get((TENANTS, version)) or await self._get_tenants()
        if document is None:
            return DEFAULT_POLICY
        policy = document.policy_of(tenant)
        if policy is None and tenant != "default":
            telemetry.UNKNOWN_TENANTS.inc()
        return policy or DEFAULT_POLICY

    async def _find_own_policy(self, tenant: str) -> str:
        """The policy that the active tenants document gives a tenant; `default` if it gives none."""
        document = await self._get_tenants()
        return (document.policy_of(tenant) if document else None) or DEFAULT_POLICY

    async def _is_own_policy(self, tenant: str, name: str) -> bool:
        """Whether the tenants document gives a policy to a tenant. False while the document is unknown.

        Without a document there is one tenant, `default`, which owns every policy.
        """
        try:
            document = await self._get_tenants()
        except (PolicyUnavailable, UnknownPolicy):
            return False
        if document is None:
            return tenant == "default" or name == DEFAULT_POLICY
        return (document.policy_of(tenant) or DEFAULT_POLICY) == name

    async def _get_tenants(self) -> TenantsDocument | None:
        """The active tenants document; None if there is none."""
        version = (await self._get_rollout(TENANTS)).active
        if version is None:
            return None
        document = self._tenants.get((TENANTS, version))
        if document is None:
            await self._share_lookup(("version", TENANTS, version), self._load_version, TENANTS, version)
            document = self._tenants[TENANTS, version]
        return document

    async def _get_policy(self, name: str, version: int) -> Policy:
        policy = self._policies.get((name, version))
        if policy is None:
            if time.monotonic() - self._missing_since.get((name, version), float("-inf")) < _MISSING_TTL_S:
                raise UnknownPolicy(f"policy {name}@{version} does not exist")
            await self._share_lookup(("version", name, version), self._load_version, name, version)
            policy = self._policies.get((name, version))
            if policy is None:
                raise UnknownPolicy(f"{name}@{version} is the tenants document, not a policy")
        return policy

    async def _load_version(self, name: str, version: int) -> None:
        """Load one version into the local copies."""
        known = self._rollouts.get(name)
        expected = known.rollout.digests.get(version) if known else None
        rejected: CachedVersion | None = None
        is_too_large = False
        may_parse_unsigned = expected is not None

        async def copy(redis_cache: PolicyRedisCache) -> StoredVersion | None:
            nonlocal rejected, is_too_large, may_parse_unsigned
            try:
                entry = await redis_cache.find_version(name, version)
            except ValueError:
                is_too_large = True
                return None
            if entry and (entry.is_signed or may_parse_unsigned):
                with suppress(ValueError):
                    if not expected or entry.stored.digest == expected:
                        return entry.stored
                may_parse_unsigned = False  # parsing takes time, so a lookup parses one forged entry at most
            if entry and not entry.is_signed:
                rejected = entry
            return None

        async def read() -> StoredVersion:
            stored = await _read_in_thread(self._registry.get, name, version)
            if is_too_large or (rejected and not rejected.is_of(stored)):
                self._report_forgery("version", f"{name}@{version}")
            if self._redis_cache:
                with suppress(RedisUnavailable):
                    await self._redis_cache.cache_version(stored)
            return stored

        try:
            stored = await self._read_once(f"{name}@{version}", copy, read)
        except UnknownPolicy:
            _put_bounded(self._missing_since, (name, version), time.monotonic())
            raise
        if isinstance(stored.document, PolicyDocument):
            if name not in self._rollouts:
                await self._refresh_rollout(name)  # it has the calibrations of every version
            _put_bounded(self._policies, (name, version), self._calibrate(stored.document.as_version(version)))
        else:
            _put_bounded(self._tenants, (name, version), stored.document)

    async def _refresh_rollout(self, name: str) -> None:
        await self._share_lookup(("rollout", name), self._fetch_rollout, name)

    async def _fetch_rollout(self, name: str) -> None:
        """Load the present rollout of a name, or keep the last known one."""
        previous = self._rollouts.get(name)
        announced = self._announced.get(name)
        least_number = max(previous.number if previous else 0, announced.number if announced else 0)
        entry: CachedChange | None = None
        is_too_large = False

        async def copy(redis_cache: PolicyRedisCache) -> tuple[RolloutChange | None] | None:
            nonlocal entry, is_too_large
            try:
                entry = await redis_cache.find_newest_change(name)
            except ValueError:
                is_too_large = True
                return None
            max_age_s = min(self._refresh_s, time.monotonic() - self._redis_recovered_at)
            if entry is None or not entry.is_signed or entry.age_s >= max_age_s:
                return None
            try:
                is_older = (entry.change.number if entry.change else 0) < least_number
                return None if is_older else (entry.change,)
            except ValueError:  # signed by a version whose changes this one cannot read
                return None

        async def read() -> tuple[RolloutChange | None]:
            newest = await _read_in_thread(self._registry.find_newest_change, name)
            unsigned = entry if entry and entry.body and not entry.is_signed else None
            if is_too_large or (unsigned and not await self._is_in_bucket(unsigned, newest)):
                self._report_forgery("rollout", name)
            if self._redis_cache:
                with suppress(RedisUnavailable):
                    # If Redis had an entry, overwrite it, even if its number is higher: it is forged, or of a bucket
                    # that was replaced.
                    had_entry = is_too_large or entry is not None
                    await self._redis_cache.publish_change(name, newest, even_if_older=had_entry)
            return (newest,)

        try:
            if self._redis_cache and not self._redis_cache.signer.can_sign:
                with suppress(RedisUnavailable):
                    await copy(self._redis_cache)  # only to report a forgery
                (change,) = await read()
            else:
                (change,) = await self._read_once(name, copy, read)
        except PolicyUnavailable as error:
            if previous is not None:
                log.warning("keeping the last known version of policy %s: %s", name, error)
                return
            # Do not trust an old entry that says that a policy does not exist: submissions would become dead letters.
            if entry is None or not entry.is_signed or not (entry.body or name == TENANTS):
                raise
            try:
                change = entry.change
            except ValueError:
                raise error from None
        if self._rollouts.get(name) is previous:  # otherwise a newer change has arrived
            self._keep_rollout(name, change)

    async def _read_once(
        self, subject: str, copy: Callable[[PolicyRedisCache], Awaitable[V | None]], read: Callable[[], Awaitable[V]]
    ) -> V:
        """A valid copy from Redis, or the result of `read`, which one process at a time calls for all of them."""
        deadline = time.monotonic() + _LEASE_WAIT_S
        while self._redis_cache and time.monotonic() < deadline:
            try:
                if (found := await copy(self._redis_cache)) is not None:
                    return found
                token = await self._redis_cache.lease(subject)
            except RedisUnavailable:
                break
            if token:
                try:
                    # Between the check above and the lease, another process may have read it and released its lease.
                    with suppress(RedisUnavailable):
                        if (found := await copy(self._redis_cache)) is not None:
                            return found
                    return await read()
                finally:
                    with suppress(RedisUnavailable):
                        await self._redis_cache.release(subject, token)
            await asyncio.sleep(_POLL_S)
        return await read()

    def _keep_rollout(self, name: str, change: RolloutChange | None) -> None:
        rollout = change.rollout if change else Rollout()
        for version, digest in rollout.digests.items():
            policy = self._policies.get((name, version))
            if policy and policy.identity.digest != digest:
                del self._policies[name, version]
        number = change.number if change else 0
        _put_bounded(self._rollouts, name, _CachedRollout(number, change, rollout, time.monotonic()))
        for (other, version), policy in self._policies.items():
            if other == name:
                self._policies[name, version] = self._calibrate(policy)

    def _calibrate(self, policy: Policy) -> Policy:
        """The policy with the calibrations of its last known rollout."""
        known = self._rollouts.get(policy.identity.name)
        applied = known.rollout.get_calibrations(policy.identity.version) if known else {}
        return policy if applied == policy.calibrations else replace(policy, calibrations=applied)

    async def _listen(self) -> None:
        """Check every change that Redis announces, until Redis is down."""
        assert self._redis_cache is not None
        try:
            async for announced in self._redis_cache.subscribe(self._refresh_all):
                if announced is None:
                    self._report_forgery("announcement", "(unknown: the announcement is too large to be read)")
                else:
                    self._follow_announcement(announced)
        except RedisUnavailable as error:
            log.warning(
                "Redis is down: policy changes are read from the bucket every %g s until it is back: %s",
                self._refresh_s,
                error,
            )
            await asyncio.sleep(random.uniform(0.1, 1))
            self._redis_recovered_at = time.monotonic()

    def _follow_announcement(self, announced: CachedChange) -> None:
        """Begin to check an announced change, if it is news for this process."""
        name, known = announced.name, self._rollouts.get(announced.name)
        if known is None or announced.number < known.number:
            return
        if announced.number == known.number and announced.is_of(known.change):
            return
        self._announced[name] = announced
        if name not in self._checks:
            self._checks[name] = asyncio.create_task(self._check_announcements(name))
            self._checks[name].add_done_callback(lambda _: self._checks.pop(name, None))

    async def _check_announcements(self, name: str) -> None:
        """Load the rollout again until no announced change of it is left to check."""
        while announced := self._announced.get(name):
            began_at = time.monotonic()
            for _ in range(2):  # the first lookup may have begun before the change was made
                with suppress(PolicyUnavailable):
                    await self._refresh_rollout(name)
                known = self._rollouts.get(name)
                if known is None or announced.is_of(known.change):
                    break
            if known is None:  # dropped meanwhile, so that the next submission loads it
                pass
            elif known.change and announced.is_of(known.change):
                delay_s = max(0.0, (datetime.now(UTC) - known.change.at).total_seconds())
                telemetry.POLICY_PROPAGATION_SECONDS.observe(delay_s)
            elif known.checked_at >= began_at:
                with suppress(PolicyUnavailable):
                    if not await self._is_in_bucket(announced, known.change):
                        self._report_forgery("announcement", name)
            if self._announced[name] is announced:
                del self._announced[name]
            await asyncio.sleep(_CHECK_PAUSE_S)

    async def _is_in_bucket(self, copy: CachedChange, newest: RolloutChange | None) -> bool:
        """Whether the policy bucket has this change, of which `newest` is the newest one."""
        if newest is None or copy.number >= newest.number:
            return copy.is_of(newest)
        return copy.is_of(await _read_in_thread(self._registry.find_change, copy.name, copy.number))

    def _report_forgery(self, kind: str, subject: str) -> None:
        """Report an entry of Redis that the policy bucket does not have."""
        self._forgeries.report(
            kind,
            f"the {kind} of policy {subject} in Redis differs from the policy bucket; it is ignored and the bucket is "
            "used. Someone else writes to Redis, or the bucket was replaced. Find out who can write to it.",
        )

    async def _refresh(self) -> None:
        await asyncio.sleep(self._refresh_s * random.uniform(0.8, 1.2))
        await self._refresh_all()

    async def _refresh_all(self) -> None:
        names = {name for name, known in self._rollouts.items() if known.rollout.active is not None} | {TENANTS}
        names |= {name for name, _ in self._policies}  # a version in use may belong to a name without an active version
        for name in names:
            with suppress(PolicyUnavailable):
                await self._refresh_rollout(name)

    def _age(self, known: _CachedRollout) -> float:
        return time.monotonic() - known.checked_at

    async def _share_lookup(self, key: Hashable, lookup: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Await the running lookup of this key, or start one."""
        task = self._running_lookups.get(key)
        if task is None:
            task = asyncio.ensure_future(lookup(*arguments))
            self._running_lookups[key] = task
            task.add_done_callback(partial(self._forget_lookup, key))
        await asyncio.shield(task)

    def _forget_lookup(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        del self._running_lookups[key]
        if not task.cancelled():
            task.exception()  # mark it as retrieved: the callers that waited have it


def _parse(reference: str) -> PolicyReference:
    parsed = PolicyReference.parse(reference)
    if parsed.name == TENANTS:
        raise UnknownPolicy(f"{TENANTS!r} is the document that assigns policies to tenants, not a policy")
    return parsed


async def _read_in_thread(read: Callable[..., V], *arguments: object) -> V:
    try:
        return await asyncio.to_thread(read, *arguments)
    except ConfigurationError as error:
        raise PolicyUnavailable(str(error)) from error


async def _repeat(work: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await work()
        except Exception:
            log.exception("refreshing policies failed; retrying in 1 s")
            await asyncio.sleep(1)


def _put_bounded(copies: MutableMapping[K, V], key: K, value: V) -> None:
    copies.pop(key, None)
    copies[key] = value
    if len(copies) > _COPIES_LIMIT:
        del copies[next(iter(copies))]
