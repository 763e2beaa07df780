"""A short storm with each kind of delivery, and the faults that a seed decides."""

import asyncio
from pathlib import Path

import pytest

from tests.faults.backends import Delivery
from tests.faults.run import DELIVERIES, Plan, storm
from tests.faults.schedule import KINDS, schedule
from tests.support.servers import require_kafka

_SEED = 20_261
_SUBMISSIONS = 1_000


@pytest.mark.kafka
@pytest.mark.timeout(400)
@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_storm_of_faults_leaves_one_outcome_for_each_submission(delivery: Delivery, tmp_path: Path) -> None:
    await asyncio.to_thread(require_kafka)
    report = await storm(Plan(_SEED, _SUBMISSIONS, delivery), tmp_path / "storm", print)
    assert report.findings.sentences() == [], report.table()


def test_schedule_same_seed_repeats_and_each_round_has_every_kind() -> None:
    faults = schedule(7, 3)
    assert faults == schedule(7, 3)
    assert faults != schedule(8, 3)
    for n in range(3):
        assert {fault.kind for fault in faults[n * len(KINDS) : (n + 1) * len(KINDS)]} == set(KINDS)
