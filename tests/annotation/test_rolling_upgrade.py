"""A run of `sluice annotate` that version 0.1.0 began, and that was killed, is finished by today's code.

`run-0.1.0.json` holds the files of such a run after its last chunk was judged and before it published anything: JSON
as text, Parquet as the schema and the rows. In them {root} stands for the folder of the source and of the run, and
{listing} for the random name of the listing.
"""

import base64
import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.annotation.options import AnnotateOptions
from pipelines.annotation.run import annotate
from pipelines.annotation.storage import LocalFolder
from services.core.settings import Settings
from services.core.values import Assessment, PreparedImage
from tests.support.annotation_service import assessment
from tests.support.annotation_without_ray import annotate_without_ray
from tests.support.data_set_images import tar
from tests.support.fake_guard import FakeGuard

FILES: Final[dict[str, Any]] = json.loads((Path(__file__).parent / "run-0.1.0.json").read_text())
CHUNKS: Final = [name for name in FILES if name.startswith("_sluice/chunks/")]
RECORDED_ROWS: Final = {row["row"]: row for name in CHUNKS for row in FILES[name]["rows"]}
TIMES: Final = ("submitted_at", "judged_at")


class Crash(BaseException):
    """Stands for the death of the process."""


class CountingGuard(FakeGuard):
    """Gives the answers of the recording, and counts the images."""

    images = 0

    async def max_side_px(self) -> int:
        return 384

    async def assess_each(self, image: PreparedImage, *_: Any) -> list[Assessment]:
        CountingGuard.images += 1
        return [assessment(image.sha256)]


@pytest.fixture(autouse=True)
def _guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountingGuard, "images", 0)
    annotate_without_ray(monkeypatch, CountingGuard)


@pytest.fixture
def options(tmp_path: Path) -> AnnotateOptions:
    """The options and the source of the recorded run: ten images, one of them broken, three of them duplicates."""

    def image(number: int) -> bytes:
        return b"no image" if number == 3 else b"\x89PNG\r\n\x1a\n" + bytes([number % 7]) * 100

    images = [(f"{number:02d}.png", image(number)) for number in range(10)]
    (tmp_path / "shards").mkdir()
    tar(tmp_path / "shards" / "0.tar", images[:6])
    tar(tmp_path / "shards" / "1.tar", images[6:])
    return AnnotateOptions(str(tmp_path / "shards"), str(tmp_path / "out"), "default", chunk_rows=4)


def restore(root: Path, *missing: str) -> None:
    """Write the recorded files below `root`, except `missing`."""
    for name, content in json.loads(json.dumps(FILES).replace("{root}", str(root))).items():
        if name in missing:
            continue
        file = root / "out" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            file.write_text(content)
        else:
            schema = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(content["schema"])))
            rows = [
                {
                    name: datetime.fromisoformat(value) if name in TIMES and value else value
                    for name, value in row.items()
                }
                for row in content["rows"]
            ]
            pq.write_table(pa.Table.from_pylist(rows, schema), file)


def dump(root: Path) -> Iterator[tuple[str, Any]]:
    """The files below `root`, in the form of the recording."""
    listing = re.compile(r"(_sluice/listing/)[0-9a-f]{32}")
    for file in (root / "out").rglob("*"):
        if not file.is_file():
            continue
        content: Any
        if file.suffix == ".parquet":
            table = pq.read_table(file, partitioning=None)
            schema = base64.b64encode(table.schema.serialize().to_pybytes()).decode()
            content = {"schema": schema, "rows": table.to_pylist()}
        else:
            content = file.read_text()
        text = json.dumps(content, default=lambda value: value.isoformat()).replace(str(root), "{root}")
        yield (
            listing.sub(r"\1{listing}", str(file.relative_to(root / "out"))),
            json.loads(listing.sub(r"\1{listing}", text)),
        )


def comparable(files: dict[str, Any]) -> dict[str, Any]:
    """The files without times, without ids that depend on the folder, and with schemas that can be read."""
    result = {}
    for name, content in files.items():
        if isinstance(content, str):
            result[name] = content
            continue
        schema = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(content["schema"])))
        rows = [
            {column: value for column, value in row.items() if column not in {*TIMES, "verdict_id", "timings_ms"}}
            for row in content["rows"]
        ]
        result[name] = {"schema": schema.to_string(), "rows": rows}
    return result


@pytest.mark.parametrize("missing", [(), (CHUNKS[1],), tuple(CHUNKS)], ids=["no chunk", "one chunk", "all chunks"])
def test_run_of_0_1_0_is_finished(missing: tuple[str, ...], options: AnnotateOptions, tmp_path: Path) -> None:
    restore(tmp_path, *missing)
    summary, _ = annotate(options, Settings(model="tiny"), lambda _: None)
    assert (summary["rows"], summary["outcome"]) == (10, {"verdict": 9, "dead_letter": 1})
    judged_again = {row["sha256"] for name in missing for row in FILES[name]["rows"] if row["outcome"] == "verdict"}
    assert CountingGuard.images == len(judged_again), "chunks that 0.1.0 judged are not judged again"
    rows = {row["row"]: row for row in pq.read_table(options.out).to_pylist()}
    assert rows[3]["rating"] == "none", "the name of the partition of rows without a rating"
    rows[3]["rating"] = None
    same = ("outcome", "reason", "rating", "category", "score", "sha256", "duplicate_of", "action", "tenant")
    assert {number: {name: row[name] for name in same} for number, row in rows.items()} == {
        number: {name: row[name] for name in same} for number, row in RECORDED_ROWS.items()
    }


def test_same_run_writes_the_files_of_0_1_0(
    options: AnnotateOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = LocalFolder.put

    def put_or_crash(folder: LocalFolder, name: str, data: bytes) -> None:
        if not name.startswith("_sluice/"):
            raise Crash
        put(folder, name, data)

    monkeypatch.setattr(LocalFolder, "put", put_or_crash)
    with pytest.raises(Crash):
        annotate(options, Settings(model="tiny"), lambda _: None)
    assert comparable(dict(dump(tmp_path))) == comparable(FILES)
