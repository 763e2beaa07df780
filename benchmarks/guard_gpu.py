"""The guard on a GPU: images a second, start times, memory, and the share of the hardware's limit, in ten minutes.

    python benchmarks/guard_gpu.py --smoke [--out FOLDER]       # a minute after the engine's start: does it run?
    python benchmarks/guard_gpu.py [--out FOLDER] [--budget-s 540]
    python benchmarks/guard_gpu.py --report FOLDER              # only print the figures of a run
    python benchmarks/guard_gpu.py --tiny [--smoke]             # without a GPU: the same steps with tiny shapes

Weights are random, in the shapes of LlavaGuard-v1.2-0.5B-OV and -7B-OV (`benchmarks/made_up_checkpoints.py`). Speed and
memory do not depend on their values; accuracy is not measured. Engine and requests are those of Sluice.

**Requests.** `score` is one token. `verdict` is rating and category. `rationale` adds a rationale, up to 90 tokens.
`adaptive` is Sluice's first look at a small copy, after which a tenth of the images is judged in full. `chat` is the
baseline, LlavaGuard's own way of calling: the OpenAI chat API of the same server, free-running JSON with a rationale
(90 tokens), temperature 0.2. `plain_chat` is `chat` to a server with SGLang's own defaults.

**Method.** A number of calls is always in flight. Images a second are counted from the end of the first calls, as many
as are in flight, for some seconds. All images differ, and the engine's cache is emptied before each measurement.

**Limit.** The time that the GPU's fastest matrix product and fastest copy (both measured first) need for the prefill's
operations, and for the bytes that decoding reads. Prompts shorter than this assumes do not exist: the policy is read
anew for each image, because the image stands before it.

Each measurement is one JSON line in `results.jsonl` as soon as it is known. Steps are ordered by value. A step that no
longer fits into `--budget-s` is skipped, with a line that says so.
"""

import argparse
import asyncio
import base64
import hashlib
import json
import logging
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import psutil
import pynvml

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, Python searches benchmarks/ only
from benchmarks import older_sglang
from benchmarks.made_up_checkpoints import PATCHES, SHAPES, TINY_SHAPES, Shape, count_views
from services.core.errors import GuardFailed, GuardUnavailable
from services.core.settings import Settings
from services.core.values import Assessment, Detail, GuardPriority, ImageFacts, Policy, PreparedImage
from services.guard.checkpoints import Checkpoint, resolve_checkpoint
from services.guard.engine import Engine
from services.guard.gpus import read_gpu_memory_bytes
from services.guard.inference import GuardInference
from services.images.decoder_pool import DecoderPool
from services.moderation.cascade import PolicyAssessment, assess_under_policies
from services.policies.document import PolicyDocument

ROOT: Final = Path(__file__).parents[1]
ROWS: Final = {"0.5B": "LlavaGuard-v1.2-0.5B-OV", "7B": "LlavaGuard-v1.2-7B-OV"}
SIZES: Final = {"384": (384, 384), "1024": (1024, 768), "1080p": (1920, 1080)}
LARGE: Final = (2304, 1728)
LARGE_COUNT: Final = 4
ANSWER_TOKENS: Final = 90
"""LlavaGuard's answers with a rationale have about 90 tokens."""
ESCALATED_SHARE: Final = 0.1
BASELINE: Final = "chat"
CLIENT_LIMIT: Final = 0.85
"""The share of a core from which the client may be what limits a rate."""
POOL: Final = {"384": 3000, "1024": 1500, "1080p": 800}
"""Distinct images of each size; a measurement ends early if it has used them all."""
DEADLINE_S: Final = 120.0
FIRST_CALLS_S: Final = 60.0
"""The first calls of a kind may compile kernels for so long."""


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement: a kind of request, the size of the images, and the calls in flight."""

    kind: str
    size: str = ""
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Session:
    """The measurements with one start of the engine."""

    shape: str
    steps: Sequence[Step]
    until: float = 1.0
    """The share of the budget by which the steps of this session must end, but for the first ones."""
    first: int = 0
    """Steps that may use the whole budget, because the start was paid for them."""
    plain: bool = False
    """Whether the server has SGLang's own defaults."""


@dataclass
class Budget:
    """The seconds that a run may take."""

    total_s: float
    began: float = field(default_factory=time.monotonic)

    @property
    def used_s(self) -> float:
        return time.monotonic() - self.began

    def has_room(self, needed_s: float, until: float = 1.0) -> bool:
        return self.used_s + needed_s <= until * self.total_s


class Results:
    """Writes each measurement at once, as a JSON line."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path = folder / "results.jsonl"
        self._began = time.monotonic()

    def add(self, measurement: str, **fields: Any) -> dict[str, Any]:
        line = {"measurement": measurement, "at_s": round(time.monotonic() - self._began, 1)} | {
            name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        progress(json.dumps(line))
        return line


# The limit of the hardware


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the GPU does at best."""

    flop_per_s: float
    bytes_per_s: float


def count_prefill_operations(shape: Shape, views: int, prompt_tokens: float) -> float:
    """Multiplications and additions of one prompt: vision tower, projector, language model, and one token's head."""
    tower = 4 * shape.tower_hidden**2 + 2 * shape.tower_hidden * shape.tower_intermediate
    view = 2 * PATCHES * (shape.tower_layers * tower + shape.tower_hidden * shape.hidden + shape.hidden**2)
    view += 4 * PATCHES**2 * shape.tower_hidden * shape.tower_layers
    # Causal attention computes half of the square.
    attention = 2 * prompt_tokens**2 * shape.hidden * shape.layers
    language = 2 * prompt_tokens * shape.layers * shape.layer_parameters
    return views * view + language + attention + 2 * shape.vocabulary * shape.hidden


def limit_images_per_s(
    shape: Shape, hardware: Hardware, *, views: int, prompt_tokens: float, output_tokens: float, in_flight: int
) -> float:
    """Images a second if nothing but the prefill's operations and the decoder's reading took time.

    A decoding step reads the weights once for all calls in flight, and the KV cache of each.
    """
    prefill_s = count_prefill_operations(shape, views, prompt_tokens) / hardware.flop_per_s
    step_bytes = 2 * shape.language_parameters / in_flight + shape.kv_bytes * prompt_tokens
    return 1 / (prefill_s + max(0.0, output_tokens - 1) * step_bytes / hardware.bytes_per_s)


_MEASURE_HARDWARE: Final = """
import json, sys, time, torch
cuda = torch.cuda.is_available()
device = "cuda" if cuda else "cpu"
side, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
def clock(work, count):
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    for _ in range(3): work()
    times = []
    for _ in range(count):
        wait(); began = time.perf_counter(); work(); wait()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]
a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
out = torch.empty_like(a)
product_s = clock(lambda: torch.mm(a, b, out=out), 10)
source = torch.randn((1 << 31 if cuda else 1 << 24) // 4, device=device)
target = torch.empty_like(source)
copy_s = clock(lambda: target.copy_(source), 10)
print(json.dumps({
    "device": torch.cuda.get_device_name() if cuda else "CPU", "torch": torch.__version__, "side": side,
    "dtype": str(dtype), "flop_per_s": 2 * side**3 / product_s, "bytes_per_s": 2 * source.nbytes / copy_s}))
"""


def measure_hardware(results: Results) -> Hardware:
    """In a process of its own, which frees the GPU."""
    done = subprocess.run([sys.executable, "-c", _MEASURE_HARDWARE], check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout.splitlines()[-1])
    results.add("hardware", **found)
    return Hardware(found["flop_per_s"], found["bytes_per_s"])


# Requests


def make_policy(**fields: Any) -> Policy:
    return PolicyDocument.model_validate({"name": "benchmark"} | fields).as_version(1)


@dataclass(frozen=True, slots=True)
class Reply:
    """The tokens of one call."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0


Call = Callable[[PreparedImage], Awaitable[Reply]]


class EscalatingGuard:
    """Judges with the real guard, and then escalates a tenth of the first looks: random weights have no opinion."""

    def __init__(self, guard: GuardInference) -> None:
        self._guard = guard
        self.used: list[Assessment] = []

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority
    ) -> list[Assessment]:
        found = await self._guard.assess_each(image, policies, detail, priority)
        self.used.extend(found)
        if detail != "score":
            return found
        escalated = int(image.sha256[:8], 16) % round(1 / ESCALATED_SHARE) == 0
        rating: Mapping[str, Any] = {"rating": "Unsafe", "score": 1.0} if escalated else {"rating": "Safe", "score": 0}
        return [replace(each, **rating) for each in found]


def make_calls(engine: Engine, in_flight: int, preparer: DecoderPool) -> dict[str, Call]:
    """Each kind of request."""
    guard = GuardInference(
        engine,
        in_flight=in_flight,
        deadline_s=DEADLINE_S,
        answer_tokens=ANSWER_TOKENS,
    )

    def ask(by: GuardInference, policy: Policy, detail: Detail) -> Call:
        async def call(image: PreparedImage) -> Reply:
            (found,) = await by.assess_each(image, [policy], detail)
            return Reply(found.prompt_tokens, found.output_tokens, found.cached_tokens)

        return call

    adaptive_policy = make_policy(effort="adaptive", rationale="never")

    async def adaptive(image: PreparedImage) -> Reply:
        escalating = EscalatingGuard(guard)
        (found,) = await assess_under_policies(image, [adaptive_policy], "live", guard=escalating, preparer=preparer)
        if not isinstance(found, PolicyAssessment) or not isinstance(found.answer, Assessment):
            raise GuardFailed(f"The image got no answer: {found}")
        return Reply(
            sum(each.prompt_tokens for each in escalating.used),
            sum(each.output_tokens for each in escalating.used),
            sum(each.cached_tokens for each in escalating.used),
        )

    return {
        "score": ask(guard, make_policy(), "score"),
        "verdict": ask(guard, make_policy(rationale="never"), "verdict"),
        "rationale": ask(guard, make_policy(rationale="always"), "verdict"),
        "adaptive": adaptive,
        "chat": make_chat(engine),
        "plain_chat": make_chat(engine),
    }


def make_chat(engine: Engine) -> Call:
    """LlavaGuard's own way of calling. The length of the answer is fixed, because random weights do not end one."""
    prompt = make_policy().prompt

    async def chat(image: PreparedImage) -> Reply:
        url = f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
        answer = await engine.call(
            "/v1/chat/completions",
            {
                "model": "made-up",
                "messages": [{"role": "user", "content": content}],
                "temperature": 0.2,
                "top_p": 0.95,
                "top_k": 50,
                "max_tokens": ANSWER_TOKENS,
                "ignore_eos": True,
            },
        )
        return Reply(int(answer["usage"]["prompt_tokens"]), int(answer["usage"]["completion_tokens"]))

    return chat


# Images


class Images:
    """Distinct images of each size, drawn by processes that run beside the first steps."""

    def __init__(self, folder: Path, pool: Mapping[str, int]) -> None:
        self._folder = folder
        self._drawing: dict[str, subprocess.Popen[bytes]] = {}
        counts = {size: (pool[size], SIZES[size]) for size in pool} | {"large": (LARGE_COUNT, LARGE)}
        for size, (count, (width, height)) in counts.items():
            target = folder / f"{width}x{height}"
            if len(list(target.glob("*.jpg"))) >= count:  # an earlier run has drawn them
                continue
            argv = [sys.executable, str(ROOT / "benchmarks" / "made_up_images.py"), f"{width}x{height}", str(count)]
            self._drawing[size] = subprocess.Popen([*argv, str(target)])

    def load(self, size: str) -> list[PreparedImage]:
        if (drawing := self._drawing.pop(size, None)) and drawing.wait() != 0:
            raise RuntimeError(f"drawing the images of {size} failed with status {drawing.returncode}")
        width, height = LARGE if size == "large" else SIZES[size]
        facts = ImageFacts(width=width, height=height, format="jpeg")
        found = []
        for path in sorted((self._folder / f"{width}x{height}").glob("*.jpg")):
            data = path.read_bytes()
            found.append(PreparedImage(data, "image/jpeg", width, height, hashlib.sha256(data).hexdigest(), facts))
        return found


# Measurements


@dataclass(frozen=True, slots=True)
class Rate:
    """What a number of calls in flight achieved."""

    images_per_s: float
    images: int
    p50_s: float
    p95_s: float
    prompt_tokens: float
    output_tokens: float
    cached_share: float
    client_cpu_share: float
    """The share of a core that this process used. Near 1, the client was the limit."""
    errors: int = 0
    first_error: str = ""


async def measure_rate(call: Call, images: Sequence[PreparedImage], in_flight: int, seconds: float) -> Rate:
    """Keep this many calls in flight until the time is over, and cancel the last ones.

    Raises:
        RuntimeError: too few calls succeeded.
    """
    remaining = iter(images)
    done: list[tuple[float, float, Reply]] = []
    failures: list[str] = []
    ended = asyncio.Event()

    async def work() -> None:
        for image in remaining:
            asked = time.perf_counter()
            try:
                reply = await call(image)
            except (GuardFailed, GuardUnavailable) as error:
                failures.append(str(error))
                if len(failures) >= in_flight:  # the engine is down
                    ended.set()
                    return
                continue
            now = time.perf_counter()
            done.append((now, now - asked, reply))
            # The first calls fill the pipeline. Some more are needed for a rate.
            enough = len(done) > in_flight and len(done) >= in_flight + min(in_flight, 8)
            if enough and now - done[in_flight - 1][0] >= seconds:
                ended.set()

    workers = [asyncio.create_task(work()) for _ in range(in_flight)]
    finished = asyncio.gather(*workers)
    began, cpu_began = time.perf_counter(), time.process_time()
    stop = asyncio.create_task(ended.wait())
    either: set[asyncio.Future[Any]] = {finished, stop}
    try:
        limit_s = 5 * seconds + FIRST_CALLS_S
        done_first, _ = await asyncio.wait(either, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not done_first:
            failures.append(f"the time was over after {limit_s:.0f} s")
    finally:
        client_cpu_share = (time.process_time() - cpu_began) / (time.perf_counter() - began)
        for task in (stop, *workers):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await finished
    counted = done[in_flight:]
    if len(counted) < 2:
        raise RuntimeError(f"only {len(done)} calls succeeded; {len(failures)} failed: {failures[:1]}")
    times = sorted(took for _, took, _ in counted)
    replies = [reply for _, _, reply in counted]
    prompt_tokens = statistics.mean(reply.prompt_tokens for reply in replies)
    return Rate(
        images_per_s=len(counted) / (counted[-1][0] - done[in_flight - 1][0]),
        images=len(counted),
        p50_s=statistics.median(times),
        p95_s=times[int(0.95 * (len(times) - 1))],
        prompt_tokens=prompt_tokens,
        output_tokens=statistics.mean(reply.output_tokens for reply in replies),
        cached_share=statistics.mean(reply.cached_tokens for reply in replies) / max(1.0, prompt_tokens),
        client_cpu_share=client_cpu_share,
        errors=len(failures),
        first_error=failures[0][:200] if failures else "",
    )


class MemorySampler:
    """The most memory in use, of the first GPU or of the engine's processes."""

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak_bytes = self.first_bytes = self.read()

    def read(self) -> int:
        try:
            pynvml.nvmlInit()
            return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
        except pynvml.NVMLError:
            pass
        total = 0
        with suppress(psutil.Error):
            engine = psutil.Process(self._pid)
            for process in (engine, *engine.children(recursive=True)):
                with suppress(psutil.Error):
                    total += process.memory_info().rss
        return total

    def _sample(self) -> None:
        while not self._ended.wait(0.05):
            self.peak_bytes = max(self.peak_bytes, self.read())

    def __enter__(self) -> "MemorySampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


class StartTimes(logging.Handler):
    """Reads from the log of Sluice when the server listened and when it was ready, in seconds after its launch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        for part, name in (("listens after", "listens_s"), ("is ready after", "ready_s")):
            if part in str(record.msg) and isinstance(record.args, tuple):
                self.found[name] = float(str(record.args[0]))


async def settle(engine: Engine) -> None:
    """End the calls that were cancelled, and empty the cache. The engine refuses while it has a request."""
    with suppress(GuardUnavailable, GuardFailed):
        await engine.call("/abort_request", {"rid": "", "abort_all": True})
    for _ in range(100):
        try:
            await engine.call("/flush_cache", {})
        except GuardUnavailable:
            return  # it answered with text instead of JSON: the cache is empty
        except GuardFailed:
            await asyncio.sleep(0.1)
        else:
            return
    raise RuntimeError("the engine did not empty its cache within 10 s; it is never idle")


# The run


@dataclass
class Run:
    """Everything that the steps share."""

    results: Results
    budget: Budget
    work: Path
    shapes: Mapping[str, Shape]
    images: Images
    hardware: Hardware
    seconds: float
    engine_in_flight: int
    engine_flags: tuple[str, ...] = ()
    tokenizer: Path | None = None
    tiny: bool = False
    step_s: dict[tuple[str, str, str], float] = field(default_factory=dict)
    """How long a step took, by shape, kind and size."""
    start_s: float = 60.0
    """How long the last start took."""

    def skip(self, reason: str, **fields: Any) -> None:
        self.results.add("skipped", reason=reason, **fields)

    async def run_session(self, session: Session) -> None:
        """One start of the engine, and its steps. An error ends the session, not the run."""
        expected = self.start_s + 2 * self.seconds
        if not self.budget.has_room(expected, session.until):
            steps = [f"{step.kind} {step.size} {step.in_flight}" for step in session.steps]
            self.skip(f"a start takes about {expected:.0f} s", shape=session.shape, plain=session.plain, steps=steps)
            return
        try:
            async with self._start(session) as engine:
                await self._run_steps(session, engine)
        except Exception as error:  # noqa: BLE001 - the other sessions are worth having
            self.results.add("failed", shape=session.shape, error=f"{type(error).__name__}: {error}"[:1000])
        finally:
            self._keep_log(session)

    @asynccontextmanager
    async def _start(self, session: Session) -> AsyncIterator[Engine]:
        checkpoint = await self._make_checkpoint(session.shape)
        caches = self.work / "kernels"
        cached = sum(path.is_file() for path in caches.rglob("*")) if caches.is_dir() else 0
        times = StartTimes()
        logging.getLogger("services.guard").addHandler(times)
        began = time.monotonic()
        engine = Engine(
            checkpoint,
            state_dir=self.work / "state",
            in_flight=self.engine_in_flight,
            deadline_s=DEADLINE_S,
            start_s=max(60.0, self.budget.total_s - self.budget.used_s),
            # A server that compiles kernels generates nothing for a while.
            hang_s=300,
            engine_flags=self.engine_flags,
        )
        with use_plain_defaults() if session.plain else nullcontext():
            await engine.start()
        self.start_s = time.monotonic() - began
        # Sluice hashes the weights of a local folder before the launch.
        launch_s = times.found.get("ready_s", 0.0)
        self.results.add(
            "start",
            shape=session.shape,
            plain=session.plain,
            kernel_files_before=cached,
            caches="empty" if cached == 0 else "filled by an earlier start",
            staging_s=self.start_s - launch_s,
            total_s=self.start_s,
            **times.found,
        )
        try:
            yield engine
        finally:
            logging.getLogger("services.guard").removeHandler(times)
            await engine.stop()

    async def _make_checkpoint(self, shape: str) -> Checkpoint:
        folder = self.work / "checkpoints" / shape
        if not (folder / "config.json").is_file():
            began = time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            argv = [sys.executable, str(ROOT / "benchmarks" / "made_up_checkpoints.py"), shape, str(folder)]
            argv += ["--tiny"] if self.tiny else []
            argv += ["--tokenizer", str(self.tokenizer)] if self.tokenizer else []
            await asyncio.to_thread(subprocess.run, argv, check=True, stdout=sys.stderr)
            size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
            self.results.add("weights", shape=shape, bytes=size, seconds=time.monotonic() - began)
        row = resolve_checkpoint(ROWS[shape])
        return replace(row, folder=folder, launch_flags=(*row.launch_flags, "--chat-template", "chatml-llava"))

    async def _run_steps(self, session: Session, engine: Engine) -> None:
        preparer = DecoderPool(
            Settings(model="tiny", decode_workers=max(2, (os.cpu_count() or 2) // 2)), engine.checkpoint.max_side_px
        )
        try:
            for number, step in enumerate(session.steps):
                until = 1.0 if number < session.first else session.until
                in_flight = step.in_flight or self._default_in_flight(session.shape)
                expected = self.step_s.get((session.shape, step.kind, step.size), 3 * self.seconds)
                named = {"shape": session.shape, "kind": step.kind, "size": step.size, "in_flight": in_flight}
                if not self.budget.has_room(expected, until):
                    self.skip(f"it takes about {expected:.0f} s", **named)
                    continue
                began = time.monotonic()
                try:
                    if step.kind == "memory":
                        await self._measure_memory(session.shape, engine)
                    else:
                        await self._measure_rate(session.shape, step, in_flight, engine, preparer)
                except Exception as error:
                    self.results.add("failed", **named, error=f"{type(error).__name__}: {error}"[:1000])
                    if engine.state != "ready":
                        raise
                self.step_s[session.shape, step.kind, step.size] = time.monotonic() - began
        finally:
            preparer.close()

    def _default_in_flight(self, shape: str) -> int:
        """As Sluice chooses it for a large GPU."""
        return min(self.engine_in_flight, resolve_checkpoint(ROWS[shape]).large_gpu_in_flight)

    async def _measure_rate(self, name: str, step: Step, in_flight: int, engine: Engine, preparer: DecoderPool) -> None:
        images = await asyncio.to_thread(self.images.load, step.size)
        call = make_calls(engine, in_flight, preparer)[step.kind]
        await settle(engine)
        rate = await measure_rate(call, images, in_flight, self.seconds)
        await settle(engine)
        width, height = SIZES[step.size]
        fields: dict[str, Any] = {}
        if step.kind != "adaptive":  # its prompts have two lengths
            fields["limit_images_per_s"] = limit = limit_images_per_s(
                self.shapes[name],
                self.hardware,
                views=count_views(width, height),
                prompt_tokens=rate.prompt_tokens,
                output_tokens=rate.output_tokens,
                in_flight=in_flight,
            )
            fields["share_of_limit"] = rate.images_per_s / limit
        found = {key: getattr(rate, key) for key in Rate.__slots__}
        self.results.add("rate", shape=name, kind=step.kind, size=step.size, in_flight=in_flight, **found, **fields)

    async def _measure_memory(self, name: str, engine: Engine) -> None:
        """The most memory while the largest images are judged together."""
        images = await asyncio.to_thread(self.images.load, "large")
        guard = GuardInference(engine, in_flight=len(images), deadline_s=DEADLINE_S)
        await settle(engine)
        began = time.monotonic()
        with MemorySampler(engine.pid) as memory:
            policy = make_policy(rationale="never")
            await asyncio.gather(*(guard.assess_each(image, [policy], "verdict") for image in images))
        gpus = read_gpu_memory_bytes()
        plan = engine.checkpoint.plan_memory(gpus, self.engine_in_flight) if gpus else None
        self.results.add(
            "memory",
            shape=name,
            of="GPU 0" if gpus else "the engine's processes",
            images=len(images),
            size=f"{LARGE[0]}x{LARGE[1]}",
            seconds=time.monotonic() - began,
            before_gib=memory.first_bytes / 2**30,
            peak_gib=memory.peak_bytes / 2**30,
            total_gib=gpus[0] / 2**30 if gpus else 0.0,
            planned_kv_gib=plan.kv_tokens * self.shapes[name].kv_bytes / 2**30 if plan else 0.0,
            planned_prefill_tokens=plan.prefill_tokens if plan else 0,
        )

    def _keep_log(self, session: Session) -> None:
        """The end of the engine's log, beside the results."""
        logs = sorted((self.work / "state" / "logs").glob("engine-*.log"), key=lambda path: path.stat().st_mtime)
        if logs:
            name = f"engine-{session.shape}{'-plain' if session.plain else ''}.log"
            (self.results.folder / name).write_bytes(logs[-1].read_bytes()[-1_000_000:])


@contextmanager
def use_plain_defaults() -> Iterator[None]:
    """Launch the server as LlavaGuard's repository does: model, chat template, and SGLang's defaults."""
    from services.guard import sglang_command  # noqa: PLC0415 - its flags are replaced

    kept = ("--host", "--log-level", "--log-level-http", "--skip-server-warmup", "--enable-priority-scheduling")
    common, cuda = sglang_command._COMMON_FLAGS, sglang_command._make_cuda_flags
    plain = [
        word
        for number, word in enumerate(common)
        if word in kept or (number and common[number - 1] in kept and not word.startswith("--"))
    ]
    try:
        sglang_command._COMMON_FLAGS = tuple(plain)  # type: ignore[misc, assignment]
        sglang_command._make_cuda_flags = lambda plan: ("--tp-size", str(plan.gpus))
        yield
    finally:
        sglang_command._COMMON_FLAGS, sglang_command._make_cuda_flags = common, cuda  # type: ignore[misc]


def plan_sessions(*, smoke: bool, sweep: Sequence[int]) -> list[Session]:
    """The sessions of a run, most valuable first."""
    if smoke:
        steps = [Step("verdict", "384"), Step("chat", "384"), Step("score", "1080p"), Step("adaptive", "1080p")]
        return [Session("0.5B", [*steps, Step("memory")])]
    most = [Step(kind, size) for size in ("384", "1080p") for kind in ("verdict", "chat", "score")]
    more = [Step("adaptive", "1080p"), Step("memory"), Step("verdict", "1024"), Step("rationale", "384")]
    rest = [Step("chat", "1024"), Step("score", "1024"), Step("adaptive", "1024")]
    rest += [Step("rationale", "1080p"), Step("rationale", "1024")]
    # The lowest and the highest load first.
    ordered = [sweep[0], sweep[-1], *sweep[1:-1]]
    loads = [Step("verdict", size, calls) for calls in ordered for size in ("384", "1080p")]
    return [
        Session("0.5B", [*most, *more, *rest], until=0.42, first=len(most)),
        Session("7B", [*most, *more, *loads, *rest], until=0.9, first=len(most)),
        # The second start of a shape finds the kernels of the first.
        Session("0.5B", loads),
        Session("0.5B", [Step("plain_chat", "384"), Step("plain_chat", "1080p")], plain=True),
        Session("7B", [Step("plain_chat", "384"), Step("plain_chat", "1080p")], plain=True),
    ]


# The report


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results of all runs in the folder. The report shows the newest rate of each kind."""
    path = folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # a run that was cut off may leave half a line


def format_report(results: Sequence[Mapping[str, Any]]) -> str:
    """Figures and ratios as text."""
    lines: list[str] = []
    for each in results:
        if each["measurement"] == "hardware":
            lines += [
                f"{each['device']}, PyTorch {each['torch']}: {each['flop_per_s'] / 1e12:.3g} TFLOP/s in a product of "
                f"{each['side']} x {each['side']} ({each['dtype']}), {each['bytes_per_s'] / 1e12:.3g} TB/s in a copy.",
                "Limit: these rates for the prefill's operations and the decoder's reading; every token of a prompt is "
                "computed.",
            ]
        elif each["measurement"] == "start":
            lines.append(
                f"start of {each['shape']}{' (plain)' if each['plain'] else ''}: {each['total_s']:.0f} s, of these "
                f"{each['staging_s']:.0f} s before the launch, listening {each.get('listens_s', 0):.0f} s after it; "
                f"caches of kernels: {each['caches']}"
            )
        elif each["measurement"] == "memory":
            of = f" of {each['total_gib']:.1f}" if each["total_gib"] else ""
            lines.append(
                f"memory of {each['of']}, {each['shape']}, {each['images']} images of {each['size']} at a time: "
                f"{each['peak_gib']:.1f} GiB at most{of}; before {each['before_gib']:.1f}"
            )
    rates = {(r["shape"], r["size"], r["in_flight"], r["kind"]): r for r in results if r["measurement"] == "rate"}
    if rates:
        lines += ["", "shape size  in_flight kind       images/s  p50 s  tokens in, out  of limit  to chat"]
    for (shape, size, in_flight, kind), rate in sorted(rates.items()):
        baseline = rates.get((shape, size, in_flight, BASELINE))
        ratio = f"{rate['images_per_s'] / baseline['images_per_s']:8.2f}" if baseline else "       -"
        share = f"{100 * rate['share_of_limit']:6.1f} %" if "share_of_limit" in rate else "       -"
        lines.append(
            f"{shape:<5} {size:<5} {in_flight:>9} {kind:<10} {rate['images_per_s']:8.2f} {rate['p50_s']:6.2f} "
            f"{rate['prompt_tokens']:9.0f} {rate['output_tokens']:5.1f} {share} {ratio}"
            + (f"  {rate['errors']} errors" if rate["errors"] else "")
            + ("  the client was the limit" if rate["client_cpu_share"] > CLIENT_LIMIT else "")
        )
    last = max((number for number, each in enumerate(results) if each["measurement"] == "run"), default=0)
    for each in results[last:]:
        if each["measurement"] in {"skipped", "failed"}:
            what = [f"{each[name]}" for name in ("shape", "kind", "size", "in_flight") if each.get(name)]
            what += [f"({len(each['steps'])} steps)"] if "steps" in each else []
            lines.append(f"{each['measurement']}: {' '.join(what)}: {each.get('reason') or each.get('error')}")
    return "\n".join(lines)


def choose_work_folder() -> Path:
    """In memory if there is room for the weights of 7B, so that the disk does not count."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > 40 << 30:
        return shared / "sluice-guard-gpu"
    return Path("/var/tmp/sluice-guard-gpu")


def keep_kernels_below(folder: Path) -> None:
    """Compiled kernels go into folders of their own, so that the first start is a cold one."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "XDG_CACHE_HOME": str(folder),
        "SGLANG_CACHE_DIR": str(folder / "sglang"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "FLASHINFER_WORKSPACE_BASE": str(folder),
        "CUDA_CACHE_PATH": str(folder / "cuda"),
    }


async def main(arguments: argparse.Namespace) -> int:
    results = Results(arguments.out)
    budget = Budget(arguments.budget_s)
    work: Path = arguments.work or choose_work_folder()
    if arguments.tiny:
        work /= "tiny"
    keep_kernels_below(work / "kernels")
    older_sglang.adapt()
    gpus = read_gpu_memory_bytes()
    sweep = (2, 3, 4) if arguments.tiny else (8, 16, 32, 64)
    results.add(
        "run",
        argv=sys.argv[1:],
        sglang=older_sglang.installed_version(),
        gpus_gib=[round(each / 2**30, 1) for each in gpus],
        cores=os.cpu_count(),
        budget_s=budget.total_s,
        engine_flags=arguments.engine_flags,
    )
    pool = dict.fromkeys(SIZES, 60) if arguments.tiny else POOL
    images = Images(work / "images", pool)
    run = Run(
        results=results,
        budget=budget,
        work=work,
        shapes=TINY_SHAPES if arguments.tiny else SHAPES,
        images=images,
        hardware=measure_hardware(results),
        seconds=arguments.seconds or (2.0 if arguments.smoke else 4.0),
        engine_in_flight=max(sweep),
        engine_flags=tuple(shlex.split(arguments.engine_flags)),
        tokenizer=arguments.tokenizer,
        tiny=arguments.tiny,
    )
    for session in plan_sessions(smoke=arguments.smoke, sweep=sweep):
        if arguments.shapes and session.shape not in arguments.shapes.split(","):
            continue
        await run.run_session(session)
    results.add("end", used_s=budget.used_s)
    found = read_results(arguments.out)
    print(format_report(found), flush=True)
    return 0 if any(each["measurement"] == "rate" for each in found) else 1


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few measurements of two seconds")
    parser.add_argument("--tiny", action="store_true", help="shapes for machines without a GPU")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="print the results in this folder, run nothing")
    parser.add_argument("--out", type=Path, default=Path("guard-gpu"), help="the folder of the results")
    parser.add_argument(
        "--work", type=Path, help="weights, images, kernels; kept for the next run (default: in memory)"
    )
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds that the run may take (default: 540)")
    parser.add_argument("--seconds", type=float, help="of one measurement (default: 4, or 2 with --smoke)")
    parser.add_argument("--shapes", help="0.5B, 7B or 0.5B,7B (default: both)")
    parser.add_argument("--engine-flags", default="", help="as SLUICE_ENGINE_FLAGS, e.g. '--attention-backend triton'")
    parser.add_argument("--tokenizer", type=Path, help="a folder with Qwen's tokenizer (default: one is made up)")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    if given.report:
        print(format_report(read_results(given.report)))
        sys.exit(0)
    sys.exit(asyncio.run(main(given)))
