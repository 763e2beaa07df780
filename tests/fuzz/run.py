"""Feeds mutated messages to the formats, and mutated pictures to the decoders.

    python -m tests.fuzz.run [--cases 100000] [--seed 1]

Half of the cases each. Nothing may be raised that the interfaces do not name, no message may take a second and no
picture five, and no decoding process may grow beyond its bound. What breaks a rule is written to `corpus`. For the
formats a coverage-guided fuzzer does the second half of their share, where `atheris` is installed (`pip install
atheris`).
"""

import argparse
import asyncio
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from services.core.errors import Unjudgeable
from services.core.settings import Settings
from services.images.decoder_pool import DecoderPool
from services.streams.base import Message
from services.streams.parsing import InvalidMessage, ParsedSubmission, parse
from tests.fuzz.cases import CORPUS, images, messages, mutated

MESSAGE_S = 1.0
IMAGE_S = 5.0
IN_FLIGHT = 4
HEADERS = ((), (("ce_specversion", b"1.0"), ("ce_type", b"t"), ("ce_id", b"1"), ("ce_source", b"s")))


def keep(kind: str, data: bytes) -> str:
    """Write a find to the corpus; returns its name."""
    file = CORPUS / kind / f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
    file.write_bytes(data)
    return f"{kind}/{file.name}"


def parsed(data: bytes) -> str | None:
    """What is wrong with how the formats take a message, None where nothing is."""
    for headers in HEADERS:
        message = Message(data, b"k", headers, "s/0/1", datetime.now(UTC))
        started = time.thread_time()  # of this thread alone: other work on the machine does not count
        try:
            entries = parse(message)
        except Exception as error:  # noqa: BLE001 - any is a find
            return f"{type(error).__name__}: {error}"
        if (took_s := time.thread_time() - started) > MESSAGE_S:
            return f"took {took_s:.1f} s"
        if not all(isinstance(entry, ParsedSubmission | InvalidMessage) for entry in entries):
            return "something else than entries"
        for entry in entries:
            if isinstance(entry, ParsedSubmission):
                entry.submission.model_dump_json()
    return None


def fuzz_formats(cases: Iterable[bytes]) -> Counter[str]:
    ends: Counter[str] = Counter()
    for data in cases:
        wrong = parsed(data)
        ends["wrong" if wrong else "fine"] += 1
        if wrong:
            print(f"{keep('formats', data)}: {wrong}", file=sys.stderr)
    return ends


async def fuzz_images(cases: Iterable[bytes]) -> tuple[Counter[str], float]:
    """How the cases ended, and the seconds of the slowest one."""
    ends: Counter[str] = Counter()
    slowest_s = 0.0
    preparer = DecoderPool(Settings(decode_workers=2, decode_deadline_s=IMAGE_S, image_limit_px=1_000_000), 384)
    waiting = iter(cases)

    async def work() -> None:
        nonlocal slowest_s
        for data in waiting:
            started, wrong = time.perf_counter(), None
            try:
                prepared = await preparer.prepare(data)
                ends["prepared"] += 1
                if max(prepared.width, prepared.height) > 384:
                    wrong = f"{prepared.width}x{prepared.height}"
            except Unjudgeable as error:
                ends[error.reason] += 1
                if "longer than" in str(error) or "crashed" in str(error):
                    wrong = str(error)
            except Exception as error:  # noqa: BLE001 - any is a find
                wrong = f"{type(error).__name__}: {error}"
            slowest_s = max(slowest_s, time.perf_counter() - started)
            if wrong:
                ends["wrong"] += 1
                print(f"{keep('images', data)}: {wrong}", file=sys.stderr)

    try:
        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    finally:
        preparer.close()
    return ends, slowest_s


def guide(runs: int, seed: int) -> int:
    """Let coverage choose the messages; returns 0 where nothing was found."""
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(messages()):
            (Path(folder) / str(number)).write_bytes(data)
        options = [f"-runs={runs}", f"-seed={seed}", "-max_len=8192", "-verbosity=0"]
        command = [sys.executable, "-m", "tests.fuzz.guided", folder, *options]
        return subprocess.run(command, check=False).returncode


def main(cases: int, seed: int) -> int:
    started = time.monotonic()
    guided = cases // 4 if find_spec("atheris") else 0
    formats = fuzz_formats(islice(mutated(messages(), seed), cases // 2 - guided))
    if guided:
        formats["wrong" if guide(guided, seed) else "guided"] += guided
    ends, slowest_s = asyncio.run(fuzz_images(islice(mutated(images(), seed), cases // 2)))
    largest_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    found = {
        "cases": cases,
        "formats": dict(formats),
        "images": dict(ends),
        "slowest_image_s": round(slowest_s, 2),
        "largest_process_mib": largest_bytes >> 20,
        "wrong": formats["wrong"] + ends["wrong"],
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    print(json.dumps(found))
    return bool(found["wrong"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    sys.exit(main(given.cases, given.seed))
