"""API keys: immutable objects in the policy bucket, and the copy of them that every gateway keeps.

    keys/<id>/key.json        who may do what, and the digest of the key; written once
    keys/<id>/revoked.json    that it is revoked; written once

So nothing of them is lost with Redis, and each gateway finds within seconds what was created or revoked. A key has 256
random bits: nobody can guess it from a plain SHA-256, and a slow hash would only slow down every request.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import Field, ValidationError
from pydantic_core import to_json

from services.core.errors import ConfigurationError, KeysUnavailable, StoreUnavailable, Unjudgeable
from services.core.messages import Moment
from services.core.s3 import SMALL_OBJECT_CONFIG, Bucket, s3_client
from services.core.settings import Settings
from services.core.tasks import cancel_and_wait
from services.core.values import WireModel

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Role = Literal["moderate", "review", "admin"]
ROLES: Final[tuple[Role, ...]] = ("moderate", "review", "admin")
"""Each may do what those before it may."""

_TOKEN: Final = re.compile(r"sk-sluice-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")
_PATH: Final = re.compile(r"keys/([0-9a-f]{16})/(key|revoked)\.json")
_BELIEVED_S: Final = 300.0
"""How long keys are believed while the bucket does not answer: longer, and a revoked one might be among them."""
_SEARCH_S: Final = 0.5
_SEARCH_SHARE: Final = 10
"""The bucket is searched for keys that are not known here at most so often, and for one part in so many of the time."""
_READERS: Final = 8

log = logging.getLogger(__name__)


class ApiKey(WireModel):
    """What is kept of a key: everything but the key."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    name: Annotated[str, Field(min_length=1, max_length=100)]
    role: Role
    tenant: Annotated[str, Field(min_length=1, max_length=256)] = "default"
    rate_per_s: Annotated[float, Field(gt=0)] | None = None
    concurrency: Annotated[int, Field(gt=0)] | None = None
    digest: str
    """SHA-256 of the key, hex."""
    created_at: Moment
    created_by: str = ""

    def may(self, role: Role) -> bool:
        """Whether the key's role is `role` or more."""
        return ROLES.index(self.role) >= ROLES.index(role)

    def listing_json(self, *, revoked: bool) -> str:
        """One JSON object for a list of keys. The digest is left out."""
        return json.dumps(self.model_dump(mode="json", exclude={"digest"}) | {"revoked": revoked})

    def listing_line(self, *, revoked: bool) -> str:
        """One line for a list of keys."""
        limits = [
            f"{self.rate_per_s:g}/s" if self.rate_per_s else "",
            f"{self.concurrency} at a time" if self.concurrency else "",
        ]
        parts = [self.role, f"tenant {self.tenant}", *limits, "revoked" if revoked else ""]
        return f"{self.id} {self.created_at:%Y-%m-%d} {self.name:<24} {', '.join(filter(None, parts))}"


class ApiKeyRegistry:
    """Creates, lists and revokes keys in one bucket. Blocking: call it off the event loop.

    Any method raises KeysUnavailable where the bucket does not answer.
    """

    def __init__(self, s3: "S3Client", bucket: str) -> None:
        self._objects = Bucket(s3, bucket)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The policy bucket of these settings, with credentials the usual AWS way."""
        return cls(s3_client(settings.s3_endpoint, **SMALL_OBJECT_CONFIG), settings.policy_bucket)

    def create(
        self,
        name: str,
        role: Role,
        *,
        tenant: str = "default",
        rate_per_s: float | None = None,
        concurrency: int | None = None,
        who: str = "",
    ) -> tuple[ApiKey, str]:
        """A new key, and the token that is shown once and kept nowhere.

        Raises:
            ConfigurationError: a field is wrong.
        """
        key_id = secrets.token_hex(8)
        token = f"sk-sluice-{key_id}-{secrets.token_urlsafe(32)}"
        try:
            key = ApiKey(
                id=key_id,
                name=name,
                role=role,
                tenant=tenant,
                rate_per_s=rate_per_s,
                concurrency=concurrency,
                digest=_digest(token),
                created_at=datetime.now(UTC),
                created_by=who,
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ConfigurationError(f"the key's {first['loc'][0]} is wrong: {first['msg']}") from None
        self._create(f"keys/{key_id}/key.json", key.model_dump_json().encode())
        return key, token

    def revoke(self, key_id: str, *, who: str = "") -> None:
        """Revoke a key for ever; safe to repeat.

        Raises:
            ConfigurationError: there is no such key.
        """
        if not re.fullmatch("[0-9a-f]{16}", key_id) or key_id not in self.read_index():
            raise ConfigurationError(f"there is no API key with the id {key_id!r}; `sluice keys list` has them all")
        self._create(f"keys/{key_id}/revoked.json", to_json({"at": datetime.now(UTC), "who": who}))

    def read_index(self) -> dict[str, bool]:
        """The ids of all keys, and whether each is revoked. What else lies beside them is passed over."""
        found: dict[str, set[str]] = {"key": set(), "revoked": set()}
        with self._map_bucket_errors():
            for entry in self._objects.entries("keys/"):
                if parts := _PATH.fullmatch(entry.key):
                    found[parts[2]].add(parts[1])
        return {key_id: key_id in found["revoked"] for key_id in sorted(found["key"])}

    def get(self, key_id: str) -> ApiKey | None:
        """One key, revoked or not; None where what is kept of it is wrong, or of a newer release."""
        with self._map_bucket_errors():
            body = self._objects.read(f"keys/{key_id}/key.json")
        try:
            key = ApiKey.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            log.warning("the API key %s is refused: %s: %s", key_id, ".".join(map(str, first["loc"])), first["msg"])
            return None
        if key.id != key_id:  # a copy would be good for as long as it is there, even if the key itself is revoked
            log.warning("the API key %s is refused: what is kept of it is of the key %s", key_id, key.id)
            return None
        return key

    def get_each(self, key_ids: list[str]) -> list[ApiKey]:
        """Several keys, in their order, without those that `get` has not."""
        with ThreadPoolExecutor(_READERS) as readers:
            return [key for key in readers.map(self.get, key_ids) if key is not None]

    def _create(self, key: str, body: bytes) -> None:
        with self._map_bucket_errors():
            self._objects.create(key, body, content_type="application/json")

    @contextmanager
    def _map_bucket_errors(self) -> Iterator[None]:
        try:
            yield
        except (Unjudgeable, StoreUnavailable) as error:
            raise KeysUnavailable(f"the policy bucket {self._objects.name!r} cannot be used: {error}") from error


class ApiKeyCache:
    """The keys as this process knows them. To be used as an async context manager."""

    def __init__(
        self, registry: ApiKeyRegistry, *, refresh_s: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`refresh_s`: how often the bucket is asked, so how long a revoked key may still be taken."""
        self._registry = registry
        self._refresh_s = refresh_s
        self._clock = clock
        self._keys: dict[str, ApiKey] = {}
        self._refused: set[str] = set()
        """What `get` has not, though it is there. Keys never change, so it need not be asked for again."""
        self._seen_at = float("-inf")
        self._tried_at = float("-inf")
        self._took_s = 0.0
        self._refreshing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        with suppress(KeysUnavailable):
            await self._refresh()
        self._task = asyncio.create_task(self._refresh_loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._task)
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])  # its thread cannot be told to end, and ends soon

    async def find(self, token: str) -> ApiKey | None:
        """The key that a token is, or None where there is none, or it is revoked.

        Raises:
            KeysUnavailable: what is known is too old to be believed.
        """
        if (parts := _TOKEN.fullmatch(token)) is None:
            return None
        key = self._keys.get(parts[1])
        if key is None:
            key = await self._search(parts[1])
        self.check()
        return key if key is not None and hmac.compare_digest(key.digest, _digest(token)) else None

    def check(self) -> None:
        """
        Raises:
            KeysUnavailable: what is known is too old to be believed.
        """
        if self._clock() - self._seen_at > _BELIEVED_S:
            raise KeysUnavailable("the policy bucket, where API keys are kept, does not answer")

    async def _search(self, key_id: str) -> ApiKey | None:
        """The key if it was created by now. Those who ask for what is not known share a look at the bucket."""
        asked_at = self._clock()
        pause_s = max(_SEARCH_S, min(self._refresh_s, _SEARCH_SHARE * self._took_s))
        await asyncio.sleep(max(0.0, pause_s - (asked_at - self._tried_at)))
        with suppress(KeysUnavailable):
            while self._seen_at < asked_at:  # a look that was under way may have missed it
                await self._refresh()
        return self._keys.get(key_id)

    async def _refresh_loop(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            try:
                await self._refresh()
            except KeysUnavailable as error:
                log.warning("the known API keys are kept: %s", error)
            except Exception:
                log.exception("API keys could not be looked at; they are again in %g s", self._refresh_s)

    async def _refresh(self) -> None:
        """Compare with the bucket; those who ask meanwhile share the answer."""
        # One that has ended, and of which nobody was told yet, must not be waited for: that would never be a wait.
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._compare())
            self._refreshing.add_done_callback(self._refresh_ended)
        await asyncio.shield(self._refreshing)

    def _refresh_ended(self, task: asyncio.Task[None]) -> None:
        if self._refreshing is task:
            self._refreshing = None
        if not task.cancelled():
            task.exception()  # whoever waited has got it

    async def _compare(self) -> None:
        began = self._tried_at = self._clock()
        index = await asyncio.to_thread(self._registry.read_index)
        valid = {key_id for key_id, revoked in index.items() if not revoked}
        # First those that are gone: a new one that cannot be read must not keep them.
        self._keys = {key_id: key for key_id, key in self._keys.items() if key_id in valid}
        unknown = valid - self._keys.keys() - self._refused
        new = {key.id: key for key in await asyncio.to_thread(self._registry.get_each, sorted(unknown))}
        self._keys |= new
        self._refused = (self._refused & valid) | (unknown - new.keys())
        self._seen_at, self._took_s = began, self._clock() - began


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
