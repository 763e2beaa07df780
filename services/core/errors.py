"""All errors that Sluice raises on purpose.

    SluiceError
        ConfigurationError      a setting, a file or an argument is wrong; stop and say so
            InvalidDocument         a policy document
        NotOwned                another group member owns the message; drop it
        Unavailable             a backend is unavailable; retry
            StreamUnavailable       Kafka or Redis Streams
            StoreUnavailable        the object store
                Throttled               it throttles
            PolicyUnavailable       the policy bucket, without a cached copy
            ApiKeysUnavailable      the API keys in the policy bucket
            RedisUnavailable        the Redis that processes share
            GuardUnavailable        the guard
                EngineFailed            its engine, during a call
        UnreadableAnswer        the guard's answer cannot be parsed; verdict `needs_review`
        Unjudgeable             the submission can never be judged; dead letter with `reason`
            Malformed, Forbidden, NotFound, ObjectChanged, TooLarge, NotAnImage, UnknownPolicy, Expired, GuardFailed
                ObjectOutOfScope, PolicyOutOfScope      a Forbidden and an UnknownPolicy; never systemic
                OutsideFolder                           a Forbidden: a local file that may not be read
                DecoderOutOfMemory                      a TooLarge, after a try in a new decoder process

The class decides whether to retry and how the submission ends. `pipelines/intake/processor.py` makes two exceptions: it
retries systemic errors, and a submission expires if it cannot be judged in time while others are judged.

`str(error)` is one sentence for the operator: the header `sluice-detail` of a dead letter has it, or it goes to stderr.
Only the gateway's `HttpProblem` is defined elsewhere, because it consists of an HTTP status and fields of the response.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from services.core.values import ModelIdentity

DeadLetterReason = Literal[
    "malformed",
    "forbidden",
    "not_found",
    "changed",
    "too_large",
    "not_an_image",
    "unknown_policy",
    "expired",
    "guard_failed",
]


class SluiceError(Exception):
    """Base class. `str(error)` is one sentence."""


class ConfigurationError(SluiceError):
    """A setting, a file or an argument is wrong. The sentence says what to do."""


@dataclass(frozen=True, slots=True, order=True)
class DocumentIssue:
    """One mistake in a document."""

    line: int
    """From 1."""
    column: int
    """From 1."""
    field: str
    """Such as `thresholds.categories.O7.block` or, counted from 1, `examples.2.expect`; empty for the document."""
    message: str
    """What is wrong and what would be right."""


class InvalidDocument(ConfigurationError):
    """A document cannot be read. The sentence is about its first issue."""

    def __init__(self, source: str, issues: Sequence[DocumentIssue]) -> None:
        self.issues = tuple(sorted(issues))
        """In the order of the document."""
        first, more = self.issues[0], len(self.issues) - 1
        field = f"{first.field}: " if first.field else ""
        others = f" ({more} more problem{'s' if more > 1 else ''})" if more else ""
        super().__init__(f"{source}:{first.line}: {field}{first.message}{others}")


class NotOwned(SluiceError):
    """The message belongs to another member now. That member settles it; this one drops it."""


class Unavailable(SluiceError):
    """A backend is unavailable. A retry can succeed, so the submission is retried.

    It expires only if others are judged meanwhile.
    """


class StreamUnavailable(Unavailable):
    """Kafka or Redis does not answer."""


class StoreUnavailable(Unavailable):
    """The object store does not answer, answers with a server error, or throttles."""


class Throttled(StoreUnavailable):
    """The object store throttled the request (503 SlowDown, 429)."""


class PolicyUnavailable(Unavailable):
    """A policy version cannot be read: the policy bucket does not answer, and there is no cached copy."""


class ApiKeysUnavailable(Unavailable):
    """The API keys cannot be read from the policy bucket."""


class RedisUnavailable(Unavailable):
    """The Redis at SLUICE_REDIS_URL does not answer."""


class GuardUnavailable(Unavailable):
    """The engine is starting, full, hanging or gone."""


class EngineFailed(GuardUnavailable):
    """The engine failed, or stopped, during a call."""


class UnreadableAnswer(SluiceError):
    """The guard's answer cannot be parsed. After one retry the submission ends as `needs_review`."""

    def __init__(self, detail: str, model: "ModelIdentity | None" = None) -> None:
        super().__init__(detail)
        self.model = model
        """The model that gave the answer."""


class Unjudgeable(SluiceError):
    """The submission can never be judged. It becomes a dead letter with `reason`."""

    reason: ClassVar[DeadLetterReason]


class Malformed(Unjudgeable):
    """The message is not a submission."""

    reason = "malformed"

    def __init__(self, detail: str, submission_id: str | None = None) -> None:
        super().__init__(detail)
        self.submission_id = submission_id
        """The id, if it could be read."""


class Forbidden(Unjudgeable):
    """The settings or the object store forbid reading the object."""

    reason = "forbidden"


class OutsideFolder(Forbidden):
    """The local file is outside of the folders whose files may be read."""


class ObjectOutOfScope(Forbidden):
    """The tenant or the API key may not use the object. Over HTTP it looks like an object that does not exist."""


class NotFound(Unjudgeable):
    """The bucket, key or object version does not exist."""

    reason = "not_found"


class ObjectChanged(Unjudgeable):
    """The ETag of the object differs from the one in the submission."""

    reason = "changed"


class TooLarge(Unjudgeable):
    """More bytes or pixels than the limits allow."""

    reason = "too_large"


class DecoderOutOfMemory(TooLarge):
    """A decoder process has not the memory that the image needs."""


class NotAnImage(Unjudgeable):
    """The bytes are not an image that Sluice can decode completely."""

    reason = "not_an_image"


class UnknownPolicy(Unjudgeable):
    """The policy or the version of it does not exist."""

    reason = "unknown_policy"


class PolicyOutOfScope(UnknownPolicy):
    """The tenant or the API key may not use the policy. The sentence is the same if the policy does not exist."""


class Expired(Unjudgeable):
    """The submission could not be judged before its deadline."""

    reason = "expired"


class GuardFailed(Unjudgeable):
    """The engine refuses the image, or the image or its message crashed the engine or an intake process three times.

    Unlike `EngineFailed`, this is the image's fault: the engine serves other images.
    """

    reason = "guard_failed"
