"""API keys: immutable objects in the policy bucket.

    keys/<id>/key.json        name, role, tenant, scope, limits and digest of the key; written once
    keys/<id>/revoked.json    exists if the key is revoked; written once

A loss of Redis therefore loses no key. A key has 256 random bits, so nobody can guess it from its SHA-256. A slow hash
would add no security and delay every request.
"""

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import to_json

from services.core.errors import ApiKeysUnavailable, ConfigurationError, StoreUnavailable, Unjudgeable
from services.core.messages import UtcDatetime
from services.core.s3 import SMALL_OBJECT_CONFIG, Bucket, s3_client
from services.core.settings import Settings
from services.core.tenancy import DEFAULT_TENANT, UNLIMITED, Limit, Scope, Tenancy, parse_prefix
from services.core.text import require_one_line
from services.core.values import WireModel
from services.policies.document import PolicyName

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Role = Literal["moderate", "review", "admin"]
ROLES: Final[tuple[Role, ...]] = ("moderate", "review", "admin")
"""From the lowest to the highest. Each role includes the roles before it."""

_TOKEN_PATTERN: Final = re.compile(r"sk-sluice-([0-9a-f]{16})-[A-Za-z0-9_-]{43}")
_PATH_PATTERN: Final = re.compile(r"keys/([0-9a-f]{16})/(key|revoked)\.json")
_READ_THREADS: Final = 8
_SCOPE_FIELDS: Final = ("all_tenants", "prefixes", "policies")

log = logging.getLogger(__name__)


def _check_prefix(prefix: str) -> str:
    parse_prefix(require_one_line(prefix))
    return prefix


Prefix = Annotated[str, AfterValidator(_check_prefix)]


class ApiKey(WireModel):
    """An API key as the bucket has it: everything but the key itself."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    name: Annotated[str, Field(min_length=1, max_length=100)]
    role: Role
    tenant: Annotated[str, Field(min_length=1, max_length=256)] = DEFAULT_TENANT
    all_tenants: bool = False
    """Whether the key may use the objects and policies of every tenant. It sees the assessments of its own only."""
    prefixes: Annotated[tuple[Prefix, ...], Field(max_length=100)] | None = None
    """The key may use only objects below these prefixes, of those that its tenant may use. None: all of them."""
    policies: Annotated[tuple[PolicyName, ...], Field(max_length=100)] | None = None
    """The key may use only these policies, of those that its tenant may use. None: all of them."""
    rate_per_s: Annotated[float, Field(gt=0)] | None = None
    concurrency: Annotated[int, Field(gt=0)] | None = None
    digest: str
    """SHA-256 of the key, hex."""
    created_at: UtcDatetime
    created_by: str = ""

    def allows(self, role: Role) -> bool:
        """Return whether the key's role includes `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)

    @cached_property
    def limit(self) -> Limit | None:
        """What the key itself allows; None: everything that its tenant may use."""
        if self.prefixes is None and self.policies is None:
            return None
        return Limit.of(self.prefixes, self.policies)

    def find_scope(self, tenancy: Tenancy) -> Scope:
        """Return the objects and policies that the key may use. Each role is limited to them."""
        scope = UNLIMITED if self.all_tenants else tenancy.find_scope(self.tenant)
        return scope.narrow(self.limit) if self.limit else scope

    def listing_json(self, *, revoked: bool) -> str:
        """Return one JSON object for a list of keys, without the digest."""
        return json.dumps(self.model_dump(mode="json", exclude={"digest"}) | {"revoked": revoked})

    def listing_line(self, *, revoked: bool) -> str:
        """Return one line for a list of keys."""
        limits = [
            f"{self.rate_per_s:g}/s" if self.rate_per_s else "",
            f"{self.concurrency} at a time" if self.concurrency else "",
        ]
        scope = [
            "all tenants" if self.all_tenants else "",
            f"only {' '.join(self.prefixes)}" if self.prefixes is not None else "",
            f"policies {' '.join(self.policies)}" if self.policies is not None else "",
        ]
        parts = [self.role, f"tenant {self.tenant}", *scope, *limits, "revoked" if revoked else ""]
        return f"{self.id} {self.created_at:%Y-%m-%d} {self.name:<24} {', '.join(filter(None, parts))}"


class ApiKeyRegistry:
    """Creates, lists and revokes keys in one bucket. Blocking: call it off the event loop.

    All methods raise ApiKeysUnavailable if the bucket does not answer.
    """

    def __init__(self, s3: "S3Client", bucket: str) -> None:
        self._objects = Bucket(s3, bucket)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Open the policy bucket of the settings, with credentials the usual AWS way."""
        return cls(s3_client(settings.s3_endpoint, **SMALL_OBJECT_CONFIG), settings.policy_bucket)

    def create(
        self,
        name: str,
        role: Role,
        *,
        tenant: str = DEFAULT_TENANT,
        all_tenants: bool = False,
        prefixes: Sequence[str] | None = None,
        policies: Sequence[str] | None = None,
        rate_per_s: float | None = None,
        concurrency: int | None = None,
        who: str = "",
    ) -> tuple[ApiKey, str]:
        """Create a key. Returns it and its token. The token is stored nowhere, so it cannot be shown again.

        By default the key may use what its tenant may use. `prefixes` and `policies` narrow this, and `all_tenants`
        widens it to the objects and policies of every tenant.

        Raises:
            ConfigurationError: the value of a field is invalid.
        """
        key_id = secrets.token_hex(8)
        token = f"sk-sluice-{key_id}-{secrets.token_urlsafe(32)}"
        for field, text in (("name", name), ("tenant", tenant)):  # keys of earlier releases may have such names
            try:
                require_one_line(text)
            except ValueError as error:
                raise ConfigurationError(f"the key's {field} is invalid: it {error}") from None
        try:
            api_key = ApiKey(
                id=key_id,
                name=name,
                role=role,
                tenant=tenant,
                all_tenants=all_tenants,
                prefixes=None if prefixes is None else tuple(prefixes),
                policies=None if policies is None else tuple(policies),
                rate_per_s=rate_per_s,
                concurrency=concurrency,
                digest=digest_token(token),
                created_at=datetime.now(UTC),
                created_by=who,
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            why = first["msg"].removeprefix("Value error, ")
            raise ConfigurationError(f"the key's {first['loc'][0]} is invalid: {why}") from None
        # Without a scope of its own, a key is stored as in 0.1.0.
        unset = {name for name in _SCOPE_FIELDS if getattr(api_key, name) == ApiKey.model_fields[name].default}
        self._create(f"keys/{key_id}/key.json", api_key.model_dump_json(exclude=unset).encode())
        return api_key, token

    def revoke(self, key_id: str, *, who: str = "") -> None:
        """Revoke a key for ever. Safe to repeat.

        Raises:
            ConfigurationError: the key does not exist.
        """
        if not re.fullmatch("[0-9a-f]{16}", key_id) or key_id not in self.read_index():
            raise ConfigurationError(f"there is no API key with the id {key_id!r}; `sluice keys list` prints all ids")
        self._create(f"keys/{key_id}/revoked.json", to_json({"at": datetime.now(UTC), "who": who}))

    def read_index(self) -> dict[str, bool]:
        """Return the ids of all keys, and whether each is revoked. Other objects under `keys/` are ignored."""
        found: dict[str, set[str]] = {"key": set(), "revoked": set()}
        with self._map_bucket_errors():
            for entry in self._objects.entries("keys/"):
                if parts := _PATH_PATTERN.fullmatch(entry.key):
                    found[parts[2]].add(parts[1])
        return {key_id: key_id in found["revoked"] for key_id in sorted(found["key"])}

    def get(self, key_id: str) -> ApiKey | None:
        """Return one key, revoked or not. None if its object is invalid or was written by a newer release."""
        with self._map_bucket_errors():
            body = self._objects.read(f"keys/{key_id}/key.json")
        try:
            api_key = ApiKey.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"]))
            log.warning(
                "the API key %s is refused, because its object is invalid: %s: %s; upgrade the gateway, or revoke "
                "the key and create a new one",
                key_id,
                field,
                first["msg"],
            )
            return None
        if api_key.id != key_id:  # a copy of a key under another id would stay valid after the key itself is revoked
            log.warning("the API key %s is refused, because its object is a copy of the key %s", key_id, api_key.id)
            return None
        return api_key

    def get_each(self, key_ids: list[str]) -> list[ApiKey]:
        """Return several keys, in this order. Keys for which `get` returns None are left out."""
        with ThreadPoolExecutor(_READ_THREADS) as threads:
            return [api_key for api_key in threads.map(self.get, key_ids) if api_key is not None]

    def _create(self, object_key: str, body: bytes) -> None:
        with self._map_bucket_errors():
            self._objects.create(object_key, body, content_type="application/json")

    @contextmanager
    def _map_bucket_errors(self) -> Iterator[None]:
        try:
            yield
        except (Unjudgeable, StoreUnavailable) as error:
            raise ApiKeysUnavailable(f"the policy bucket {self._objects.name!r} cannot be used: {error}") from error


def parse_key_id(token: str) -> str | None:
    """Return the key id that a token contains, or None if the text has not the form of a token."""
    parts = _TOKEN_PATTERN.fullmatch(token)
    return parts[1] if parts else None


def digest_token(token: str) -> str:
    """Return the SHA-256 of a token, as in `ApiKey.digest`."""
    return hashlib.sha256(token.encode()).hexdigest()
