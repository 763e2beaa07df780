"""The examples of a policy document, judged by the running service before the document is published."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import typer

from pipelines.clients.judge_client import JudgeRequest, JudgeResult, open_client
from pipelines.clients.uploads import Uploads
from services.core.errors import ConfigurationError
from services.core.messages import ObjectReference, Submission, Verdict
from services.core.settings import Settings
from services.policies.document import Example, Expectation, PolicyDocument

_FOLDER: Final = "policy-examples"


def run_examples(document: PolicyDocument, folder: Path, settings: Settings, write: Callable[[str], None]) -> int:
    """Judge every example and write a line on each; return how many came out otherwise than expected.

    Files, seen from `folder`, and drawn images lie in the first bucket of SLUICE_S3_BUCKETS meanwhile.

    Raises:
        ConfigurationError: a file cannot be read, or no service runs.
        StoreUnavailable: an image cannot be uploaded, or not be removed again.
    """
    examples = document.examples
    if not examples:
        write(f"{document.name} has no examples")
        return 0
    for example in examples:
        if (file := _file(example, folder)) and not file.is_file():
            raise ConfigurationError(f"{name_of(example)}: there is no file {file}")
    with open_client(settings) as service, _stored(examples, folder, settings) as references:
        policy = document.as_version(0)
        trials = [
            JudgeRequest(
                Submission(
                    id=f"example-{number}",
                    uri=reference.uri,
                    version_id=reference.version_id,
                    etag=reference.etag,
                    policy=document.name,
                ),
                (policy,),
            )
            for number, reference in enumerate(references, start=1)
        ]
        outcomes = service.judge(trials, progress=lambda line: typer.echo(line, err=True))
    problems = [problem(example.expect, outcome) for example, outcome in zip(examples, outcomes, strict=True)]
    for example, wrong in zip(examples, problems, strict=True):
        write(f"FAIL  {name_of(example)}: {wrong}" if wrong else f"ok    {name_of(example)}")
    return sum(wrong is not None for wrong in problems)


def problem(expected: Expectation, outcome: JudgeResult) -> str | None:
    """What came instead of what was expected, None where it is what was expected."""
    if not isinstance(outcome, list):
        return f"it cannot be judged ({outcome.reason}): {outcome}"
    (verdict,) = outcome
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
        return f"expected {wanted}; the guard's answer could not be read"
    return f"expected {wanted}; came {verdict.rating}, {verdict.category}, {verdict.action} (score {verdict.score:.2f})"


def name_of(example: Example) -> str:
    """What an example is called in messages."""
    drawn = example.synthetic
    return example.name or example.image or (f"synthetic {drawn.label}, seed {drawn.seed}" if drawn else "")


@contextmanager
def _stored(examples: Sequence[Example], folder: Path, settings: Settings) -> Iterator[list[ObjectReference]]:
    """Where the image of each example lies; what was uploaded for it is removed at the end."""
    uploads = Uploads(settings, _FOLDER)
    with ExitStack() as stack:

        def passing(reference: ObjectReference) -> ObjectReference:
            stack.callback(uploads.remove, reference)
            return reference

        references = []
        for example in examples:
            if file := _file(example, folder):
                references.append(passing(uploads.put_file(file)))
            elif example.synthetic:
                references.append(passing(uploads.put("drawn.jpg", _drawn(example))))
            else:
                bucket, _, key = (example.image or "").removeprefix("s3://").partition("/")
                references.append(ObjectReference(bucket=bucket, key=key))
        yield references


def _file(example: Example, folder: Path) -> Path | None:
    return folder / example.image if example.image and not example.image.startswith("s3://") else None


def _drawn(example: Example) -> bytes:
    from pipelines.tiny_guard.drawings import draw  # noqa: PLC0415 - it takes NumPy

    assert example.synthetic is not None
    return draw(example.synthetic.seed, example.synthetic.category).jpeg
