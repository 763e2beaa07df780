"""The data sets of an evaluation: their formats, rejected records, and how rows are judged by a scripted service."""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.clients.judge_client import JudgeRequest, JudgeResult, Progress
from pipelines.evaluation import run as runs
from pipelines.evaluation import tiny_report
from pipelines.evaluation.data_set_judge import DataSetJudge, EvaluationOptions
from pipelines.evaluation.datasets import open_data_set
from pipelines.evaluation.labels import LabelledImage, RejectedRecord, parse_record
from pipelines.evaluation.metrics import NOTHING_WAIVED, OTHERS_WAIVED, VIOLATION_WAIVED
from pipelines.evaluation.policy_selection import EvaluatedPolicy, PolicySelector, find_policy
from pipelines.evaluation.results import ResultColumns
from services.core.errors import ConfigurationError, GuardFailed, NotFound, UnknownPolicy
from services.core.messages import ImageRequest
from services.core.settings import Settings
from services.core.values import CATEGORIES, NO_CATEGORY, Policy
from services.policies.document import BUILT_IN, PolicyDocument
from tests.support.intake_bench import IntakeBench
from tests.support.verdicts import verdict_with

O2, O3 = CATEGORIES[1:3]
HERE = Path("/data")


def parsed(**record: Any) -> LabelledImage | RejectedRecord:
    return parse_record({"image": "a.jpg", "rating": "Safe"} | record, 7, HERE)


def conversation(prompt: str, **answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": prompt}, {"from": "gpt", "value": json.dumps(answer)}]


class TestParseRecord:
    def test_plain_record_is_parsed(self) -> None:
        record = {"id": "x", "image": "a/b.jpg", "rating": "Unsafe", "category": "O2", "policy": "shop@3"}
        assert parse_record(record, 1, HERE) == LabelledImage("x", HERE / "a/b.jpg", "Unsafe", O2, "shop@3")
        assert parsed() == LabelledImage("row-7", HERE / "a.jpg", "Safe", None)

    def test_image_fields_give_file_object_or_bytes(self) -> None:
        def image(value: Any, name: str = "image") -> Any:
            found = parse_record({name: value, "rating": "safe"}, 1, HERE)
            return found.image if isinstance(found, LabelledImage) else found.reason

        assert image("s3://b/k.jpg", "uri") == "s3://b/k.jpg"
        assert image({"bytes": b"jpeg", "path": "x.jpg"}) == b"jpeg"
        assert image({"bytes": None, "path": "x.jpg"}) == HERE / "x.jpg"
        assert image(b"jpeg", "image_bytes") == b"jpeg"
        assert image("/abs.jpg", "file_name") == Path("/abs.jpg")
        both = {"uri": "s3://b/other.jpg", "image": "s3://b/k.jpg", "rating": "Safe"}
        assert parse_record(both, 1, HERE) == LabelledImage("row-1", "s3://b/k.jpg", "Safe", None)
        for nothing in ("", 3, {"bytes": b""}, "a\0b", "\ud800", "http://169.254.169.254/x"):
            assert image(nothing) == "no_image"

    @pytest.mark.parametrize(
        ("value", "rating"),
        [("SAFE ", "Safe"), ("unsafe", "Unsafe"), ("Review Needed", "Unsafe"), ("Compliant", "Safe")],
    )
    def test_rating_spellings_are_accepted(self, value: str, rating: str) -> None:
        found = parsed(rating=value)
        assert isinstance(found, LabelledImage)
        assert found.rating == rating

    @pytest.mark.parametrize("value", ["Safeish", "", 1, None, True, ["Safe"]])
    def test_invalid_rating_is_rejected(self, value: Any) -> None:
        found = parsed(rating=value)
        assert isinstance(found, RejectedRecord)
        assert found.reason == "bad_rating"

    @pytest.mark.parametrize(
        ("value", "category"),
        [
            (O2, O2),
            ("o2", O2),
            ("O2: Violence, Harm or Cruelty", O2),
            ("NA", NO_CATEGORY),
            ("10: None applying", NO_CATEGORY),
            ("", None),
            ("O12: Gambling", "O12"),
        ],
    )
    def test_category_spellings_are_accepted(self, value: str, category: str | None) -> None:
        found = parsed(category=value)
        assert isinstance(found, LabelledImage)
        assert found.category == category

    @pytest.mark.parametrize(
        ("record", "reason"),
        [
            ({"category": "Violence"}, "unknown_category"),
            ({"category": 2}, "unknown_category"),
            ({"rating": "Unsafe", "category": "NA"}, "contradiction"),
            ({"policy": 3}, "unknown_policy"),
            ({"policy": "v3_a"}, "unknown_policy"),
            ({"policy": "v2"}, "unknown_policy"),
            ({"waived": ["Violence"]}, "unknown_category"),
            ({"conversations": [{"from": "human", "value": "p"}]}, "malformed"),
            ({"conversations": [*conversation("p")[:1], {"value": "no json"}]}, "malformed"),
            ({"conversations": "text"}, "malformed"),
        ],
    )
    def test_unusable_record_is_rejected_with_reason(self, record: dict[str, Any], reason: str) -> None:
        found = parsed(**record)
        assert isinstance(found, RejectedRecord), found
        assert found.reason == reason

    @pytest.mark.parametrize("record", [None, 3, "text", ["a"]])
    def test_non_object_record_is_malformed(self, record: Any) -> None:
        found = parse_record(record, 7, HERE)
        assert isinstance(found, RejectedRecord)
        assert (found.id, found.reason) == ("row-7", "malformed")

    def test_prompt_of_llavaguard_defines_waived_categories(self) -> None:
        document = BUILT_IN.model_copy(
            update={
                "categories": PolicyDocument.model_validate({"name": "p", "categories": {"O3": "waive"}}).categories
            }
        )
        record = {
            "id": "smid_1_v3_a",
            "image": "a.jpg",
            "category": "2",
            "score": "Highly Inappropriate",
            "conversations": conversation("<image>\n" + document.prompt(), rating="Unsafe", category=O2, rationale="r"),
        }
        found = parse_record(record, 1, HERE)
        assert found == LabelledImage("smid_1_v3_a", HERE / "a.jpg", "Unsafe", O2, waived=frozenset({"O3"}))

    def test_augmentation_by_id_or_column_waives_category(self) -> None:
        by_id = parsed(id="img_12_v2", category="O2")
        assert isinstance(by_id, LabelledImage)
        assert (by_id.policy, by_id.waived) == (None, {"O2"})
        by_column = parsed(augmentation="v2", category="O2")
        assert isinstance(by_column, LabelledImage)
        assert by_column.waived == {"O2"}
        for plain in ("v0", "default policy", ""):
            found = parsed(policy=plain, category="O2")
            assert isinstance(found, LabelledImage)
            assert (found.policy, found.waived) == (None, frozenset())
        listed = parsed(id="img_1_v3", rating="Unsafe", category="O2", waived="O3, O4")
        assert isinstance(listed, LabelledImage)
        assert listed.waived == {"O3", "O4"}


RECORDS = [{"image": f"{n}.jpg", "rating": "Safe", "id": f"r{n}"} for n in range(5)]


def ids(path: Path, split: str | None = None) -> list[str]:
    return [record["id"] for record in open_data_set(path, split).records()]


class TestOpenDataSet:
    def test_json_lines_and_json_array_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
        (tmp_path / "d.json").write_text(json.dumps(RECORDS, indent=4))
        (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, RECORDS)))
        for name in ("d.jsonl", "d.json", "lines.json"):
            assert ids(tmp_path / name) == [f"r{n}" for n in range(5)]
        assert open_data_set(tmp_path / "d.jsonl").count() == 5
        assert open_data_set(tmp_path / "d.json").count() is None

    def test_array_larger_than_a_block_is_read(self, tmp_path: Path) -> None:
        many = [{"id": f"r{n}", "text": "x" * 100_000} for n in range(40)]
        (tmp_path / "d.json").write_text(json.dumps(many))
        assert ids(tmp_path / "d.json") == [record["id"] for record in many]

    @pytest.mark.parametrize("text", ["[{}", "[{} {", '[{"a": }]'])
    def test_open_data_set_broken_array_is_rejected(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(ConfigurationError, match="is not a JSON array"):
            list(open_data_set(tmp_path / "d.json").records())

    def test_line_that_is_not_json_is_one_malformed_row(self, tmp_path: Path) -> None:
        (tmp_path / "d.jsonl").write_bytes(b'{"id": "a"}\n{"id": \n\xff\n{"id": "b"}\n')
        found = [parse_record(r, n, tmp_path) for n, r in enumerate(open_data_set(tmp_path / "d.jsonl").records(), 1)]
        assert [each.reason for each in found if isinstance(each, RejectedRecord)] == [
            "bad_rating",
            "malformed",
            "malformed",
            "bad_rating",
        ]

    def test_parquet_of_hugging_face_is_read_by_split(self, tmp_path: Path) -> None:
        rows = [record | {"image": {"bytes": b"jpeg", "path": record["image"]}, "other": 1} for record in RECORDS]
        (tmp_path / "data").mkdir()
        for part in (0, 1):
            pq.write_table(pa.Table.from_pylist(rows[part::2]), tmp_path / f"data/test-0000{part}-of-00002.parquet")
        pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "data/train-00000-of-00001.parquet")
        assert ids(tmp_path) == ["r0", "r2", "r4", "r1", "r3"]
        assert open_data_set(tmp_path).count() == 5
        assert ids(tmp_path, "train") == ["r0"]
        first = next(open_data_set(tmp_path).records())
        assert parse_record(first, 1, tmp_path) == LabelledImage("r0", b"jpeg", "Safe", None)

    def test_image_folder_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "test").mkdir()
        (tmp_path / "test/metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "rating": "Safe", "id": "a"}))
        data_set = open_data_set(tmp_path)
        assert data_set.folder == tmp_path / "test"
        assert ids(tmp_path) == ["a"]

    @pytest.mark.parametrize("place", ["d.jsonl", "d.json", "metadata.jsonl", "test/metadata.jsonl", "d.parquet"])
    def test_links_out_of_the_folder_are_refused(self, tmp_path: Path, place: str) -> None:
        """The folder is of somebody else, and its file is a link to one of the user."""
        private, foreign = tmp_path / "private", tmp_path / "foreign"
        private.mkdir()
        secret, link = private / f"secret{Path(place).suffix}", foreign / place
        if secret.suffix == ".parquet":
            pq.write_table(pa.table({"id": ["secret"]}), secret)
        else:
            secret.write_text('{"id": "secret"}')
        link.parent.mkdir(parents=True)
        link.symlink_to(secret)
        is_found = place.endswith(("metadata.jsonl", ".parquet"))
        for path in [link, foreign] if is_found else [link]:
            with pytest.raises(ConfigurationError, match="allow another folder with --root") as refused:
                list(open_data_set(path).records())
            assert str(link) in str(refused.value)
            with pytest.raises(ConfigurationError, match="allow another folder with --root"):
                open_data_set(path).count()
            assert [record["id"] for record in open_data_set(path, root=private).records()] == ["secret"]
        link.unlink()
        (foreign / "kept").write_bytes(secret.read_bytes())
        link.symlink_to(foreign / "kept")
        assert [record["id"] for record in open_data_set(foreign if is_found else link).records()] == ["secret"]

    @pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
    def test_line_without_end_is_refused_and_takes_little_memory(self, tmp_path: Path, name: str) -> None:
        file = tmp_path / name
        file.write_text('{"id": "a"}\n')
        os.truncate(file, 20 << 30)  # a sparse file
        records = open_data_set(file).records()
        assert next(records) == {"id": "a"}
        with pytest.raises(ConfigurationError, match="has a line of more than 67,108,864 bytes"):
            next(records)
        with pytest.raises(ConfigurationError, match="has a line of more than 67,108,864 bytes"):
            open_data_set(file).count()

    def test_linked_split_outside_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "private").mkdir()
        (tmp_path / "private/metadata.jsonl").write_text('{"id": "secret"}')
        (tmp_path / "foreign").mkdir()
        (tmp_path / "foreign/test").symlink_to(tmp_path / "private")
        with pytest.raises(ConfigurationError, match="allow another folder with --root"):
            list(open_data_set(tmp_path / "foreign").records())

    def test_open_data_set_path_without_data_set_is_rejected(self, tmp_path: Path) -> None:
        (tmp_path / "d.csv").touch()
        (tmp_path / "d.parquet").write_bytes(b"PAR1 not")
        for place, words in (
            (tmp_path / "absent", "there is no data set"),
            (tmp_path / "d.csv", "has to be .jsonl"),
            (tmp_path / "d.parquet", "not a readable parquet file"),
            (tmp_path / "..", "has no data set|has no split|not a readable parquet"),
        ):
            with pytest.raises(ConfigurationError, match=words):
                list(open_data_set(place, "train" if place.name == ".." else None).records())


def selected(sample: LabelledImage, document: dict[str, Any] | None = None) -> Any:
    evaluated = EvaluatedPolicy(PolicyDocument.model_validate({"name": "p"} | (document or {})), 4, {})
    return PolicySelector(evaluated, None).select(sample)  # type: ignore[arg-type]  # no row names a policy


class TestPolicySelector:
    def test_categories_waived_by_row_are_added_to_policy(self) -> None:
        sample = LabelledImage("x", b"", "Safe", O2, waived=frozenset({"O2"}))
        found = selected(sample, {"categories": {"O3": "waive"}, "effort": "adaptive", "thresholds": {"block": 0.9}})
        assert (found.waiver_kind, found.category) == (VIOLATION_WAIVED, O2)
        assert set(re.findall(r"Category (O\d) is declared", found.full.prompt)) == {"O2", "O3"}
        assert (found.full.effort, found.adaptive.effort) == ("full", "adaptive")
        assert found.full.thresholds.block == 0.9
        assert found.full.identity.version == 4

    def test_selected_policy_kind_follows_waived_categories(self) -> None:
        assert selected(LabelledImage("x", b"", "Unsafe", O2)).waiver_kind == NOTHING_WAIVED
        assert selected(LabelledImage("x", b"", "Unsafe", O2, waived=frozenset({"O3"}))).waiver_kind == OTHERS_WAIVED
        assert (
            selected(LabelledImage("x", b"", "Safe", O2), {"categories": {"O2": "waive"}}).waiver_kind
            == VIOLATION_WAIVED
        )

    @pytest.mark.parametrize(
        ("sample", "reason"),
        [
            (LabelledImage("x", b"", "Unsafe", O2, waived=frozenset({"O2"})), "contradiction"),
            (LabelledImage("x", b"", "Safe", "O12"), "unknown_category"),
            (LabelledImage("x", b"", "Safe", None, waived=frozenset({"O12"})), "unknown_policy"),
        ],
    )
    def test_unusable_row_is_rejected_with_reason(self, sample: LabelledImage, reason: str) -> None:
        assert selected(sample).reason == reason

    def test_own_category_of_policy_is_accepted(self) -> None:
        own = {"own_categories": [{"code": "O12", "title": "Gambling", "should_not": ["Show dice."]}]}
        assert selected(LabelledImage("x", b"", "Unsafe", "O12"), own).category == "O12: Gambling"


class ScriptedService:
    """Judges by the first word of the id, and keeps the requests."""

    def __init__(self, bench: IntakeBench) -> None:
        self._bench = bench
        self.requests: list[JudgeRequest] = []
        self.batches: list[int] = []

    def judge(self, requests: Sequence[JudgeRequest], _progress: Progress) -> list[JudgeResult]:
        self.requests += requests
        self.batches.append(len(requests))
        return [self._judge(request.submission, request.policies[0], request.image) for request in requests]

    def _judge(self, submission: ImageRequest, policy: str | Policy, image: bytes | None) -> JudgeResult:
        assert isinstance(policy, Policy)
        name, _, _ = submission.id.partition("-")
        if name == "absent":
            return NotFound("there is no such key")
        if name == "refused":
            return [GuardFailed("The engine refuses it.")]
        if image is None:
            bucket, _, key = submission.uri.removeprefix("s3://").partition("/")
            image = self._bench.s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        assert Image.open(io.BytesIO(image)).format == "JPEG"
        if name == "unreadable":
            return [
                verdict_with(rating=None, category=None, score=None, outcome="needs_review", reason="unreadable_answer")
            ]
        safe = name == "safe" or "non-violating" in policy.prompt
        effort = "first_look" if safe and policy.effort == "adaptive" else "full"
        fields = (
            {"rating": "Safe", "score": 0.1, "category": NO_CATEGORY, "action": "allow"} if safe else {"score": 0.9}
        )
        return [verdict_with(effort=effort, **fields)]


def jpeg(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def service(bench: IntakeBench, monkeypatch: pytest.MonkeyPatch) -> ScriptedService:
    script = ScriptedService(bench)

    @contextmanager
    def open_client(_settings: Settings) -> Iterator[ScriptedService]:
        yield script

    monkeypatch.setattr(runs, "open_client", open_client)
    return script


@pytest.fixture
def data_set(bench: IntakeBench, tmp_path: Path) -> Path:
    """Ten rows: two files, one of them missing; an object; rejected records; images that the service cannot judge."""
    bench.put("evaluated/k.jpg", jpeg("red"))
    (tmp_path / "a.jpg").write_bytes(jpeg("blue"))
    image = {"image": "a.jpg"}
    rows: list[Any] = [
        {"id": "unsafe-1", "rating": "Unsafe", "category": "O2", **image},
        {"id": "unsafe-1_v2", "rating": "Safe", "category": "O2", **image},
        {"id": "safe-1", "rating": "Safe", "image": "s3://uploads/evaluated/k.jpg"},
        {"id": "unreadable-1", "rating": "Safe", **image},
        {"id": "gone", "rating": "Safe", "image": "missing.jpg"},
        {"id": "odd", "rating": "Perhaps", **image},
        {"id": "strange", "rating": "Unsafe", "category": "O12", **image},
        {"id": "elsewhere", "rating": "Safe", "policy": "absent", **image},
        {"id": "absent-1", "rating": "Safe", **image},
        {"id": "refused-1", "rating": "Safe", **image},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "d.jsonl"


def objects(bench: IntakeBench) -> list[tuple[str, str]]:
    """Every object of the bucket that the service reads, with its version or ETag."""
    found = bench.s3.list_objects_v2(Bucket="uploads")
    return [(entry["Key"], entry["ETag"]) for entry in found.get("Contents", ())]


def evaluated(bench: IntakeBench, data_set: Path, lines: list[str], **fields: Any) -> Any:
    given = {
        "options": EvaluationOptions(adaptive=True, perturbed=5),
        "out": None,
        "resamples": 200,
        "prevalence": None,
    } | fields
    return runs.evaluate(runs.DataSetSource(data_set), "default", bench.settings, progress=lines.append, **given)


def test_evaluation_writes_report_and_nothing_to_the_bucket(
    bench: IntakeBench, service: ScriptedService, data_set: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    before = objects(bench)
    report = evaluated(bench, data_set, lines, out=tmp_path / "out")
    assert objects(bench) == before, "nothing is written to the bucket"
    assert {request.image is None for request in service.requests if request.submission.id == "safe-1"} == {True, False}
    assert all(request.image for request in service.requests if request.submission.id == "unsafe-1")
    assert (report.rows, report.judged, report.images) == (10, 4, 2)
    assert report.failures == {
        "no_image": 1,
        "bad_rating": 1,
        "unknown_category": 1,
        "unknown_policy": 1,
        "not_found": 1,
        "guard_failed": 1,
    }
    confusion = report.rates["all"].confusion
    assert (confusion.true_positives, confusion.true_negatives, confusion.safe_invalid) == (1, 2, 1)
    assert (report.per.value, report.per.of) == (1.0, 1)
    assert report.adaptive.escalated.value == 0.5, "the Unsafe row and the unreadable one"
    assert {robust.rows for robust in report.robustness} == {2}, "the unreadable row has no rating to flip"
    assert any(re.search(r"10 of 10 rows, [\d.]+ a second, 0 s left", line) for line in lines)
    rows = [json.loads(line) for line in (tmp_path / "out" / runs.ROWS_NAME).read_text().splitlines()]
    assert len(rows) == 10
    assert next(row for row in rows if row["id"] == "gone")["error"] == "no_image"
    assert json.loads((tmp_path / "out" / runs.REPORT_NAME).read_text())["judged"] == 4
    assert "does not exist" in (tmp_path / "out" / runs.PAGE_NAME).read_text()


def test_row_that_names_a_policy_is_judged_by_it(bench: IntakeBench, service: ScriptedService, tmp_path: Path) -> None:
    bench.registry.publish(PolicyDocument.model_validate({"name": "shop", "categories": {"O2": "waive"}}))
    (tmp_path / "a.jpg").write_bytes(jpeg("blue"))
    row = {"id": "unsafe-1", "image": "a.jpg", "rating": "Safe", "category": "O2", "policy": "shop@1"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    report = evaluated(bench, tmp_path / "d.jsonl", [], options=EvaluationOptions())
    assert (report.judged, report.per.value) == (1, 1.0)
    assert report.adaptive is None
    (policy,) = service.requests[0].policies
    assert isinstance(policy, Policy)
    assert (policy.identity.name, policy.identity.version) == ("shop", 1)


def test_evaluate_without_judged_rows_fails_and_names_reasons(
    bench: IntakeBench, service: ScriptedService, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text('{"id": "x", "rating": "Unclear"}\n')
    with pytest.raises(
        ConfigurationError, match=r"no row of d.jsonl could be judged \(bad_rating 1\): x its rating is"
    ):
        evaluated(bench, tmp_path / "d.jsonl", [])
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(ConfigurationError, match="has no rows"):
        evaluated(bench, tmp_path / "d.jsonl", [])
    with pytest.raises(UnknownPolicy, match="absent"):
        runs.evaluate(
            runs.DataSetSource(tmp_path / "d.jsonl"),
            "absent",
            bench.settings,
            options=EvaluationOptions(),
            out=None,
            resamples=200,
            prevalence=None,
            progress=print,
        )


def test_service_that_ends_stops_the_evaluation(
    bench: IntakeBench, service: ScriptedService, data_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(_requests: Sequence[JudgeRequest], _progress: Progress) -> list[JudgeResult]:
        raise ConfigurationError("the service has ended; start it again")

    monkeypatch.setattr(service, "judge", ends)
    with pytest.raises(ConfigurationError, match="has ended"):
        evaluated(bench, data_set, [])


def test_file_larger_than_the_limit_is_not_sent(bench: IntakeBench, service: ScriptedService, tmp_path: Path) -> None:
    (tmp_path / "large.jpg").write_bytes(bytes(bench.settings.image_limit_bytes + 1))
    (tmp_path / "a.jpg").write_bytes(jpeg("blue"))
    rows = [{"id": f"safe-{name}", "image": name, "rating": "Safe"} for name in ("large.jpg", "a.jpg")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluated(bench, tmp_path / "d.jsonl", [], options=EvaluationOptions())
    assert (report.judged, report.failures) == (1, {"too_large": 1})
    assert [request.submission.id for request in service.requests] == ["safe-a.jpg"]


def test_file_outside_the_folder_or_not_an_image_is_never_sent(
    bench: IntakeBench, service: ScriptedService, tmp_path: Path
) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (tmp_path / "private.jpg").write_bytes(jpeg("blue"))
    (folder / "a.jpg").write_bytes(jpeg("blue"))
    (folder / "secret.jpg").write_bytes(b"password=hunter2")
    (folder / "link.jpg").symlink_to(tmp_path / "private.jpg")
    names = ["a.jpg", "../private.jpg", str(tmp_path / "private.jpg"), "link.jpg", "secret.jpg"]
    rows = [{"id": f"safe-{number}", "image": name, "rating": "Safe"} for number, name in enumerate(names)]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluated(bench, folder / "d.jsonl", [], options=EvaluationOptions())
    assert (report.judged, report.failures) == (1, {"no_image": 3, "not_an_image": 1})
    assert [request.submission.id for request in service.requests] == ["safe-0"]


def test_many_rows_are_judged_in_bounded_batches(bench: IntakeBench, service: ScriptedService) -> None:
    held: list[int] = []
    pulled = 0

    def records() -> Iterator[dict[str, Any]]:
        nonlocal pulled
        for n in range(20_000):
            pulled += 1
            held.append(pulled - judging.columns.judged - judging.columns.failures.total())
            yield {"id": f"absent-{n}" if n % 100 else f"safe-{n}", "image": "s3://uploads/many.jpg", "rating": "Safe"}

    bench.put("many.jpg", jpeg("red"))
    selector = PolicySelector(find_policy("default", bench.registry), bench.registry)
    judging = DataSetJudge(service, selector, bench.settings, EvaluationOptions())
    lines: list[str] = []
    columns: ResultColumns = judging.run(records(), HERE, None, lines.append)
    assert (columns.judged, columns.failures) == (200, {"not_found": 19_800})
    assert len(columns.examples) == 20
    assert max(service.batches) <= 1024
    assert max(held) <= 3 * 1024, "one batch is judged, one is prepared, one is parsed"
    assert lines[-1].startswith("20,000 rows")


def test_unpublished_document_is_evaluated(bench: IntakeBench, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("name: shop\ncategories: {O9: waive}\n")
    found = find_policy(str(tmp_path / "p.yaml"), bench.registry)
    assert (found.name, found.version, found.waived) == ("shop (not published)", 0, {"O9"})
    with pytest.raises(ConfigurationError, match="cannot be read"):
        find_policy(str(tmp_path / "absent.yaml"), bench.registry)
    assert replace(found, version=3).name == "shop@3"


def test_drawn_data_set_has_the_documented_rows(tmp_path: Path) -> None:
    tiny_report.write_data_set(tmp_path)
    data_set = open_data_set(tmp_path)
    samples = [parse_record(record, n, data_set.folder) for n, record in enumerate(data_set.records(), 1)]
    row_policies = [selected(sample) for sample in samples if isinstance(sample, LabelledImage)]
    assert len(row_policies) == len(samples) == data_set.count()
    kinds = Counter(
        (sample.rating, row_policy.waiver_kind) for sample, row_policy in zip(samples, row_policies, strict=True)
    )  # type: ignore[union-attr]
    assert kinds == {
        ("Unsafe", NOTHING_WAIVED): 180,
        ("Safe", NOTHING_WAIVED): 180,
        ("Safe", VIOLATION_WAIVED): 108,
        ("Unsafe", OTHERS_WAIVED): 108,
    }
    first = [
        sample.rating
        for sample, row_policy in zip(samples, row_policies, strict=True)
        if row_policy.waiver_kind == NOTHING_WAIVED
    ][:80]  # type: ignore[union-attr]
    assert Counter(first) == {"Safe": 40, "Unsafe": 40}, "the rows that are perturbed"
