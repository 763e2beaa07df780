"""A backtest from the sample in Redis to the pictures, with a scripted service."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image

from pipelines.clients.judge_client import JudgeRequest, JudgeResult, Progress
from pipelines.policy_testing import backtest as backtesting
from services.core.errors import ConfigurationError, GuardFailed, NotFound
from services.core.settings import Settings
from services.policies.redis_cache import PolicyRedisCache
from services.policies.traffic_sample import TrafficSample
from tests.support.intake_bench import IntakeBench
from tests.support.verdicts import verdict_with

BEFORE, AFTER = "default@1", "default@2"


class ScriptedService:
    """Answers Safe under the second version to submissions named flip."""

    def judge(self, requests: Sequence[JudgeRequest], _progress: Progress) -> list[JudgeResult]:
        return [self._judge(request) for request in requests]

    def _judge(self, request: JudgeRequest) -> JudgeResult:
        submission = request.submission
        assert request.policies == (BEFORE, AFTER)
        assert submission.priority == "backfill"
        assert request.image is None, "the service fetches the object of the submission"
        before = verdict_with(submission_id=submission.id, uri=submission.uri, etag=submission.etag)
        match submission.id.partition("-")[0]:
            case "absent":
                return NotFound("there is no such key")
            case "refused":
                return [before, GuardFailed("The engine refuses it.")]
            case "flip":
                return [before, before.model_copy(update={"rating": "Safe", "action": "allow", "score": 0.02})]
        return [before, before]


@contextmanager
def _connected(_settings: Settings) -> Iterator[ScriptedService]:
    yield ScriptedService()


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backtesting, "open_client", _connected)


async def _sample(bench: IntakeBench, keys: dict[str, str]) -> None:
    """Add submissions to the sample: their ids, and the keys of their objects."""
    shared = PolicyRedisCache(bench.settings.redis_url, bench.settings.policy_bucket)
    sample = TrafficSample(shared, size=100)
    for name, key in keys.items():
        found = bench.s3.head_object(Bucket="uploads", Key=key)["ETag"].strip('"')
        sample.add(verdict_with(submission_id=name, uri=f"s3://uploads/{key}", etag=found))
    await sample.flush()
    await shared.close()


def _run(bench: IntakeBench, **fields: Any) -> Any:
    fields = {"count": 100, "pictures": True} | fields
    return backtesting.backtest(before=BEFORE, after=AFTER, settings=bench.settings, progress=lambda _: None, **fields)


def _encoded(kind: str, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side // 2), "red").save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
async def sampled(bench: IntakeBench) -> IntakeBench:
    """Two submissions whose action flips, one whose object has changed since, three others."""
    for key, data in {
        "large": _encoded("JPEG", 900),
        "small": _encoded("PNG", 64),
        "tiny": _encoded("JPEG", 2),
    }.items():
        bench.put(key, data)
    await _sample(
        bench,
        {"flip-1": "large", "flip-2": "small", "flip-3": "tiny", "same": "small", "absent": "tiny", "refused": "tiny"},
    )
    bench.put("tiny", _encoded("JPEG", 8))
    return bench


def test_backtest_pairs_verdicts_and_shows_flips(sampled: IntakeBench) -> None:
    report, pairs = _run(sampled)
    assert (report.pairs, report.judged_both, report.action_flips.count) == (6, 4, 3)
    assert report.failures_before.by_reason == {"not_found": 1}
    assert sorted(report.failures_after.by_reason) == ["guard_failed", "not_found"]
    pictures = {pair.submission_id: pair.picture for pair in pairs}
    assert {name for name, picture in pictures.items() if picture} == {"flip-1", "flip-2"}
    for name in ("flip-1", "flip-2"):
        with Image.open(io.BytesIO(pictures[name] or b"")) as image:
            assert image.format == "JPEG"
            assert max(image.size) == (320 if name == "flip-1" else 63)


def test_backtest_count_and_no_pictures_limit_the_pairs(sampled: IntakeBench) -> None:
    report, pairs = _run(sampled, pictures=False, count=3)
    assert report.pairs == len(pairs) == 3
    assert all(pair.picture is None for pair in pairs)


def test_backtest_without_a_sample_fails(bench: IntakeBench) -> None:
    with pytest.raises(ConfigurationError, match="there is no sample of policy default yet"):
        _run(bench)
