"""`sluice` as users call it: results on stdout, and one sentence on stderr after a failure."""

import json
import os
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import redis

from pipelines.local.backends import run_valkey, start_backends
from pipelines.local.env_file import keep_env_file, read_env_file
from services.core.errors import ConfigurationError
from services.core.settings import Settings, load
from tests.support.command_line import assert_fails, run_sluice, run_sluice_in, start_sluice
from tests.support.intake_bench import IntakeBench
from tests.support.s3_server import CREDENTIALS
from tests.support.servers import Valkey


async def test_submit_of_files_and_objects_prints_ids_and_verdicts_prints_verdicts(
    bench: IntakeBench, folder: Path, tmp_path: Path
) -> None:
    await bench.start()
    bench.put("a.jpg")
    picture = tmp_path / "bild ä.jpg"
    picture.write_bytes(bench.s3.get_object(Bucket="uploads", Key="a.jpg")["Body"].read())
    result = run_sluice_in(
        folder, "submit", "s3://uploads/a.jpg", str(picture), "--policy", "default@1", "--tenant", "shop"
    )
    assert result.returncode == 0, result.stderr
    ids = result.stdout.decode().split()
    verdicts, letters = await bench.settled(2)
    assert (sorted(ids), letters) == (sorted(verdict.submission_id for verdict in verdicts), [])
    assert {verdict.tenant for verdict in verdicts} == {"shop"}

    lines = run_sluice_in(folder, "verdicts", "--json").stdout.decode().splitlines()
    assert {json.loads(line)["verdict_id"] for line in lines} == {verdict.verdict_id for verdict in verdicts}
    await bench.submit(b"what another program wrote", stream=bench.settings.verdicts_stream)
    shown = run_sluice_in(folder, "verdicts")
    readable = shown.stdout.decode().splitlines()
    assert len(readable) == 2
    assert all("allow" in line and "default@1" in line for line in readable)
    assert b"is not a verdict" in shown.stderr


async def test_submit_of_json_lines_stops_at_the_first_invalid_line(bench: IntakeBench, folder: Path) -> None:
    await bench.start()
    bench.put("a.jpg")
    good = [{"id": f"line-{number}", "uri": "s3://uploads/a.jpg", "metadata": {"a": None}} for number in range(2)]
    lines = "\n".join([*map(json.dumps, good), "", json.dumps({"id": "bad", "uri": "ftp://x"}), json.dumps(good[0])])
    result = run_sluice_in(folder, "submit", "-", stdin=lines.encode())
    assert_fails(result, "line 4", "uri")
    assert result.stdout.decode().split() == ["line-0", "line-1"]
    verdicts, _ = await bench.settled(2)
    assert [verdict.metadata for verdict in verdicts] == [{"a": None}] * 2


async def test_submit_of_an_invalid_reference_fails(folder: Path) -> None:
    assert_fails(run_sluice_in(folder, "submit", "no/such/file.jpg"), "neither a file nor an s3:// URI")
    assert_fails(run_sluice_in(folder, "submit", "s3://uploads"), "s3://bucket/key")


def test_command_without_a_service_names_the_missing_settings(tmp_path: Path) -> None:
    assert_fails(start_sluice("verdicts", folder=tmp_path), "SLUICE_STREAM_URL", "sluice up --embedded")
    assert_fails(start_sluice("up", folder=tmp_path, SLUICE_MODEL="tiny"), "SLUICE_STREAM_URL", "SLUICE_S3_BUCKETS")
    (tmp_path / ".sluice" / "env").mkdir(parents=True)
    assert_fails(start_sluice("verdicts", folder=tmp_path), ".sluice/env cannot be read")


def test_command_with_an_invalid_setting_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "SLUICE_STREAM_URL": "amqp://x",
        "SLUICE_REDIS_URL": "redis://host:port",
        "SLUICE_S3_ENDPOINT": "minio:9000",
        "SLUICE_KAFKA_OPTIONS": "{",
    }.items():
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            refused = run_sluice("verdicts")
        assert refused.returncode == 1
        assert f"{name} is wrong" in refused.stderr


def test_command_with_an_absent_aws_profile_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLUICE_POLICY_BUCKET", "policies")
    monkeypatch.setenv("AWS_PROFILE", "absent")
    refused = run_sluice("policy", "list")
    assert refused.returncode == 1
    assert "S3 cannot be used" in refused.stderr
    assert "absent" in refused.stderr


@pytest.mark.parametrize(("value", "stream"), [("", ""), (None, "sluice.submissions.backfill"), ("slow", "slow")])
def test_backfill_stream_setting_when_empty_is_off(
    value: str | None, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("SLUICE_BACKFILL_STREAM", value)
    assert load("group").backfill_stream == Settings().backfill_stream == stream


def test_up_with_an_unknown_model_fails_and_writes_no_env_file(tmp_path: Path) -> None:
    assert_fails(start_sluice("up", "--embedded", folder=tmp_path, SLUICE_MODEL="gpt-2"), "SLUICE_MODEL=gpt-2", "tiny")
    assert not (tmp_path / ".sluice" / "env").exists()


def test_up_without_a_reachable_stream_names_the_setting(
    tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        **CREDENTIALS,
        "SLUICE_STREAM_URL": "kafka://127.0.0.1:9",
        "SLUICE_REDIS_URL": "redis://127.0.0.1:9/0",
        "SLUICE_S3_ENDPOINT": s3_endpoint,
        "SLUICE_S3_BUCKETS": "uploads",
        "SLUICE_POLICY_BUCKET": "policies",
        "SLUICE_MODEL": "tiny",
    }
    # As the command `sluice up`, but with one second for the backends to answer instead of 20.
    impatient = (
        "import pipelines.local.up as up; up._BACKEND_TIMEOUT_S = 1; from pipelines.cli.main import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", impatient, "up"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        env={**{name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}, **variables},
    )
    assert_fails(result, "SLUICE_STREAM_URL", "127.0.0.1:9")


def test_env_file_is_private_and_removed_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / ".sluice" / "env"
    settings = Settings(stream_url="redis://h:1/0", s3_buckets=("a", "b"), kafka_options={"sasl_plain_password": "s"})
    variables = {"AWS_SECRET_ACCESS_KEY": "throw-away", "OTHER": "x"}
    with keep_env_file(settings, variables, file):
        assert file.stat().st_mode & 0o777 == 0o600
        read = read_env_file(file)
        assert read["SLUICE_S3_BUCKETS"] == "a,b"
        assert read["SLUICE_STREAM_URL"] == "redis://h:1/0"
        assert read["AWS_SECRET_ACCESS_KEY"] == "throw-away"
        assert not {"OTHER", "SLUICE_KAFKA_OPTIONS"} & read.keys()
        assert list(file.parent.iterdir()) == [file]
    assert not file.exists()


def test_env_file_of_a_later_service_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "env"
    with ExitStack() as second:
        with keep_env_file(Settings(group="first"), {}, file):
            assert read_env_file(file)["SLUICE_GROUP"] == "first"
            second.enter_context(keep_env_file(Settings(group="second"), {}, file))
        assert read_env_file(file)["SLUICE_GROUP"] == "second"
    assert not file.exists()


def write_env_file(folder: Path, content: str, mode: int = 0o600) -> Path:
    file = folder / ".sluice" / "env"
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    file.chmod(mode)
    return file


def test_env_file_of_a_repository_runs_no_program(tmp_path: Path) -> None:
    """A repository can have the file and a configuration of AWS that runs a program to get credentials."""
    ran = tmp_path / "ran"
    (tmp_path / "aws").write_text(f"[default]\ncredential_process = touch {ran}\n")
    settings = "SLUICE_POLICY_BUCKET=b\nSLUICE_S3_ENDPOINT=http://127.0.0.1:9\n"
    hostile = f"{settings}AWS_CONFIG_FILE={tmp_path / 'aws'}\n"
    without_credentials = {name: "" for name in os.environ if name.startswith("AWS_")} | {"HOME": str(tmp_path)}
    file = write_env_file(tmp_path, hostile, mode=0o644)
    assert_fails(start_sluice("policy", "list", folder=tmp_path, **without_credentials), ".sluice/env", "mode 0644")
    file.chmod(0o600)
    assert_fails(start_sluice("policy", "list", folder=tmp_path, **without_credentials), "'AWS_CONFIG_FILE'")
    assert not ran.exists()


def test_huge_env_file_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.touch(mode=0o600)
    os.truncate(file, 1 << 40)  # a sparse file
    with pytest.raises(ConfigurationError, match="has more than 262,144 bytes"):
        read_env_file(file)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o700, 0o400])
def test_env_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    file = write_env_file(tmp_path, "SLUICE_GROUP=mine\n", mode)
    with pytest.raises(ConfigurationError, match=f"has mode {mode:04o}; remove the file"):
        read_env_file(file)


def test_env_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "env"
    with keep_env_file(Settings(group="mine"), {}, file):
        assert read_env_file(file)["SLUICE_GROUP"] == "mine"
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        with pytest.raises(ConfigurationError, match=f"belongs to the user {user} "):
            read_env_file(file)


def test_env_file_out_of_an_archive_sends_nothing_to_its_author(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An archive keeps the mode 0600, and the user who unpacks it owns the file."""
    author, reader = tmp_path / "author", tmp_path / "reader"
    author.mkdir(), reader.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as foreign_service:
        url = f"redis://127.0.0.1:{foreign_service.getsockname()[1]}/0"
        settings = (
            f"SLUICE_STREAM_URL={url}\nSLUICE_REDIS_URL={url}\nSLUICE_S3_ENDPOINT={url.replace('redis', 'http')}\n"
        )
        write_env_file(author, f"{settings}SLUICE_S3_BUCKETS=uploads\nSLUICE_POLICY_BUCKET=p\n")
        (author / "picture.jpg").write_bytes(b"private")
        subprocess.run(["tar", "-cf", tmp_path / "project.tar", "."], cwd=author, check=True)
        subprocess.run(["tar", "-xf", tmp_path / "project.tar"], cwd=reader, check=True)
        unpacked = (reader / ".sluice" / "env").stat()
        assert (unpacked.st_mode & 0o777, unpacked.st_uid) == (0o600, os.geteuid())

        for command in (("submit", "picture.jpg"), ("verdicts",), ("policy", "list")):
            refused = run_sluice_in(reader, *command, AWS_ACCESS_KEY_ID="mine", AWS_SECRET_ACCESS_KEY="mine")
            assert_fails(refused, "not set; set it (SLUICE_")
            assert "no running `sluice up` keeps it" in caplog.text
            caplog.clear()
        foreign_service.settimeout(0.2)
        with pytest.raises(TimeoutError):
            foreign_service.accept()


def test_env_file_of_a_killed_service_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep = (
        "import time; from pipelines.local.env_file import keep_env_file; from services.core.settings import Settings\n"
        "with keep_env_file(Settings(group='mine'), {}): print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", keep]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as service:
        assert service.stdout is not None
        service.stdout.readline()
        file = tmp_path / ".sluice" / "env"
        assert read_env_file(file)["SLUICE_GROUP"] == "mine"
        assert read_env_file(file)["SLUICE_GROUP"] == "mine", "a command leaves the lock to the service"
        service.kill()
        service.wait()
    assert read_env_file(file) == {}
    assert "the service was killed, or" in caplog.text


@pytest.mark.parametrize(
    "name", ["LD_PRELOAD", "PYTHONPATH", "AWS_PROFILE", "RAY_ADDRESS", "SLUICE_KAFKA_OPTIONS", "SLUICE_OTHER", " X", ""]
)
def test_env_file_with_a_variable_that_sluice_never_writes_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="which `sluice up` never writes"):
        read_env_file(write_env_file(tmp_path, f"SLUICE_GROUP=mine\n{name}=x\n"))


def test_env_file_that_is_a_link_or_a_pipe_is_refused(tmp_path: Path) -> None:
    file = write_env_file(tmp_path, "SLUICE_GROUP=mine\n")
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    os.mkfifo(pipe, 0o600)
    for each in (link, pipe):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            read_env_file(each)


@pytest.mark.server
def test_embedded_backends_do_not_replace_given_settings(tmp_path: Path) -> None:
    valkey = Valkey(tmp_path)
    valkey.start()
    given: dict[str, Any] = {"SLUICE_STREAM_URL": "kafka://broker:9092", "SLUICE_REDIS_URL": valkey.url}
    try:
        with start_backends(given | {"SLUICE_S3_BUCKETS": "mine", "AWS_SECRET_ACCESS_KEY": "precious"}) as started:
            assert not started.keys() & {"SLUICE_STREAM_URL", "SLUICE_REDIS_URL", "SLUICE_S3_BUCKETS"}
            assert started["SLUICE_MODEL"] == "tiny"
            assert started["AWS_SECRET_ACCESS_KEY"] != "precious"
    finally:
        valkey.kill()


@pytest.mark.server
def test_embedded_valkey_requires_a_password_that_no_other_user_sees(tmp_path: Path) -> None:
    with run_valkey(tmp_path) as url:
        address = urlsplit(url)
        assert (address.hostname, len(address.password or "")) == ("127.0.0.1", 40)
        with redis.Redis.from_url(url) as client:
            assert client.ping()
            server = psutil.Process(client.info("server")["process_id"])
        assert str(address.password) not in " ".join(server.cmdline())
        assert {connection.laddr.ip for connection in server.net_connections()} == {"127.0.0.1"}
        assert stat.S_IMODE((tmp_path / "valkey.conf").stat().st_mode) == 0o600
        for password in (None, "", "wrong"):
            with redis.Redis(port=address.port or 0, password=password) as stranger, pytest.raises(redis.RedisError):
                stranger.set("key", "forged")


def test_calibrate_accepts_the_hidden_option_take_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    shown = run_sluice("calibrate", "--help").stdout
    assert "--revert" in shown
    assert "--take-back" not in shown
    for option in ("--revert", "--take-back"):
        refused = run_sluice("calibrate", "images", option)
        assert refused.returncode == 1
        assert "--revert takes no data set" in refused.stderr
