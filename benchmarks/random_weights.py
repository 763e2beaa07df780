"""Answers can be parsed with any weights: judge images with checkpoints of random weights.

    python benchmarks/random_weights.py [--answers 2000] [--seeds 4] [--json]

Every answer must be readable at the first try: a rating, a category that fits it, a rationale if the policy asks for
one, no control character and no run of white space. The three modes of `rationale` take turns.
"""

import argparse
import asyncio
import json
import logging
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from pipelines.tiny_guard.drawings import draw
from services.core.errors import UnreadableAnswer
from services.core.values import CATEGORIES, NO_CATEGORY, Assessment, Policy
from services.guard.checkpoints import resolve_checkpoint
from services.guard.engine import Engine
from services.guard.inference import GuardInference
from services.images.decode import Limits, prepare
from services.policies.document import PolicyDocument

MODES = ("unsafe", "always", "never")
CONCURRENCY = 16


def find_faults(answer: Assessment, mode: str) -> list[str]:
    """The names of the faults of an answer."""
    wants_rationale = mode == "always" or (mode == "unsafe" and answer.rating == "Unsafe")
    rationale = answer.rationale or ""
    categories = CATEGORIES if answer.rating == "Unsafe" else (*CATEGORIES, NO_CATEGORY)
    found = {
        "category": answer.category not in categories,
        "rationale": bool(rationale) != wants_rationale,
        "white_space": bool(re.search(r"\s\s", rationale)) or rationale != rationale.strip(),
        "control": any(not character.isprintable() for character in rationale),
    }
    return [name for name, wrong in found.items() if wrong]


async def judge_all(checkpoint: Path, count: int, first: int, results: Counter[str]) -> None:
    policies: list[Policy] = [PolicyDocument(name="random", rationale=mode).as_version(1) for mode in MODES]
    with tempfile.TemporaryDirectory(prefix="sluice-random-") as folder:
        async with Engine(resolve_checkpoint(str(checkpoint)), state_dir=Path(folder), in_flight=CONCURRENCY) as engine:
            guard, slots = (
                GuardInference(engine, in_flight=CONCURRENCY, deadline_s=300),
                asyncio.Semaphore(CONCURRENCY),
            )

            async def judge(number: int) -> None:
                async with slots:  # a request that waits here does not use up its deadline
                    await judge_in_slot(number)

            async def judge_in_slot(number: int) -> None:
                image = prepare(draw(number).jpeg, Limits(image_px=1_000_000, side_px=guard.max_side_px))
                mode = MODES[number % len(MODES)]
                try:
                    (answer,) = await guard.assess_each(image, [policies[number % len(MODES)]], "verdict")
                except UnreadableAnswer as error:
                    results[f"unreadable: {error}"] += 1
                    return
                results["read"] += 1
                results["cut"] += answer.rationale_truncated
                results[answer.rating] += 1
                results.update(find_faults(answer, mode))

            await asyncio.gather(*(judge(number) for number in range(first, first + count)))


async def run(answers: int, seeds: int) -> Counter[str]:
    results: Counter[str] = Counter()
    for seed in range(seeds):
        with tempfile.TemporaryDirectory(prefix="sluice-weights-") as folder:
            command = [
                sys.executable,
                "-m",
                "pipelines.tiny_guard.train",
                "--random",
                "--seed",
                str(seed),
                "--out",
                folder,
            ]
            await asyncio.to_thread(subprocess.run, command, check=True, stdout=sys.stderr)
            await judge_all(Path(folder), answers // seeds, 7_000_000 + seed * answers, results)
            print(f"seed {seed}: {dict(results)}", file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    given = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    found = asyncio.run(run(given.answers, given.seeds))
    print(json.dumps(found) if given.json else "\n".join(f"{name:<20} {value}" for name, value in found.items()))
    sys.exit(
        found["read"] != given.answers // given.seeds * given.seeds
        or any(found[name] for name in ("category", "rationale", "white_space", "control"))
    )
