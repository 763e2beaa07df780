"""One hierarchy of errors: each knows whether trying again can help and how its submission ends if not.

Nothing else in Sluice decides either question. Every message is one sentence for the person who runs
Sluice; it ends up in the header `sluice-detail` of a dead letter or on stderr.
"""

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
    """Anything that Sluice raises on purpose. `str(error)` is one sentence."""


class ConfigurationError(SluiceError):
    """A setting, a file or an argument of the user is wrong. The sentence says what to do."""


class NotOwned(SluiceError):
    """The message belongs to another member by now: that member settles it, this one forgets it."""


class Unavailable(SluiceError):
    """Something Sluice needs is away. Trying again can help, so the submission waits and is never dead-lettered."""


class StreamUnavailable(Unavailable):
    """Kafka or Redis does not answer."""


class StoreUnavailable(Unavailable):
    """The object store does not answer, answers with a server error, or throttles."""


class PolicyUnavailable(Unavailable):
    """No policy version can be had right now: neither from the policy bucket nor from a copy."""


class GuardUnavailable(Unavailable):
    """The engine is starting, full, hanging or gone."""


class UnreadableAnswer(SluiceError):
    """The guard's answer could not be read. After one more try the submission ends as `needs_review`."""

    def __init__(self, detail: str, model: "ModelIdentity | None" = None) -> None:
        super().__init__(detail)
        self.model = model
        """What gave the answer."""


class Unjudgeable(SluiceError):
    """The submission can never be judged: it ends as a dead letter with `reason`."""

    reason: ClassVar[DeadLetterReason]


class Malformed(Unjudgeable):
    """The message is not a submission."""

    reason = "malformed"

    def __init__(self, detail: str, submission_id: str | None = None) -> None:
        super().__init__(detail)
        self.submission_id = submission_id
        """The id, where one could be read."""


class Forbidden(Unjudgeable):
    """The bucket may not be read: Sluice's settings or the store's own rules say so."""

    reason = "forbidden"


class NotFound(Unjudgeable):
    """No such bucket, key or object version."""

    reason = "not_found"


class Changed(Unjudgeable):
    """The object is not the one that the submission names: its ETag differs."""

    reason = "changed"


class TooLarge(Unjudgeable):
    """More bytes or pixels than the limits allow."""

    reason = "too_large"


class NotAnImage(Unjudgeable):
    """The bytes are not an image that Sluice can decode completely."""

    reason = "not_an_image"


class UnknownPolicy(Unjudgeable):
    """No policy of that name, or no such version of it."""

    reason = "unknown_policy"


class Expired(Unjudgeable):
    """The submission could not be judged before its deadline."""

    reason = "expired"


class GuardFailed(Unjudgeable):
    """The engine refuses the image."""

    reason = "guard_failed"
