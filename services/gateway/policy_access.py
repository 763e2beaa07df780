"""Decides which policies the API key of a request may read and change, for every route that shows or changes them."""

from collections.abc import Mapping
from typing import Protocol

from services.core.tenancy import Scope, Tenancy
from services.gateway.admission import AdmittedRequest
from services.gateway.problems import HttpProblem


class TenantPolicies(Protocol):
    """Knows the tenants document: `services.policies.cache.PolicyCache`."""

    async def is_in_scope(self, name: str, scope: Scope, tenant: str) -> bool:
        """Return whether a scope of a tenant allows a policy."""

    async def get_assignments(self) -> Mapping[str, str]:
        """Return the policy of each tenant in the tenants document."""


class PolicyAccess:
    """The policies of the API keys. The methods raise PolicyUnavailable if the tenants document cannot be read."""

    def __init__(self, policies: TenantPolicies, tenancy: Tenancy) -> None:
        self._policies = policies
        self._tenancy = tenancy

    async def may_read(self, admitted: AdmittedRequest, name: str) -> bool:
        """Return whether the key may read a policy. The answer does not depend on whether the policy exists."""
        return await self._policies.is_in_scope(name, admitted.scope, admitted.api_key.tenant)

    async def require_readable(self, admitted: AdmittedRequest, name: str) -> None:
        """
        Raises:
            HttpProblem: the key may not read the policy. It gets the same answer if there is no such policy.
        """
        if not await self.may_read(admitted, name):
            raise HttpProblem("not-found", f"the policy {name!r} does not exist, or this API key may not use it")

    async def require_changeable(self, admitted: AdmittedRequest, name: str) -> None:
        """
        Raises:
            HttpProblem: the key may not read the policy, or is limited to a tenant that shares the policy with others.
        """
        await self.require_readable(admitted, name)
        key = admitted.api_key
        if key.all_tenants or not self._tenancy.is_separated or (key.policies is not None and name in key.policies):
            return
        if self._tenancy.is_shared(name, key.tenant, await self._policies.get_assignments()):
            raise HttpProblem(
                "not-permitted",
                f"other tenants use the policy {name!r}, too, so a key of one tenant may not change it; use a key that "
                "was created with --all-tenants or with --policy for this policy",
            )
