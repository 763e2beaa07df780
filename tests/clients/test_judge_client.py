"""Commands judge on a scripted service, which runs on a real Ray cluster in another process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.clients.judge_client import JudgeClient, JudgeRequest, JudgeResult, open_client
from services.core.errors import ConfigurationError, GuardFailed, NotFound, SluiceError
from services.core.messages import Submission, Verdict
from services.core.processes import SupervisedProcess
from services.core.settings import Settings
from services.policies.document import BUILT_IN
from tests.support.command_line import SLUICE

pytestmark = pytest.mark.ray

_START_S = 150.0


class ScriptedService:
    """A Ray cluster with a scripted application, in its own process."""

    def __init__(self, folder: Path, application: str = "sluice") -> None:
        self._deploys = folder / "address.deploy"
        address = folder / "address"
        self.child = SupervisedProcess(
            [sys.executable, "-m", "tests.support.fake_service", str(address), application],
            log=folder / "log",
            env={name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
        )
        deadline = time.monotonic() + _START_S
        while not address.exists() or not address.read_text():
            assert time.monotonic() < deadline, self.child.tail()
            time.sleep(0.1)
        self.settings = Settings(ray_address=address.read_text())

    def deploy(self, application: str) -> None:
        """Deploy one more application on the cluster."""
        self._deploys.write_text(application)
        deadline = time.monotonic() + _START_S
        while self._deploys.exists():
            assert time.monotonic() < deadline, self.child.tail()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedService]:
    service = ScriptedService(tmp_path_factory.mktemp("service"))
    yield service
    service.child.kill()


@pytest.fixture(autouse=True, scope="module")
def _token() -> Iterator[None]:
    """The value that `sluice up` writes to `.sluice/env`."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "token")
        yield


@pytest.fixture(scope="module")
def client(scripted: ScriptedService) -> Iterator[JudgeClient]:
    """A client that several tests share, because its process takes many seconds to load Ray."""
    with open_client(scripted.settings) as client:
        yield client


def request(name: str, uri: str = "s3://uploads/a.jpg") -> JudgeRequest:
    return JudgeRequest(Submission(id=name, uri=uri), ("default@1", "default@2"))


def judge(settings: Settings, *requests: JudgeRequest) -> list[JudgeResult]:
    with open_client(settings) as service:
        return service.judge(requests, progress=lambda _: None)


def test_results_are_in_the_order_of_requests(client: JudgeClient, tmp_path: Path) -> None:
    names = [f"n-{'x' * (number % 7)}-{number}" for number in range(60)]
    crash = request("crash", f"s3://crashes{tmp_path}/crashed")
    outcomes = client.judge([*map(request, names), request("absent"), request("refused"), crash], print)
    for name, outcome in zip([*names, "crash"], [*outcomes[:60], outcomes[62]], strict=True):
        assert isinstance(outcome, list)
        verdicts = [answer for answer in outcome if isinstance(answer, Verdict)]
        assert [(v.submission_id, v.category) for v in verdicts] == [(name, "default@1"), (name, "default@2")]
        assert {v.tenant for v in verdicts} == {"backfill"}, "they have lower priority than live submissions"
    absent, refused = outcomes[60], outcomes[61]
    assert isinstance(absent, NotFound)
    assert str(absent) == "s3://uploads/a.jpg does not exist"
    assert isinstance(refused, list)
    assert [type(answer) for answer in refused] == [GuardFailed] * 2


def test_unpublished_policy_is_judged(client: JudgeClient) -> None:
    (outcome,) = client.judge([JudgeRequest(request("a").submission, (BUILT_IN.as_version(0),))], print)
    assert isinstance(outcome, list)
    assert isinstance(outcome[0], Verdict)
    assert outcome[0].category == "default"


def test_images_larger_than_the_object_store_together_are_judged(client: JudgeClient) -> None:
    """Five images of 30 MB are more than the 100 MiB that Ray has for objects on this cluster."""
    policy = BUILT_IN.as_version(0)
    images = [bytes([number]) * 30_000_000 for number in range(5)]
    requests = [JudgeRequest.of_bytes(f"image-{number}", image, policy) for number, image in enumerate(images)]
    outcomes = client.judge(requests, print)
    assert [type(outcome) for outcome in outcomes] == [list] * len(images), outcomes


def test_one_connection_judges_several_times(client: JudgeClient) -> None:
    assert client.judge([], progress=print) == []
    assert [len(client.judge([request("a")], progress=print)) for _ in range(2)] == [1, 1]


def test_fault_of_the_service_is_one_sentence_and_the_connection_stays_usable(client: JudgeClient) -> None:
    with pytest.raises(SluiceError, match=r"the service failed: .*ZeroDivisionError.*line one") as caught:
        client.judge([request("a"), request("fault")], print)
    assert "\n" not in str(caught.value)
    assert len(client.judge([request("a")], print)) == 1


def test_interrupted_command_leaves_no_process(scripted: ScriptedService, tmp_path: Path) -> None:
    marker = tmp_path / "hangs"
    program = (
        # If the tests run in the background, SIGINT is ignored, and every child inherits that.
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pipelines.clients.judge_client import JudgeRequest, open_client\n"
        "from services.core.messages import Submission\n"
        "from services.core.settings import Settings\n"
        f"with open_client(Settings(ray_address={scripted.settings.ray_address!r})) as service:\n"
        f"    service.judge([JudgeRequest(Submission(id='hang', uri='s3://hangs{marker}'), ('default',))], print)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not marker.exists():
        assert process.poll() is None
        time.sleep(0.1)
    (child,) = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert output == b""
    assert b"KeyboardInterrupt" in errors
    assert not child.is_running()
    judge(scripted.settings, request("a"))


def test_judge_without_service_error_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_RAY_ADDRESS is not set"):
        judge(Settings(), request("a"))
    with pytest.raises(ConfigurationError, match=r"no service runs at SLUICE_RAY_ADDRESS \(127.0.0.1:9\)"):
        judge(Settings(ray_address="127.0.0.1:9"), request("a"))
    result = subprocess.run(
        [SLUICE, "replay", "x"],
        cwd=tmp_path,
        env={**os.environ, "SLUICE_STREAM_URL": "redis://127.0.0.1:9/0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "SLUICE_RAY_ADDRESS not set" in result.stderr


def test_wrong_token_error_names_the_user_and_the_token(
    scripted: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    with pytest.raises(
        ConfigurationError,
        match="refuses this command: run it as the user who started the service",
    ):
        judge(scripted.settings, request("a"))


def test_judge_without_service_or_cluster_fails_and_with_both_judges(tmp_path: Path) -> None:
    """One cluster for three states, because a cluster takes half a minute to start."""
    own = ScriptedService(tmp_path, application="another")
    with pytest.raises(ConfigurationError, match="Sluice does not run on it"):
        judge(own.settings, request("a"))
    own.deploy("sluice")
    with open_client(own.settings) as service:
        service.judge([request("a")], progress=print)
        own.child.kill()
        with pytest.raises(SluiceError, match=r"has ended|does not answer"):
            service.judge([request("a")], progress=print)
    with pytest.raises(ConfigurationError, match="no service runs"):
        judge(own.settings, request("a"))
