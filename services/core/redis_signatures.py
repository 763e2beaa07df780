"""Signatures of entries in Redis, so that a process notices entries that others have written.

The key is SLUICE_REDIS_SIGNING_KEY, which Redis does not hold. Version 0.1.0 reads and writes the same entries without
signatures, and ignores the signatures.
"""

import hashlib
import hmac
from typing import Final

from pydantic import SecretStr

_JSON_PREFIX: Final = b'{"signature":"'
_HEX_DIGITS: Final = hashlib.sha256().digest_size * 2


class RedisSigner:
    """Signs entries, and checks them. Without a key it signs nothing, and no signature is valid."""

    def __init__(self, key: SecretStr | None, scope: str) -> None:
        """`scope`: the prefix of the keys in Redis. Entries of another scope are not valid here."""
        self._key = key.get_secret_value().encode() if key else None
        self._scope = scope

    @property
    def can_sign(self) -> bool:
        """Whether there is a key."""
        return self._key is not None

    def sign(self, kind: str, name: str, *parts: str | bytes) -> str:
        """The HMAC-SHA256 of an entry. Needs a key."""
        assert self._key is not None
        encoded = [part.encode() if isinstance(part, str) else part for part in (self._scope, kind, name, *parts)]
        # Each part follows its length, so that no two entries make the same message.
        message = b"".join(len(part).to_bytes(8) + part for part in encoded)
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()

    def is_valid(self, signature: bytes | None, kind: str, name: str, *parts: str | bytes) -> bool:
        """Whether a process with the same key has signed an entry."""
        if self._key is None or not signature:
            return False
        return hmac.compare_digest(signature, self.sign(kind, name, *parts).encode())

    def sign_json(self, kind: str, name: str, document: str) -> str:
        """Add the signature to a JSON object as its first field. Without a key, return the object as it is.

        `document` has no space at the beginning, and at least one field.
        """
        if self._key is None:
            return document
        return f'{_JSON_PREFIX.decode()}{self.sign(kind, name, document)}",{document.removeprefix("{")}'

    def accepts_json(self, kind: str, name: str, signed: bytes) -> bool:
        """Whether an entry may be used: it is a result of `sign_json`, or there is no key to check it."""
        if self._key is None:
            return True
        begin, end = len(_JSON_PREFIX), len(_JSON_PREFIX) + _HEX_DIGITS
        return (
            signed.startswith(_JSON_PREFIX)
            and signed[end : end + 2] == b'",'
            and self.is_valid(signed[begin:end], kind, name, b"{" + signed[end + 2 :])
        )
