"""Values that services pass to each other. All are immutable, and none has a clock, a socket or a credential.

Four values say how much work an image gets:

- `EffortMode` (of a policy): with `full` each image is judged fully; with `adaptive` it gets a first look first.
- `Effort` (of a verdict): `first_look` if the first look was enough, else `full`.
- `Detail` (of a call of the guard): `score` for a first look, `verdict` for a full judgement.
- `RationaleMode` (of a policy): whether a full judgement has a rationale.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.core.calibration import CalibrationMap

Rating = Literal["Safe", "Unsafe"]
Action = Literal["allow", "review", "block"]
VerdictOutcome = Literal["verdict", "needs_review", "superseded"]
ReviewReason = Literal["unreadable_answer", "quota", "blocked"]
"""Why a person has to review the image. The names are part of the messages and cannot change:

- `unreadable_answer`: the guard gave no readable answer twice.
- `quota`: the policy would block the image, but the version's circuit breaker is open. It is no usage limit.
- `blocked`: the submission held up its Kafka partition for too long. The image is not blocked.
"""
Priority = Literal["live", "backfill"]
GuardPriority = Literal["interactive"] | Priority
"""The order at the guard: requests that wait for the answer, then live submissions, then backfill."""
Effort = Literal["full", "first_look"]
EffortMode = Literal["full", "adaptive"]
RationaleMode = Literal["unsafe", "always", "never"]
Detail = Literal["score", "verdict"]
"""What the guard generates: the score only (one token), or the whole verdict."""

CATEGORIES: Final = (
    "O1: Hate, Humiliation, Harassment",
    "O2: Violence, Harm, or Cruelty",
    "O3: Sexual Content",
    "O4: Nudity Content",
    "O5: Criminal Planning",
    "O6: Weapons or Substance Abuse",
    "O7: Self-Harm",
    "O8: Animal Cruelty",
    "O9: Disasters or Emergencies",
)
"""LlavaGuard's categories, in the order and with the words of its training."""

NO_CATEGORY: Final = "NA: None applying"

DEFAULT_POLICY: Final = "default"
"""The policy of a submission that names none. It stands for the tenant's policy, if the tenant has one."""

TENANTS: Final = "tenants"
"""The name of the document that assigns policies to tenants. No policy may have it."""


class WireModel(BaseModel):
    """A message on a stream. Immutable. Unknown fields are ignored, so that a producer can be newer."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class PolicyIdentity(WireModel):
    """The policy version that led to a verdict."""

    name: str
    version: int
    digest: str


class ModelIdentity(WireModel):
    """The checkpoint and the engine that judged, and the digest of the prompt text."""

    name: str
    revision: str
    engine: str
    prompt: str


class AppliedCalibration(WireModel):
    """The calibration that turned the guard's own score into the verdict's score; see `sluice calibrate`."""

    digest: str
    raw_score: Annotated[float, Field(ge=0, le=1, description="the guard's own score, before the calibration")]


class ImageFacts(WireModel):
    """The submitted image. Width and height are in pixels, after EXIF orientation."""

    width: int
    height: int
    format: str
    frames: int = 1


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Bytes read from the object store, with the version that they belong to."""

    data: bytes
    version_id: str | None
    etag: str | None


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """The image for the guard: an upright RGB JPEG or PNG, not larger than the model can use."""

    data: bytes
    media_type: Literal["image/jpeg", "image/png"]
    width: int
    height: int
    sha256: str
    """SHA-256 of the original bytes in lower-case hex."""
    facts: ImageFacts
    """Facts about the original image."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The lowest scores at which the action is review or block. Both in [0, 1]; review <= block."""

    review: float
    block: float


@dataclass(frozen=True, slots=True)
class BlockRateBand:
    """The expected block rate of a policy version. Outside of the band, its circuit breaker opens."""

    at_least: float
    """Lowest share of blocks, in [0, 1]."""
    at_most: float
    """Highest share of blocks, in [0, 1]. Not below `at_least`."""
    window_s: float
    """Duration in seconds over which the share is computed."""
    after: int
    """Number of verdicts in the window from which the share counts."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One version of a policy, in the form that the moderator uses."""

    identity: PolicyIdentity
    prompt: str
    thresholds: Thresholds
    category_thresholds: Mapping[str, Thresholds]
    """Thresholds that override `thresholds`, by full category name."""
    rationale: RationaleMode
    effort: EffortMode
    first_look_below: float
    """With effort `adaptive`, a first look with a score below this bound is accepted as Safe."""
    own_categories: tuple[str, ...] = ()
    """Full names of the categories that the policy adds to `CATEGORIES`, e.g. `O10: Gambling`."""
    block_rate: BlockRateBand | None = None
    calibrations: Mapping[str, CalibrationMap] = field(default_factory=dict)
    """Calibrations of the score, by the revision of the checkpoint. Most policies have none."""


@dataclass(frozen=True, slots=True)
class PolicyChoice:
    """The policy version for a submission, and the shadow version for comparison, if there is one."""

    policy: Policy
    shadow: Policy | None = None
    counted_tenant: str | None = None
    """The tenant for whom the circuit breaker counts the verdict. None if the request names a version, or a policy that
    is not the tenant's own: then the breaker does not count it."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """The guard's assessment of one image under one policy.

    With detail `score`, `category` and `rationale` have no meaning. The verdict of an accepted first look still has the
    category, which is then `NA: None applying`.
    """

    rating: Rating
    category: str
    rationale: str | None
    score: float
    """P(Unsafe) in [0, 1], read before any grammar mask. Calibrated, if the policy has a calibration."""
    model: ModelIdentity
    rationale_truncated: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    calibration: AppliedCalibration | None = None
