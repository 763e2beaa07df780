"""The benchmark of the guard on a GPU, without a GPU: its sums, its method, its budget, and its requests."""

import asyncio
import hashlib
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from benchmarks import older_sglang
from benchmarks.guard_gpu import (
    ANSWER_TOKENS,
    ROWS,
    SIZES,
    Budget,
    Hardware,
    Images,
    Reply,
    Results,
    Run,
    Session,
    Step,
    format_report,
    limit_images_per_s,
    make_calls,
    measure_rate,
    plan_sessions,
    read_results,
    use_plain_defaults,
)
from benchmarks.made_up_checkpoints import GRID, SHAPES, TINY_SHAPES, count_views
from benchmarks.made_up_images import draw_picture
from services.core.errors import GuardUnavailable
from services.core.settings import Settings
from services.core.values import PreparedImage
from services.guard.checkpoint_staging import StagedCheckpoint
from services.guard.checkpoints import resolve_checkpoint
from services.guard.engine import Engine
from services.guard.gpu_memory import MemoryPlan
from services.guard.sglang_command import LaunchConfig
from services.images.decoder_pool import DecoderPool
from tests.support.engine import SharedGuard, drawn, prepared

H200 = Hardware(flop_per_s=790e12, bytes_per_s=4.3e12)
POLICY_TOKENS = 1129


@pytest.mark.parametrize(
    ("shape", "size", "image_tokens", "expected"),
    [  # calculated by hand for 64 calls in flight: images a second with 20 and with 150 tokens of output
        ("0.5B", "384", 1485, (214, 159)),
        ("0.5B", "1080p", 7269, (39, 34)),
        ("7B", "384", 1485, (20.5, 16)),
        ("7B", "1024", 4725, (8.7, 7.5)),
        ("7B", "1080p", 7269, (5.7, 5.1)),
    ],
)
def test_limit_of_published_shapes_is_as_calculated_by_hand(
    shape: str, size: str, image_tokens: int, expected: tuple[float, float]
) -> None:
    found = [
        limit_images_per_s(
            SHAPES[shape],
            H200,
            views=count_views(*SIZES[size]),
            prompt_tokens=image_tokens + POLICY_TOKENS,
            output_tokens=output,
            in_flight=64,
        )
        for output in (20, 150)
    ]
    assert found == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_sizes_of_their_rows(shape: str) -> None:
    made_up, row = SHAPES[shape], resolve_checkpoint(ROWS[shape])
    assert (made_up.layers, made_up.hidden, made_up.intermediate, made_up.kv_heads, made_up.head_dim) == (
        row.size.layers,
        row.size.hidden_size,
        row.size.intermediate_size,
        row.size.kv_heads,
        row.size.head_dim,
    )
    assert made_up.kv_bytes == row.size.kv_bytes(1)


def test_views_are_those_of_transformers() -> None:
    from transformers.image_processing_utils import select_best_resolution  # noqa: PLC0415 - heavy

    sides = (31, 97, 384, 500, 768, 1080, 1200, 1728, 1920, 2304)
    for width, height in itertools.product(sides, sides):
        high, wide = select_best_resolution((height, width), GRID)
        assert count_views(width, height) == 1 + high * wide // 384**2, (width, height)


def test_pictures_are_distinct_and_have_size() -> None:
    first, second = draw_picture(1, 384, 288), draw_picture(2, 384, 288)
    assert first != second
    assert first == draw_picture(1, 384, 288)
    assert 10_000 < len(first) < 100_000


async def test_rate_counts_calls_after_the_first_ones_and_keeps_their_number_in_flight() -> None:
    running, most, asked = 0, 0, []

    async def call(image: PreparedImage) -> Reply:
        nonlocal running, most
        asked.append(image.data)
        running += 1
        most = max(most, running)
        # The first four calls compile kernels.
        await asyncio.sleep(0.5 if len(asked) <= 4 else 0.02)
        running -= 1
        return Reply(prompt_tokens=2000, output_tokens=20, cached_tokens=500)

    images = [prepared(str(number).encode()) for number in range(10_000)]
    rate = await measure_rate(call, images, 4, 0.4)

    assert most == 4
    assert len(set(asked)) == len(asked)
    assert 5 < rate.images_per_s <= 200
    assert rate.p50_s < 0.4
    assert 0 < rate.client_cpu_share < 1.5
    assert (rate.prompt_tokens, rate.output_tokens, rate.cached_share, rate.errors) == (2000, 20, 0.25, 0)


async def test_rate_ends_with_the_images_and_counts_errors() -> None:
    async def call(image: PreparedImage) -> Reply:
        await asyncio.sleep(0.01)
        if image.data == b"7":
            raise GuardUnavailable("away")
        return Reply(10, 1)

    rate = await measure_rate(call, [prepared(str(number).encode()) for number in range(20)], 2, 60)
    assert (rate.images, rate.errors, rate.first_error) == (17, 1, "away")


async def test_rate_without_answers_is_an_error_that_has_the_reason() -> None:
    async def call(_: PreparedImage) -> Reply:
        raise GuardUnavailable("the engine is down")

    with pytest.raises(RuntimeError, match="the engine is down"):
        await measure_rate(call, [prepared(b"x")] * 1000, 4, 60)


def make_run(tmp_path: Path, budget_s: float) -> Run:
    return Run(
        results=Results(tmp_path / "out"),
        budget=Budget(budget_s),
        work=tmp_path / "work",
        shapes=TINY_SHAPES,
        images=Images(tmp_path / "images", {}),
        hardware=H200,
        seconds=5,
        engine_in_flight=4,
        tiny=True,
    )


async def test_session_beyond_the_budget_is_skipped_with_its_steps(tmp_path: Path) -> None:
    await make_run(tmp_path, budget_s=30).run_session(Session("7B", [Step("verdict", "384"), Step("memory")]))

    (line,) = read_results(tmp_path / "out")
    assert line["measurement"] == "skipped"
    assert line["steps"] == ["verdict 384 0", "memory  0"]
    assert not (tmp_path / "work" / "checkpoints").exists()
    assert "skipped: 7B (2 steps): a start takes about 70 s" in format_report([line])


async def test_failed_session_is_a_line_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    await make_run(tmp_path, budget_s=500).run_session(Session("0.5B", [Step("verdict", "384")]))

    (line,) = read_results(tmp_path / "out")
    assert line["measurement"] == "failed"
    assert "/bin/false" in line["error"]


def test_sessions_measure_every_size_kind_and_load_of_both_shapes() -> None:
    steps = [(s.shape, each) for s in plan_sessions(smoke=False, sweep=(8, 64)) for each in s.steps]
    for shape, size in itertools.product(ROWS, SIZES):
        for kind in ("score", "verdict", "rationale", "chat"):
            assert (shape, Step(kind, size)) in steps
    for shape in ROWS:
        assert {(shape, Step("memory")), (shape, Step("adaptive", "1080p")), (shape, Step("plain_chat", "384"))} <= {
            *steps
        }
        assert {(shape, Step("verdict", "384", 8)), (shape, Step("verdict", "384", 64))} <= {*steps}


def test_report_of_a_run_that_was_cut_off_has_figures_and_ratios(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add("run")
    results.add("hardware", device="H200", torch="2.11", side=8192, dtype="bf16", flop_per_s=790e12, bytes_per_s=4.3e12)
    for kind, rate in (("chat", 4.0), ("verdict", 9.0)):
        results.add(
            "rate",
            shape="7B",
            kind=kind,
            size="384",
            in_flight=16,
            images_per_s=rate,
            p50_s=1.5,
            prompt_tokens=2600.0,
            output_tokens=20.0,
            errors=0,
            share_of_limit=0.5,
            client_cpu_share=0.1,
        )
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"measurement": "rate", "sha')

    report = format_report(read_results(tmp_path))
    assert "H200, PyTorch 2.11: 790 TFLOP/s" in report
    assert "7B    384          16 verdict        9.00   1.50      2600  20.0   50.0 %     2.25" in report


class ScriptedEngine(Engine):
    """Answers like SGLang after 10 ms, without a server."""

    images: Counter[str]

    async def start(self) -> None:
        self.images = Counter()
        self._staged = StagedCheckpoint(Path("/model"), "sha256:0")
        logging.getLogger("services.guard.sglang_server").info("the engine listens after %.0f s", 1.5)
        logging.getLogger("services.guard.sglang_server").info("the engine is ready after %.0f s", 2.5)
        self._state = "ready"

    async def stop(self) -> None:
        self._state = "stopped"

    async def call(self, path: str, body: Mapping[str, Any]) -> Any:
        if path == "/v1/tokenize":
            return {"tokens": list(body["prompt"].encode())}
        if path in ("/flush_cache", "/abort_request"):
            raise GuardUnavailable("The engine's answer is not JSON.")
        await asyncio.sleep(0.01)
        if path == "/v1/chat/completions":
            assert body["ignore_eos"]
            return {"usage": {"prompt_tokens": 2614, "completion_tokens": body["max_tokens"]}}
        assert path == "/generate"
        self.images.update(body["mm_hashes"])
        grammar = body["sampling_params"].get("ebnf")
        text = 'Safe",\n    "category": "NA: None applying' + (
            '",\n    "rationale": "x' if "any reasoned" in (grammar or "") else ""
        )
        meta = {
            "prompt_tokens": 2614,
            "cached_tokens": 0,
            "completion_tokens": len(text.split()) if grammar else 1,
            "finish_reason": {"type": "stop"},
            "output_token_ids_logprobs": [[[-0.01, ord("S"), None], [-5.0, ord("U"), None]]],
        }
        return {"text": f'{text}"\n}}' if grammar else "Safe", "meta_info": meta}


async def test_sessions_write_every_measurement_of_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.guard_gpu.Engine", ScriptedEngine)
    run = make_run(tmp_path, budget_s=500)
    run.start_s, run.seconds = 1, 0.1
    run.images = Images(tmp_path / "images", {"384": 40, "1024": 40, "1080p": 40})
    folder = tmp_path / "work" / "checkpoints" / "0.5B"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    sessions = [each for each in plan_sessions(smoke=False, sweep=(2, 3, 4)) if each.shape == "0.5B"]
    logging.getLogger("services.guard").setLevel(logging.INFO)
    for session in sessions:
        await run.run_session(session)

    lines = read_results(tmp_path / "out")
    assert not [line for line in lines if line["measurement"] in ("failed", "skipped")]
    starts = [line for line in lines if line["measurement"] == "start"]
    assert [line["plain"] for line in starts] == [False, False, True]
    assert (starts[0]["listens_s"], starts[0]["ready_s"]) == (1.5, 2.5)
    memory = [line for line in lines if line["measurement"] == "memory"]
    assert [(line["images"], line["size"]) for line in memory] == [(4, "2304x1728")]
    rates = [line for line in lines if line["measurement"] == "rate"]
    measured = {(line["kind"], line["size"], line["in_flight"]) for line in rates}
    # The engine holds four calls, fewer than the shape's default.
    assert measured == {(step.kind, step.size, step.in_flight or 4) for each in sessions for step in each.steps} - {
        ("memory", "", 4)
    }
    by_kind = {line["kind"]: line for line in rates if line["size"] == "1080p"}
    assert by_kind["score"]["output_tokens"] == 1
    assert by_kind["verdict"]["output_tokens"] < by_kind["rationale"]["output_tokens"]
    assert by_kind["chat"]["output_tokens"] == by_kind["plain_chat"]["output_tokens"] == ANSWER_TOKENS
    assert 1 <= by_kind["adaptive"]["output_tokens"] <= 1 + by_kind["verdict"]["output_tokens"]
    assert all(line["errors"] == 0 and line["images_per_s"] > 0 for line in rates)
    report = format_report(lines)
    assert report.count("start of 0.5B") == 3
    assert "4 images of 2304x1728 at a time" in report


async def test_adaptive_judges_a_tenth_of_the_images_in_full() -> None:
    engine = ScriptedEngine(resolve_checkpoint("tiny"), state_dir=Path("/state"), in_flight=4)
    await engine.start()
    preparer = DecoderPool(Settings(model="tiny"), 384)
    try:
        adaptive = make_calls(engine, 4, preparer)["adaptive"]
        images = [
            replace(prepared(b"%d" % number), sha256=hashlib.sha256(b"%d" % number).hexdigest())
            for number in range(300)
        ]
        replies = await asyncio.gather(*(adaptive(image) for image in images))
    finally:
        preparer.close()
    in_full = sum(reply.output_tokens > 1 for reply in replies)
    assert 0.07 < in_full / len(images) < 0.13
    # An image that is judged in full was looked at before.
    assert engine.images.total() == len(images) + in_full


def make_launch_config() -> LaunchConfig:
    row = resolve_checkpoint(ROWS["7B"])
    return LaunchConfig(row, Path("/model"), MemoryPlan(1, 16, 32768, 100_000), in_flight=16, deadline_s=60)


def test_older_sglang_gets_no_flag_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("command",):
        monkeypatch.setattr(LaunchConfig, name, getattr(LaunchConfig, name))
    monkeypatch.setattr("services.guard.sglang_server.SglangServer._is_listening", None)
    before = make_launch_config().command(port=1, secrets=Path("/secrets"))
    older_sglang.adapt("0.5.17")
    after = make_launch_config().command(port=1, secrets=Path("/secrets"))

    at = before.index("--allowed-media-domains")
    assert after == before[:at] + before[at + 2 :]


def test_own_sglang_is_left_alone() -> None:
    command = LaunchConfig.command
    older_sglang.adapt(version("sglang"))
    assert LaunchConfig.command is command


def test_plain_defaults_leave_the_flags_to_sglang_and_end() -> None:
    def build() -> list[str]:
        return make_launch_config().command(port=1, secrets=Path("/secrets"))

    before = build()
    with use_plain_defaults():
        plain = build()
    assert build() == before
    assert "--chunked-prefill-size" in before
    for flag in ("--chunked-prefill-size", "--mem-fraction-static", "--grammar-backend", "--max-total-tokens"):
        assert flag not in plain
    assert plain[plain.index("--host") + 1] == "127.0.0.1"


@pytest.mark.engine
async def test_requests_are_answered_as_their_kind_says(engine: SharedGuard) -> None:
    images = [drawn(seed) for seed in range(40, 46)]

    async def ask() -> dict[str, Any]:
        preparer = DecoderPool(Settings(model="tiny"), engine.max_side_px)
        try:
            calls = make_calls(engine.engine, 2, preparer)
            found: dict[str, Any] = {kind: await calls[kind](images[0]) for kind in ("score", "verdict", "rationale")}
            found["adaptive"] = await calls["adaptive"](images[1])
            found["rate"] = await measure_rate(calls["score"], images, 2, 60)
            return found
        finally:
            preparer.close()

    found = await engine.on_loop(ask())
    assert found["score"].output_tokens == 1
    assert 10 < found["verdict"].output_tokens < found["rationale"].output_tokens <= ANSWER_TOKENS
    assert found["adaptive"].output_tokens >= 1
    assert (found["rate"].images, found["rate"].errors) == (4, 0)
