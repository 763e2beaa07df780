"""The rollout of a policy: which submissions get which version, and the changes of this state. Pure."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field

from services.core.calibration import CalibrationMap
from services.core.errors import ConfigurationError
from services.core.messages import UtcDatetime
from services.core.values import WireModel

Percent = Annotated[float, Field(gt=0, le=100)]
ChangeAction = Literal["activate", "rollback", "canary", "shadow", "trip", "calibrate"]

_EARLIER_LIMIT: Final = 100
_CALIBRATIONS_LIMIT: Final = 3
"""Every change contains them, and each has a few KB."""


class Canary(WireModel):
    """A version that judges a share of the traffic instead of the active version."""

    version: int
    percent: Annotated[float, Field(ge=0, le=100)]
    """The share of submissions, by a stable hash of the id: a larger share contains every smaller one."""
    tenants: frozenset[str] = frozenset()
    """All submissions of these tenants get the canary."""


class Shadow(WireModel):
    """A version that also judges a share of the traffic, for comparison only."""

    version: int
    percent: Percent


class Rollout(WireModel):
    """The state of one policy's rollout. Each change of the state is one entry of the history."""

    active: int | None = None
    earlier: tuple[int, ...] = ()
    """The versions to roll back to, the newest last."""
    canary: Canary | None = None
    shadow: Shadow | None = None
    tripped: frozenset[int] = frozenset()
    """Versions whose circuit breaker is open. They block nothing until `activate` or `canary`
    names them again. A rollback closes no circuit breaker."""
    since: int = 0
    """The number of the last change other than `shadow` and `trip`. Block rates count from this change."""
    digests: Mapping[int, str] = Field(default_factory=dict)
    """The digests of the versions in use. A copy with another digest is not used."""
    calibrations: Mapping[int, Mapping[str, tuple[CalibrationMap, ...]]] = Field(default_factory=dict)
    """By version and checkpoint revision: the last calibration is applied, the earlier ones can be restored. They
    belong to their version, even while another one is active."""

    def with_active(self, version: int) -> Self:
        """The state with another active version. The canary ends."""
        earlier = self.earlier
        if self.active is not None and self.active != version:
            earlier = (*earlier, self.active)[-_EARLIER_LIMIT:]
        shadow = None if self.shadow and self.shadow.version == version else self.shadow
        return self._with(active=version, earlier=earlier, canary=None, shadow=shadow, tripped=self.tripped - {version})

    def with_rollback(self) -> Self:
        """The state with the version active that was active before. The canary ends. No circuit breaker closes.

        Raises:
            ConfigurationError: no version was active before.
        """
        if not self.earlier:
            raise ConfigurationError("there is no earlier active version to roll back to; activate one by its number")
        return self._with(active=self.earlier[-1], earlier=self.earlier[:-1], canary=None)

    def with_canary(self, canary: Canary | None) -> Self:
        """The state with another canary, or with none.

        Raises:
            ConfigurationError: the canary is the active version, or none is active.
        """
        if canary is None:
            return self._with(canary=None)
        self._require_active()
        if canary.version == self.active:
            raise ConfigurationError(f"version {canary.version} is the active one; a canary is another version")
        return self._with(canary=canary, tripped=self.tripped - {canary.version})

    def with_shadow(self, shadow: Shadow | None) -> Self:
        """The state with another shadow, or with none.

        Raises:
            ConfigurationError: no version is active.
        """
        if shadow:
            self._require_active()
        return self._with(shadow=shadow)

    def with_tripped(self, version: int) -> Self:
        """The state with the version's circuit breaker open. If the version is the canary, the canary ends."""
        canary = None if self.canary and self.canary.version == version else self.canary
        return self._with(tripped=self.tripped | {version}, canary=canary)

    def with_calibration(self, version: int, revision: str, calibration: CalibrationMap) -> Self:
        """The state with a calibration for the scores of a version and a checkpoint."""
        kept = (*self._get_calibrations(version, revision), calibration)[-_CALIBRATIONS_LIMIT:]
        return self._with_calibrations(version, revision, kept)

    def without_calibration(self, version: int, revision: str) -> Self:
        """The state with the calibration that was applied before the present one, or with none.

        Raises:
            ConfigurationError: no calibration is applied.
        """
        applied = self._get_calibrations(version, revision)
        if not applied:
            raise ConfigurationError(f"version {version} has no calibration for the checkpoint {revision}")
        return self._with_calibrations(version, revision, applied[:-1])

    def get_calibrations(self, version: int) -> dict[str, CalibrationMap]:
        """The applied calibrations of a version, by checkpoint revision."""
        return {revision: applied[-1] for revision, applied in self.calibrations.get(version, {}).items()}

    def choose_version(self, name: str, submission_id: str, tenant: str) -> int | None:
        """The version of policy `name` that judges a submission; None if none was ever activated."""
        canary = self.canary
        if canary and (tenant in canary.tenants or _hash_to_percent("canary", name, submission_id) < canary.percent):
            return canary.version
        return self.active

    def choose_shadow(self, name: str, submission_id: str) -> int | None:
        """The shadow version for a submission; None if there is none."""
        shadow = self.shadow
        return shadow.version if shadow and _hash_to_percent("shadow", name, submission_id) < shadow.percent else None

    @property
    def in_use(self) -> frozenset[int]:
        """The versions that judge submissions whose policy names no version."""
        others = {other.version for other in (self.canary, self.shadow) if other}
        return frozenset(others if self.active is None else others | {self.active})

    def _require_active(self) -> None:
        if self.active is None:
            raise ConfigurationError("no version of this policy is active; activate one first")

    def _get_calibrations(self, version: int, revision: str) -> tuple[CalibrationMap, ...]:
        return self.calibrations.get(version, {}).get(revision, ())

    def _with_calibrations(self, version: int, revision: str, applied: tuple[CalibrationMap, ...]) -> Self:
        revisions = {r: kept for r, kept in self.calibrations.get(version, {}).items() if r != revision}
        if applied:
            revisions[revision] = applied
        versions = {v: kept for v, kept in self.calibrations.items() if v != version}
        return self._with(calibrations=versions | ({version: revisions} if revisions else {}))

    def _with(self, **fields: Any) -> Self:
        return self.model_copy(update=fields)


def _hash_to_percent(purpose: str, name: str, submission_id: str) -> float:
    """The position of a submission in [0, 100), equal in every process and for every version."""
    digest = hashlib.blake2b(f"{purpose}\0{name}\0{submission_id}".encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64 * 100


class RolloutChange(WireModel):
    """One entry of a policy's history: who changed the rollout, the versions before and after, and the new state."""

    name: str
    number: int
    action: ChangeAction
    previous: int | None = Field(None, alias="from")
    version: int | None = Field(None, alias="to")
    who: str
    why: str = ""
    at: UtcDatetime
    rollout: Rollout

    def history_json(self) -> str:
        """One JSON object for a history: the change without the state since then."""
        entry = self.model_dump(mode="json", by_alias=True, exclude={"rollout"})
        share = self._share()
        return json.dumps(entry | (share.model_dump(mode="json", exclude={"version"}) if share else {}))

    def history_line(self) -> str:
        """One line for a history, such as `2026-11-21 10:00:00Z activate from shop@1 to shop@2 by ann: stricter`."""
        before = "" if self.previous is None else f" from {self.name}@{self.previous}"
        after = " to none" if self.version is None else f" to {self.name}@{self.version}"
        share = self._share()
        percent = f" for {share.percent:g} %" if share else ""
        why = f": {self.why}" if self.why else ""
        return f"{self.at:%Y-%m-%d %H:%M:%S}Z {self.action}{before}{after}{percent} by {self.who}{why}"

    def _share(self) -> Canary | Shadow | None:
        """The canary or the shadow that this change has set."""
        return {"canary": self.rollout.canary, "shadow": self.rollout.shadow}.get(self.action)
