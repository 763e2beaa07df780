"""The local copy of policy versions that every process keeps, so that a submission needs no network for its policy."""

import asyncio
import logging
import time
from collections.abc import Callable, MutableMapping
from typing import Any, Final, TypeVar

from services.contracts import Policy
from services.errors import ConfigurationError, PolicyUnavailable, UnknownPolicy
from services.policies.policy import is_policy_name
from services.policies.registry import PolicyRegistry

_LOCAL_VERSIONS: Final = 1024
_LOCAL_NAMES: Final = 1024

log = logging.getLogger(__name__)
K = TypeVar("K")
V = TypeVar("V")


class PolicyCache:
    """Resolves `name` and `name@version` to the policy to judge by.

    A version is immutable and kept; which one is active is looked up again when it is older than `refresh_s`. While
    the policy bucket is away the last known answer serves.
    """

    def __init__(
        self, registry: PolicyRegistry, *, refresh_s: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._refresh_s = refresh_s
        self._clock = clock
        self._versions: dict[tuple[str, int], Policy] = {}
        self._active: dict[str, tuple[float, int]] = {}
        self._lookups: dict[object, asyncio.Task[Any]] = {}

    async def resolve(self, reference: str) -> Policy:
        """The policy that `name` (active version) or `name@7` (that version) stands for.

        Raises:
            UnknownPolicy: no such policy or version, or the reference is not well-formed.
            PolicyUnavailable: it is not known here and the policy bucket does not answer.
        """
        name, at, number = reference.partition("@")
        if at and not (number.isascii() and number.isdigit() and len(number) <= 8):
            raise UnknownPolicy(f"policy {reference!r} is neither a name nor name@version")
        if not is_policy_name(name):
            raise UnknownPolicy(f"{name!r} is not a policy name")
        return await self._version(name, int(number) if at else await self._active_version(name))

    async def _version(self, name: str, version: int) -> Policy:
        policy = self._versions.get((name, version))
        if policy is None:
            document = await self._once(self._registry.get, name, version)
            policy = document.as_version(version)
            _keep(self._versions, (name, version), policy, _LOCAL_VERSIONS)
        return policy

    async def _active_version(self, name: str) -> int:
        looked_up_at, version = self._active.get(name, (float("-inf"), 0))
        if self._clock() - looked_up_at < self._refresh_s:
            return version
        try:
            newest = await self._once(self._registry.active, name)
        except (PolicyUnavailable, ConfigurationError) as error:
            if not version:
                raise PolicyUnavailable(str(error)) from error
            log.warning("keeping the last known version of policy %s: %s", name, error)
            newest = version
        _keep(self._active, name, (self._clock(), newest), _LOCAL_NAMES)
        return newest

    async def _once(self, look_up: Callable[..., V], *arguments: object) -> V:
        """Join the same look-up where it is under way, else start it."""
        task: asyncio.Task[V] | None = self._lookups.get(arguments)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(look_up, *arguments))
            self._lookups[arguments] = task
            task.add_done_callback(lambda _: self._lookups.pop(arguments))
        return await asyncio.shield(task)


def _keep(copies: MutableMapping[K, V], key: K, value: V, limit: int) -> None:
    copies.pop(key, None)
    copies[key] = value
    if len(copies) > limit:
        del copies[next(iter(copies))]
