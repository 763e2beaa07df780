"""`sluice up --embedded` from outside: every kind of input, and the gateway, judged by the real engine."""

import json
from urllib.parse import urlsplit

import pytest
import redis

from tests.end_to_end.checks import SCHEMA, all_cases, check
from tests.end_to_end.gateway import check_gateway
from tests.end_to_end.outside import RedisStream, Service, Uploads, submit, wait_until_settled
from tests.support.command_line import start_sluice

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(900)]


def test_submissions_to_embedded_service_have_one_outcome_each(service: Service) -> None:
    """200 images, and every kind of invalid input."""
    settings = service.wait_until_ready()
    stream = RedisStream(settings["SLUICE_STREAM_URL"])
    uploads = Uploads(settings["SLUICE_S3_ENDPOINT"], settings)
    cases = all_cases(uploads, 200)
    before = stream.lengths()
    submit(stream, cases)
    count = sum(case.end != "nothing" for case in cases)
    verdicts, letters = wait_until_settled(stream, count, within_s=240, before=before)
    check(cases, verdicts, letters)


def test_embedded_redis_requires_the_password_in_the_env_file_and_has_signed_rollouts(service: Service) -> None:
    url = service.wait_until_ready()["SLUICE_REDIS_URL"]
    with redis.Redis.from_url(url) as client:
        ((name,),) = [list(client.scan_iter("*:policies:rollout:default"))]
        assert client.hexists(name, "signature")
    with redis.Redis(port=urlsplit(url).port or 0) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.hset(name, "change", "forged")


def test_embedded_service_cannot_be_reached_from_other_machines(service: Service) -> None:
    """The backends, Ray, Serve's replicas, the gateway and the engine."""
    service.wait_until_ready()
    assert service.listening() == {"127.0.0.1"}


def test_doctor_beside_the_service_finds_nothing_wrong(service: Service) -> None:
    """It reads .sluice/env, so it asks the embedded backends and meets the gateway on its port."""
    service.wait_until_ready()

    done = start_sluice("doctor", "--json", folder=service.folder, CUDA_VISIBLE_DEVICES="")

    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result for result in results if not result["ok"]] == []
    assert {"stream", "redis", "buckets", "policy bucket", "model", "gpu", "ports"} <= {
        result["check"] for result in results
    }
    assert (done.returncode, done.stderr) == (0, b"")


def test_gateway_of_embedded_service_serves_openai_client_and_assessments(service: Service) -> None:
    check_gateway(service.wait_until_ready(), SCHEMA)
