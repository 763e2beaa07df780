"""Runs of `annotate` without Ray, with a scripted guard: sources, plans, filters, curated sets, errors."""

import asyncio
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.annotation import ray_workers, workers
from pipelines.annotation.annotation_files import list_partition_files, read_annotations
from pipelines.annotation.chunks import plan_chunks
from pipelines.annotation.curate import claim_folder, write_references, write_tars
from pipelines.annotation.filters import parse_filter
from pipelines.annotation.image_reader import ImageReader
from pipelines.annotation.image_row import INDEX, PLAN, FileLocation, ImageRow, PlannedImage
from pipelines.annotation.index import Indexer
from pipelines.annotation.options import AnnotateOptions
from pipelines.annotation.resume_state import RunState
from pipelines.annotation.run import annotate
from pipelines.annotation.schema import BATCH_ROWS, from_parquet, to_parquet
from pipelines.annotation.sources.discover import SourceShard, find_source
from pipelines.annotation.sources.lines import read_lines
from pipelines.annotation.stage_progress import StageProgress
from pipelines.annotation.storage import Folder, open_folder
from pipelines.annotation.summary import SUMMARY_COLUMNS, SummaryCounts, render_page
from services.core.errors import ConfigurationError, Forbidden, GuardFailed, SluiceError
from services.core.messages import Submission
from services.core.settings import Settings
from services.core.values import Assessment, Detail, PreparedImage
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore
from services.moderation.retrying_ports import build_retrying_moderator
from services.policies.document import BUILT_IN
from tests.support.annotation_service import assessment
from tests.support.annotation_without_ray import annotate_without_ray
from tests.support.data_set_images import picture, tar
from tests.support.fake_guard import FakeGuard

Annotation = dict[str, Any]

SETTINGS = Settings(model="tiny", image_limit_bytes=1 << 20)
POLICY = BUILT_IN.as_version(1)


class ScriptedGuard(FakeGuard):
    """Refuses images 1 pixel wide. The digest decides the answer for others."""

    def __init__(self) -> None:
        super().__init__(_answer)

    async def max_side_px(self) -> int:
        return 384


async def _answer(image: PreparedImage, _detail: Detail) -> Assessment:
    if image.facts.width == 1:
        raise GuardFailed("The engine refuses it.")
    return assessment(image.sha256)


run_in_process = ray_workers.run_in_process


class AnnotateBench:
    """Runs `annotate` without Ray, with a scripted guard and real decoders. Keeps the temporary files of the run."""

    def __init__(self, out: str, settings: Settings = SETTINGS) -> None:
        self.settings = settings
        self.guard = ScriptedGuard()
        self.out = out
        self.run = RunState(open_folder(out, settings))

    async def annotate(self, source: Path | str, *, chunk_rows: int = 4, **more: Any) -> list[Annotation]:
        """All rows, in the order of the source."""
        options = AnnotateOptions(str(source), self.out, "default", chunk_rows=chunk_rows, **more)
        decoders: list[DecoderPool] = []

        def make_decoder(*arguments: Any) -> DecoderPool:
            decoders.append(DecoderPool(*arguments))
            return decoders[-1]

        with pytest.MonkeyPatch.context() as patch:
            annotate_without_ray(patch, lambda: self.guard)
            patch.setattr(workers, "DecoderPool", make_decoder)
            for name in ("run_on_workers", "run_in_process"):
                patch.setattr(ray_workers, name, _run_last_number_first)
            patch.setattr(RunState, "delete_temporary", lambda _state: None)
            await asyncio.to_thread(annotate, options, self.settings, lambda _line: None)
        for decoder in decoders:
            decoder.close()
        return self.rows()

    def rows(self) -> list[Annotation]:
        found = [
            row
            for name in list_partition_files(self.run.folder)
            for rows in read_annotations(self.run.folder, name)
            for row in rows.to_pylist()
        ]
        return sorted(found, key=lambda row: int(row["row"]))


def _run_last_number_first(worker: type[Any], arguments: Any, numbers: Sequence[int], _placement: Any = None) -> Any:
    return run_in_process(worker, arguments, sorted(numbers, reverse=True))


@pytest.fixture
def bench(tmp_path: Path) -> AnnotateBench:
    return AnnotateBench(str(tmp_path / "out"))


def results(rows: list[Annotation]) -> list[str]:
    """The rating of each row, or the reason why it has none."""
    return [row["rating"] or row["reason"] for row in rows]


async def test_folder_of_images_row_for_each_file(bench: AnnotateBench, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    (pictures / "b #ä").mkdir(parents=True)
    (pictures / "_ours").mkdir()
    (pictures / "_ours" / "left-out.png").write_bytes(picture(9))
    (pictures / "a.png").write_bytes(picture(1))
    (pictures / "b #ä" / "same.jpg").write_bytes(picture(1))
    (pictures / "c.txt").write_bytes(b"no image")
    (pictures / "d.png").write_bytes(b"")
    (pictures / "e.png").write_bytes(picture(2, width=1))
    (pictures / "f.png").write_bytes(os.urandom(SETTINGS.image_limit_bytes + 1))
    os.mkfifo(pictures / "g.png")
    (pictures / "h.png").symlink_to(tmp_path / "nowhere")
    (pictures / "i.png").symlink_to(pictures / "nowhere")
    os.close(os.open(os.fsencode(pictures) + b"/\xff.png", os.O_CREAT))
    rows = await bench.annotate(str(pictures), source_kind="images")
    safe, same = rows[:2]
    assert results(rows)[2:] == [
        *(
            "not_an_image",
            "not_an_image",
            "guard_failed",
            "too_large",
            "forbidden",
            "forbidden",
            "not_found",
            "not_an_image",
        )
    ]
    assert safe["uri"] == safe["submission_id"] == (pictures / "a.png").as_uri()
    assert (safe["duplicate_of"], same["duplicate_of"]) == (None, 0)
    assert same["uri"] == (pictures / "b #ä" / "same.jpg").as_uri()
    assert same["score"] == safe["score"]
    assert same["verdict_id"] != safe["verdict_id"]
    assert all(row["outcome"] == "dead_letter" and row["detail"] for row in rows[2:])
    assert bench.guard.calls.count("verdict") == 2, "the same bytes are judged once"


async def test_s3_objects_ids_are_those_of_the_stream(bench: AnnotateBench, s3_endpoint: str) -> None:
    settings = SETTINGS.model_copy(update={"s3_endpoint": s3_endpoint})
    s3: Any = boto3.client("s3", endpoint_url=s3_endpoint)
    unique = uuid.uuid4().hex
    public, private = f"public-{unique}", f"private-{unique}"
    for bucket in (public, private):
        s3.create_bucket(Bucket=bucket)
    s3.put_bucket_versioning(Bucket=public, VersioningConfiguration={"Status": "Enabled"})
    versions = [s3.put_object(Bucket=public, Key=f"p/{n}.png", Body=picture(n))["VersionId"] for n in (1, 2)]
    s3.put_object(Bucket=private, Key="a.png", Body=picture(3))
    bench = AnnotateBench(f"s3://{public}/annotations/first", settings)
    rows = await bench.annotate(f"s3://{public}/p/")
    assert [row["uri"] for row in rows] == [f"s3://{public}/p/1.png", f"s3://{public}/p/2.png"]
    assert [row["submission_id"] for row in rows] == [
        f"{public}/p/{n}.png#{v}" for n, v in zip((1, 2), versions, strict=True)
    ]

    allowed = settings.model_copy(update={"s3_buckets": (public,)})
    store, preparer = ObjectStore(allowed), DecoderPool(allowed, 384)
    moderator = build_retrying_moderator(policies=None, images=store, preparer=preparer, guard=bench.guard)  # type: ignore[arg-type]
    for row in rows:
        same = Submission(id=row["submission_id"], uri=row["uri"], version_id=row["version_id"])
        (verdict,) = await moderator.judge_under(same, [POLICY])
        assert not isinstance(verdict, GuardFailed)
        assert (verdict.verdict_id, verdict.score) == (row["verdict_id"], row["score"])
    preparer.close()
    store.close()

    # A list cannot open a bucket that the settings do not.
    listed = [{"uri": f"s3://{private}/a.png"}, {"uri": "1.png", "id": "own", "tenant": "t"}, {"uri": "../p/1.png"}]
    s3.put_object(Bucket=public, Key="p/list.jsonl", Body="\n".join(map(json.dumps, listed)))
    rows = await AnnotateBench(f"s3://{public}/annotations/second", allowed).annotate(f"s3://{public}/p/list.jsonl")
    assert results(rows) == ["forbidden", rows[1]["rating"], "forbidden"]
    assert (rows[1]["submission_id"], rows[1]["tenant"]) == ("own", "t")


async def test_list_of_references_files_outside_of_root_are_forbidden(bench: AnnotateBench, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "a.png").write_bytes(picture(1))
    (tmp_path / "outside.png").write_bytes(picture(2))
    (lists / "link.png").symlink_to(tmp_path / "outside.png")
    good = [
        {"path": "a.png", "uri": "s3://other/k", "caption": "ä", "n": 1},
        {"image": (lists / "a.png").as_uri()},
        "a.png",
    ]
    bad = [
        *(
            {"path": "../outside.png"},
            {"path": str(tmp_path / "outside.png")},
            {"path": "link.png"},
            {"path": "no.png"},
        ),
        *(
            {"uri": "http://a/b.png"},
            {"caption": "none"},
            7,
            {"uri": "s3://bucket"},
            {"uri": "s3://other/k"},
            {"path": 5},
        ),
    ]
    text = "\n".join([*map(json.dumps, [*good, *bad]), "{", "", "x" * (2 << 20)])
    (lists / "l.jsonl").write_text(text)
    rows = await bench.annotate(str(lists / "l.jsonl"), root=str(lists))
    assert results(rows)[:3] == [rows[0]["rating"]] * 3
    assert [row["duplicate_of"] for row in rows[:3]] == [None, 0, 0]
    assert json.loads(rows[0]["source_json"]) == {"uri": "s3://other/k", "caption": "ä", "n": 1}
    assert results(rows)[3:] == [
        *("forbidden", "forbidden", "forbidden", "not_found"),
        *("malformed", "malformed", "malformed", "malformed", "forbidden", "malformed"),
        *("malformed", "malformed"),
    ]
    assert len(rows[-1]["uri"]) <= 200


async def test_links_out_of_a_foreign_folder_are_refused(bench: AnnotateBench, tmp_path: Path) -> None:
    """An image and a list of secrets are linked in the folder. The image is neither judged nor copied."""
    private, foreign = tmp_path / "private", tmp_path / "foreign"
    private.mkdir()
    foreign.mkdir()
    (private / "p.png").write_bytes(picture(5))
    (foreign / "a.png").write_bytes(picture(1))
    (foreign / "b.png").symlink_to(private / "p.png")
    (foreign / "c.png").symlink_to("../private/p.png")
    (foreign / "d.png").symlink_to(foreign / "a.png")
    (foreign / "e").symlink_to(private)
    (foreign / "f.png").symlink_to("f.png")
    curated = tmp_path / "curated"
    more = {"row_filter": parse_filter("score>=0"), "curated": str(curated), "curated_format": "tars"}
    rows = await bench.annotate(foreign, source_kind="images", **more)
    assert results(rows) == [rows[0]["rating"], "forbidden", "forbidden", rows[0]["rating"], "forbidden", "forbidden"]
    assert "allow another folder with --root" in rows[1]["detail"]
    assert bench.guard.calls.count("verdict") == 1
    copied = b"".join(file.read_bytes() for file in curated.rglob("*.tar"))
    assert picture(1) in copied
    assert picture(5) not in copied

    allowed = await AnnotateBench(str(tmp_path / "allowed")).annotate(foreign, source_kind="images", root=str(private))
    assert results(allowed)[1:3] == [allowed[1]["rating"]] * 2
    assert allowed[1]["sha256"] == allowed[2]["sha256"] == hashlib.sha256(picture(5)).hexdigest()


@pytest.mark.parametrize(("suffix", "kind"), [("jsonl", "references"), ("parquet", "parquet"), ("tar", "tars")])
async def test_linked_list_table_or_tar_outside_costs_one_row(
    bench: AnnotateBench, tmp_path: Path, suffix: str, kind: str
) -> None:
    foreign, secret = tmp_path / "foreign", tmp_path / f"secret.{suffix}"
    foreign.mkdir()
    (foreign / "a.png").write_bytes(picture(1))
    for file, line, seed in ((secret, "aws_secret_access_key = hunter2", 5), (foreign / f"m.{suffix}", "", 1)):
        if suffix == "jsonl":
            file.write_text(line * 100_000 or json.dumps("a.png"))  # more than one shard
        elif suffix == "parquet":
            pq.write_table(pa.table({"image": [{"bytes": picture(seed), "path": "a.png"}] * (1 + len(line))}), file)
        else:
            tar(file, [("a.png", picture(seed))])
    for name in ("b", "z"):  # before and behind the readable file
        (foreign / f"{name}.{suffix}").symlink_to(secret)
    (foreign / f"n.{suffix}").symlink_to(f"m.{suffix}")
    rows = await bench.annotate(foreign, source_kind=kind)
    assert results(rows) == ["forbidden", rows[1]["rating"], rows[1]["rating"], "forbidden"]
    assert "allow another folder with --root" in rows[0]["detail"]
    assert "hunter2" not in str(rows)
    assert bench.guard.calls.count("verdict") == 1

    only = tmp_path / "only"
    only.mkdir()
    (only / f"z.{suffix}").symlink_to(secret)
    with pytest.raises(SluiceError, match="allow another folder with --root"):
        await AnnotateBench(str(tmp_path / "named")).annotate(only / f"z.{suffix}")
    named = await AnnotateBench(str(tmp_path / "allowed")).annotate(only / f"z.{suffix}", root=str(tmp_path))
    assert "forbidden" not in results(named)


async def test_link_that_points_outside_after_the_index_is_not_judged(bench: AnnotateBench, tmp_path: Path) -> None:
    """A reader checks each file when it opens it, not only when the folder is listed."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (tmp_path / "private.png").write_bytes(picture(1))
    (foreign / "a.png").symlink_to(tmp_path / "private.png")
    source = find_source(str(foreign), SETTINGS)
    images = ImageReader(SETTINGS, source)
    uri = (foreign / "a.png").as_uri()
    with pytest.raises(Forbidden, match="--root"):
        async with images.open(ImageRow(id="a", uri=uri, place=FileLocation(uri))):
            pass
    images.close()


async def test_tables_annotations_have_their_columns(tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    images = [{"bytes": picture(n // 2), "path": f"{n}.png"} for n in range(150)]
    images[7] = {"bytes": None, "path": "x.png"}
    table = pa.table({"image": images, "rating": list(range(150)), "when": pa.array(range(150), pa.timestamp("s"))})
    pq.write_table(table, tables / "a.parquet", row_group_size=70)
    (tables / "b.parquet").write_bytes(b"PAR1 no table")
    bench = AnnotateBench(str(tmp_path / "out"))
    rows = await bench.annotate(str(tables), chunk_rows=40)
    assert [row["source_rating"] for row in rows] == [*range(150), None]
    assert rows[3]["source_when"].second == 3
    assert results(rows)[7] == "not_an_image"
    assert results(rows)[150] == "malformed"
    assert [row["duplicate_of"] for row in rows[:4]] == [None, 0, None, 2]
    assert bench.guard.calls.count("verdict") == 75
    assert rows[71]["uri"].endswith("a.parquet#group=1&row=1")

    references = pa.table({"url": [str(tables / "p.png")] * 2, "id": ["a", "b"], "score": [1.5, 2.5]})
    (tables / "p.png").write_bytes(picture(1))
    pq.write_table(references, tmp_path / "refs.parquet")
    with pytest.raises(
        ConfigurationError, match=r"no column with images or references; name one with --column: it has url"
    ):
        find_source(str(tmp_path / "refs.parquet"), SETTINGS)
    other = AnnotateBench(str(tmp_path / "out2"))
    rows = await other.annotate(str(tmp_path / "refs.parquet"), column="url", root=str(tmp_path))
    assert [(row["submission_id"], row["source_score"]) for row in rows] == [("a", 1.5), ("b", 2.5)]
    assert {row["rating"] for row in rows} <= {"Safe", "Unsafe"}


async def test_tars_hostile_and_truncated_members_get_reasons(bench: AnnotateBench, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    hostile = ["../../etc/a.png", "/etc/a.png", "a/../../b.png"]
    tar(
        shards / "0.tar",
        [
            *(("x/1.jpg", picture(1)), ("x/1.json", b'{"caption": "c"}'), ("x/1.txt", b"t\xff")),
            *((name, picture(2)) for name in hostile),
            *(("2.png", picture(1)), ("3.cls", b"3"), ("4.left.png", picture(3)), ("4.right.png", picture(4))),
        ],
    )
    with tarfile.open(shards / "0.tar", "a") as more:
        link = tarfile.TarInfo("5.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        more.addfile(link)
    tar(shards / "1.tar", [(f"{n}.png", os.urandom(3000)) for n in range(3)])
    whole = (shards / "1.tar").read_bytes()
    (shards / "1.tar").write_bytes(whole[: 512 + 3072 + 512 + 100])
    (shards / "2.tar").write_bytes(b"no tar at all" * 100)
    (shards / "3.tar").write_bytes(b"")
    rows = await bench.annotate(str(shards))
    by_name = {row["uri"].removeprefix(shards.as_uri()): row for row in rows}
    first = by_name["/0.tar#x/1.jpg"]
    assert json.loads(first["source_json"]) == {"json": {"caption": "c"}, "txt": "t�"}
    assert by_name["/0.tar#2.png"]["duplicate_of"] == first["row"]
    assert {by_name[f"/0.tar#{name}"]["reason"] for name in hostile} == {"forbidden"}
    assert by_name["/0.tar#5.png"]["reason"] == "forbidden"
    assert by_name["/0.tar#4.right.png"]["rating"]
    assert by_name["/1.tar#0.png"]["reason"] == "not_an_image"
    assert "cut off" in by_name["/1.tar#1.png"]["detail"]
    assert [by_name[f"/{n}.tar"]["reason"] for n in (1, 2, 3)] == ["malformed"] * 3
    assert len(rows) == 7 + 1 + 3 + 2


async def test_many_duplicates_are_judged_once_in_bounded_batches(bench: AnnotateBench, tmp_path: Path) -> None:
    """A service's "image not available" may be most of its images. No step has all of their rows in memory."""
    rows = 2 * BATCH_ROWS + 7
    images = [{"bytes": picture(1)}] * rows
    images[0] = {"bytes": picture(2)}
    pq.write_table(pa.table({"image": images}), tmp_path / "images.parquet")
    found = await bench.annotate(str(tmp_path / "images.parquet"), chunk_rows=500)
    assert [row["row"] for row in found] == list(range(rows))
    assert [row["duplicate_of"] for row in found] == [None, None, *[1] * (rows - 2)]
    assert len({row["score"] for row in found[1:]}) == 1
    assert bench.guard.calls.count("verdict") == 2
    held = [table.num_rows for table in bench.run.read_planned(0)]
    assert (sum(held), max(held)) == (rows, BATCH_ROWS)


async def test_image_changed_after_indexing_next_duplicate_is_judged(bench: AnnotateBench, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "abc":
        (pictures / f"{name}.png").write_bytes(picture(1))
    index = Indexer.index

    async def index_and_change(self: Indexer, shard: SourceShard) -> pa.Table:
        table = await index(self, shard)
        (pictures / "a.png").unlink()
        (pictures / "b.png").write_bytes(picture(2))
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Indexer, "index", index_and_change)
        rows = await bench.annotate(str(pictures))
    assert results(rows) == ["not_found", "changed", rows[2]["rating"]], "the first readable image is judged"
    assert rows[2]["duplicate_of"] is None


def test_index_and_plan_columns_stay_those_of_earlier_runs() -> None:
    """A run that an earlier version began is resumed, so the columns of its tables cannot change."""
    place = "struct<file: string, offset: int64, size: int64, group: int64, etag: string>"
    image = [(name, "string") for name in ("id", "uri", "version_id", "etag", "tenant", "sha256", "reason", "detail")]
    assert [(each.name, str(each.type)) for each in INDEX] == [*image, ("place", place)]
    assert [(each.name, str(each.type)) for each in PLAN][:2] == [("row", "int64"), ("duplicate_of", "int64")]
    assert list(PLAN)[2:] == list(INDEX)


text = st.none() | st.text(max_size=5)
locations = st.builds(FileLocation, st.text(max_size=5), st.integers(0, 9), st.none() | st.integers(0, 9))


@given(st.integers(0, 9), text, text, st.none() | locations, st.none() | st.integers(0, 9))
def test_planned_image_survives_parquet(
    row: int, sha256: str | None, extra: str | None, place: FileLocation | None, first: int | None
) -> None:
    image = ImageRow("id", "uri", sha256=sha256, place=place, source_columns={"source_json": extra})
    planned = PlannedImage(row, first, image)
    schema = pa.schema([*PLAN, ("source_json", pa.string())])
    (table,) = from_parquet(to_parquet(pa.Table.from_pylist([planned.to_columns()], schema)))
    assert [PlannedImage.from_columns(columns) for columns in table.to_pylist()] == [planned]


@given(st.lists(st.sampled_from([None, *(f"{n:064x}" for n in range(6))]), max_size=60), st.integers(1, 7))
def test_plan_has_every_row_once_and_duplicates_together(digests: list[str | None], per_chunk: int) -> None:
    table = pa.Table.from_pylist([{"id": str(n), "sha256": digest} for n, digest in enumerate(digests)], INDEX)
    written: dict[str, list[Annotation]] = {}

    def write(name: str, rows: int, parquet: bytes) -> None:
        assert name not in written
        written[name] = [row for table in from_parquet(parquet) for row in table.to_pylist()]
        assert len(written[name]) == rows

    made = plan_chunks(lambda: [table.slice(0, 7), table.slice(7)], pa.schema([]), write, per_chunk)
    rows = {row["row"]: (int(name[:6]), row) for name, each in written.items() for row in each}
    assert sorted(rows) == list(range(len(digests)))
    assert sum(map(len, written.values())) == len(digests) == made.rows
    assert made.duplicates == sum(count - 1 for digest, count in Counter(digests).items() if digest)
    for number, digest in enumerate(digests):
        chunk, row = rows[number]
        assert row["id"] == str(number)
        first = digests.index(digest) if digest else number
        assert row["duplicate_of"] == (first if first != number else None)
        assert chunk == first // per_chunk
    assert len({name for name in written if not name.endswith("late")}) == made.chunks


@given(st.binary(max_size=200).map(lambda data: data.replace(b"x", b"\n")), st.integers(1, 40))
def test_ranges_of_a_file_have_every_line_once(data: bytes, size: int) -> None:
    ranges = [(start, min(start + size, len(data))) for start in range(0, len(data), size)]
    found = [line.strip(b"\n") for start, end in ranges for line in read_lines(io.BytesIO(data), start, end)]
    assert found == [line for line in data.split(b"\n") if line.strip()]


ROW: Annotation = {
    "rating": "Safe",
    "category": "O6: Weapons or Substance Abuse",
    "action": "allow",
    "outcome": "verdict",
    "score": 0.2,
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("rating=Safe", True),
        ("rating=Safe,score<0.2", False),
        (" rating = Safe , score <= 0.2 ", True),
        ("category=O2|O6", True),
        ("category!=O6", False),
        ("category=O6: Weapons or Substance Abuse,rating=Safe", True),
        ("category=O1: Hate, Humiliation, Harassment,score>0", False),
        ("action=allow|review,outcome!=needs_review", True),
        ("score>=0.2,score!=0.3", True),
    ],
)
def test_filter_keeps_rows_that_meet_all_conditions(text: str, kept: bool) -> None:
    assert parse_filter(text).keeps(ROW) is kept
    assert not parse_filter(text).keeps(dict.fromkeys(ROW)), "a row without values meets no condition"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not a condition"),
        ("rating", "'rating' is not a condition"),
        ("rating=Safe;score<1", "rating is never 'Safe;score<1'"),
        ("ratings=Safe", "no field 'ratings'; the fields are rating, category"),
        ("rating=safe", "rating is never 'safe'; write Safe or Unsafe"),
        ("rating<Safe", "has no order"),
        ("score<high", "'high' is not a score"),
        ("score<1.5", "from 0 to 1"),
        ("score<nan", "'nan' is not a score"),
        ("category=Weapons", "not a category; write a code"),
    ],
)
def test_invalid_filter_error_names_the_condition(text: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        parse_filter(text)


async def test_curated_set_has_the_selected_images(bench: AnnotateBench, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n in range(20):
        (pictures / f"{n:02d}.png").write_bytes(picture(n))
    rows = await bench.annotate(str(pictures))
    wanted = parse_filter("rating=Safe")
    expected = [row for row in rows if row["rating"] == "Safe"]
    assert 0 < len(expected) < 20
    into: Folder = open_folder(str(tmp_path / "references"), SETTINGS)
    claim_folder(into, {"as": "references"})
    made = write_references(bench.run.folder, wanted, into, lambda _: None)
    assert made.images == len(expected)
    again = AnnotateBench(str(tmp_path / "again"))
    assert [row["uri"] for row in await again.annotate(into.uri.removeprefix("file://"), root=str(pictures))] == [
        row["uri"] for row in expected
    ]

    source = find_source(str(pictures), SETTINGS)
    (pictures / expected[0]["uri"].rpartition("/")[2]).unlink()
    images, tars = ImageReader(SETTINGS, source), open_folder(str(tmp_path / "tars"), SETTINGS)
    claim_folder(tars, {"as": "tars"})
    made = await write_tars(bench.run.folder, wanted, tars, images, lambda _: None)
    images.close()
    assert (made.images, made.unreadable) == (len(expected) - 1, 1)
    (shard,) = (tmp_path / "tars").glob("*.tar")
    with tarfile.open(shard) as found:
        names = found.getnames()
        assert names[:2] == [f"{expected[1]['row']:012d}.png", f"{expected[1]['row']:012d}.json"]
        content = found.extractfile(names[0])
        assert content is not None
        assert content.read() == (pictures / expected[1]["uri"].rpartition("/")[2]).read_bytes()
    with pytest.raises(ConfigurationError, match="another curated set"):
        claim_folder(tars, {"as": "references"})
    with pytest.raises(ConfigurationError, match="is not empty"):
        claim_folder(open_folder(str(pictures), SETTINGS), {})


def test_summary_page_escapes_text_of_the_source() -> None:
    counts = SummaryCounts()
    row = {"outcome": "dead_letter", "reason": "not_found", "detail": "<script>x</script>", "score": None}
    seen = {
        "outcome": "verdict",
        "rating": "Safe",
        "category": "NA",
        "action": "allow",
        "score": 1.0,
        "duplicate_of": 3,
    }
    schema = pa.schema([(name, pa.string()) for name in SUMMARY_COLUMNS if name not in ("score", "duplicate_of")])
    schema = schema.append(pa.field("score", pa.float64())).append(pa.field("duplicate_of", pa.int64()))
    counts.add(pa.Table.from_pylist([row, seen], schema))
    summary = {"source": "s<b>", "policy": "p@1", **counts.to_json()}
    assert (summary["rows"], summary["duplicates"], summary["score_histogram"][-1]) == (2, 1, 1)
    html = render_page(summary)
    assert "<script>" not in html
    assert "s&lt;b&gt;" in html
    assert "data:image/png;base64," in html


def test_progress_line_has_rate_and_time_left() -> None:
    times = iter((0.0, 10.0))
    stage = StageProgress("judged", 1000, lambda _: None, done=100, clock=lambda: next(times))
    stage.add(100)
    assert stage.format_line() == "judged 200 of 1,000, 10.0/s, 1 min 20 s left"


def options(source: Path | str, out: Path, **more: Any) -> AnnotateOptions:
    return AnnotateOptions(str(source), str(out), "default", **more)


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.png").write_bytes(picture(1))
    (tmp_path / "mixed" / "b.tar").write_bytes(b"")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "zipped.tar.gz").write_bytes(b"x")
    (tmp_path / "void.jsonl").write_bytes(b"\n\n")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(picture(1))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "more", "sentence"),
    [
        ("missing", {}, "nothing to annotate at .*missing: no such file or folder, or an empty one"),
        ("empty", {}, "nothing to annotate"),
        ("mixed", {}, r"several kinds \(images, tars\); name one with --format"),
        ("broken.parquet", {}, "not a readable parquet file"),
        ("zipped.tar.gz", {}, "compressed tars"),
        ("text.parquet", {}, "no column with images or references.*it has text"),
        ("text.parquet", {"column": "uri"}, "has no column 'uri'; it has text"),
        ("p", {"source_kind": "parquet"}, "no parquet file"),
        ("p", {"policy": "other"}, "SLUICE_POLICY_BUCKET is not set"),
        ("p", {"out": "p/out"}, "inside the source or contains it"),
        ("p", {"out": "mixed"}, r"mixed has other files than annotations \(a.png\)"),
        ("ftp://a/b", {}, "neither a path nor an s3:// URI"),
        ("s3://", {}, "names no bucket"),
    ],
)
def test_bad_input_error_is_one_sentence(cases: Path, source: str, more: dict[str, Any], sentence: str) -> None:
    place = source if "://" in source else str(cases / source)
    given = {"policy": "default"} | more | {"out": str(cases / more.get("out", "out"))}
    with pytest.raises(ConfigurationError, match=sentence) as caught:
        annotate(AnnotateOptions(place, **given), SETTINGS, lambda _: None)
    assert "\n" not in str(caught.value)


def test_output_folder_of_another_run_is_rejected(cases: Path) -> None:
    run = RunState(open_folder(str(cases / "out"), SETTINGS))
    run.begin({"source": "file:///elsewhere", "policy": "default@1"})
    with pytest.raises(
        ConfigurationError, match=r"its source is file:///elsewhere, not file://.*/p; name another folder with --out"
    ):
        annotate(options(cases / "p", cases / "out"), SETTINGS, lambda _: None)


def test_command_line_is_imported_without_ray() -> None:
    """Ray reads its authentication mode from the environment on import, and the command reads `.sluice/env` before."""
    subprocess.run([sys.executable, "-c", "import pipelines.cli.main, sys; sys.exit('ray' in sys.modules)"], check=True)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_created_file_is_not_overwritten(place: str, tmp_path: Path, s3_endpoint: str) -> None:
    settings = SETTINGS.model_copy(update={"s3_endpoint": s3_endpoint})
    if place == "s3":
        boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="folders")
    within = open_folder(str(tmp_path / "f") if place == "local" else "s3://folders/f", settings)
    assert within.create("a/b", b"first")
    assert not within.create("a/b", b"second")
    assert within.read("a/b") == b"first"
    within.put("a/b", b"third")
    with within.open("a/b") as file:
        file.seek(2)
        assert (file.read(2), file.read(), file.read()) == (b"ir", b"d", b"")
    assert [(entry.name, entry.size) for entry in within.entries()] == [("a/b", 5)]
    within.remove("a")
    assert within.read("a/b") is None
    assert list(within.entries("a")) == []
