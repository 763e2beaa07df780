"""Documents in YAML: issues with line numbers, and written documents that are read back."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import ConfigurationError, DocumentIssue, InvalidDocument
from services.policies import document as policy
from services.policies.document import BUILT_IN, PolicyDocument
from services.policies.document_warnings import find_warnings
from services.policies.document_yaml import DOCUMENT_LIMIT_BYTES, read_document, read_document_file, write_document
from services.policies.tenants import TENANTS_LIMIT, TenantsDocument

SHIPPED = sorted((Path(policy.__file__).parent / "documents").glob("*.yaml"))


def refused(text: str | bytes) -> InvalidDocument:
    with pytest.raises(InvalidDocument) as caught:
        read_document(text.encode() if isinstance(text, str) else text, "shop.yaml")
    assert isinstance(caught.value, ConfigurationError)
    return caught.value


class TestIssues:
    @pytest.mark.parametrize(
        ("text", "line", "field", "says"),
        [
            ("", 1, "", "is empty"),
            ("# nothing\n", 1, "", "is empty"),
            ("shop", 1, "", "is not a mapping"),
            ("- name: shop", 1, "", "is not a mapping"),
            ("description: a shop", 1, "name", "is missing"),
            ("name: Shop", 1, "name", "Shop is not a policy's name: lower-case letters, digits"),
            ("name: tenants", 1, "name", "cannot be called 'tenants'"),
            ("name:", 1, "name", "is empty"),
            ("kind: tenant\nname: x", 1, "kind", "did you mean tenants? (allowed are policy, tenants)"),
            ("name: x\nthreshold: 1", 2, "threshold", "did you mean thresholds? (allowed are kind, name, desc"),
            (
                "name: x\nthresholds:\n  blok: 1",
                3,
                "thresholds.blok",
                "did you mean block? (allowed are review, block, c",
            ),
            ("name: x\nthresholds: 3", 2, "thresholds", "has to have fields below it: review, block, categories"),
            ("name: x\nthresholds: {review: high}", 2, "thresholds.review", "high is not a number"),
            ("name: x\nthresholds: {review: true}", 2, "thresholds.review", "true is not a number"),
            ("name: x\nthresholds: {review: .inf}", 2, "thresholds.review", ".inf is not a number"),
            ("name: x\nthresholds: {review: inf}", 2, "thresholds.review", "inf is not a number"),
            ("name: x\nthresholds: {block: 1.5}", 2, "thresholds.block", "1.5 is too large; the most is 1"),
            ("name: x\nthresholds: {block: -1}", 2, "thresholds.block", "-1 is too small; the least is 0"),
            ("name: x\nthresholds:\n  review: 0.9", 2, "thresholds.block", "block (0.8) is below review (0.9)"),
            (
                "name: x\nthresholds:\n  categories:\n    O7:\n      review: 0.3\n      block: 0.2",
                6,
                "thresholds.categories.O7.block",
                "block (0.2) is below review (0.3); set it to at least 0.3",
            ),
            ("name: x\nthresholds:\n  categories:\n    O12: {}", 4, "thresholds.categories.O12", "does not declare it"),
            ("name: x\ncategories:\n  O10: waive", 3, "categories.O10", "belongs under own_categories"),
            ("name: x\ncategories:\n  O1: off", 3, "categories.O1", "off is not allowed; allowed are enforce, waive"),
            ("name: x\ncategories:\n  O1: waive\n  O1: enforce", 4, "categories.O1", "appears twice, first in line 3"),
            ("name: x\nname: x", 2, "name", "appears twice, first in line 1"),
            ("name: x\nthresholds: {block: 1, block: 1}", 2, "thresholds.block", "appears twice"),
            ("name: x\ncategories:\n  O1:\n    can: yes", 4, "categories.O1.can", "has to be a list, with a dash"),
            ("name: x\ncategories:\n  O1:\n    can:\n      - a: b", 5, "categories.O1.can.1", "needs quotes"),
            ("name: x\ncategories:\n  O1:\n    can: [<x>]", 4, "categories.O1.can.1", "without < and >"),
            ("name: x\nrationale: no", 2, "rationale", "no is not allowed; allowed are unsafe, always, never"),
            ("name: x\nrationale: Always", 2, "rationale", "did you mean always?"),
            ("name: x\nblock_rate:\n  at_least: 0", 2, "block_rate.at_most", "is missing"),
            (
                "name: x\nblock_rate: {at_least: 1, at_most: 0}",
                2,
                "block_rate.at_most",
                "at_most (0) is below at_least",
            ),
            ("name: x\nblock_rate: {at_most: 1, window_s: 0}", 2, "block_rate.window_s", "has to be above 0"),
            ("name: x\nblock_rate: {at_most: 1, after: 1.5}", 2, "block_rate.after", "1.5 is not a whole number"),
            ("name: x\nblock_rate: {at_most: 1, after: 0x10}", 2, "block_rate.after", "0x10 is not a whole number"),
            (
                "name: x\nown_categories:\n- code: O10\n  title: 'a:b'\n  should_not: [a]",
                4,
                "own_categories.1.title",
                'without < > " : \\',
            ),
            (
                "name: x\nown_categories:\n- {code: O10, title: a, should_not: [a]}\n- {code: O10, title: b, "
                "should_not: [a]}",
                4,
                "own_categories.2.code",
                "has the code O10",
            ),
            (
                "name: x\nown_categories:\n- code: O10\n  title: a\n  should_not: []",
                5,
                "own_categories.1.should_not",
                "must not be empty",
            ),
            ("name: x\nexamples:\n- expect: {rating: Safe}", 3, "examples.1", "either `image` or `synthetic`"),
            ("name: x\nexamples:\n- image: a.jpg\n  expect: {}", 4, "examples.1.expect", "at least one of rating"),
            (
                "name: x\nexamples:\n- image: a.jpg\n  expect: {rating: safe}",
                4,
                "examples.1.expect.rating",
                "mean Safe?",
            ),
            (
                "name: x\nexamples:\n- image: a.jpg\n  expect: {rating: Safe}\n- image: a.jpg\n  expect:\n"
                "    category: O12",
                7,
                "examples.2.expect.category",
                "does not declare it under own_categories",
            ),
            (
                "name: x\nexamples:\n- image: a.jpg\n  expect:\n    rating: Unsafe\n    category: NA",
                6,
                "examples.1.expect.category",
                "NA goes with Safe only",
            ),
            ("kind: tenants\ntenants:\n  a: Shop", 3, "tenants.a", "Shop is not a policy's name"),
            ("kind: tenants\ntenants:\n  a:", 3, "tenants.a", "is empty"),
            ("kind: tenants\ntenants:\n  '': a", 3, "tenants.", "must not be empty"),
            ("kind: tenants\ntenants:\n  no: a\n  'no': b", 4, "tenants.no", "appears twice"),
        ],
    )
    def test_issue_names_place_and_remedy(self, text: str, line: int, field: str, says: str) -> None:
        error = refused(text)
        first = error.issues[0]
        assert (first.line, first.field) == (line, field)
        assert says in first.message
        assert str(error).startswith(f"shop.yaml:{line}: {field}: {first.message}" if field else f"shop.yaml:{line}: ")

    @pytest.mark.parametrize(
        ("text", "line", "says"),
        [
            (b"name: x\ndescription: \xff", 2, "is not UTF-8"),
            ("name: x".encode("utf-16"), 1, "is not UTF-8"),
            ("name: x\ndescription: a\x00b", 2, "U+0000"),
            ("name: x\ndescription: [", 2, "is not YAML"),
            ("name: x\ndescription: ours: theirs", 2, "a text that contains `: ` needs quotes"),
            ("name: x\n\tdescription: a", 2, "is not YAML"),
            ('name: "\\UFFFFFFFF"', 1, "is not YAML"),
            ("name: x\ndescription: &a b", 2, "anchors and aliases"),
            ("name: x\ndescription: *a", 2, "anchors and aliases"),
            ("name: x\ndescription: !!python/object:os.system b", 2, "a tag"),
            ("name: x\ndescription: !b c", 2, "a tag"),
            ("name: x\n---\nname: y", 2, "begins a second document"),
            ("name: x\n? [a]\n: b", 2, "a field's name has to be text"),
            ("name: " + "[" * 50_000, 1, "is nested deeper"),
            ("name: " + "{a: " * 10_000, 1, "is nested deeper"),
            ("".join(f"{'  ' * depth}a:\n" for depth in range(20)), 12, "is nested deeper"),
            ('name: x\ndescription: "\\ud800"', 2, "half of a character"),
        ],
    )
    def test_yaml_feature_that_is_not_allowed_is_rejected(self, text: str | bytes, line: int, says: str) -> None:
        first = refused(text).issues[0]
        assert first.line == line
        assert says in first.message

    def test_all_issues_are_listed_in_the_order_of_the_file(self) -> None:
        error = refused("name: Shop\ncolour: red\nthresholds:\n  block: 2\n  review: x\neffort: none\neffort: full\n")
        assert [issue.field for issue in error.issues] == [
            "name",
            "colour",
            "thresholds.block",
            "thresholds.review",
            "effort",
        ]
        assert error.issues[2] == DocumentIssue(4, 3, "thresholds.block", "2 is too large; the most is 1")
        assert str(error).endswith("(4 more problems)")
        assert str(refused("name: Shop\ncolour: red")).endswith("(1 more problem)")

    @pytest.mark.parametrize("text", ["name: x\n{}: a", "name: x\nrationale: {}", "kind: tenants\ntenants: {{{}: X}}"])
    def test_issue_text_is_short_and_printable(self, text: str) -> None:
        error = refused(text.replace("{}", '"' + "\\e[31m" * 200 + '"').replace("{{", "{").replace("}}", "}"))
        assert len(str(error)) < 500
        assert str(error).isprintable()

    @pytest.mark.parametrize("data", [b"name: x\n" + b"#" * 10_000_000, b"[" * 10_000_000, b"\xff" * 10_000_000])
    def test_document_over_the_limit_is_rejected_unread(self, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.policies.document_yaml._compose", lambda _: pytest.fail("it was parsed"))
        assert "the limit is 262,144 bytes" in str(refused(data))

    def test_huge_file_is_not_read_into_memory(self, tmp_path: Path) -> None:
        file = tmp_path / "shop.yaml"
        file.write_text("name: x\n")
        os.truncate(file, 1 << 40)  # a sparse file
        with pytest.raises(InvalidDocument, match="the limit is 262,144 bytes"):
            read_document_file(file)

    def test_document_at_the_limit_is_read(self) -> None:
        data = b"name: x\n"
        assert read_document(data + b"#" * (DOCUMENT_LIMIT_BYTES - len(data)), "shop.yaml") == PolicyDocument(name="x")

    @given(
        st.binary(max_size=200)
        | st.text(max_size=200).map(str.encode)
        | st.lists(
            st.sampled_from(
                [*"\n:-[]{}&*!|>'\"%#?,\\ ", "  ", ": ", "name: x\n", "examples:\n", "- ", "O1", "0.5", "thresholds"]
            ),
            max_size=40,
        ).map(lambda parts: "".join(parts).encode())
    )
    def test_random_bytes_are_a_document_or_rejected(self, data: bytes) -> None:
        found: tuple[DocumentIssue, ...] = ()
        try:
            read_document(data, "shop.yaml")
        except InvalidDocument as error:
            found = error.issues
        assert all(problem.line >= 1 and problem.column >= 1 and problem.message for problem in found)


class TestScalars:
    def test_name_that_yaml_would_convert_stays_text(self) -> None:
        names = ["no", "on", "007", "7", "1e-3", "2024-01-01", "null", "~", "true", "0x10", "1_000", "12:30:45", "="]
        text = "kind: tenants\ntenants:\n" + "".join(f"  {name}: shop\n" for name in names)
        document = read_document(text.encode(), "tenants.yaml")
        assert isinstance(document, TenantsDocument)
        assert list(document.tenants) == names

    @pytest.mark.parametrize(
        ("field", "value"), [("name", "no"), ("name", "007"), ("name", "1e3"), ("description", "2024-01-01")]
    )
    def test_text_that_yaml_would_convert_stays_text(self, field: str, value: str) -> None:
        document = read_document(f"name: x\n{field}: {value}\n".replace("name: x\nname", "name").encode(), "shop.yaml")
        assert getattr(document, field) == value

    def test_number_formats_are_read(self) -> None:
        document = read_document(
            b"name: x\nthresholds: {review: 1e-3, block: .5}\nblock_rate: {at_most: 1}", "shop.yaml"
        )
        assert isinstance(document, PolicyDocument)
        assert (document.thresholds.review, document.thresholds.block) == (0.001, 0.5)

    def test_empty_optional_field_counts_as_not_given(self) -> None:
        document = read_document(b"name: x\nblock_rate:\ncategories: {O1: {can: null}}", "shop.yaml")
        assert isinstance(document, PolicyDocument)
        assert document.block_rate is None
        assert document.prompt() == BUILT_IN.prompt()

    def test_version_and_digest_are_ignored(self) -> None:
        assert read_document(b"version: 3\ndigest: {a: b}\nname: x", "shop.yaml") == PolicyDocument(name="x")

    def test_byte_order_mark_is_ignored(self) -> None:
        assert read_document("\ufeffname: x".encode(), "shop.yaml") == PolicyDocument(name="x")

    def test_largest_number_of_tenants_is_read(self) -> None:
        text = "kind: tenants\ntenants:\n" + "".join(f"  shop-{n:05}: market\n" for n in range(TENANTS_LIMIT))
        document = read_document(text.encode(), "tenants.yaml")
        assert isinstance(document, TenantsDocument)
        assert len(document.tenants) == TENANTS_LIMIT


TEXTS = st.text(max_size=60) | st.text(
    st.sampled_from([*"ab .,:#-'\"|>%@`&*!?{}[]~=\t\n\r\\", "\x85", "\u2028", "\ufeff", "\x07", "é", "界", "🔪", " "]),
    max_size=200,
)
LINES = TEXTS.filter(lambda text: text.isprintable() and text != "")
RULES = st.lists(
    TEXTS.map(lambda text: "".join(c for c in text if c not in "<>" and (c.isprintable() or c == "\ufeff"))).filter(
        bool
    ),
    max_size=3,
)
DESCRIPTIONS = st.lists(LINES | st.sampled_from(["", "\ttab", " "]), max_size=4).map("\n".join)
SHARES = st.floats(0, 1)
PAIRS = st.tuples(SHARES, SHARES).map(lambda pair: {"review": min(pair), "block": max(pair)}) | st.just({})
CODES = st.sampled_from([f"O{n}" for n in range(1, 10)])
NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True).filter(lambda name: name != "tenants")


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


EXPECTATIONS = optional(
    rating=st.just("Safe"), category=CODES | st.just("NA"), action=st.sampled_from(["allow", "review", "block"])
).filter(bool)
EXAMPLES = st.fixed_dictionaries(
    {"expect": EXPECTATIONS, "synthetic": st.fixed_dictionaries({"label": CODES, "seed": st.integers(0, 10**9 - 1)})},
    optional={"name": LINES},
) | st.fixed_dictionaries({"expect": EXPECTATIONS, "image": LINES.map(lambda key: f"s3://bucket/{key}")})
OWN = st.lists(
    st.fixed_dictionaries(
        {
            "title": LINES.map(lambda text: "".join(c for c in text if c not in '<>":\\').strip()[:60].strip()).filter(
                bool
            ),
            "should_not": RULES.filter(bool),
        },
        optional={"can": RULES},
    ),
    max_size=3,
).map(lambda own: [{"code": f"O{19 - n}", **category} for n, category in enumerate(own)])
POLICIES = st.fixed_dictionaries(
    {"name": NAMES},
    optional={
        "description": DESCRIPTIONS,
        "categories": st.dictionaries(
            CODES,
            st.sampled_from(["enforce", "waive"])
            | optional(mode=st.sampled_from(["enforce", "waive"]), should_not=RULES, can=RULES),
        ),
        "own_categories": OWN,
        "thresholds": st.tuples(PAIRS, st.dictionaries(CODES, PAIRS)).map(
            lambda both: both[0] | {"categories": both[1]}
        ),
        "rationale": st.sampled_from(["unsafe", "always", "never"]),
        "effort": st.sampled_from(["full", "adaptive"]),
        "first_look_below": SHARES,
        "block_rate": SHARES.map(lambda share: {"at_most": share})
        | st.just({"at_least": 0.1, "at_most": 0.9, "window_s": 1e-3, "after": 7}),
        "examples": st.lists(EXAMPLES, max_size=3),
    },
).map(PolicyDocument.model_validate)
TENANTS = st.builds(
    TenantsDocument,
    description=TEXTS,
    tenants=st.dictionaries(TEXTS.filter(bool) | st.sampled_from(["no", "007", "null", "~", "<<", "="]), NAMES),
)


class TestWriting:
    @given(POLICIES | TENANTS)
    def test_written_document_is_read_back(self, document: PolicyDocument | TenantsDocument) -> None:
        written = write_document(document, version=7, digest=document.digest())
        again = read_document(written.encode(), "shown.yaml")
        assert again == document
        assert again.digest() == document.digest()
        assert type(again) is type(document)
        assert written.startswith(f"version: 7\ndigest: {document.digest()}\n")

    @given(POLICIES)
    def test_standard_yaml_reader_sees_the_same_policy(self, document: PolicyDocument) -> None:
        plain = yaml.safe_load(write_document(document, version=1, digest="sha256:0"))
        assert (
            PolicyDocument.model_validate({k: v for k, v in plain.items() if k not in {"version", "digest"}})
            == document
        )

    def test_written_document_is_short(self) -> None:
        rule = "Contain content that shows how a stake is placed, where, and with whom, so that others could do it too."
        document = PolicyDocument.model_validate(
            {
                "name": "club",
                "description": "Für den Verein.\nSeit 1894.",
                "categories": {"O9": "waive", "O1": {"mode": "waive", "can": ["Joke."]}},
                "own_categories": [{"code": "O10", "title": "Glücksspiel", "should_not": [rule]}],
                "thresholds": {"block": 0.9},
            }
        )
        assert write_document(document, version=2, digest="sha256:ab") == (
            "version: 2\n"
            "digest: sha256:ab\n"
            "name: club\n"
            "description: |-\n"
            "  Für den Verein.\n"
            "  Seit 1894.\n"
            "categories:\n"
            "  O9: waive\n"
            "  O1:\n"
            "    mode: waive\n"
            "    can:\n"
            "      - Joke.\n"
            "own_categories:\n"
            "  - code: O10\n"
            "    title: Glücksspiel\n"
            "    should_not:\n"
            "      - >-\n"
            "        Contain content that shows how a stake is placed, where, and with whom, so that others could do\n"
            "        it too.\n"
            "thresholds:\n"
            "  block: 0.9\n"
        )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
class TestShippedPolicies:
    def test_shipped_policy_is_named_as_its_file_and_read_back(self, path: Path) -> None:
        document = read_document(path.read_bytes(), path.name)
        assert document.name == path.stem
        assert read_document(write_document(document, version=1, digest="").encode(), path.name) == document

    def test_shipped_policy_has_few_warnings(self, path: Path) -> None:
        expected = {
            "default": [],
            "marketplace": ["The wording that waives O4, O9"],
            "health-education": ["The wording that waives O4, O6"],
            "children": ["categories.O2: the wording of should_not and can"],
        }
        found = find_warnings(read_document(path.read_bytes(), path.name))
        assert [warning.partition(" is not ")[0] for warning in found] == expected[path.stem]

    def test_examples_of_a_shipped_policy_match_its_rules(self, path: Path) -> None:
        document = read_document(path.read_bytes(), path.name)
        assert isinstance(document, PolicyDocument)
        assert document.name == "default" or 4 <= len(document.examples) <= 8
        for example in document.examples:
            assert example.synthetic is not None
            label, expect = example.synthetic.label, example.expect
            waived = label != "NA" and label in document.categories and document.categories[label].mode == "waive"
            assert expect.rating == ("Safe" if waived or label == "NA" else "Unsafe")
            assert expect.action != "allow" or expect.rating == "Safe"
            # A first look names no category, so where one may settle the image none can be expected.
            first_look = document.effort == "adaptive" and expect.rating == "Safe"
            assert expect.category == (None if first_look else label)

    def test_first_look_threshold_is_below_the_review_threshold(self, path: Path) -> None:
        document = read_document(path.read_bytes(), path.name)
        assert isinstance(document, PolicyDocument)
        lowest = min([document.thresholds.review, *(pair.review for pair in document.thresholds.categories.values())])
        assert document.effort == "full" or document.first_look_below < lowest


def test_built_in_policy_is_the_shipped_default() -> None:
    assert [path.stem for path in SHIPPED] == ["children", "default", "health-education", "marketplace"]
    assert read_document(SHIPPED[1].read_bytes(), "default.yaml") == BUILT_IN
