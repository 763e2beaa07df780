"""The tenant for which the present task works, so that shared resources can be divided fairly among tenants."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

_tenant: Final[ContextVar[str]] = ContextVar("tenant", default="default")


def current_tenant() -> str:
    """Return the tenant of this task; `default` if no one has named it."""
    return _tenant.get()


@contextmanager
def work_for_tenant(tenant: str) -> Iterator[None]:
    """Name the tenant of the block, and of the tasks that it starts."""
    token = _tenant.set(tenant)
    try:
        yield
    finally:
        _tenant.reset(token)
