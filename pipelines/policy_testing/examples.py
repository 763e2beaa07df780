"""Judges the examples of a policy document on the running service, before the document is published."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from pipelines.clients.judge_client import JudgeClient, JudgeRequest, JudgeResult, Progress, open_client
from pipelines.clients.local_images import read_local_image
from services.core.errors import ConfigurationError, Forbidden, NotAnImage, NotFound, TooLarge
from services.core.messages import Submission, Verdict
from services.core.settings import Settings
from services.core.values import Policy
from services.policies.document import Example, Expectation, PolicyDocument

_BATCH_BYTES: Final = 64 << 20


def run_examples(
    document: PolicyDocument, folder: Path, settings: Settings, *, write: Callable[[str], None], progress: Progress
) -> int:
    """Judge every example and write a line for each. Returns the number of examples that failed.

    Paths of files are relative to `folder`. Files and drawings travel with the request, so nothing is uploaded.

    Raises:
        ConfigurationError: a file cannot be read, or no service runs.
    """
    examples = document.examples
    if not examples:
        write(f"{document.name} has no examples")
        return 0
    for example in examples:
        if file := _find_file(example, folder):
            with suppress(TooLarge, NotAnImage):
                _read(example, file, folder, settings.image_limit_bytes)
    with open_client(settings) as service:
        results = _judge(service, examples, document.as_version(0), folder, settings.image_limit_bytes, progress)
    mismatches = [find_mismatch(example.expect, result) for example, result in zip(examples, results, strict=True)]
    for example, mismatch in zip(examples, mismatches, strict=True):
        write(f"FAIL  {name_example(example)}: {mismatch}" if mismatch else f"ok    {name_example(example)}")
    return sum(mismatch is not None for mismatch in mismatches)


def find_mismatch(expected: Expectation, result: JudgeResult) -> str | None:
    """How a result differs from the expectation; None if it meets it."""
    if not isinstance(result, list):
        return f"it cannot be judged ({result.reason}): {result}"
    (verdict,) = result
    if not isinstance(verdict, Verdict):
        return f"it cannot be judged ({verdict.reason}): {verdict}"
    code = verdict.category.partition(":")[0] if verdict.category else None
    if (
        expected.rating in (None, verdict.rating)
        and expected.category in (None, code)
        and expected.action in (None, verdict.action)
    ):
        return None
    wanted = ", ".join(part for part in (expected.rating, expected.category, expected.action) if part)
    if verdict.rating is None or verdict.score is None:
        return f"expected {wanted}; the guard's answer is unreadable"
    return f"expected {wanted}; got {verdict.rating}, {verdict.category}, {verdict.action} (score {verdict.score:.2f})"


def name_example(example: Example) -> str:
    """The name of an example in messages."""
    drawn = example.synthetic
    return example.name or example.image or (f"synthetic {drawn.label}, seed {drawn.seed}" if drawn else "")


def _judge(
    service: JudgeClient,
    examples: Sequence[Example],
    policy: Policy,
    folder: Path,
    limit_bytes: int,
    progress: Progress,
) -> list[JudgeResult]:
    """Judge the examples in batches of about 64 MiB of images."""
    results: dict[int, JudgeResult] = {}
    batch: dict[int, JudgeRequest] = {}
    for number, example in enumerate(examples, start=1):
        request = _make_request(number, example, policy, folder, limit_bytes)
        if isinstance(request, TooLarge | NotAnImage):
            results[number] = request
        else:
            batch[number] = request
        if number == len(examples) or sum(len(each.image or b"") for each in batch.values()) >= _BATCH_BYTES:
            results |= zip(batch, service.judge(list(batch.values()), progress), strict=True)
            batch.clear()
    return [results[number] for number in sorted(results)]


def _make_request(
    number: int, example: Example, policy: Policy, folder: Path, limit_bytes: int
) -> JudgeRequest | TooLarge | NotAnImage:
    """The request to judge one example, with its file or drawing; an error if the file must not be sent.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    name = f"example-{number}"
    if file := _find_file(example, folder):
        try:
            return JudgeRequest.of_bytes(name, _read(example, file, folder, limit_bytes), policy)
        except (TooLarge, NotAnImage) as error:
            return error
    if example.synthetic:
        return JudgeRequest.of_bytes(name, _draw(example), policy)
    return JudgeRequest(Submission(id=name, uri=example.image or "", policy=policy.identity.name), (policy,))


def _read(example: Example, file: Path, folder: Path, limit_bytes: int) -> bytes:
    try:
        return read_local_image(file, folder, limit_bytes)
    except (Forbidden, NotFound) as error:
        raise ConfigurationError(f"{name_example(example)}: {error}") from None


def _find_file(example: Example, folder: Path) -> Path | None:
    return folder / example.image if example.image and not example.image.startswith("s3://") else None


def _draw(example: Example) -> bytes:
    from pipelines.tiny_guard.drawings import draw  # noqa: PLC0415 - it loads NumPy

    assert example.synthetic is not None
    return draw(example.synthetic.seed, example.synthetic.category).jpeg
