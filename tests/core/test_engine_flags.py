"""The operator's flags for the engine. SGLang's own parser says which flags there are."""

import argparse

import pytest
from sglang.srt.server_args import ServerArgs

from services.core.engine_flags import parse_engine_flags
from services.core.errors import ConfigurationError
from services.core.settings import Settings, load


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", ()),
        ("--quantization fp8", ("--quantization", "fp8")),
        ("--chunked-prefill-size=8192 --disable-radix-cache", ("--chunked-prefill-size=8192", "--disable-radix-cache")),
        (
            """--mm-process-config '{"image": {"max_pixels": 1}}'""",
            ("--mm-process-config", '{"image": {"max_pixels": 1}}'),
        ),
        (["--dtype", "bfloat16"], ("--dtype", "bfloat16")),
    ],
)
def test_flags_are_split_as_by_a_shell(flags: str | list[str], words: tuple[str, ...]) -> None:
    assert parse_engine_flags(flags) == words


@pytest.mark.parametrize(
    "flags",
    [
        "--host 0.0.0.0",
        "--host=0.0.0.0",
        "--hos 0.0.0.0",
        "--quantization fp8 --port 80",
        "--api-key x",
        "--api x",
        "--admin-api-key x",
        "--allowed-media-domains example.org",
        "--allowed_media_domains example.org",
        "--config /tmp/flags.yaml",
        "--trust-remote-code",
        "--log-requests",
        "--model-path /other",
        "-- x",
        "8192",
    ],
)
def test_flag_that_opens_the_engine_is_refused(flags: str) -> None:
    with pytest.raises(ValueError, match=r"set by Sluice alone|is no flag"):
        parse_engine_flags(flags)


def test_no_flag_of_sglang_that_listens_or_holds_a_key_is_forgotten() -> None:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    words = {"host", "port", "ports", "addr", "url", "urls", "ip", "key", "ssl", "media", "endpoint", "trust", "hooks"}
    names = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    dangerous = [name for name in names if words & set(name.strip("-").split("-"))]
    # These are about the memory of the host.
    dangerous = [name for name in dangerous if not name.startswith(("--hicache-host", "--disaggregation-decode-host"))]
    assert len(dangerous) > 20
    for name in dangerous:
        with pytest.raises(ValueError, match="set by Sluice alone"):
            parse_engine_flags(name)


def test_setting_is_read_and_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_ENGINE_FLAGS", "--quantization fp8")
    settings = Settings()
    assert settings.engine_flags == ("--quantization", "fp8")
    assert Settings(**settings.model_dump(mode="json", include={"engine_flags"})).engine_flags == settings.engine_flags
    monkeypatch.setenv("SLUICE_ENGINE_FLAGS", "--host 0.0.0.0")
    with pytest.raises(ConfigurationError, match=r"SLUICE_ENGINE_FLAGS is wrong: the engine's --host is set by Sluice"):
        load("engine_flags")
