"""Policy versions in S3, the truth: immutable objects, each created by a conditional write.

    policies/<name>/versions/<n>.json       the document of version n
    policies/<name>/activations/<m>.json    the m-th change of the active version; the newest one counts

Numbers are written as their distance from 99,999,999, so that the newest object is the first one listed.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from botocore.exceptions import BotoCoreError, ClientError
from pydantic import Field
from pydantic_core import from_json, to_json

from services.contracts import Moment, WireModel
from services.errors import ConfigurationError, PolicyUnavailable, UnknownPolicy
from services.policies.policy import BUILT_IN, PolicyDocument

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_TOP: Final = 99_999_999
_ABSENT: Final = {"NoSuchKey", "404"}
_TAKEN: Final = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}


class Activation(WireModel):
    """One change of the version that new submissions get."""

    number: int
    action: str
    previous: int | None = Field(None, alias="from")
    version: int = Field(alias="to")
    who: str
    why: str = ""
    at: Moment


class PolicyRegistry:
    """Publishes, finds and activates policy versions in one bucket. Blocking: call it off the event loop."""

    def __init__(self, s3: "S3Client", bucket: str, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._s3 = s3
        self._bucket = bucket
        self._clock = clock

    def publish(self, document: PolicyDocument) -> int:
        """Write the document as the next version of its name and return that version, 1 or more.

        Raises:
            PolicyUnavailable: the policy bucket does not answer.
            ConfigurationError: the bucket does not exist or may not be written.
        """
        return self._append(f"policies/{document.name}/versions/", lambda _: _stored(document))

    def get(self, name: str, version: int) -> PolicyDocument:
        """The document of one version.

        Raises:
            UnknownPolicy: no such name or version.
            PolicyUnavailable: the policy bucket does not answer, or what it holds does not match its digest.
        """
        stored = self._read(_key(f"policies/{name}/versions/", version)) if 0 < version < _TOP else None
        if stored is None:
            raise UnknownPolicy(f"policy {name}@{version} does not exist")
        document = PolicyDocument.model_validate(stored["document"])
        if document.digest() != stored["digest"]:
            raise PolicyUnavailable(f"policy {name}@{version} does not match its digest; publish it again")
        return document

    def active(self, name: str) -> int:
        """The version that new submissions get.

        Raises:
            UnknownPolicy: no such policy, or none of its versions was ever activated.
            PolicyUnavailable: the policy bucket does not answer.
        """
        newest = self._newest_activation(name)
        if newest is None:
            raise UnknownPolicy(f"policy {name} has no active version")
        return newest.version

    def activate(self, name: str, version: int, *, who: str, why: str = "") -> Activation:
        """Make `version` the one that new submissions get.

        Raises:
            UnknownPolicy: no such version.
            PolicyUnavailable: the policy bucket does not answer.
        """
        self.get(name, version)
        activation: Activation | None = None

        def change(number: int) -> bytes:
            nonlocal activation
            before = self._newest_activation(name)
            activation = Activation.model_validate(
                {
                    "number": number,
                    "action": "activate",
                    "from": before.version if before else None,
                    "to": version,
                    "who": who,
                    "why": why,
                    "at": self._clock(),
                }
            )
            return activation.model_dump_json(by_alias=True).encode()

        self._append(f"policies/{name}/activations/", change)
        assert activation is not None
        return activation

    def publish_built_in(self) -> None:
        """Publish and activate the built-in policy when the bucket holds no policy at all; safe to repeat."""
        name = BUILT_IN.name
        if self._newest("policies/") is None:
            # Of several processes that start at once, one creates version 1 and the others find it there.
            self._create(_key(f"policies/{name}/versions/", 1), _stored(BUILT_IN))
        if self._newest(f"policies/{name}/activations/") is None and self._newest(f"policies/{name}/versions/"):
            self.activate(name, 1, who="sluice", why="first start")

    def _newest_activation(self, name: str) -> Activation | None:
        key = self._newest(f"policies/{name}/activations/")
        stored = key and self._read(key)
        return Activation.model_validate(stored) if stored else None

    def _append(self, prefix: str, body: Callable[[int], bytes]) -> int:
        """Create the next object under `prefix`; whoever is overtaken takes the number after."""
        while True:
            newest = self._newest(prefix)
            number = 1 if newest is None else _TOP - int(newest.removeprefix(prefix).partition(".")[0]) + 1
            if self._create(_key(prefix, number), body(number)):
                return number

    def _create(self, key: str, body: bytes) -> bool:
        """Write an object unless there is one of that key; say whether it was written."""
        try:
            self._call("put_object", Key=key, Body=body, ContentType="application/json", IfNoneMatch="*")
        except ClientError as error:
            if _code(error) in _TAKEN:
                return False
            raise
        return True

    def _newest(self, prefix: str) -> str | None:
        listing = self._call("list_objects_v2", Prefix=prefix, MaxKeys=1)
        return next((str(found["Key"]) for found in listing.get("Contents", ())), None)

    def _read(self, key: str) -> dict[str, Any] | None:
        try:
            document = from_json(self._call("get_object", Key=key)["Body"].read())
        except ClientError as error:
            if _code(error) in _ABSENT:
                return None
            raise
        except (BotoCoreError, ValueError) as error:
            raise PolicyUnavailable(f"{key} in the policy bucket cannot be read: {error}") from error
        return document if isinstance(document, dict) else None

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One S3 call; what is the caller's to handle comes back as ClientError."""
        try:
            answer: dict[str, Any] = getattr(self._s3, operation)(Bucket=self._bucket, **arguments)
        except ClientError as error:
            if _code(error) in _ABSENT | _TAKEN:
                raise
            if _code(error) == "NoSuchBucket":
                raise ConfigurationError(
                    f"the policy bucket {self._bucket!r} does not exist; create it or correct SLUICE_POLICY_BUCKET"
                ) from error
            raise PolicyUnavailable(f"the policy bucket {self._bucket!r} cannot be used: {error}") from error
        except BotoCoreError as error:
            raise PolicyUnavailable(f"the policy bucket {self._bucket!r} does not answer: {error}") from error
        return answer


def _stored(document: PolicyDocument) -> bytes:
    return to_json({"digest": document.digest(), "document": document.model_dump(mode="json")})


def _key(prefix: str, number: int) -> str:
    return f"{prefix}{_TOP - number:08d}.json"


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")
