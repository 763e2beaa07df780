"""Calibrations: how the maps are fitted, stored, announced, applied and reverted."""

import asyncio
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from sklearn.isotonic import IsotonicRegression
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.clients.judge_client import JudgeRequest, JudgeResult, Progress
from pipelines.evaluation import run as runs
from pipelines.evaluation.calibration_fit import apply_map, count_changes, fit_calibration
from pipelines.policy_testing import rejudge as replaying
from pipelines.policy_testing.rejudge import rejudge
from pipelines.tiny_guard.drawings import draw
from services.core.calibration import CalibrationMap, IsotonicMap, PlattMap, StoredCalibration, log_odds
from services.core.errors import ConfigurationError, SluiceError, UnknownPolicy
from services.core.messages import Submission
from services.core.settings import Settings
from services.core.tenancy import UNLIMITED
from services.core.values import CATEGORIES, NO_CATEGORY, AppliedCalibration, Policy, PolicyIdentity
from services.moderation.cascade import apply_calibration
from services.policies.cache import PolicyCache
from services.policies.document import PolicyDocument
from services.policies.rollout import Rollout
from tests.support.fake_ports import POLICY, FakePorts, unsafe
from tests.support.intake_bench import IntakeBench
from tests.support.verdicts import VERDICT, verdict_with

ISOTONIC = IsotonicMap(scores=(0.2, 0.6, 0.9), probabilities=(0.1, 0.1, 0.5))
PLATT = PlattMap(slope=0.5, intercept=-1.0)
FITTED = StoredCalibration(
    version=1, revision="sha256:0", map=ISOTONIC, samples=50, unsafe=20, ece_before=0.2, ece_after=0.05
)


class TestMaps:
    def test_isotonic_map_interpolates_between_knots(self) -> None:
        found = [ISOTONIC.probability(score) for score in (0.0, 0.2, 0.4, 0.6, 0.75, 0.9, 1.0)]
        assert found == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.3, 0.5, 0.5])

    def test_platt_map_is_logistic_in_log_odds(self) -> None:
        assert PLATT.probability(0.5) == pytest.approx(1 / (1 + math.e))
        assert PLATT.probability(0.8) == pytest.approx(1 / (1 + math.exp(1 - 0.5 * math.log(4))))
        assert 0 < PLATT.probability(0.0) < PLATT.probability(1.0) < 1

    @given(st.floats(0, 1), st.floats(0, 1), st.sampled_from([ISOTONIC, PLATT]))
    def test_higher_score_never_gets_lower_probability(self, a: float, b: float, found: CalibrationMap) -> None:
        low, high = sorted((a, b))
        assert 0 <= found.probability(low) <= found.probability(high) <= 1

    def test_maps_survive_json_and_have_a_digest(self) -> None:
        adapter: TypeAdapter[Any] = TypeAdapter(CalibrationMap)
        for found in (ISOTONIC, PLATT):
            again = adapter.validate_json(found.model_dump_json())
            assert again == found
            assert again.digest == found.digest
        assert ISOTONIC.digest != PLATT.digest
        assert ISOTONIC.digest.startswith("sha256:")

    @pytest.mark.parametrize(
        "knots",
        [
            {"scores": (0.2, 0.2), "probabilities": (0.1, 0.2)},
            {"scores": (0.2, 0.3), "probabilities": (0.2, 0.1)},
            {"scores": (0.2, 0.3, 0.4), "probabilities": (0.2, 0.3)},
            {"scores": (0.2,), "probabilities": (0.2,)},
        ],
    )
    def test_isotonic_map_falling_knots_are_rejected(self, knots: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            IsotonicMap(**knots)


def labelled(count: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Scores that are overconfident: the log-odds of the truth are half of theirs, less one."""
    rng = np.random.default_rng(seed)
    score = rng.random(count)
    truth = np.array([PLATT.probability(float(s)) for s in score])
    return (rng.random(count) < truth).astype(float), score, np.arange(count)


class TestFit:
    def test_platt_fit_recovers_the_true_curve(self) -> None:
        found = fit_calibration(*labelled(5000), method="platt").map
        assert isinstance(found, PlattMap)
        assert (found.slope, found.intercept) == (pytest.approx(0.5, abs=0.07), pytest.approx(-1, abs=0.1))

    def test_platt_fit_of_separated_classes_is_bounded(self) -> None:
        # Separated classes: without his targets the slope would have no bound.
        score = np.array([0.1] * 10 + [0.9] * 10)
        found = fit_calibration((score > 0.5).astype(float), score, np.arange(20)).map
        assert isinstance(found, PlattMap)
        assert found.probability(0.9) == pytest.approx(11 / 12, abs=1e-3)
        assert found.probability(0.1) == pytest.approx(1 / 12, abs=1e-3)

    def test_isotonic_fit_matches_scikit_learn(self) -> None:
        label, score, images = labelled(1500)
        found = fit_calibration(label, score, images)
        assert found.map.method == "isotonic"
        theirs = IsotonicRegression(out_of_bounds="clip", y_min=1 / 1502, y_max=1 - 1 / 1502).fit(
            label * 0 + score, label
        )
        assert apply_map(found.map, score) == pytest.approx(theirs.predict(score), abs=0.02)
        assert min(found.map.probabilities) > 0
        assert max(found.map.probabilities) < 1

    def test_fit_lowers_calibration_error_on_other_images(self) -> None:
        for count in (300, 3000):
            found = fit_calibration(*labelled(count))
            assert found.map.method == ("platt" if count < 1000 else "isotonic")
            assert found.ece_before > 0.15
            assert found.ece_after < 0.08
            assert found.brier_after < found.brier_before

    def test_isotonic_fit_with_many_knots_is_reduced_to_the_limit(self) -> None:
        score = np.linspace(0, 1, 5000)
        label = (np.random.default_rng(0).random(5000) < score).astype(float)
        found = fit_calibration(label, score, np.arange(5000)).map
        assert isinstance(found, IsotonicMap)
        assert len(found.scores) <= 128

    def test_fit_with_too_few_images_of_a_class_is_rejected(self) -> None:
        score = np.linspace(0, 1, 60)
        with pytest.raises(ConfigurationError, match=r"takes 10 judged images of each class.*9 are Unsafe"):
            fit_calibration((np.arange(60) < 9).astype(float), score, np.arange(60))
        with pytest.raises(ConfigurationError, match="0 are Safe"):
            fit_calibration(np.ones(60), score, np.arange(60))
        with pytest.raises(ConfigurationError, match="1 are Unsafe"):
            fit_calibration((np.arange(60) < 30).astype(float), score, np.repeat([0, *range(1, 31)], [30, *[1] * 30]))

    @pytest.mark.parametrize("method", ["platt", "isotonic"])
    def test_fit_of_falling_scores_is_rejected(self, method: Any) -> None:
        score = np.linspace(0, 1, 60)
        with pytest.raises(ConfigurationError, match="does not rise with the score"):
            fit_calibration((score < 0.5).astype(float), score, np.arange(60), method=method)

    def test_count_changes_compares_actions(self) -> None:
        label, score = np.array([1.0, 1, 0, 0, 1]), np.array([0.95, 0.7, 0.95, 0.3, 0.3])
        categories = [CATEGORIES[1], CATEGORIES[1], CATEGORIES[1], NO_CATEGORY, "O7: Self-Harm"]
        found = count_changes(
            label, score, categories, ISOTONIC, POLICY
        )  # review from 0.4, block from 0.8; O7 0.1 and 0.2
        assert found.rows == {
            ("allow", "allow"): 1,
            ("review", "allow"): 1,
            ("block", "review"): 3,
        }
        assert found.changed == 4
        assert (found.unsafe_allowed, found.safe_blocked, found.safe_reviewed) == ((0, 1), (1, 0), (0, 1))


class TestRollout:
    def test_revert_restores_the_previous_calibration(self) -> None:
        once = Rollout().with_calibration(1, "r", ISOTONIC)
        twice = once.with_calibration(1, "r", PLATT).with_calibration(2, "r", ISOTONIC)
        assert twice.get_calibrations(1) == {"r": PLATT}
        assert twice.without_calibration(1, "r").get_calibrations(1) == {"r": ISOTONIC}
        assert once.without_calibration(1, "r").calibrations == {}
        assert Rollout.model_validate_json(twice.model_dump_json()) == twice
        with pytest.raises(ConfigurationError, match="no calibration"):
            once.without_calibration(1, "other")

    def test_many_calibrations_keep_the_last_three(self) -> None:
        rollout = Rollout()
        for _ in range(20):
            rollout = rollout.with_calibration(1, "r", ISOTONIC)
        assert len(rollout.calibrations[1]["r"]) == 3


class TestModeration:
    def test_calibration_of_another_checkpoint_is_not_applied(self) -> None:
        said = unsafe(0.75)
        assert apply_calibration(said, replace(POLICY, calibrations={"other": ISOTONIC})) is said
        found = apply_calibration(said, replace(POLICY, calibrations={said.model.revision: ISOTONIC}))
        assert found.score == pytest.approx(0.3)
        assert found.calibration == AppliedCalibration(digest=ISOTONIC.digest, raw_score=0.75)

    async def test_thresholds_use_the_calibrated_score(self) -> None:
        submission = Submission(id="upl-1", uri="s3://uploads/a")
        before = (await FakePorts(POLICY).build_moderator().judge(submission, UNLIMITED)).verdict
        policy = replace(POLICY, calibrations={unsafe().model.revision: ISOTONIC})
        after = (await FakePorts(policy).build_moderator().judge(submission, UNLIMITED)).verdict
        assert (before.score, before.action, before.calibration) == (0.9, "block", None)
        assert (after.score, after.action, after.rating) == (pytest.approx(0.5), "review", "Unsafe")
        assert after.calibration == AppliedCalibration(digest=ISOTONIC.digest, raw_score=0.9)
        assert after.verdict_id != before.verdict_id, "a calibrated verdict has another id"

    async def test_first_look_uses_the_calibrated_score(self) -> None:
        adaptive = PolicyDocument.model_validate({"name": "p", "effort": "adaptive", "first_look_below": 0.2})
        policy = replace(adaptive.as_version(3), calibrations={unsafe().model.revision: ISOTONIC})
        ports = FakePorts(policy)
        ports.first_look_answers = [replace(unsafe(0.45), rating="Safe", category=NO_CATEGORY)]
        verdict = (await ports.build_moderator().judge(Submission(id="upl-1", uri="s3://uploads/a"), UNLIMITED)).verdict
        assert (verdict.effort, verdict.score) == ("first_look", pytest.approx(0.1))
        for score in (0.6, 0.9):  # the first for its rating, although its calibrated score is low
            ports.first_look_answers = [unsafe(score)]
            verdict = (
                await ports.build_moderator().judge(Submission(id="upl-1", uri="s3://uploads/a"), UNLIMITED)
            ).verdict
            assert verdict.effort == "full"


class TestRegistry:
    def test_calibrate_and_revert_are_in_the_history(self, bench: IntakeBench) -> None:
        first = bench.registry.calibrate("default", FITTED, who="ann", why="labels of May")
        assert (first.action, first.previous, first.version, first.who) == ("calibrate", 1, 1, "ann")
        assert first.rollout.active == 1
        second = bench.registry.calibrate("default", FITTED.model_copy(update={"map": PLATT}), who="ann")
        assert second.rollout.get_calibrations(1) == {"sha256:0": PLATT}
        back = bench.registry.revert_calibration("default", 1, "sha256:0", who="bob")
        assert back.rollout.get_calibrations(1) == {"sha256:0": ISOTONIC}
        assert bench.registry.revert_calibration("default", 1, "sha256:0", who="bob").rollout.calibrations == {}
        assert [change.action for change in bench.registry.list_changes("default")] == ["activate", *["calibrate"] * 4]
        assert bench.registry.find_calibration("default", 1, "sha256:0", ISOTONIC.digest) == FITTED
        with pytest.raises(UnknownPolicy, match="no calibration sha256:1"):
            bench.registry.find_calibration("default", 1, "sha256:0", "sha256:1")
        with pytest.raises(UnknownPolicy):
            bench.registry.calibrate("default", FITTED.model_copy(update={"version": 9}), who="ann")
        with pytest.raises(ConfigurationError):
            bench.registry.revert_calibration("default", 1, "sha256:0", who="bob")

    def test_another_version_has_its_own_calibrations(self, bench: IntakeBench) -> None:
        bench.registry.calibrate("default", FITTED, who="ann")
        bench.registry.publish(PolicyDocument.model_validate({"name": "default", "description": "other"}))
        rollout = bench.registry.activate("default", 2, who="ann").rollout
        assert rollout.get_calibrations(2) == {}
        assert bench.registry.rollback("default", who="ann").rollout.get_calibrations(1) == {"sha256:0": ISOTONIC}


async def subscribed(bench: IntakeBench) -> None:
    """Wait until a process listens for changes of policies."""
    cache = bench.redis_cache
    for _ in range(500):
        ((_, listeners),) = await cache.client.pubsub_numsub(cache.key("changes"))
        if listeners:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("no process listens")


class TestProcesses:
    @pytest.mark.parametrize("policy", ["default", "default@1"])
    async def test_announced_calibration_is_applied_until_it_is_reverted(self, bench: IntakeBench, policy: str) -> None:
        submission = Submission(id="upl-1", uri="s3://uploads/a", policy=policy)
        async with PolicyCache(bench.registry, bench.redis_cache, refresh_s=60) as cache:

            async def becomes(expected: dict[str, Any]) -> None:
                for _ in range(100):
                    if (await cache.choose(submission)).policy.calibrations == expected:
                        return
                    await asyncio.sleep(0.02)
                raise AssertionError((await cache.choose(submission)).policy.calibrations)

            await becomes({})
            await subscribed(bench)
            await bench.redis_cache.publish_change("default", bench.registry.calibrate("default", FITTED, who="ann"))
            await becomes({"sha256:0": ISOTONIC})
            back = bench.registry.revert_calibration("default", 1, "sha256:0", who="ann")
            await bench.redis_cache.publish_change("default", back)
            await becomes({})

    async def test_new_process_applies_calibration_to_pinned_version(self, bench: IntakeBench) -> None:
        bench.registry.publish(PolicyDocument.model_validate({"name": "shop"}))
        bench.registry.calibrate("shop", FITTED, who="ann")
        async with PolicyCache(bench.registry, bench.redis_cache) as cache:
            chosen = await cache.choose(Submission(id="upl-1", uri="s3://uploads/a", policy="shop@1"))
            assert chosen.policy.calibrations == {"sha256:0": ISOTONIC}
            assert (await cache.resolve("shop@1")).calibrations == {"sha256:0": ISOTONIC}

    async def test_calibration_without_redis_is_found_by_the_refresh(self, bench: IntakeBench) -> None:
        bench.registry.publish(PolicyDocument.model_validate({"name": "shop"}))
        submission = Submission(id="upl-1", uri="s3://uploads/a", policy="shop@1")
        async with PolicyCache(bench.registry, None, refresh_s=0.05) as cache:
            assert (await cache.choose(submission)).policy.calibrations == {}
            bench.registry.calibrate("shop", FITTED, who="ann")
            for _ in range(100):
                if (await cache.choose(submission)).policy.calibrations:
                    return
                await asyncio.sleep(0.05)
            raise AssertionError("no version of shop is active, and its calibration was not found")


class ScriptedService:
    """The number in the id is the score. The policy's calibration is applied, as in the service."""

    def __init__(self) -> None:
        self.policies: list[Policy] = []

    def judge(self, requests: Sequence[JudgeRequest], _progress: Progress) -> list[JudgeResult]:
        return [self._judge(request) for request in requests]

    def _judge(self, request: JudgeRequest) -> JudgeResult:
        (policy,) = request.policies
        assert isinstance(policy, Policy)
        self.policies.append(policy)
        score = 0.75 if request.submission.id == "upl-42" else int(request.submission.id.partition("-")[2]) / 100
        calibrated = apply_calibration(replace(unsafe(score), model=VERDICT.model or unsafe().model), policy)
        return [
            verdict_with(
                rating="Unsafe" if score >= 0.5 else "Safe", score=calibrated.score, calibration=calibrated.calibration,
                category=calibrated.category if score >= 0.5 else NO_CATEGORY,
                policy=policy.identity,
            )
        ]  # fmt: skip


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> ScriptedService:
    script = ScriptedService()

    @contextmanager
    def open_client(_settings: Settings) -> Iterator[ScriptedService]:
        yield script

    monkeypatch.setattr(runs, "open_client", open_client)
    monkeypatch.setattr(replaying, "open_client", open_client)
    return script


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """100 rows whose share of Unsafe rises with the score, but only to a half, and one with a waiver."""
    rows = [
        f'{{"id": "row-{n}", "uri": "s3://uploads/{n}", "rating": "{"Unsafe" if n > 40 and n % 2 else "Safe"}"}}\n'
        for n in range(100)
    ]
    rows.append('{"id": "row-5", "uri": "s3://uploads/w", "rating": "Safe", "category": "O2", "waived": ["O2"]}\n')
    (tmp_path / "d.jsonl").write_text("".join(rows))
    return tmp_path / "d.jsonl"


@pytest.fixture
def sluice(bench: IntakeBench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    settings = bench.settings
    for name in ("policy_bucket", "redis_url", "s3_endpoint"):
        monkeypatch.setenv(f"SLUICE_{name.upper()}", str(getattr(settings, name)))
    monkeypatch.setenv("SLUICE_S3_BUCKETS", "uploads")
    monkeypatch.setenv("SLUICE_RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, ["calibrate", *arguments])
        if isinstance(result.exception, SluiceError):
            return str(result.exception)
        assert result.exit_code == 0, result.output
        return result

    return run


def test_calibrate_without_apply_stores_nothing(
    bench: IntakeBench, service: ScriptedService, data_set: Path, sluice: Any
) -> None:
    result = sluice(str(data_set))
    assert "platt over 100 samples" in result.stdout
    assert "actions that would change: " in result.stdout
    assert "Safe and blocked: 10 before, 1 after" in result.stdout
    assert "left out: 1 rows" in result.stdout
    assert "the calibration is not stored" in result.stderr
    assert [change.action for change in bench.registry.list_changes("default")] == ["activate"]


def test_calibrate_revert_after_two_fits_restores_the_first(
    bench: IntakeBench, service: ScriptedService, data_set: Path, sluice: Any
) -> None:
    assert "applied to the scores of default@1" in sluice(str(data_set), "--apply", "--why", "May").stderr
    newest = bench.registry.find_newest_change("default")
    assert newest is not None
    assert (newest.action, newest.why) == ("calibrate", "May")
    ((revision, found),) = newest.rollout.get_calibrations(1).items()
    assert revision == "r1"
    assert isinstance(found, PlattMap)
    again = sluice(str(data_set), "--method", "isotonic", "--apply", "--json")
    assert '"method": "isotonic"' in again.stdout
    assert all(not policy.calibrations for policy in service.policies), "it is fitted on the guard's own scores"
    assert "calibration reverted" in sluice("--take-back", "--policy", "default@1").stdout
    newest = bench.registry.find_newest_change("default")
    assert newest is not None
    assert newest.rollout.get_calibrations(1) == {"r1": found}
    sluice("--take-back")
    assert "has no calibration" in sluice("--take-back")


def test_calibrate_invalid_arguments_fail_with_one_sentence(
    service: ScriptedService, data_set: Path, sluice: Any, tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text("name: shop\n")
    for arguments, words in (
        ((), "name one with labelled images, or give --revert"),
        ((str(data_set), "--take-back"), "takes no data set"),
        ((str(data_set), "--policy", str(tmp_path / "p.yaml")), "is not published"),
        ((str(data_set), "--limit", "50"), "9 are Unsafe|5 are Unsafe|4 are Unsafe"),
        ((str(tmp_path / "absent.jsonl"),), "there is no data set"),
        ((str(data_set), "--policy", "default@x"), "neither NAME nor NAME@V"),
    ):
        found = sluice(*arguments)
        assert isinstance(found, str), arguments
        assert any(word in found for word in words.split("|")), found


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_links_out_of_a_foreign_data_set_send_no_private_file(
    bench: IntakeBench,
    service: ScriptedService,
    sluice: Any,
    tmp_path: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: dict[str, bytes] = {}
    judge = service.judge

    def note(requests: Sequence[JudgeRequest], progress: Progress) -> list[JudgeResult]:
        for request in requests:
            assert request.image is not None
            sent[request.submission.id] = request.image
        return judge(requests, progress)

    monkeypatch.setattr(service, "judge", note)
    private, foreign = tmp_path / "private", tmp_path / "foreign"
    private.mkdir()
    foreign.mkdir()
    picture = draw(1).jpeg
    (private / "diary.jpg").write_bytes(picture + b"private")
    (foreign / "inner").symlink_to(private)
    (foreign / "link.jpg").symlink_to(private / "diary.jpg")
    names = ["link.jpg", "inner/diary.jpg", "../private/diary.jpg", str(private / "diary.jpg")]
    rows = []
    for n in range(100):
        name = names[n] if n < len(names) else f"{n}.jpg"
        if n >= len(names):
            (foreign / name).write_bytes(picture + bytes([n]))
        rows.append(json.dumps({"id": f"row-{n}", "image": name, "rating": "Unsafe" if n > 40 and n % 2 else "Safe"}))
    (foreign / "d.jsonl").write_text("\n".join(rows))

    def run(*options: str) -> Any:
        sent.clear()
        return CliRunner().invoke(app, [command, str(foreign / "d.jsonl"), *options], catch_exceptions=False)

    more = ["--no-adaptive"] if command == "evaluate" else []
    assert run(*more).exit_code == 0
    assert sent.keys() == {f"row-{n}" for n in range(len(names), 100)}
    assert not any(data.endswith(b"private") for data in sent.values())
    assert run(*more, "--root", str(tmp_path)).exit_code == 0
    assert {f"row-{n}" for n in range(len(names))} <= {name for name, data in sent.items() if data.endswith(b"private")}


def test_replay_uses_the_calibration_of_the_verdict(bench: IntakeBench, service: ScriptedService) -> None:
    stored = bench.registry.get("default", 1)
    identity = PolicyIdentity(name="default", version=1, digest=stored.digest)
    fitted = FITTED.model_copy(update={"revision": "r1"})
    bench.registry.calibrate("default", fitted, who="ann")
    then = verdict_with(
        policy=identity, score=0.3, calibration=AppliedCalibration(digest=ISOTONIC.digest, raw_score=0.75)
    )
    before_that = verdict_with(policy=identity, score=0.75)
    bench.registry.revert_calibration("default", 1, "r1", who="ann")
    bench.registry.calibrate("default", fitted.model_copy(update={"map": PLATT}), who="ann")
    for verdict in (then, before_that):
        found = rejudge(verdict, bench.settings, lambda _line: None)
        assert [d.field for d in found.differences if d.field not in {"category", "rationale"}] == []
        assert found.after.calibration == verdict.calibration


def test_log_odds_of_zero_and_one_are_bounded() -> None:
    odds = [log_odds(score) for score in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert odds[2] == 0
    assert odds[3] == pytest.approx(math.log(3))
    assert all(a < b for a, b in itertools.pairwise(odds))
    assert odds[4] == pytest.approx(-odds[0]) == pytest.approx(13.8, abs=0.05)
