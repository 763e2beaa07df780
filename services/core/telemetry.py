"""The metrics, each documented where it is defined.

Ray exports the metrics to Prometheus with the prefix `ray_`.
"""

from typing import Final

from ray.util.metrics import Counter, Gauge, Histogram

SUBMISSIONS: Final = Counter(
    "sluice_submissions_total",
    "Finished submissions. `result` is the outcome of the verdict, or `dead_letter`. `reason` is the reason of the "
    "verdict or dead letter, if it has one; verdicts with the reason `quota` count as `circuit_breaker`. `end` is the "
    "former name of `result`; the next release removes it.",
    tag_keys=("result", "reason", "end"),
)

STEP_SECONDS: Final = Histogram(
    "sluice_step_seconds",
    "Time that one submission spent in one step: queued (until Intake received it), fetch (from S3), prepare (decode "
    "and downscale), guard (first look included), total (until its verdict).",
    boundaries=[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300],
    tag_keys=("step",),
)

FIRST_LOOKS: Final = Counter(
    "sluice_first_looks_total",
    "First looks under policies with effort adaptive. `result` is `accepted` or `escalated`. An escalated image "
    "costs a second request.",
    tag_keys=("result",),
)

RETRIES: Final = Counter(
    "sluice_retries_total",
    "Retries because a backend was unavailable or because of a systemic error. `error` is the class of the error. "
    "While the count grows, submissions wait.",
    tag_keys=("error",),
)

WAITS: Final = Counter(
    "sluice_waits_total",
    "The former name of `sluice_retries_total`; the next release removes it.",
    tag_keys=("error",),
)

ACTIONS: Final = Counter(
    "sluice_actions_total",
    "Verdicts by policy, version and action. The block rate of a version is its share of `block`.",
    tag_keys=("policy", "version", "action"),
)

SHADOWS: Final = Counter(
    "sluice_shadows_total",
    "Submissions that a shadow version judged as well. `result` is `same` or `differs` (another action), or `failed`.",
    tag_keys=("policy", "version", "result"),
)

UNKNOWN_TENANTS: Final = Counter(
    "sluice_unknown_tenants_total",
    "Submissions of a tenant that the active tenants document does not name. They get the policy `default`.",
)

POLICY_PROPAGATION_SECONDS: Final = Histogram(
    "sluice_policy_propagation_seconds",
    "Time from a change of a policy's rollout until this process received it.",
    boundaries=[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10],
)

REDIS_FORGERIES: Final = Counter(
    "sluice_redis_forgeries_total",
    "Entries in Redis that Sluice did not write; none of them was used. `kind` is `rollout`, `version` or "
    "`announcement` of a policy that differs from the policy bucket, or `assessment` or `idempotency_key` of the "
    "gateway without a valid signature. Alert on each increase: someone else writes to Redis.",
    tag_keys=("kind",),
)

BREAKER_TRIPS: Final = Counter(
    "sluice_breaker_trips_total",
    "Times that this process found the block rate of a version outside of its band. Alert on each increase.",
    tag_keys=("policy", "version"),
)

GATEWAY_REQUESTS: Final = Counter(
    "sluice_gateway_requests_total",
    "Requests to the gateway by route and HTTP status. The route `none` stands for unknown paths.",
    tag_keys=("route", "status"),
)

GATEWAY_SECONDS: Final = Histogram(
    "sluice_gateway_seconds",
    "Time from the head of a request to the end of its response, including the wait for the guard.",
    boundaries=[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60],
    tag_keys=("route",),
)

GATEWAY_REFUSED: Final = Counter(
    "sluice_gateway_refused_total",
    "Requests and connections that the gateway refused. `reason` is the name of the problem, or of the limit.",
    tag_keys=("reason",),
)

DECODER_SANDBOX: Final = Gauge(
    "sluice_decoder_sandbox",
    "1 if the kernel puts this measure of the sandbox of image decoders in force, else 0. `measure` is `capabilities`, "
    "`no_new_privs`, `landlock`, `seccomp` or `rlimits`.",
    tag_keys=("measure",),
)

IN_FLIGHT: Final = Gauge("sluice_in_flight", "Messages that this intake replica has received and not settled.")

LAG: Final = Gauge(
    "sluice_lag",
    "Messages that are published but not acknowledged (Kafka: not committed), for the whole group. `priority` names "
    "the stream: `live` is the stream of submissions, `backfill` the backfill stream.",
    tag_keys=("priority", "partition"),
)


_REASON_LABELS: Final = {"quota": "circuit_breaker"}
"""Labels of the reasons whose label is not the reason itself."""


def count_result(result: str, reason: str | None) -> None:
    """Count one finished submission. `result` is the outcome of its verdict, or `dead_letter`."""
    label = _REASON_LABELS.get(reason or "", reason or "")
    SUBMISSIONS.inc(1, {"result": result, "reason": label, "end": result})


def count_retry(error: BaseException | None) -> None:
    """Count one retry because of `error`."""
    tags = {"error": type(error).__name__}
    RETRIES.inc(1, tags)
    WAITS.inc(1, tags)
