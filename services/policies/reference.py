"""References to policies: NAME for the active version, NAME@V for one version."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from services.core.errors import ConfigurationError, UnknownPolicy
from services.policies.tenants import is_document_name

_DIGITS_LIMIT: Final = 8


@dataclass(frozen=True, slots=True)
class PolicyReference:
    """A name, and optionally a version."""

    name: str
    version: int | None = None
    """None stands for the active version."""

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(reference: str) -> "PolicyReference":
        """Parse NAME or NAME@V. Does not check whether the policy exists.

        Raises:
            UnknownPolicy: the text has another form, or the name is invalid.
        """
        name, at, number = reference.partition("@")
        if at and not (number.isascii() and number.isdigit() and len(number) <= _DIGITS_LIMIT):
            raise UnknownPolicy(f"{reference!r} is neither NAME nor NAME@V, such as default@3")
        if not is_document_name(name):
            raise UnknownPolicy(f"{name!r} is not a policy name: lower-case letters, digits, - and _ only")
        return PolicyReference(name, int(number) if at else None)

    def require_version(self) -> tuple[str, int]:
        """The name and the version.

        Raises:
            ConfigurationError: the reference has no version.
        """
        if self.version is None:
            raise ConfigurationError(f"{self.name!r} names no version; write {self.name}@V, such as {self.name}@3")
        return self.name, self.version

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"
