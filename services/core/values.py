"""The values that services hand each other: all of them immutable, without clocks, sockets or credentials."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.core.calibration import Calibration

Rating = Literal["Safe", "Unsafe"]
Action = Literal["allow", "review", "block"]
VerdictOutcome = Literal["verdict", "needs_review", "superseded"]
ReviewReason = Literal["unreadable_answer", "quota", "blocked"]
Priority = Literal["live", "backfill"]
GuardPriority = Literal["interactive"] | Priority
"""Who comes first at the guard: someone who waits for the answer, then live submissions, then backfill."""
Effort = Literal["full", "first_look"]
EffortMode = Literal["full", "adaptive"]
RationaleMode = Literal["unsafe", "always", "never"]
Detail = Literal["score", "verdict"]
"""What the guard is asked for: only the score (one token), or the whole verdict."""

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
"""LlavaGuard's categories, in the order and the wording of its training."""

NO_CATEGORY: Final = "NA: None applying"

DEFAULT_POLICY: Final = "default"
"""What a submission that names no policy asks for: its tenant's policy, else the policy of this name."""


class WireModel(BaseModel):
    """A message on a stream: immutable; unknown fields are ignored so that producers can be newer."""

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
    """What the guard sees: an upright RGB JPEG or PNG no larger than the model can use."""

    data: bytes
    media_type: Literal["image/jpeg", "image/png"]
    width: int
    height: int
    sha256: str
    """Of the original bytes, lower-case hex."""
    facts: ImageFacts
    """Of the original."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Scores from which an Unsafe rating becomes a review or a block; both in [0, 1], review <= block."""

    review: float
    block: float


@dataclass(frozen=True, slots=True)
class BlockRateBand:
    """How much of what a policy version judges it may block; outside of the band something is wrong with it."""

    at_least: float
    """Share in [0, 1]."""
    at_most: float
    """Share in [0, 1], not below `at_least`."""
    window_s: float
    """Seconds of verdicts that the share is taken over."""
    after: int
    """Verdicts that the window has to hold before the share means anything."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One version of a policy, ready to judge by."""

    identity: PolicyIdentity
    prompt: str
    thresholds: Thresholds
    category_thresholds: Mapping[str, Thresholds]
    """Overrides, by full category name."""
    rationale: RationaleMode
    effort: EffortMode
    first_look_below: float
    """With effort `adaptive`: a first look with a score below this bound is accepted as Safe."""
    own_categories: tuple[str, ...] = ()
    """Full names of the categories that the policy adds to `CATEGORIES`, e.g. `O10: Gambling`."""
    block_rate: BlockRateBand | None = None
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    """What maps the score of a checkpoint to a probability, by the checkpoint's revision; mostly there is none."""


@dataclass(frozen=True, slots=True)
class PolicyChoice:
    """The policy version that a submission is judged by, and one to compare it with, if any."""

    policy: Policy
    shadow: Policy | None = None


@dataclass(frozen=True, slots=True)
class Assessment:
    """What the guard says about one image under one policy. With detail `score`, only the score is looked at."""

    rating: Rating
    category: str
    rationale: str | None
    score: float
    """P(Unsafe) in [0, 1], read before any grammar mask; of a calibrated policy what the calibration makes of it."""
    model: ModelIdentity
    rationale_truncated: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    calibration: AppliedCalibration | None = None
