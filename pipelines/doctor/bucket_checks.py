"""Checks of S3: the buckets of images, the policy bucket, and the clock."""

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

from pipelines.doctor.checks import CheckResult, failed, passed
from services.core.errors import Forbidden, NotFound, SluiceError, StoreUnavailable
from services.core.s3 import SMALL_OBJECT_CONFIG, Bucket, map_s3_errors, s3_client
from services.core.settings import Settings

CLOCK_LIMIT_S: Final = 300.0
"""AWS refuses requests whose time differs by more than 15 minutes. A third of that is a clock that nobody sets."""

_ABSENT_KEY: Final = "sluice-doctor/absent"
_PROBE_KEY: Final = "doctor/probe"
"""Written only if the policy bucket has no policy yet, and deleted again if the bucket's policy allows it."""
_POLICIES: Final = "policies/"
_CHANGES: Final = "/changes/"
"""Each role of infra/aws that reads policies may write the changes of the policy `default`."""


def run_bucket_checks(settings: Settings) -> Iterator[CheckResult]:
    """Yield the result of `buckets`."""
    with closing(_open_client(settings)) as client:
        problems = [problem for name in settings.s3_buckets if (problem := _find_read_problem(client, name))]
    if problems:
        yield failed("buckets", "; ".join(dict.fromkeys(problems)))
    else:
        yield passed("buckets", f"{', '.join(settings.s3_buckets)} can be read")


def run_policy_bucket_checks(settings: Settings) -> Iterator[CheckResult]:
    """Yield the results of `policy bucket`, `policy bucket writes` and `clock`."""
    with closing(_open_client(settings)) as client:
        bucket = Bucket(client, settings.policy_bucket)
        try:
            with map_s3_errors(bucket.uri()):
                answer = client.list_objects_v2(Bucket=bucket.name, Prefix=_POLICIES)
            known = [str(found["Key"]) for found in answer.get("Contents", ())]
        except NotFound:
            raise StoreUnavailable(
                f"the bucket {bucket.name} does not exist: create it, or correct SLUICE_POLICY_BUCKET"
            ) from None
        except Forbidden as error:
            raise StoreUnavailable(
                f"{error}: grant s3:ListBucket and s3:GetObject, or correct SLUICE_POLICY_BUCKET"
            ) from None
        except StoreUnavailable as error:
            raise StoreUnavailable(_explain_unavailable(error)) from None
        yield passed("policy bucket", "it has policies" if known else "it has no policy yet; `sluice up` publishes one")
        yield _check_conditional_write(bucket, choose_known_key(known))
        yield check_clock(answer["ResponseMetadata"]["HTTPHeaders"].get("date", ""), datetime.now(UTC))


def choose_known_key(keys: Sequence[str]) -> str:
    """The object of the policy bucket that most roles may write; empty if there is none."""
    ranks = (f"{_POLICIES}default{_CHANGES}", _CHANGES, "")
    return next((key for part in ranks for key in keys if part in key), "")


def check_clock(date: str, now: datetime) -> CheckResult:
    """Compare the header `Date` of an answer with the clock of this machine."""
    try:
        differs_s = (now - parsedate_to_datetime(date)).total_seconds()
    except (TypeError, ValueError):
        return passed("clock", "not compared, because the object store sends no date")
    if abs(differs_s) > CLOCK_LIMIT_S:
        return failed(
            "clock",
            f"the clock of this machine is {abs(differs_s):.0f} s {'ahead of' if differs_s > 0 else 'behind'} the "
            "object store, which refuses requests of 15 minutes difference: synchronise it (chrony, systemd-timesyncd)",
        )
    return passed("clock", f"differs from the object store's by {abs(differs_s):.0f} s")


def _open_client(settings: Settings) -> Any:
    return s3_client(settings.s3_endpoint, **{**SMALL_OBJECT_CONFIG, "retries": {"total_max_attempts": 1}})


def _find_read_problem(client: Any, name: str) -> str:
    """Why a bucket cannot be read; empty if it can."""
    try:
        with map_s3_errors(f"s3://{name}/"):
            client.list_objects_v2(Bucket=name, MaxKeys=1)
        Bucket(client, name).find(_ABSENT_KEY)
    except NotFound:
        return f"the bucket {name} does not exist: create it, or correct SLUICE_S3_BUCKETS"
    except Forbidden as error:
        return f"{error}; it needs s3:GetObject on the objects and s3:ListBucket on the bucket"
    except StoreUnavailable as error:
        return _explain_unavailable(error)
    return ""


def _explain_unavailable(error: SluiceError) -> str:
    if "does not answer" in str(error):
        return f"{error}; start the object store, or correct SLUICE_S3_ENDPOINT"
    return str(error)


def _check_conditional_write(bucket: Bucket, known: str) -> CheckResult:
    """Write an object under the condition that it does not exist: the store must refuse.

    The object is one of the bucket with its own content, so a store that ignores the condition changes nothing.
    """
    check = "policy bucket writes"
    key = known or _PROBE_KEY
    try:
        if not known:
            bucket.create(key, b"")
        written = bucket.create(key, bucket.find(key) or b"")
        if not known:
            with suppress(SluiceError):  # a policy of the bucket may forbid it
                bucket.delete_each([key])
    except Forbidden as error:
        if known:
            return failed(check, f"{error}: grant s3:PutObject on {key}, as the roles in infra/aws have it")
        return failed(
            check,
            f"not checked, because the bucket has no policy and {key} may not be written: start Sluice once, which "
            "publishes its built-in policy, and run this again",
        )
    except SluiceError as error:
        return failed(check, str(error))
    if written:
        return failed(
            check,
            "the object store ignores the condition If-None-Match, so two processes could write one policy version: "
            "use a store with conditional writes (AWS S3, MinIO, VersityGW)",
        )
    return passed(check, "the object store refuses to replace an object that must be new")
