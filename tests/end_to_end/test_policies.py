"""Policies from the first draft to the rollback, as a user of `sluice up --embedded` handles them."""

import getpass
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.tiny_guard.drawings import draw
from services.core.values import CATEGORIES, NO_CATEGORY
from tests.end_to_end.outside import SLUICE, RedisStream, Service

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(1200)]

DOCUMENTS = Path(__file__).parents[2] / "services" / "policies" / "documents"
VIOLENCE = CATEGORIES[1]
MARKET = ("--policy", "market")
WITHIN_S = 300.0


class User:
    """A user with a terminal in the folder of a running service."""

    def __init__(self, folder: Path, stream: RedisStream) -> None:
        self.folder = folder
        self._stream = stream

    def runs(self, *arguments: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a `sluice` command. It must end with this status, without a traceback and without output of Ray.

        `status` None stands for any status.
        """
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLUICE_", "AWS_", "RAY_"))
        }
        done = subprocess.run(
            [SLUICE, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=WITHIN_S,
        )
        assert status in (None, done.returncode), f"{arguments}:\n{done.stdout}\n{done.stderr}"
        assert not any(word in done.stdout + done.stderr for word in ("Traceback", "[33m", "gcs_client", "(raylet)"))
        return done

    def prints(self, *arguments: str) -> list[dict[str, Any]]:
        """Run a `sluice` command that prints one JSON object per line."""
        return [json.loads(line) for line in self.runs(*arguments).stdout.splitlines()]

    def publishes(self, name: str, changes: dict[str, Any]) -> str:
        """Publish the active version of a policy with changes, and return the name of the new version."""
        document = yaml.safe_load(self.runs("policy", "show", name).stdout) | changes
        file = self.folder / "draft.yaml"
        file.write_text(yaml.safe_dump(document))
        self.runs("policy", "check", str(file))
        return self.runs("policy", "publish", str(file)).stdout.split()[0]

    def submits(self, labels: list[str], *options: str) -> dict[str, dict[str, Any]]:
        """Submit newly drawn images, and return the verdicts by submission id in the order of the labels."""
        files = []
        for number, label in enumerate(labels):
            file = self.folder / f"{time.time_ns()}.jpg"
            file.write_bytes(draw(time.time_ns() % 900_000_000 + number, label).jpeg)
            files.append(str(file))
        ids = self.runs("submit", *files, *options).stdout.split()
        assert len(ids) == len(labels)
        deadline = time.monotonic() + WITHIN_S
        while True:
            found = {verdict["submission_id"]: verdict for verdict in self.reads("verdicts")}
            if found.keys() >= set(ids):
                return {name: found[name] for name in ids}
            assert time.monotonic() < deadline, f"{len(found.keys() & set(ids))} of {len(ids)} were judged"
            time.sleep(0.5)

    def submits_until(self, accepted: Callable[[dict[str, Any]], bool], *options: str) -> None:
        """Submit one image after the other until the verdict on one is as expected: the service has read a change."""
        deadline = time.monotonic() + WITHIN_S
        while True:
            (verdict,) = self.submits([NO_CATEGORY], *options).values()
            if accepted(verdict):
                return
            assert time.monotonic() < deadline, f"the last verdict was {verdict}"

    def submits_until_version(self, version: int, *options: str) -> None:
        self.submits_until(lambda verdict: verdict["policy"]["version"] == version, *options)

    def shadowed(self) -> set[str]:
        """The ids of submissions with a shadow verdict."""
        return {verdict["submission_id"] for verdict in self.reads("shadow-verdicts")}

    def reads(self, stream: str) -> list[dict[str, Any]]:
        return [json.loads(entry.value) for entry in self._stream.read(stream)]


def versions(verdicts: dict[str, dict[str, Any]]) -> set[int]:
    return {verdict["policy"]["version"] for verdict in verdicts.values()}


@pytest.fixture(scope="module")
def user(service: Service) -> User:
    settings = service.wait_until_ready()
    assert settings["SLUICE_RAY_ADDRESS"]
    return User(service.folder, RedisStream(settings["SLUICE_STREAM_URL"]))


def test_policy_version_from_draft_to_rollback(user: User) -> None:
    # The built-in policy is active. The user makes one of their own of it.
    listed = {policy["name"]: policy for policy in user.prints("policy", "list", "--json")}
    assert listed["default"]["active"] == 1
    assert "default" in user.runs("policy", "list").stdout
    shown = yaml.safe_load(user.runs("policy", "show", "default").stdout)
    assert (shown["name"], shown["version"]) == ("default", 1)
    assert [(change["action"], change["who"]) for change in user.prints("policy", "history", "default", "--json")] == [
        ("activate", "sluice")
    ]
    assert user.publishes("default", {"name": "market"}) == "market@1"
    user.runs("policy", "activate", "market@1")

    # A second version judges nothing yet.
    assert user.publishes("market", {"categories": {"O2": "waive"}}) == "market@2"
    compared = user.runs("policy", "diff", "market@1", "market@2").stdout
    assert "Category O2 is declared as non-violating" in compared
    labels = [VIOLENCE] * 10 + [NO_CATEGORY] * 14 + [label for label in CATEGORIES if label != VIOLENCE] * 2
    before = user.submits(labels, *MARKET)
    assert versions(before) == {1}
    violent = {name for name, verdict in list(before.items())[:10] if verdict["action"] == "block"}
    assert len(violent) >= 8, "tiny knows violence when it sees it"
    published, shadowed = len(user.reads("verdicts")), len(user.reads("shadow-verdicts"))

    # A backtest of these submissions. Once a second the service adds new ones to the sample.
    page = user.folder / "page.html"
    against = ("policy", "backtest", "market@2", "--against", "market@1")
    deadline = time.monotonic() + WITHIN_S
    while True:
        tried = user.runs(*against, "--json", "--html", str(page), "--max-errors", "0", status=None)
        if tried.returncode == 0 and json.loads(tried.stdout)["pairs"] == len(labels):
            break
        assert time.monotonic() < deadline, f"{tried.stdout}\n{tried.stderr}"
    report = json.loads(tried.stdout)
    assert report["judged_both"] == len(labels)
    flipped = {
        flip["submission_id"]
        for group in report["flip_groups"]
        if group["before"] == "block" and group["after"] == "allow"
        for flip in group["flips"]
    }
    assert len(flipped & violent) >= 0.8 * len(violent), "what is waived is allowed"
    assert len(flipped - violent) <= 2
    assert report["exceeded"] == []
    assert page.read_text().count("<img ") == report["action_flips"]["count"] + sum(
        len(group["flips"]) for group in report["flip_groups"] if group["before"] == group["after"]
    )
    refused = user.runs(*against, "--sample", "20", "--max-flips", "0", status=1)
    assert "The share of submissions whose action flips is" in refused.stderr
    assert "market@1 → market@2: 20 submissions, 20 judged under both" in refused.stdout
    assert len(user.reads("verdicts")) == published, "a backtest publishes nothing"
    assert len(user.reads("shadow-verdicts")) == shadowed

    # A shadow judges live submissions for comparison.
    user.runs("policy", "shadow", "market@2", "--why", "compare")
    user.submits_until(lambda verdict: verdict["submission_id"] in user.shadowed(), *MARKET)
    shadowed = len(user.reads("shadow-verdicts"))
    assert versions(user.submits([VIOLENCE] * 4, *MARKET)) == {1}
    shadows = user.reads("shadow-verdicts")[shadowed:]
    assert [shadow["policy"]["version"] for shadow in shadows] == [2] * 4
    assert sum(shadow["action"] == "allow" for shadow in shadows) >= 3
    user.runs("policy", "shadow", "market")

    # The new version judges the images of one tenant, then all images, then none.
    user.runs("policy", "canary", "market@2", "--tenant", "shop")
    user.submits_until_version(2, *MARKET, "--tenant", "shop")
    assert versions(user.submits([NO_CATEGORY] * 2, *MARKET, "--tenant", "shop")) == {2}
    assert versions(user.submits([NO_CATEGORY] * 2, *MARKET, "--tenant", "news")) == {1}
    user.runs("policy", "activate", "market@2", "--why", "the figures are good")
    user.submits_until_version(2, *MARKET)
    after = user.submits([VIOLENCE] * 4, *MARKET)
    assert versions(after) == {2}
    assert sum(verdict["action"] == "allow" for verdict in after.values()) >= 3
    user.runs("policy", "rollback", "market", "--why", "the phone does not stop ringing", "--who", "ada")
    user.submits_until_version(1, *MARKET)
    history = user.prints("policy", "history", "market", "--json")
    assert [(change["action"], change["from"], change["to"]) for change in history] == [
        ("activate", None, 1),
        ("shadow", None, 2),
        ("shadow", 2, None),
        ("canary", None, 2),
        ("activate", 1, 2),
        ("rollback", 2, 1),
    ]
    assert [change["who"] for change in history] == [*[getpass.getuser()] * 5, "ada"]
    assert history[-1]["why"] == "the phone does not stop ringing"


def test_examples_of_a_document_are_judged_and_mismatches_fail(user: User) -> None:
    names = [example["name"] for example in yaml.safe_load((DOCUMENTS / "marketplace.yaml").read_text())["examples"]]
    checked = user.runs("policy", "check", str(DOCUMENTS / "marketplace.yaml"), "--examples")
    assert [line for line in checked.stdout.splitlines() if line.startswith("ok ")] == [f"ok    {n}" for n in names]

    # Examples of files and of an absent object that fail.
    (user.folder / "pictures").mkdir()
    (user.folder / "pictures" / "knife.jpg").write_bytes(draw(4711, VIOLENCE).jpeg)
    file = user.folder / "shop.yaml"
    examples = [
        {"image": "pictures/knife.jpg", "expect": {"rating": "Unsafe", "category": "O2", "action": "block"}},
        {"image": "pictures/knife.jpg", "expect": {"rating": "Safe"}, "name": "a knife"},
        {"image": "s3://uploads/absent.jpg", "expect": {"rating": "Safe"}},
    ]
    file.write_text(yaml.safe_dump({"name": "shop", "examples": examples}))
    failed = user.runs("policy", "check", str(file), "--examples", status=1)
    first, second, third = failed.stdout.splitlines()
    assert first == "ok    pictures/knife.jpg"
    assert second.startswith("FAIL  a knife: expected Safe; got Unsafe, O2: ")
    assert third.startswith("FAIL  s3://uploads/absent.jpg: it cannot be judged (not_found)")
    assert failed.stderr.strip().endswith("2 of 3 examples did not come out as expected")


def test_replay_of_a_verdict_reproduces_it_and_publishes_nothing(user: User) -> None:
    (verdict,) = user.submits([VIOLENCE]).values()
    count = len(user.reads("verdicts"))
    replayed = user.runs("replay", verdict["verdict_id"], "--json")
    found = json.loads(replayed.stdout)
    assert (found["reproduced"], found["differences"]) == (True, [])
    assert found["after"]["verdict_id"] == verdict["verdict_id"]
    assert f"verdict {verdict['verdict_id']} was reproduced" in replayed.stderr
    assert verdict["uri"] in user.runs("replay", verdict["verdict_id"]).stdout
    assert len(user.reads("verdicts")) == count, "a replay publishes nothing"
    assert "there is no verdict nobody" in user.runs("replay", "nobody", status=1).stderr


def test_backtest_without_a_version_or_a_sample_fails(user: User) -> None:
    unknown = user.runs("policy", "backtest", "default@99", "--against", "default@1", status=1)
    assert unknown.stderr.strip() == "sluice: policy default@99 does not exist"
    user.publishes("default", {"name": "new"})
    unseen = user.runs("policy", "backtest", "new@1", "--against", "default@1", status=1)
    assert "there is no sample of policy new yet" in unseen.stderr


def test_annotation_on_the_guard_of_the_service_gives_the_verdicts_of_the_stream(user: User) -> None:
    """Every field of a verdict that depends on the image and the policy is the same."""
    verdicts = user.submits([VIOLENCE, NO_CATEGORY, VIOLENCE], "--policy", "default@1")
    fields = {"submission_id": "id", "uri": "uri", "version_id": "version_id", "etag": "etag"}
    lines = [json.dumps({own: verdict[name] for name, own in fields.items()}) for verdict in verdicts.values()]
    (user.folder / "references.jsonl").write_text("\n".join(lines))
    annotated = user.runs("annotate", "references.jsonl", "--out", "annotations", "--policy", "default@1", "--json")
    assert json.loads(annotated.stdout)["outcome"] == {"verdict": 3}
    assert "judging with the guard of the running service" in annotated.stderr
    rows = pq.read_table(user.folder / "annotations").to_pylist()
    assert {row["submission_id"] for row in rows} == set(verdicts)
    for row in rows:
        verdict = verdicts[row["submission_id"]]
        same = ("verdict_id", "rating", "category", "rationale", "action", "policy", "model", "sha256", "image")
        assert {name: row[name] for name in same} == {name: verdict[name] for name in same}
        assert row["score"] == pytest.approx(verdict["score"], abs=1e-3)
