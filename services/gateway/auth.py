"""Who asks: the API key of a request, its role, and its share of the gateway."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Final

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from services.gateway.api_keys import ApiKey, ApiKeyCache, Role
from services.gateway.problems import HttpProblem
from services.gateway.rate_limits import RateLimiter

_BEARER: Final = HTTPBearer(auto_error=False, description="An API key, made by `sluice keys create`.")
_LONGEST_TOKEN: Final = 200


class Authenticator:
    """Lets requests in, by their keys."""

    def __init__(self, keys: ApiKeyCache, limiter: RateLimiter) -> None:
        self._keys = keys
        self._limiter = limiter

    def require(self, role: Role) -> Callable[..., AsyncIterator[ApiKey]]:
        """A dependency: the request's key, whose role is `role` or more, counted for as long as the request runs.

        Raises:
            HttpProblem: there is no such key, its role is less, or it has had its share.
        """

        async def admitted(
            credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
        ) -> AsyncIterator[ApiKey]:
            key = await self._found(credentials.credentials if credentials else "")
            await self._limiter.acquire(key)
            if not key.may(role):
                raise HttpProblem(
                    "not-permitted", f"this needs the role {role}; the API key {key.name!r} has {key.role}"
                )
            with self._limiter.concurrency_slot(key, "requests"):
                yield key

        return admitted

    async def _found(self, token: str) -> ApiKey:
        if not token:
            raise HttpProblem("unauthenticated", "an API key is needed, as `Authorization: Bearer <key>`")
        key = await self._keys.find(token) if len(token) <= _LONGEST_TOKEN else None
        if key is None:
            raise HttpProblem("unauthenticated", "the API key is not known, or was revoked")
        return key
