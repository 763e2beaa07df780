"""The client of a running service's streams: submits images, reads verdicts."""

import asyncio
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from pipelines.clients.uploads import Uploads
from services.core.errors import ConfigurationError, Malformed, SluiceError
from services.core.messages import Submission, Verdict, decode_json
from services.core.settings import Settings
from services.core.text import escape_control_chars
from services.streams.base import OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher, open_reader

_BATCH_SUBMISSIONS: Final = 500


def read_references(
    references: Iterable[str], settings: Settings, *, policy: str, tenant: str, lines: Iterable[bytes]
) -> Iterator[Submission]:
    """A submission for each s3:// URI, each file (uploaded first), and, for `-`, each JSON line of `lines`.

    Raises:
        ConfigurationError: a file cannot be read, or a line is not a submission; those before it were yielded.
        StoreUnavailable: a file cannot be uploaded.
    """
    for reference in references:
        if reference == "-":
            yield from _read_lines(lines)
        else:
            is_uri = reference.startswith("s3://")
            uri = reference if is_uri else Uploads(settings, tenant).put_file(Path(reference)).uri
            yield _parse_submission(
                {
                    "id": str(uuid.uuid4()),
                    "uri": uri,
                    "policy": policy,
                    "tenant": tenant,
                    "submitted_at": datetime.now(UTC),
                },
                reference,
            )


async def submit(
    submissions: Iterable[Submission], settings: Settings, on_published: Callable[[str], None] = lambda _: None
) -> int:
    """Publish submissions; calls `on_published` with the id of each once it is durable. Returns how many there were.

    Raises:
        StreamUnavailable: the stream does not answer.
    """
    publisher = await open_publisher(StreamConfig.from_settings(settings))
    count = 0
    remaining = iter(submissions)
    try:
        while True:
            batch, error = await asyncio.to_thread(_next_batch, remaining)
            await publisher.publish(
                [
                    OutgoingMessage(
                        settings.submissions_stream, submission.model_dump_json().encode(), submission.uri.encode()
                    )
                    for submission in batch
                ]
            )
            for submission in batch:
                on_published(submission.id)
            count += len(batch)
            if error:
                raise error
            if not batch:
                return count
    finally:
        await publisher.close()


async def print_verdicts(
    settings: Settings, *, follow: bool, as_json: bool, write: Callable[[str], None], progress: Callable[[str], None]
) -> None:
    """Write the verdicts on the stream, oldest first, as JSON or as one readable line each.

    Raises:
        StreamUnavailable: the stream does not answer.
    """
    reader = await open_reader(StreamConfig.from_settings(settings))
    try:
        async for message in reader.read(settings.verdicts_stream, follow=follow):
            try:
                verdict = Verdict.model_validate_json(message.value)
            except ValidationError:
                progress(f"{message.source} is not a verdict; skipped")
            else:
                write(message.value.decode() if as_json else format_verdict(verdict))
    finally:
        await reader.close()


def format_verdict(verdict: Verdict) -> str:
    """A verdict as one readable line: action, score, category, policy version, submission."""
    score = "   -" if verdict.score is None else f"{verdict.score:.2f}"
    policy = f"{verdict.policy.name}@{verdict.policy.version}" if verdict.policy else "-"
    what = verdict.category or verdict.reason or verdict.outcome
    line = f"{verdict.action or '-':<7} {score}  {what:<36} {policy:<14} {verdict.submission_id}  {verdict.uri}"
    return escape_control_chars(line)


def _next_batch(remaining: Iterator[Submission]) -> tuple[list[Submission], SluiceError | None]:
    """The next submissions, and the error after them. The submissions before the error are still published."""
    batch: list[Submission] = []
    try:
        for submission in itertools.islice(remaining, _BATCH_SUBMISSIONS):
            batch.append(submission)
    except SluiceError as error:
        return batch, error
    return batch, None


def _read_lines(lines: Iterable[bytes]) -> Iterator[Submission]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _parse_submission(decode_json(line), f"line {number}")
            except Malformed as error:
                raise ConfigurationError(f"line {number}: {error}; the lines before it were submitted") from None


def _parse_submission(document: object, where: str) -> Submission:
    try:
        return Submission.parse(document)
    except Malformed as error:
        raise ConfigurationError(f"{where} cannot be submitted: {error}") from None
