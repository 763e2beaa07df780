"""Who asks: the API key of a request, its role, and its share of the gateway."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Final

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from services.gateway.api_keys import ApiKey, KeyRing, Role
from services.gateway.problems import Problem
from services.gateway.rate_limits import Rates

_BEARER: Final = HTTPBearer(auto_error=False, description="An API key, made by `sluice keys create`.")
_LONGEST_TOKEN: Final = 200


class Access:
    """Lets requests in, by their keys."""

    def __init__(self, keys: KeyRing, rates: Rates) -> None:
        self._keys = keys
        self.rates = rates

    def needs(self, role: Role) -> Callable[..., AsyncIterator[ApiKey]]:
        """A dependency: the request's key, whose role is `role` or more, counted for as long as the request runs.

        Raises:
            Problem: there is no such key, its role is less, or it has had its share.
        """

        async def admitted(
            credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
        ) -> AsyncIterator[ApiKey]:
            key = await self._found(credentials.credentials if credentials else "")
            await self.rates.take(key)
            if not key.may(role):
                raise Problem("not-permitted", f"this needs the role {role}; the API key {key.name!r} has {key.role}")
            with self.rates.running(key, "requests"):
                yield key

        return admitted

    async def _found(self, token: str) -> ApiKey:
        if not token:
            raise Problem("unauthenticated", "an API key is needed, as `Authorization: Bearer <key>`")
        key = await self._keys.find(token) if len(token) <= _LONGEST_TOKEN else None
        if key is None:
            raise Problem("unauthenticated", "the API key is not known, or was revoked")
        return key
