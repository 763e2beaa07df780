"""Authenticates requests by their API keys."""

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Final

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from services.gateway.admission import Admission, AdmittedRequest
from services.gateway.api_key_cache import ApiKeyCache
from services.gateway.api_keys import ApiKey, Role
from services.gateway.connection_limits import HAS_API_KEY
from services.gateway.problems import HttpProblem

_BEARER: Final = HTTPBearer(auto_error=False, description="An API key. `sluice keys create` makes one.")
_MAX_TOKEN_CHARS: Final = 200


class Authenticator:
    """Finds the API key of each request and passes the request to admission."""

    def __init__(self, keys: ApiKeyCache, admission: Admission) -> None:
        self._keys = keys
        self._admission = admission

    def require(self, role: Role) -> Callable[..., AsyncIterator[AdmittedRequest]]:
        """Return a dependency for routes: it admits requests whose API key has `role` or a higher role.

        Raises:
            HttpProblem: the key is missing or unknown, or `Admission.admit` refuses the request.
        """

        async def admit_request(
            request: Request,
            credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
        ) -> AsyncIterator[AdmittedRequest]:
            api_key = await self._find_key(credentials.credentials if credentials else "")
            setattr(request.state, HAS_API_KEY, True)
            async with self._admission.admit(api_key, role) as admitted:
                yield admitted

        return admit_request

    async def _find_key(self, token: str) -> ApiKey:
        if not token:
            raise HttpProblem("unauthenticated", "the API key is missing; send it as `Authorization: Bearer <key>`")
        api_key = await self._keys.find(token) if len(token) <= _MAX_TOKEN_CHARS else None
        if api_key is None:
            raise HttpProblem("unauthenticated", "the API key is unknown or was revoked")
        return api_key
