"""Policy versions and their rollouts in S3, the source of truth: immutable objects, each created conditionally.

    policies/<name>/versions/<n>.json    the document of version n
    policies/<name>/changes/<m>.json     the m-th change of the rollout, with the state after it; the newest one counts
    policies/<name>/calibrations/<n>/<revision>/<digest>.json    the fit of a calibration of version n

Version and change numbers are stored as 99,999,999 - n, so that a listing begins with the newest object.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self
from urllib.parse import quote

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json

from services.core.calibration import StoredCalibration
from services.core.errors import (
    ConfigurationError,
    NotFound,
    PolicyUnavailable,
    StoreUnavailable,
    Unjudgeable,
    UnknownPolicy,
)
from services.core.s3 import SMALL_OBJECT_CONFIG, Bucket, s3_client
from services.core.settings import Settings
from services.core.text import escape_control_chars, require_one_line
from services.policies.document import BUILT_IN
from services.policies.reference import PolicyReference
from services.policies.rollout import Canary, ChangeAction, Rollout, RolloutChange, Shadow
from services.policies.tenants import Document, TenantsDocument, is_document_name, parse_document

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_VERSION: Final = 99_999_999
"""No version or change has a higher number."""

_READER_THREADS: Final = 16


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """One stored version: the document, and the digest of its content."""

    name: str
    version: int
    digest: str
    document: Document

    def to_json(self) -> bytes:
        return to_json({"digest": self.digest, "document": self.document.model_dump(mode="json")})

    @classmethod
    def from_json(cls, name: str, version: int, data: bytes) -> "StoredVersion":
        """The inverse of `to_json`.

        Raises:
            ValueError: the data is not a version of that name, or does not match its digest.
        """
        stored = from_json(data)
        document = None
        if isinstance(stored, dict) and "document" in stored:
            document = parse_document(stored["document"], stored=True)
        if document is None or document.name != name or document.digest() != stored.get("digest"):
            raise ValueError(f"policy {name}@{version} does not match its digest")
        return cls(name, version, document.digest(), document)


class PolicySummary(BaseModel):
    """The rollout of one policy."""

    name: str
    versions: int
    newest: int | None
    active: int | None
    canary: dict[str, Any] | None
    shadow: dict[str, Any] | None
    tripped: list[int]

    def line(self) -> str:
        """One line for people."""
        parts = [
            f"active {self.active}" if self.active else "not active",
            f"{self.versions} versions",
            f"canary {self.canary['version']} ({self.canary['percent']:g} %)" if self.canary else "",
            f"shadow {self.shadow['version']} ({self.shadow['percent']:g} %)" if self.shadow else "",
            f"circuit breaker open: {', '.join(map(str, self.tripped))}" if self.tripped else "",
        ]
        return f"{self.name:<24} {', '.join(part for part in parts if part)}"


class _Transition(NamedTuple):
    """The next state of a rollout, and the versions that the change goes from and to."""

    rollout: Rollout
    previous: int | None
    version: int | None


class PolicyRegistry:
    """Publishes, finds and rolls out policy versions in one bucket. Every method blocks: call it in a thread.

    Every method raises PolicyUnavailable if the bucket does not answer, and ConfigurationError if it does not exist.
    """

    def __init__(self, s3: "S3Client", bucket: str, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.objects = Bucket(s3, bucket)
        self.bucket = bucket
        self._clock = clock

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The policy bucket of these settings, with the credentials that boto3 finds."""
        return cls(s3_client(settings.s3_endpoint, **SMALL_OBJECT_CONFIG), settings.policy_bucket)

    def publish(self, document: Document) -> StoredVersion:
        """Write the document as the next version of its name."""
        digest = document.digest()
        body = StoredVersion(document.name, 0, digest, document).to_json()
        prefix = _versions(document.name)
        while True:
            number = self._newest_number(prefix) + 1
            if self._create(_make_key(prefix, number), body):
                return StoredVersion(document.name, number, digest, document)

    def get(self, name: str, version: int) -> StoredVersion:
        """One version.

        Raises:
            UnknownPolicy: there is no such name or version.
            PolicyUnavailable: also if the stored version does not match its digest.
        """
        stored = self._read(_make_key(_versions(name), version)) if 0 < version < MAX_VERSION else None
        if stored is None:
            raise UnknownPolicy(f"policy {name}@{version} does not exist")
        try:
            return StoredVersion.from_json(name, version, stored)
        except ValueError as error:
            raise PolicyUnavailable(f"policy {name}@{version} is damaged in the bucket: {error}") from error

    def find(self, reference: PolicyReference) -> StoredVersion:
        """The version that a reference names, or the active version if it names none.

        Raises:
            UnknownPolicy: there is no such version, or none is active.
        """
        name, version = reference.name, reference.version
        if version is None:
            newest = self.find_newest_change(name)
            version = newest.rollout.active if newest else None
            if version is None:
                raise UnknownPolicy(f"policy {name} has no active version; name one as {name}@1")
        return self.get(name, version)

    def summarize(self, name: str) -> PolicySummary:
        """The number of versions of a policy, and the versions in use."""
        newest, versions = self.find_newest_change(name), self.list_versions(name)
        rollout = newest.rollout if newest else Rollout()
        return PolicySummary(
            name=name,
            versions=len(versions),
            newest=versions[-1] if versions else None,
            active=rollout.active,
            canary=rollout.canary.model_dump(mode="json") if rollout.canary else None,
            shadow=rollout.shadow.model_dump(mode="json") if rollout.shadow else None,
            tripped=sorted(rollout.tripped),
        )

    def list_names(self) -> list[str]:
        """Every name that has a version, in order."""
        with self._map_bucket_errors():
            return sorted(folder.split("/")[1] for folder in self.objects.folders("policies/"))

    def list_versions(self, name: str) -> list[int]:
        """The numbers of all versions, oldest first."""
        return self._list_numbers(_versions(name))

    def find_newest_change(self, name: str) -> RolloutChange | None:
        """The last change of the rollout, with the present state; None if there is none."""
        number = self._newest_number(_changes(name))
        return self._change_at(name, number) if number else None

    def find_change(self, name: str, number: int) -> RolloutChange | None:
        """One change of the rollout; None if there is none of this number."""
        if not 0 < number < MAX_VERSION or self._read(_make_key(_changes(name), number)) is None:
            return None
        return self._change_at(name, number)

    def list_changes(self, name: str) -> list[RolloutChange]:
        """Every change of the rollout, oldest first.

        Raises:
            UnknownPolicy: there is no such policy.
        """
        numbers = self._list_numbers(_changes(name))
        if not numbers and not self._newest_number(_versions(name)):
            raise UnknownPolicy(f"there is no policy {name!r}")
        with ThreadPoolExecutor(_READER_THREADS) as readers:
            return list(readers.map(lambda number: self._change_at(name, number), numbers))

    def activate(self, name: str, version: int, *, who: str, why: str = "") -> RolloutChange:
        """Make `version` the active version.

        Raises:
            UnknownPolicy: there is no such version.
            ConfigurationError: a tenants document names a policy that has no active version.
        """
        self._check_tenants(self.get(name, version))
        return self._change(
            name, "activate", lambda now: _Transition(now.with_active(version), now.active, version), who, why
        )

    def rollback(self, name: str, *, who: str, why: str = "") -> RolloutChange:
        """Activate the version that was active before. A second rollback goes further back.

        If the circuit breaker of that version is open, it stays open.

        Raises:
            ConfigurationError: no version was active before.
        """

        def roll_back(now: Rollout) -> _Transition:
            earlier = now.with_rollback()
            return _Transition(earlier, now.active, earlier.active)

        return self._change(name, "rollback", roll_back, who, why)

    def set_canary(self, name: str, canary: Canary | None, *, who: str, why: str = "") -> RolloutChange:
        """Set or remove the canary: a version for a share of the traffic.

        Raises:
            UnknownPolicy: there is no such version.
            ConfigurationError: the version is the active one, or none is active.
        """
        if canary:
            self.get(name, canary.version)

        def set_version(now: Rollout) -> _Transition:
            return _Transition(now.with_canary(canary), _version_of(now.canary), _version_of(canary))

        return self._change(name, "canary", set_version, who, why)

    def set_shadow(self, name: str, shadow: Shadow | None, *, who: str, why: str = "") -> RolloutChange:
        """Set or remove the shadow: a version that also judges a share of the traffic, for comparison.

        Raises:
            UnknownPolicy: there is no such version.
            ConfigurationError: no version is active.
        """
        if shadow:
            self.get(name, shadow.version)

        def set_version(now: Rollout) -> _Transition:
            return _Transition(now.with_shadow(shadow), _version_of(now.shadow), _version_of(shadow))

        return self._change(name, "shadow", set_version, who, why)

    def trip(self, name: str, version: int, *, since_change: int, who: str, why: str) -> RolloutChange:
        """Open the circuit breaker of a version, and return the change.

        If it is already open, or if `Rollout.since` is no longer `since_change`, nothing is written, and the newest
        change is returned.
        """

        def open_breaker(now: Rollout) -> _Transition | None:
            if version in now.tripped or now.since != since_change:
                return None
            return _Transition(now.with_tripped(version), version, version)

        return self._change(name, "trip", open_breaker, who, why)

    def calibrate(self, name: str, fitted: StoredCalibration, *, who: str, why: str = "") -> RolloutChange:
        """Apply a calibration to the scores of its version and checkpoint, and store its fit.

        Raises:
            UnknownPolicy: there is no such version.
        """
        version, revision = fitted.version, fitted.revision
        self.get(name, version)
        # The key has the map's digest, so of two fits with the same map the first one is stored.
        self._create(
            _make_calibration_key(name, version, revision, fitted.map.digest), fitted.model_dump_json().encode()
        )

        def apply(now: Rollout) -> _Transition:
            return _Transition(now.with_calibration(version, revision, fitted.map), version, version)

        return self._change(name, "calibrate", apply, who, why)

    def revert_calibration(self, name: str, version: int, revision: str, *, who: str, why: str = "") -> RolloutChange:
        """Apply the calibration that was applied before, or none.

        Raises:
            ConfigurationError: the version has no calibration for the checkpoint.
        """

        def revert(now: Rollout) -> _Transition:
            return _Transition(now.without_calibration(version, revision), version, version)

        return self._change(name, "calibrate", revert, who, why)

    def find_calibration(self, name: str, version: int, revision: str, digest: str) -> StoredCalibration:
        """A calibration that is applied, or was applied earlier.

        Raises:
            UnknownPolicy: there is no such calibration.
        """
        key = _make_calibration_key(name, version, revision, digest)
        if (stored := self._read(key)) is None:
            raise UnknownPolicy(f"policy {name}@{version} has no calibration {digest} for the checkpoint {revision}")
        try:
            return StoredCalibration.model_validate_json(stored)
        except ValidationError as error:
            raise PolicyUnavailable(f"{key} in the policy bucket cannot be read") from error

    def publish_built_in(self) -> None:
        """Publish the built-in policy if the bucket has no policy. Safe to repeat.

        If its name has a version and no change of its rollout, activate version 1, whoever published it.
        """
        name = BUILT_IN.name
        if self._first_key("policies/") is None:
            # If several processes start at once, one creates version 1 and the others find it.
            self._create(_make_key(_versions(name), 1), StoredVersion(name, 1, BUILT_IN.digest(), BUILT_IN).to_json())
        if not self._newest_number(_changes(name)) and self._newest_number(_versions(name)):
            self.activate(name, 1, who="sluice", why="first start")

    def _check_tenants(self, stored: StoredVersion) -> None:
        if isinstance(stored.document, TenantsDocument):
            for policy in sorted(set(stored.document.tenants.values())):
                change = self.find_newest_change(policy)
                if change is None or change.rollout.active is None:
                    raise ConfigurationError(
                        f"{stored.name}@{stored.version} gives tenants the policy {policy!r}, which has no active "
                        "version; publish and activate that policy first"
                    )

    def _change(
        self, name: str, action: ChangeAction, transition: Callable[[Rollout], _Transition | None], who: str, why: str
    ) -> RolloutChange:
        """Compute the next state from the newest one, and write it. If another process was first, repeat."""
        try:
            require_one_line(why)
        except ValueError as error:
            raise ConfigurationError(f"policy {name}: the reason {error}") from None
        who = escape_control_chars(who)
        while True:
            newest = self.find_newest_change(name)
            number = newest.number + 1 if newest else 1
            try:
                next_state = transition(newest.rollout if newest else Rollout())
            except ConfigurationError as error:
                raise ConfigurationError(f"policy {name}: {error}") from None
            if next_state is None:
                assert newest is not None
                return newest
            change = RolloutChange.model_validate(
                {
                    "name": name,
                    "number": number,
                    "action": action,
                    "from": next_state.previous,
                    "to": next_state.version,
                    "who": who,
                    "why": why,
                    "at": self._clock(),
                    "rollout": self._complete(name, next_state.rollout, action, number),
                }
            )
            if self._create(_make_key(_changes(name), number), change.model_dump_json(by_alias=True).encode()):
                return change

    def _complete(self, name: str, rollout: Rollout, action: ChangeAction, number: int) -> Rollout:
        digests = {v: rollout.digests.get(v) or self.get(name, v).digest for v in rollout.in_use}
        since = rollout.since if action in {"shadow", "trip"} else number
        return rollout.model_copy(update={"digests": digests, "since": since})

    def _change_at(self, name: str, number: int) -> RolloutChange:
        key = _make_key(_changes(name), number)
        stored = self._read(key)
        try:
            return RolloutChange.model_validate_json(stored or b"")
        except ValidationError as error:
            raise PolicyUnavailable(f"{key} in the policy bucket cannot be read") from error

    def _create(self, key: str, body: bytes) -> bool:
        """Write an object unless the key is taken. Returns whether it was written."""
        with self._map_bucket_errors():
            return self.objects.create(key, body, content_type="application/json")

    def _first_key(self, prefix: str) -> str | None:
        with self._map_bucket_errors():
            return self.objects.first_key(prefix)

    def _newest_number(self, prefix: str) -> int:
        key = self._first_key(prefix)
        return _parse_number(prefix, key) if key else 0

    def _list_numbers(self, prefix: str) -> list[int]:
        with self._map_bucket_errors():
            return sorted(_parse_number(prefix, entry.key) for entry in self.objects.entries(prefix))

    def _read(self, key: str) -> bytes | None:
        with self._map_bucket_errors():
            return self.objects.find(key)

    @contextmanager
    def _map_bucket_errors(self) -> Iterator[None]:
        try:
            yield
        except NotFound as error:
            raise ConfigurationError(
                f"the policy bucket {self.bucket!r} does not exist; create it or correct SLUICE_POLICY_BUCKET"
            ) from error
        except (Unjudgeable, StoreUnavailable) as error:
            raise PolicyUnavailable(f"the policy bucket {self.bucket!r} cannot be used: {error}") from error


def _version_of(share: Canary | Shadow | None) -> int | None:
    return share.version if share else None


def _versions(name: str) -> str:
    return f"{_folder(name)}versions/"


def _changes(name: str) -> str:
    return f"{_folder(name)}changes/"


def _folder(name: str) -> str:
    if not is_document_name(name):
        raise UnknownPolicy(f"{name!r} is not a policy name")
    return f"policies/{name}/"


def _make_calibration_key(name: str, version: int, revision: str, digest: str) -> str:
    return f"{_folder(name)}calibrations/{version}/{quote(revision, safe='')}/{digest.partition(':')[2]}.json"


def _make_key(prefix: str, number: int) -> str:
    return f"{prefix}{MAX_VERSION - number:08d}.json"


def _parse_number(prefix: str, key: str) -> int:
    return MAX_VERSION - int(key.removeprefix(prefix).partition(".")[0])
