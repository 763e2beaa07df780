"""Runs a backtest: the running service judges a sample of recent submissions under two policy versions."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from pipelines.clients.judge_client import JudgeRequest, JudgeResult, Progress, open_client
from pipelines.policy_testing.backtest_html import PICTURES_LIMIT
from pipelines.policy_testing.backtest_report import BacktestReport, Side, VerdictPair, build_report
from services.core.errors import ConfigurationError, Unavailable, Unjudgeable
from services.core.messages import ObjectReference, Verdict
from services.core.settings import Settings
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore
from services.policies.redis_cache import PolicyRedisCache
from services.policies.reference import PolicyReference
from services.policies.traffic_sample import SampledSubmission, draw_sample

_PICTURE_PX: Final = 320
_READS_IN_FLIGHT: Final = 8


def backtest(
    *, before: str, after: str, count: int, pictures: bool, settings: Settings, progress: Progress
) -> tuple[BacktestReport, list[VerdictPair]]:
    """Compare the policy version `after` with `before`; both are references such as `default@3`.

    The sample has at most `count` submissions that the policy of `after` has judged. Each is judged under both versions
    in one call, so the engine reads its image once. With `pictures`, pairs whose verdicts differ have a picture.

    Raises:
        ConfigurationError: there is no submission to judge, or no service runs.
        RedisUnavailable: Redis does not answer.
    """
    name = PolicyReference.parse(after).name
    sample, per_day = asyncio.run(_draw_sample(name, count, settings))
    if not sample:
        raise ConfigurationError(
            f"there is no sample of policy {name} yet; the sample is taken from the submissions that it judges, so "
            "submit some and try again"
        )
    with open_client(settings) as service:
        progress(f"judging {len(sample)} recent submissions under {before} and {after}")
        results = service.judge([JudgeRequest(entry.to_submission(), (before, after)) for entry in sample], progress)
    pairs = [_make_pair(entry, result) for entry, result in zip(sample, results, strict=True)]
    report = build_report(pairs, before=before, after=after, per_day=per_day)
    if pictures and report.flips:
        progress("fetching pictures of the submissions whose verdicts differ")
        pairs = asyncio.run(_add_pictures(report, pairs, settings))
    return report, pairs


def _make_pair(entry: SampledSubmission, result: JudgeResult) -> VerdictPair:
    """The verdicts of one submission, without a picture."""
    answers = result if isinstance(result, list) else [result, result]
    before, after = map(_make_side, answers)
    return VerdictPair(entry.id, entry.uri, before, after, None)


def _make_side(answer: Verdict | Unjudgeable) -> Side:
    return Side(answer, None) if isinstance(answer, Verdict) else Side(None, f"{answer.reason}: {answer}")


async def _draw_sample(name: str, count: int, settings: Settings) -> tuple[list[SampledSubmission], float | None]:
    redis_cache = PolicyRedisCache.from_settings(settings)
    try:
        return await draw_sample(redis_cache, name, count)
    finally:
        await redis_cache.close()


async def _add_pictures(report: BacktestReport, pairs: Iterable[VerdictPair], settings: Settings) -> list[VerdictPair]:
    """The pairs, with pictures for the first flips, as many as the page shows."""
    flips = [(flip.submission_id, flip.uri) for group in report.flip_groups for flip in group.flips]
    shown = frozenset(flips[:PICTURES_LIMIT])
    store, preparer = ObjectStore(settings), DecoderPool(settings, _PICTURE_PX)
    slots = asyncio.Semaphore(_READS_IN_FLIGHT)

    async def with_picture(pair: VerdictPair) -> VerdictPair:
        verdict = pair.after.verdict
        if verdict is None or (pair.submission_id, pair.uri) not in shown:
            return pair
        async with slots:
            return replace(pair, picture=await _fetch_picture(verdict, store, preparer))

    try:
        return list(await asyncio.gather(*map(with_picture, pairs)))
    finally:
        preparer.close()
        store.close()


async def _fetch_picture(verdict: Verdict, store: ObjectStore, preparer: DecoderPool) -> bytes | None:
    """A JPEG of the judged image; None if the image is not readable any more."""
    try:
        reference = ObjectReference.from_uri(verdict.uri, version_id=verdict.version_id, etag=verdict.etag)
        async with store.open(reference) as stored:
            image = await preparer.prepare(stored.data)
            if image.data == stored.data:
                # The pool returns a small image unchanged. No uploaded file may get into a browser, so encode it again.
                image = await preparer.downscale(image, max(image.width, image.height) - 1)
            return image.data
    except (Unjudgeable, Unavailable, ValueError):  # the URI of an upload names no object
        return None
