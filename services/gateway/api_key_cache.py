"""The copy of all API keys that each gateway keeps, so that a request does not wait for the policy bucket."""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

from services.core.errors import ApiKeysUnavailable
from services.core.tasks import cancel_and_wait
from services.gateway.api_keys import ApiKey, ApiKeyRegistry, digest_token, parse_key_id
from services.gateway.problems import HttpProblem

_MAX_AGE_S: Final = 300.0
"""While the bucket does not answer, cached keys stay valid for this long. A revoked key may be among them."""
_UNKNOWN_KEY_PAUSE_S: Final = 0.5
"""Refreshes for unknown keys start at least this long after the refresh before, so that invented keys cost little."""
_UNKNOWN_KEY_PAUSE_REFRESHES: Final = 10
"""If refreshes are slow, the pause is this many times the duration of a refresh, up to the refresh period. If refreshes
take 0.1 s, one for an unknown key starts 1 s after the refresh before."""

MAX_UNKNOWN_KEYS: Final = 64
"""So many requests with unknown keys may wait for a refresh at a time. Each of them holds a connection."""
_WARNING_PERIOD_S: Final = 10.0

log = logging.getLogger(__name__)


class ApiKeyCache:
    """The keys that this process knows. To be used as an async context manager."""

    def __init__(
        self,
        registry: ApiKeyRegistry,
        *,
        refresh_s: float = 2.0,
        unknown_key_pause_s: float = _UNKNOWN_KEY_PAUSE_S,
        max_unknown_keys: int = MAX_UNKNOWN_KEYS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        `refresh_s`: the period of refreshes. A revoked key is refused within it while the bucket answers.
        `max_unknown_keys`: so many requests with unknown keys wait for a refresh at a time. Others are refused at once.
        """
        self._registry = registry
        self._refresh_s = refresh_s
        self._unknown_key_pause_s = unknown_key_pause_s
        self._max_unknown_keys = max_unknown_keys
        self._waiting_unknown_keys = 0
        self._warned_at = float("-inf")
        self._clock = clock
        self._keys: dict[str, ApiKey] = {}
        self._invalid_ids: set[str] = set()
        """Keys whose objects are invalid. Objects never change, so they are not read again."""
        self._refreshed_at = float("-inf")
        self._refresh_started_at = float("-inf")
        self._refresh_took_s = 0.0
        self._refresh_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        with suppress(ApiKeysUnavailable):
            await self.refresh()
        self._loop_task = asyncio.create_task(self._refresh_loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._loop_task)
        if self._refresh_task is not None:
            await asyncio.wait([self._refresh_task])  # its thread cannot be cancelled, but ends soon

    async def find(self, token: str) -> ApiKey | None:
        """Return the key of a token, or None if the key does not exist or is revoked.

        Raises:
            ApiKeysUnavailable: the cached keys are too old.
            HttpProblem: the key is unknown, and too many requests with unknown keys are waiting for a refresh.
        """
        key_id = parse_key_id(token)
        if key_id is None:
            return None
        api_key = self._keys.get(key_id)
        if api_key is None:
            api_key = await self._refresh_for(key_id)
        self.raise_if_stale()
        if api_key is None or not hmac.compare_digest(api_key.digest, digest_token(token)):
            return None
        return api_key

    def find_cached(self, token: str) -> ApiKey | None:
        """Return the key of a token if this process knows it. Looks nothing up."""
        api_key = self._keys.get(parse_key_id(token) or "")
        return api_key if api_key and hmac.compare_digest(api_key.digest, digest_token(token)) else None

    def raise_if_stale(self) -> None:
        """
        Raises:
            ApiKeysUnavailable: the cached keys are too old, because the bucket has not answered for minutes.
        """
        if self._clock() - self._refreshed_at > _MAX_AGE_S:
            raise ApiKeysUnavailable("the policy bucket, which has the API keys, does not answer")

    async def refresh(self) -> None:
        """Read new and revoked keys from the bucket. Concurrent callers share one refresh.

        Raises:
            ApiKeysUnavailable: the bucket does not answer.
        """
        # A finished task would return at once, so a loop that awaits it would never let its done callback run.
        if self._refresh_task is None or self._refresh_task.done():
            self._refresh_task = asyncio.create_task(self._read_bucket())
            self._refresh_task.add_done_callback(self._forget_refresh)
        await asyncio.shield(self._refresh_task)

    async def _refresh_for(self, key_id: str) -> ApiKey | None:
        """Refresh, because the key may have been created after the last refresh. Returns the key, if it exists.

        Raises:
            HttpProblem: too many requests are waiting for a refresh.
        """
        if self._waiting_unknown_keys >= self._max_unknown_keys:
            if self._clock() - self._warned_at >= _WARNING_PERIOD_S:
                self._warned_at = self._clock()
                log.warning("refusing requests: %d requests with unknown API keys are waiting", self._max_unknown_keys)
            raise HttpProblem(
                "unavailable", "the API key is unknown, and too many unknown keys are being looked up; try again later"
            )
        self._waiting_unknown_keys += 1
        try:
            return await self._wait_for(key_id)
        finally:
            self._waiting_unknown_keys -= 1

    async def _wait_for(self, key_id: str) -> ApiKey | None:
        asked_at = self._clock()
        pause_s = max(
            self._unknown_key_pause_s, min(self._refresh_s, _UNKNOWN_KEY_PAUSE_REFRESHES * self._refresh_took_s)
        )
        await asyncio.sleep(max(0.0, pause_s - (asked_at - self._refresh_started_at)))
        with suppress(ApiKeysUnavailable):
            while self._refreshed_at < asked_at:  # a refresh that had started before may have missed the key
                await self.refresh()
        return self._keys.get(key_id)

    async def _refresh_loop(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            try:
                await self.refresh()
            except ApiKeysUnavailable as error:
                log.warning("refreshing API keys failed; keeping the cached keys for now: %s", error)
            except Exception:
                log.exception("refreshing API keys failed; retrying in %g s", self._refresh_s)

    def _forget_refresh(self, task: asyncio.Task[None]) -> None:
        if self._refresh_task is task:
            self._refresh_task = None
        if not task.cancelled():
            task.exception()  # marks it as retrieved: the callers of `refresh` have got it

    async def _read_bucket(self) -> None:
        started_at = self._refresh_started_at = self._clock()
        index = await asyncio.to_thread(self._registry.read_index)
        valid = {key_id for key_id, revoked in index.items() if not revoked}
        # Revoked keys are removed first, so that an error while reading new keys does not keep them.
        self._keys = {key_id: key for key_id, key in self._keys.items() if key_id in valid}
        unknown = valid - self._keys.keys() - self._invalid_ids
        new = {key.id: key for key in await asyncio.to_thread(self._registry.get_each, sorted(unknown))}
        self._keys |= new
        self._invalid_ids = (self._invalid_ids & valid) | (unknown - new.keys())
        self._refreshed_at, self._refresh_took_s = started_at, self._clock() - started_at
