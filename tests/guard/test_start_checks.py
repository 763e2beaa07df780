"""What a server must judge before it is ready, and what a checkpoint must prove before it judges images."""

import asyncio
import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from services.core.errors import ConfigurationError, GuardUnavailable
from services.guard import sglang_command as launch
from services.guard.checkpoints import CHECKPOINTS, Checkpoint, resolve_checkpoint
from services.guard.engine import Engine
from services.guard.gpu_memory import MemoryPlan
from services.guard.inference import GuardInference
from services.guard.sglang_server import find_last_error
from services.guard.warm_up import Request, build_first_verdict, build_large_images, build_probe
from tests.guard.test_engine import fake_server, until
from tests.support.engine import drawn, policy


def open_image(request: Request) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(request["image_data"].partition("base64,")[2])))


@pytest.mark.parametrize("row", CHECKPOINTS, ids=lambda row: row.name)
class TestRequests:
    def test_every_request_is_about_one_image(self, row: Checkpoint) -> None:
        """SGLang's Gemma 3 fails on a batch of images and a text without one."""
        for request in (build_probe(row), build_first_verdict(row), *build_large_images(row, 2)):
            assert request["text"].count(row.family.image_token[0]) == 1
            open_image(request).load()

    def test_large_images_are_different_and_of_the_largest_size(self, row: Checkpoint) -> None:
        requests = build_large_images(row, 4)
        assert {max(open_image(request).size) for request in requests} == {row.max_side_px}
        assert len({request["image_data"] for request in requests}) == 4

    def test_first_verdict_uses_the_grammar_and_log_probabilities(self, row: Checkpoint) -> None:
        request = build_first_verdict(row)
        assert request["return_logprob"]
        assert ("ebnf" in request["sampling_params"]) == (row.family.build_example_grammar() is not None)


PLAN = MemoryPlan(gpus=1, in_flight=16, prefill_tokens=32768, kv_tokens=99_999)

SERVER = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(LOG, "a") as log:
            log.write(json.dumps(body) + chr(10))
        FAIL
        self.answer(200, {"text": "", "meta_info": {}})

    def answer(self, status, document):
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class TestServer:
    @pytest.fixture
    def received(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Run a server in the place of SGLang, and read the requests that it got."""

        def run(fail: str = "pass", plan: MemoryPlan | None = None) -> Any:
            script = SERVER.replace("LOG", repr(str(tmp_path / "requests"))).replace("FAIL", fail)
            fake_server(monkeypatch, script)
            monkeypatch.setattr("services.guard.engine.plan_gpus", lambda *_: plan)
            return lambda: [json.loads(line) for line in (tmp_path / "requests").read_text().splitlines()]

        return run

    async def test_probes_of_a_running_server_are_images(self, tmp_path: Path, received) -> None:
        requests = received()
        engine = Engine(resolve_checkpoint("tiny"), state_dir=tmp_path / "state", probe_every_s=0.05)
        async with engine:
            await until(engine, "ready", 30)
            started = len(requests())
            while len(requests()) < started + 2:
                await engine.health_check()
        assert all("image_data" in request for request in requests())

    async def test_server_on_a_gpu_judges_large_images_before_it_is_ready(self, tmp_path: Path, received) -> None:
        requests = received(plan=PLAN)
        async with Engine(resolve_checkpoint("tiny"), state_dir=tmp_path / "state"):
            sizes = [max(open_image(request).size) for request in requests()]
        assert sizes == [256, 256, *[384] * 4]
        assert "ebnf" in requests()[1]["sampling_params"]

    async def test_failure_with_large_images_ends_the_start_with_its_error(self, tmp_path: Path, received) -> None:
        fail = """if len(body["image_data"]) > 6000:
            print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", flush=True)
            print("Received sigquit from a child process", flush=True)
            return self.answer(500, {"error": "dead"})"""
        received(fail, plan=PLAN)
        with pytest.raises(
            GuardUnavailable,
            match=r"cannot judge 4 images of 384 px at a time: .*; its log .* ends with: torch\.OutOfMemoryError",
        ):
            await Engine(resolve_checkpoint("tiny"), state_dir=tmp_path / "state").start()


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("loading\nready", "ready"),
        ("", ""),
        (
            "[TP0] Scheduler hit an exception: Traceback (most recent call last):\n  File x\n"
            "torch.OutOfMemoryError: CUDA out of memory.\n[now] Received sigquit from a child process",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        ("RuntimeError: first\nValueError: last\nKilled", "ValueError: last"),
        ("no kernel image is available for execution on the device\nend", "no kernel image is available for execution"),
        ("no errors so far\nend", "end"),
    ],
)
def test_last_error_of_a_log_is_found(log: str, error: str) -> None:
    assert find_last_error(log).startswith(error)


class FakeEngine:
    """A tokenizer in which `<image>` is 9, and scores that a test gives."""

    def __init__(self, config: dict[str, Any], scores: list[tuple[float, float]]) -> None:
        self.checkpoint = resolve_checkpoint("LlavaGuard-v1.2-0.5B-OV")
        self.in_flight = 4
        self._config = config
        self._scores = itertools.cycle(scores)

    async def health_check(self) -> None: ...

    def read_config(self) -> dict[str, Any]:
        return self._config

    async def tokenize(self, text: str) -> list[int]:
        return [1, 9, 2, *([7] if text.endswith("Unsafe") else [3] if text.endswith("Safe") else [])]

    async def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        assert request["image_data"].startswith("data:image/jpeg;base64,")
        safe, unsafe = next(self._scores)
        meta = {"finish_reason": {"type": "length"}, "output_token_ids_logprobs": [[[safe, 3], [unsafe, 7]]]}
        return {"text": "", "meta_info": meta}


GOOD_SCORES = [(-0.1, -2.3), (-0.1, -2.3), (-0.1, -2.3), (-0.2, -1.7)]


class SlowEngine(FakeEngine):
    """Answers after a while, and records the requests."""

    def __init__(self, seconds: float) -> None:
        super().__init__({}, GOOD_SCORES)
        self.revision = "sha256:0"
        self.requests: list[dict[str, Any]] = []
        self._seconds = seconds

    async def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        await asyncio.sleep(self._seconds)
        answer = await super().generate(request)
        answer["meta_info"] |= {"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1}
        return answer


class TestCalls:
    async def test_deadline_begins_with_the_slot(self) -> None:
        """With the wait included, calls behind others ended in mid-answer, and the GPU worked in vain."""
        guard = GuardInference(SlowEngine(0.2), in_flight=1, deadline_s=0.5)
        results = await asyncio.gather(*(guard.assess_each(drawn(seed), [policy()], "score") for seed in range(6)))
        assert len(results) == 6

    async def test_call_that_takes_too_long_in_its_slot_is_unavailable(self) -> None:
        guard = GuardInference(SlowEngine(5), in_flight=1, deadline_s=0.1)
        with pytest.raises(GuardUnavailable, match="did not answer within"):
            await guard.assess_each(drawn(1), [policy()], "score")

    async def test_each_image_has_its_own_name_in_the_cache(self) -> None:
        engine = SlowEngine(0)
        for guard in (GuardInference(engine), GuardInference(engine)):
            for seed in (1, 1, 2):
                await guard.assess_each(drawn(seed), [policy()], "score")
        first, same, other, elsewhere = [request["mm_hashes"] for request in engine.requests[:4]]
        assert first == same
        assert len({first[0], other[0], elsewhere[0]}) == 3, "the name could be computed outside"
        assert all(0 <= int(name, 16) < 1 << 64 for (name,) in (first, other, elsewhere))


class TestCheckpoint:
    async def test_checkpoint_that_fits_together_passes(self) -> None:
        await GuardInference(FakeEngine({"image_token_index": 9}, GOOD_SCORES)).check()
        await GuardInference(FakeEngine({}, GOOD_SCORES)).check()

    @pytest.mark.parametrize("index", [32000, 1 << 20])
    async def test_other_image_token_is_rejected(self, index: int) -> None:
        """Transformers' default is 32000; then SGLang puts the image over the first token of the prompt."""
        guard = GuardInference(FakeEngine({"image_token_index": index}, GOOD_SCORES))
        with pytest.raises(ConfigurationError, match=rf"image_token_index is {index} .* stands 0 times .* one <image>"):
            await guard.check()

    async def test_score_that_is_no_number_is_rejected(self) -> None:
        guard = GuardInference(FakeEngine({"image_token_index": 9}, [(float("nan"), -1.0)]))
        with pytest.raises(ConfigurationError, match=r"gives no score .* overflow in half precision"):
            await guard.check()

    async def test_score_that_ignores_the_image_is_rejected(self) -> None:
        guard = GuardInference(FakeEngine({"image_token_index": 9}, [(-0.1, -2.3)]))
        with pytest.raises(ConfigurationError, match="gives the same score for 4 different images"):
            await guard.check()


def test_gemma_prompts_are_not_cut_into_chunks() -> None:
    config = launch.LaunchConfig(
        checkpoint=resolve_checkpoint("ShieldGemma-2-4B"), folder=Path("/f"), plan=PLAN, in_flight=4, deadline_s=60
    )
    argv = config.command(port=1, secrets=Path("/f"))
    last = len(argv) - 1 - argv[::-1].index("--chunked-prefill-size")
    assert argv[last + 1] == "-1"
