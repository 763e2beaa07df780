"""Decides which objects and policies a tenant or an API key may use. Intake and Gateway ask the same values.

While SLUICE_TENANT_PREFIXES is not set, tenants are not separated: each may use every bucket and every policy. Once it
is set, a tenant may use only the objects below its own prefixes. It may name only the policy that the tenants document
gives it, and the policies that SLUICE_TENANT_POLICIES gives it. An API key can narrow this further, never widen it.

Everything here is pure and needs no network. Both settings are lists of `tenant=value`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from services.core.s3_uri import parse_s3_uri
from services.core.values import DEFAULT_POLICY, TENANTS

_TENANT_LIMIT_CHARS: Final = 256
_PREFIX_LIMIT_CHARS: Final = 1100

DEFAULT_TENANT: Final = "default"
"""The tenant of submissions and API keys that name none."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit of the objects and policies that may be used."""

    prefixes: Mapping[str, tuple[str, ...]] | None
    """The allowed beginnings of keys, by bucket. None: all objects."""
    policies: frozenset[str] | None
    """The names of the allowed policies. None: all policies."""
    allows_own_policy: bool = False
    """Whether the policy that the tenants document gives the tenant is allowed, too."""

    @classmethod
    def of(
        cls, prefixes: Iterable[str] | None, policies: Iterable[str] | None, *, allows_own_policy: bool = False
    ) -> Self:
        """The limit to objects below `prefixes`, such as `s3://uploads/shop/`, and to `policies`. None: no limit.

        Raises:
            ValueError: a prefix has another form.
        """
        by_bucket: defaultdict[str, list[str]] = defaultdict(list)
        for bucket, start in map(parse_prefix, prefixes or ()):
            by_bucket[bucket].append(start)
        return cls(
            None if prefixes is None else {bucket: tuple(starts) for bucket, starts in by_bucket.items()},
            None if policies is None else frozenset(policies),
            allows_own_policy,
        )

    def allows_object(self, bucket: str, key: str) -> bool:
        """Whether the object may be used."""
        return self.prefixes is None or key.startswith(self.prefixes.get(bucket, ()))

    def allows_policy(self, name: str, own_policy: str) -> bool:
        """Whether the policy may be used. `own_policy`: the one that the tenants document gives the tenant.

        No limit allows the tenants document, because it is about all tenants.
        """
        if self.policies is None:
            return True
        return name != TENANTS and (name in self.policies or (self.allows_own_policy and name == own_policy))


@dataclass(frozen=True, slots=True)
class Scope:
    """The objects and policies that a tenant or an API key may use: those that every limit allows."""

    limits: tuple[Limit, ...] = ()

    def allows_object(self, bucket: str, key: str) -> bool:
        """Whether the object may be used."""
        return all(limit.allows_object(bucket, key) for limit in self.limits)

    @property
    def has_policy_limit(self) -> bool:
        """Whether some policies may not be used."""
        return any(limit.policies is not None for limit in self.limits)

    def allows_policy(self, name: str, own_policy: str) -> bool:
        """Whether the policy may be used. `own_policy`: the one that the tenants document gives the tenant."""
        return all(limit.allows_policy(name, own_policy) for limit in self.limits)

    def narrow(self, limit: Limit) -> "Scope":
        """The scope with one more limit."""
        return Scope((*self.limits, limit))


UNLIMITED: Final = Scope()
_NOTHING: Final = Scope((Limit({}, frozenset(), allows_own_policy=True),))
"""The scope of a tenant without prefixes, once another tenant has some. Such a tenant can still upload images."""


class Tenancy:
    """The prefixes and policies of all tenants."""

    def __init__(self, tenant_prefixes: Iterable[str] = (), tenant_policies: Iterable[str] = ()) -> None:
        """Take the values of SLUICE_TENANT_PREFIXES and SLUICE_TENANT_POLICIES.

        Raises:
            ValueError: an entry has another form.
        """
        self._prefixes = _group(map(parse_tenant_prefix, tenant_prefixes))
        self._policies = _group(map(parse_tenant_policy, tenant_policies))
        self._scopes = {
            tenant: Scope(
                (Limit.of(self._prefixes.get(tenant, ()), self._policies.get(tenant, ()), allows_own_policy=True),)
            )
            for tenant in self._prefixes | self._policies
        }
        self._owners = _index_owners(self._prefixes)

    @property
    def is_separated(self) -> bool:
        """Whether tenants are separated: at least one has prefixes."""
        return bool(self._prefixes)

    def find_scope(self, tenant: str) -> Scope:
        """The objects and policies that a tenant may use."""
        return self._scopes.get(tenant, _NOTHING) if self._prefixes else UNLIMITED

    def find_owner(self, bucket: str, key: str) -> str:
        """The tenant of an object whose submission names none, as an S3 event does: the tenant with the longest prefix.

        `default` if no tenant has a prefix of the object, or if several tenants have the longest one.
        """
        for length, owners in self._owners.get(bucket, ()):
            if (owner := owners.get(key[:length])) is not None:
                return owner
        return DEFAULT_TENANT

    def is_shared(self, policy: str, tenant: str, assignments: Mapping[str, str]) -> bool:
        """Whether other tenants may use a policy, too. `assignments`: the policies of tenants in the tenants document.

        `default` is always shared, because every tenant without an assignment gets it.
        """
        return (
            policy == DEFAULT_POLICY
            or any(other != tenant and policy in policies for other, policies in self._policies.items())
            or any(other != tenant and policy == assigned for other, assigned in assignments.items())
        )

    def list_prefixes(self, tenant: str) -> list[str]:
        """The prefixes of a tenant, in the order of the setting."""
        return self._prefixes.get(tenant, [])


def parse_prefix(prefix: str) -> tuple[str, str]:
    """Split `s3://bucket/folder/` into the bucket and the beginning of keys, which is empty for a whole bucket.

    Raises:
        ValueError: the prefix has another form. A prefix that ends within a name is refused: `s3://uploads/shop` would
            also allow `shop-2/`.
    """
    try:
        bucket, start = parse_s3_uri(prefix)
    except ValueError:
        raise ValueError(
            f"{prefix!r} is not a prefix; write s3://bucket/folder/, or s3://bucket for all of it"
        ) from None
    if start and not start.endswith("/"):
        raise ValueError(f"{prefix!r} must end with a slash; write {prefix + '/'!r}")
    if not {".", ".."}.isdisjoint(start.split("/")) or len(prefix) > _PREFIX_LIMIT_CHARS:
        raise ValueError(f"{prefix!r} cannot be the beginning of an object that Sluice reads")
    return bucket, start


def parse_tenant_prefix(entry: str) -> tuple[str, str]:
    """Split `shop=s3://uploads/shop/` into the tenant and the prefix.

    Raises:
        ValueError: the entry has another form.
    """
    tenant, prefix = _split_entry(entry, "shop=s3://uploads/shop/")
    parse_prefix(prefix)
    return tenant, prefix


def parse_tenant_policy(entry: str) -> tuple[str, str]:
    """Split `shop=strict` into the tenant and the policy.

    Raises:
        ValueError: the entry has another form.
    """
    tenant, policy = _split_entry(entry, "shop=strict")
    if "@" in policy:
        raise ValueError(f"{entry!r} names a version; write the name of the policy only, which allows all its versions")
    return tenant, policy


def _split_entry(entry: str, example: str) -> tuple[str, str]:
    tenant, _, value = (part.strip() for part in entry.partition("="))
    if not tenant or not value or len(tenant) > _TENANT_LIMIT_CHARS:
        raise ValueError(f"{entry!r} is not tenant=value; write for example {example}")
    return tenant, value


def _group(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: defaultdict[str, list[str]] = defaultdict(list)
    for tenant, value in pairs:
        grouped[tenant].append(value)
    return dict(grouped)


def _index_owners(prefixes: Mapping[str, Iterable[str]]) -> dict[str, list[tuple[int, dict[str, str]]]]:
    """By bucket: the tenant of each beginning of keys, grouped by its length, longest first."""
    by_bucket: defaultdict[str, defaultdict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for tenant, own in prefixes.items():
        for bucket, start in map(parse_prefix, own):
            owners = by_bucket[bucket][len(start)]
            owners[start] = tenant if owners.get(start, tenant) == tenant else DEFAULT_TENANT
    return {bucket: sorted(by_length.items(), reverse=True) for bucket, by_length in by_bucket.items()}


NOT_SEPARATED: Final = Tenancy()
