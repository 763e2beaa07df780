"""Runs a backtest: a sample of recent submissions, judged by the running service under two policy versions."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from pipelines.clients.judge_client import JudgeRequest, JudgeResult, Progress, open_client
from pipelines.policy_testing.backtest_html import PICTURES_LIMIT
from pipelines.policy_testing.backtest_report import BacktestReport, Side, VerdictPair, summarize
from services.core.errors import ConfigurationError, Unavailable, Unjudgeable
from services.core.messages import ObjectReference, Verdict
from services.core.settings import Settings
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore
from services.policies.redis_cache import PolicyRedisCache
from services.policies.reference import PolicyReference
from services.policies.traffic_sample import SampledSubmission, draw

_PICTURE_PX: Final = 320
_AT_A_TIME: Final = 8


def backtest(
    *, before: str, after: str, count: int, pictures: bool, settings: Settings, progress: Progress
) -> tuple[BacktestReport, list[VerdictPair]]:
    """What would change if `after` judged instead of `before`, two versions such as `default@3`.

    `count` submissions at most, out of those that the name of `after` has judged; each is judged once under both, in
    one call, so that the engine reads its image once. With `pictures`, the pairs that flip have one.

    Raises:
        ConfigurationError: there is no submission to judge, or no service runs.
        RedisUnavailable: Redis does not answer.
    """
    name = PolicyReference.parse(after).name
    sample, per_day = asyncio.run(_take(name, count, settings))
    if not sample:
        raise ConfigurationError(
            f"there is no sample of policy {name} yet; it is made of the submissions that it judges, so submit some"
        )
    with open_client(settings) as service:
        progress(f"judging {len(sample)} recent submissions under {before} and {after}")
        outcomes = service.judge([JudgeRequest(entry.submission(), (before, after)) for entry in sample], progress)
    pairs = [pair(entry, outcome) for entry, outcome in zip(sample, outcomes, strict=True)]
    report = summarize(pairs, before=before, after=after, per_day=per_day)
    if pictures and report.flips:
        progress("fetching the pictures of what flips")
        pairs = asyncio.run(_with_pictures(report, pairs, settings))
    return report, pairs


def pair(entry: SampledSubmission, outcome: JudgeResult) -> VerdictPair:
    """One submission of the sample as a pair, without a picture."""
    answers = outcome if isinstance(outcome, list) else [outcome, outcome]
    before, after = map(_side, answers)
    return VerdictPair(entry.id, entry.uri, before, after, None)


def _side(answer: Verdict | Unjudgeable) -> Side:
    return Side(answer, None) if isinstance(answer, Verdict) else Side(None, f"{answer.reason}: {answer}")


async def _take(name: str, count: int, settings: Settings) -> tuple[list[SampledSubmission], float | None]:
    shared = PolicyRedisCache(settings.redis_url, settings.policy_bucket)
    try:
        return await draw(shared, name, count)
    finally:
        await shared.close()


async def _with_pictures(report: BacktestReport, pairs: Iterable[VerdictPair], settings: Settings) -> list[VerdictPair]:
    """The pairs, with a picture for as many of the flips as a page shows, in its order."""
    flips = [(flip.submission_id, flip.uri) for group in report.flip_groups for flip in group.flips]
    shown = frozenset(flips[:PICTURES_LIMIT])
    store, preparer = ObjectStore(settings), DecoderPool(settings, _PICTURE_PX)
    places = asyncio.Semaphore(_AT_A_TIME)

    async def with_picture(pair: VerdictPair) -> VerdictPair:
        verdict = pair.after.verdict
        if verdict is None or (pair.submission_id, pair.uri) not in shown:
            return pair
        async with places:
            return replace(pair, picture=await _picture(verdict, store, preparer))

    try:
        return list(await asyncio.gather(*map(with_picture, pairs)))
    finally:
        preparer.close()
        store.close()


async def _picture(verdict: Verdict, store: ObjectStore, preparer: DecoderPool) -> bytes | None:
    """A JPEG of what was judged, None where it cannot be had any more."""
    try:
        reference = ObjectReference.from_uri(verdict.uri, version_id=verdict.version_id, etag=verdict.etag)
        async with store.open(reference) as stored:
            image = await preparer.prepare(stored.data)
            if image.data == stored.data:
                # A small image is passed on as it is; what strangers uploaded does not go into anyone's browser.
                image = await preparer.downscale(image, max(image.width, image.height) - 1)
            return image.data
    except (Unjudgeable, Unavailable, ValueError):  # the URI of an upload names no object
        return None
