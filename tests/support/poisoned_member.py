"""An intake member as a process that poison kills. Its arguments are the settings (JSON) and its name.

The process dies when it parses a message whose value contains `deadly-to-read`, and when it judges a submission whose
id contains `deadly-to-judge`. Every other submission needs review.
"""

import asyncio
import os
import signal
import sys
from typing import Any

from pipelines.intake import lane
from pipelines.intake.crash_isolation import CrashIsolation
from pipelines.intake.worker import IntakeWorker
from services.core.messages import Submission
from services.core.settings import Settings
from services.core.tenancy import Scope, Tenancy
from services.moderation.moderator import ModerationResult
from services.moderation.verdicts import build_skipped_verdict
from services.policies.redis_cache import PolicyRedisCache
from services.streams.base import Message
from services.streams.config import StreamConfig
from services.streams.factory import open_consumer
from services.streams.parsing import parse

_JUDGE_S = 0.02


def deadly_parse(message: Message, tenancy: Tenancy) -> Any:
    if b"deadly-to-read" in message.value:
        os.kill(os.getpid(), signal.SIGKILL)
    return parse(message, tenancy)


class DeadlyModerator:
    async def judge(self, submission: Submission, _scope: Scope) -> ModerationResult:
        await asyncio.sleep(_JUDGE_S)
        if "deadly-to-judge" in submission.id:
            os.kill(os.getpid(), signal.SIGKILL)
        return ModerationResult(
            build_skipped_verdict(submission, "needs_review", reason="unreadable_answer", action="review")
        )


async def main(settings: Settings, name: str) -> None:
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    shared = PolicyRedisCache.from_settings(settings)
    moderator: Any = DeadlyModerator()
    async with CrashIsolation(shared, settings.group, name) as isolation:
        intake = IntakeWorker(
            await open_consumer(StreamConfig.from_settings(settings), name), moderator, settings, isolation
        )
        await ending.wait()
        await intake.drain()


if __name__ == "__main__":
    lane.parse = deadly_parse  # type: ignore[assignment]
    asyncio.run(main(Settings.model_validate_json(sys.argv[1]), sys.argv[2]))
