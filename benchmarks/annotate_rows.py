"""A large data set through `sluice annotate`: rows a second of each stage, and its memory.

    python benchmarks/annotate_rows.py [--rows 1000000] [--distinct 20000]

The data set is parquet with image bytes, as Hugging Face stores them: small pictures, repeated in random order, one
picture in a hundred broken. The guard is scripted and takes no time, so only the bookkeeping is measured. At the end
every row must be there once, and every picture must have been judged once. Prints one JSON line. The progress of the
stages goes to stderr.
"""

import argparse
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from services.core.processes import SupervisedProcess

FILE_ROWS: Final = 50_000
PICTURES_PER_BROKEN_ONE: Final = 100
"""One of this many pictures cannot be decoded."""
_MIB: Final = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--distinct", type=int, default=20_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_data_set(folder / "images", given.rows, given.distinct)
        rates, memory, whole_s = annotate(folder)
        check(folder, given.rows, given.distinct)
    figures = {"rows": given.rows, "distinct": given.distinct, "whole_s": round(whole_s)}
    figures |= {f"{stage}_rows_per_s": rate for stage, rate in rates.items()}
    print(json.dumps(figures | {f"{name}_mib": size // _MIB for name, size in memory.items()}))


def write_data_set(folder: Path, rows: int, distinct: int) -> None:
    folder.mkdir()
    rng = random.Random(1)
    pictures = [picture(number) for number in range(distinct)]
    order = [number % distinct for number in range(rows)]
    rng.shuffle(order)
    for first in range(0, rows, FILE_ROWS):
        images = [{"bytes": pictures[number], "path": None} for number in order[first : first + FILE_ROWS]]
        pq.write_table(pa.table({"image": images}), folder / f"{first // FILE_ROWS:04d}.parquet")


def picture(number: int) -> bytes:
    """A PNG of 8 x 8 pixels with random colours, or bytes that are no image."""
    if number % PICTURES_PER_BROKEN_ONE == 0:
        return b"no image %d" % number
    buffer = io.BytesIO()
    Image.frombytes("RGB", (8, 8), random.Random(number).randbytes(192)).save(buffer, "PNG")
    return buffer.getvalue()


def annotate(folder: Path) -> tuple[dict[str, int], dict[str, int], float]:
    """Run `sluice annotate`.

    Returns:
        Rows a second by stage; peak memory of the command and of its largest worker, in bytes; the duration in seconds.
    """
    address = folder / "address"
    cluster = SupervisedProcess(
        [sys.executable, "-m", "tests.support.annotation_service", str(address), str(folder / "log"), "0"],
        log=folder / "cluster.log",
    )
    try:
        while not address.exists():
            time.sleep(0.1)
        environment = {"RAY_AUTH_MODE": "token", "SLUICE_RAY_ADDRESS": address.read_text(), "SLUICE_MODEL": "tiny"}
        started = time.monotonic()
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("sluice")), "annotate", "images", "--out", "out", "--workers", "2"],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        peaks: Counter[str] = Counter()
        threading.Thread(target=record_memory, args=(process, cluster.pid, peaks), daemon=True).start()
        rates: dict[str, int] = {}
        assert process.stderr
        for line in process.stderr:
            print(f"[{time.monotonic() - started:6.1f} s] {line.rstrip()}", file=sys.stderr, flush=True)
            if match := re.match(r"(indexed|judged|published) .*?, ([\d,]+)\.\d/s", line):
                rates[match[1]] = int(match[2].replace(",", ""))
        if process.wait():
            raise SystemExit("sluice annotate failed")
        return rates, dict(peaks), time.monotonic() - started
    finally:
        cluster.kill()


def record_memory(command: subprocess.Popen[str], cluster: int, peaks: Counter[str]) -> None:
    """Record the peak memory of the command and of any Ray Data worker, until the command ends."""
    while command.poll() is None:
        with suppress(psutil.Error):
            peaks["command"] = max(peaks["command"], psutil.Process(command.pid).memory_info().rss)
            for process in psutil.Process(cluster).children(recursive=True):
                with suppress(psutil.Error):
                    if any("MapWorker" in part or "MapBatches" in part for part in process.cmdline()):
                        peaks["worker"] = max(peaks["worker"], process.memory_info().rss)
        time.sleep(0.5)


def check(folder: Path, rows: int, distinct: int) -> None:
    """Assert that every row is there once, and that every picture was judged once."""
    found = pq.read_table(folder / "out", columns=["row", "outcome", "duplicate_of"])
    numbers = found.column("row").to_pylist()
    broken = -(-distinct // PICTURES_PER_BROKEN_ONE)
    assert len(numbers) == rows
    assert len(set(numbers)) == rows
    judged = (folder / "log").read_text().split()
    assert len(judged) == len(set(judged)) == distinct - broken
    outcomes = Counter(found.column("outcome").to_pylist())
    assert set(outcomes) == {"verdict", "dead_letter"}
    assert found.column("duplicate_of").null_count >= distinct - broken


if __name__ == "__main__":
    main()
