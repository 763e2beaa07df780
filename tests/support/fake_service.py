"""A Ray Serve application that `pipelines.clients.judge_client` accepts as Sluice. It judges by a script.

python -m tests.support.fake_service FILE APPLICATION: deploys the application, writes the cluster's address to FILE
when it is ready, and runs until it is killed. When FILE.deploy appears, it deploys one more application, with the name
in that file, and deletes the file.
"""

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import ray
from ray import serve

from services.core.errors import GuardFailed, NotFound, Unjudgeable
from services.core.messages import Submission, Timings, Upload, Verdict
from services.core.values import Policy


@serve.deployment(name="Intake", max_ongoing_requests=100)
class ScriptedIntake:
    """The first word of a submission's id decides the answer."""

    async def judge_under(
        self, submission: Submission, policies: Sequence[str | Policy], image: bytes | None = None
    ) -> list[Verdict | Unjudgeable]:
        match submission.id.partition("-")[0]:
            case "absent":
                raise NotFound(f"{submission.uri} does not exist")
            case "refused":
                return [GuardFailed("The engine refuses it.") for _ in policies]
            case "fault":
                raise ZeroDivisionError("line one\nline two")
            case "crash" if _mark(submission):
                os._exit(1)
            case "hang":
                _mark(submission)
                await asyncio.sleep(3600)
        if image is not None and submission.uri != Upload.make_uri(image):
            raise NotFound("the image is not the one that was sent")
        await asyncio.sleep(0.01 * (len(submission.id) % 3))
        return [
            _verdict(submission, policy if isinstance(policy, str) else policy.identity.name) for policy in policies
        ]


def _mark(submission: Submission) -> bool:
    """Create the file that the key names. Returns whether it is new."""
    marker = Path(f"/{submission.reference.key}")
    new = not marker.exists()
    marker.touch()
    return new


def _verdict(submission: Submission, policy: str) -> Verdict:
    return Verdict.model_construct(
        verdict_id="v",
        submission_id=submission.id,
        tenant=submission.priority,
        category=policy,
        timings_ms=Timings(),
        judged_at=datetime.now(UTC),
    )


def main() -> None:
    ray.init("local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, logging_level="ERROR")
    serve.start(proxy_location="Disabled")
    _deploy(sys.argv[2])
    address = Path(sys.argv[1])
    address.write_text(ray.get_runtime_context().gcs_address)
    more = address.with_name(f"{address.name}.deploy")
    while True:
        if more.exists() and (name := more.read_text()):
            _deploy(name)
            more.unlink()
        time.sleep(0.1)


def _deploy(name: str) -> None:
    serve.run(ScriptedIntake.bind(), name=name, route_prefix=None)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
