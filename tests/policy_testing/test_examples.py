"""The examples of a policy document: how each is sent to the service, and whether it meets its expectation."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pipelines.clients.judge_client import JudgeRequest, JudgeResult, Progress
from pipelines.policy_testing import examples
from pipelines.policy_testing.examples import find_mismatch, name_example, run_examples
from services.core.errors import ConfigurationError, GuardFailed, NotFound
from services.core.messages import Upload
from services.core.settings import Settings
from services.policies.document import Example, Expectation, PolicyDocument
from tests.support.verdicts import verdict_with

JPEG = b"\xff\xd8\xff"
"""The first bytes of a JPEG file."""


def expect(**fields: Any) -> Expectation:
    return Expectation.model_validate(fields)


@pytest.mark.parametrize(
    ("expected", "wrong"),
    [
        (expect(rating="Unsafe"), False),
        (expect(category="O2"), False),
        (expect(action="block"), False),
        (expect(rating="Unsafe", category="O2", action="block"), False),
        (expect(rating="Safe"), True),
        (expect(category="O6"), True),
        (expect(category="NA"), True),
        (expect(rating="Unsafe", category="O2", action="review"), True),
    ],
)
def test_expectation_is_met_or_not(expected: Expectation, wrong: bool) -> None:
    assert (find_mismatch(expected, [verdict_with()]) is not None) == wrong


def test_expectation_of_no_category_is_met() -> None:
    harmless = verdict_with(rating="Safe", category="NA: None applying", rationale=None, score=0.01, action="allow")
    assert find_mismatch(expect(category="NA", action="allow"), [harmless]) is None


def test_mismatch_names_expectation_and_result() -> None:
    assert find_mismatch(expect(rating="Safe", action="allow"), [verdict_with()]) == (
        "expected Safe, allow; got Unsafe, O2: Violence, Harm, or Cruelty, block (score 0.97)"
    )
    unreadable = verdict_with(outcome="needs_review", rating=None, category=None, score=None, action="review")
    assert find_mismatch(expect(rating="Safe"), [unreadable]) == "expected Safe; the guard's answer is unreadable"
    assert find_mismatch(expect(action="review"), [unreadable]) is None
    assert (
        find_mismatch(expect(rating="Safe"), NotFound("no such key")) == "it cannot be judged (not_found): no such key"
    )
    assert find_mismatch(expect(rating="Safe"), [GuardFailed("no")]) == "it cannot be judged (guard_failed): no"


def test_example_without_name_has_a_name_in_messages() -> None:
    drawn: dict[str, Any] = {"synthetic": {"label": "O2", "seed": 7}, "expect": {"rating": "Safe"}}
    assert name_example(Example.model_validate(drawn)) == "synthetic O2, seed 7"
    assert name_example(Example.model_validate(drawn | {"name": "a knife"})) == "a knife"
    file = Example.model_validate({"image": "pictures/a.jpg", "expect": {"rating": "Safe"}})
    assert name_example(file) == "pictures/a.jpg"


class ScriptedService:
    """Answers Unsafe to every request and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[JudgeRequest] = []
        self.batches: list[int] = []

    def judge(self, requests: Sequence[JudgeRequest], progress: Progress) -> list[JudgeResult]:
        self.requests += requests
        self.batches.append(len(requests))
        return [[verdict_with()] for _ in requests]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> ScriptedService:
    scripted = ScriptedService()
    monkeypatch.setattr(examples, "open_client", lambda _settings: nullcontext(scripted))
    return scripted


def document_of(*images: dict[str, Any]) -> PolicyDocument:
    return PolicyDocument.model_validate(
        {"name": "shop", "examples": [image | {"expect": {"rating": "Unsafe"}} for image in images]}
    )


def test_files_and_drawings_are_sent_and_objects_are_named(service: ScriptedService, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG + b"bytes of a")
    document = document_of({"image": "a.jpg"}, {"synthetic": {"label": "O2", "seed": 7}}, {"image": "s3://uploads/k"})
    lines: list[str] = []
    assert run_examples(document, tmp_path, Settings(), write=lines.append, progress=print) == 0
    file, drawing, stored = service.requests
    assert (file.image, file.submission.uri) == (JPEG + b"bytes of a", Upload.make_uri(JPEG + b"bytes of a"))
    assert drawing.image is not None
    assert drawing.image.startswith(b"\xff\xd8"), "a JPEG file"
    assert (stored.image, stored.submission.uri) == (None, "s3://uploads/k")
    assert lines == ["ok    a.jpg", "ok    synthetic O2, seed 7", "ok    s3://uploads/k"]


def test_file_larger_than_the_limit_fails_and_is_not_sent(service: ScriptedService, tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(JPEG + bytes(8))
    (tmp_path / "small.jpg").write_bytes(JPEG + bytes(7))
    document = document_of({"image": "large.jpg"}, {"image": "small.jpg"})
    lines: list[str] = []
    assert run_examples(document, tmp_path, Settings(image_limit_bytes=10), write=lines.append, progress=print) == 1
    assert [request.submission.id for request in service.requests] == ["example-2"]
    assert lines == [
        "FAIL  large.jpg: it cannot be judged (too_large): the image has 11 bytes, more than 10",
        "ok    small.jpg",
    ]


def test_many_large_files_are_judged_in_batches(
    service: ScriptedService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "_BATCH_BYTES", 20)
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(JPEG + bytes(7))
    document = document_of(*({"image": f"{number}.jpg"} for number in range(5)))
    assert run_examples(document, tmp_path, Settings(), write=lambda _line: None, progress=print) == 0
    assert service.batches == [2, 2, 1]
    assert [request.submission.id for request in service.requests] == [f"example-{n}" for n in range(1, 6)]


def test_missing_file_error_and_nothing_is_judged(service: ScriptedService, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.jpg: there is no file"):
        run_examples(document_of({"image": "absent.jpg"}), tmp_path, Settings(), write=print, progress=print)
    assert service.requests == []


def test_file_outside_the_folder_or_not_an_image_is_not_sent(service: ScriptedService, tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (tmp_path / "private.jpg").write_bytes(JPEG)
    (folder / "link.jpg").symlink_to(tmp_path / "private.jpg")
    (folder / "up").symlink_to(tmp_path)
    for image in ("../private.jpg", "link.jpg", "up/private.jpg", "../foreign/../private.jpg"):
        with pytest.raises(ConfigurationError, match="is outside"):
            run_examples(document_of({"image": image}), folder, Settings(), write=print, progress=print)
    (folder / "secret.jpg").write_bytes(b"password=hunter2")
    lines: list[str] = []
    assert run_examples(document_of({"image": "secret.jpg"}), folder, Settings(), write=lines.append, progress=print)
    assert "not_an_image" in lines[0]
    assert service.requests == []
