"""Reads policy documents from YAML, with a line number for every issue, and writes them.

The type of a scalar depends only on its field, not on the conversions of YAML 1.1: in a name field `no`, `on` and `007`
are names, and in a number field `1e-3` is a number.
"""

import difflib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from services.core.errors import ConfigurationError, DocumentIssue, InvalidDocument
from services.policies.document import NAME_PATTERN, ConflictingFields, PolicyDocument
from services.policies.tenants import TENANTS, Document, TenantsDocument, parse_document

DOCUMENT_LIMIT_BYTES: Final = 256 * 1024
"""The largest size of a document."""

_NESTING_LIMIT: Final = 12
"""The largest depth of nesting. A document needs five levels; PyYAML's composer is recursive."""

_STAMP_FIELDS: Final = ("version", "digest")
"""Fields that `write_document` adds at the top. They are not part of a document."""

_LONG_TEXT_CHARS: Final = 80
"""A longer text is written as a YAML block."""

_NULL_TEXTS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_Path = tuple[str | int, ...]


def read_document_file(file: Path) -> Document:
    """Read one YAML document from a file.

    Raises:
        ConfigurationError: the file cannot be read.
        InvalidDocument: as `read_document`.
    """
    try:
        with file.open("rb") as content:  # a huge file of somebody else must not fill the memory
            return read_document(content.read(DOCUMENT_LIMIT_BYTES + 1), str(file))
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None


def read_document(data: bytes, source: str) -> Document:
    """Read one YAML document. `source` names it in messages.

    Ignores the fields `version` and `digest` that `write_document` adds.

    Raises:
        InvalidDocument: the bytes are not YAML, not a document, or more than `DOCUMENT_LIMIT_BYTES`.
    """
    if len(data) > DOCUMENT_LIMIT_BYTES:
        raise InvalidDocument(
            source,
            [_document_issue(f"has too many bytes; the limit is {DOCUMENT_LIMIT_BYTES:,} bytes (256 KiB)")],
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidDocument(
            source, [DocumentIssue(line, 1, "", "is not UTF-8; save the file with that encoding")]
        ) from None
    try:
        node = _compose(text)
    except _Rejected as rejected:
        raise InvalidDocument(source, [rejected.issue]) from None
    reader = _NodeReader()
    document = reader.mapping(node) if isinstance(node, yaml.MappingNode) else None
    if document is None:
        begins = "is empty" if node is None else "is not a mapping"
        raise InvalidDocument(source, [_document_issue(f"{begins}; a document has fields such as `name: shop`")])
    read: Document | None = None
    try:
        read = parse_document({field: value for field, value in document.items() if field not in _STAMP_FIELDS})
    except ValidationError as invalid:
        model = TenantsDocument if document.get("kind") == TENANTS else PolicyDocument
        reader.issues += [reader.issue(error, model) for error in invalid.errors(include_url=False)]
    if read is None or reader.issues:
        raise InvalidDocument(source, reader.issues)
    return read


def write_document(document: Document, *, version: int, digest: str) -> str:
    """The document as YAML, with `version` and `digest` at the top, and without default values.

    `read_document` returns an equal document.
    """
    content = document.model_dump(mode="json", exclude_defaults=True)
    if isinstance(document, TenantsDocument):
        content = {"kind": TENANTS, **content}
    else:
        for code, rules in content.get("categories", {}).items():
            if not rules.keys() - {"mode"}:
                content["categories"][code] = rules.get("mode", "enforce")
    stamped = {"version": version, "digest": digest, **content}
    return yaml.dump(
        _with_block_styles(stamped),
        Dumper=_Writer,
        allow_unicode=True,
        sort_keys=False,
        width=100,
        default_flow_style=False,
    )


class _Rejected(Exception):
    def __init__(self, issue: DocumentIssue) -> None:
        super().__init__(issue.message)
        self.issue = issue


class _Composer(yaml.SafeLoader):
    """Composes nodes as PyYAML does, and rejects anchors, aliases and tags."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Rejected(
                _issue_at(
                    event.start_mark, "& and * (anchors and aliases) are not allowed; repeat the text, or quote it"
                )
            )
        if getattr(event, "tag", None):
            raise _Rejected(_issue_at(event.start_mark, "! (a tag) is not allowed; leave it out, or quote the text"))
        if self._depth == _NESTING_LIMIT:
            raise _Rejected(
                _issue_at(event.start_mark, f"is nested deeper than {_NESTING_LIMIT} levels; a document needs fewer")
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _compose(text: str) -> yaml.Node | None:
    """The root node of the text; None if the text is empty.

    Raises:
        _Rejected: the text is not YAML, has several documents, or uses a feature that is not allowed.
    """
    if unprintable := yaml.reader.Reader.NON_PRINTABLE.search(text):
        before = text[: unprintable.start()]
        issue = DocumentIssue(
            before.count("\n") + 1,
            len(before) - before.rfind("\n"),
            "",
            f"contains the control character U+{ord(unprintable[0]):04X}; write it as an escape in double quotes",
        )
        raise _Rejected(issue)
    loader = _Composer(text)
    try:
        node = loader.get_single_node()
    except yaml.composer.ComposerError as error:
        raise _Rejected(_issue_at(error.problem_mark, "begins a second document; a file may have only one")) from None
    except yaml.MarkedYAMLError as error:
        raise _Rejected(_issue_at(error.problem_mark or error.context_mark, f"is not YAML: {_reason(error)}")) from None
    except (ValueError, OverflowError):
        # PyYAML passes the number of an escape to chr().
        raise _Rejected(_issue_at(loader.get_mark(), "is not YAML: an escape is not a character")) from None
    return node


def _reason(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join(f"{error.problem or error.context}".split())
    if problem == "mapping values are not allowed here":
        return "a second `: ` in one line, or a wrong indentation; a text that contains `: ` needs quotes"
    return problem


class _NodeReader:
    """Converts nodes to plain values, and remembers their positions."""

    def __init__(self) -> None:
        self.issues: list[DocumentIssue] = []
        self._marks: dict[_Path, yaml.Mark] = {}

    def mapping(self, node: yaml.MappingNode, path: _Path = ()) -> dict[str, Any]:
        """Convert a mapping. Keys are always text. A repeated key is an issue."""
        self._marks.setdefault(path, node.start_mark)
        values: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._add_issue(
                    key.start_mark, path, "a field's name has to be text; a text with brackets needs quotes"
                )
                continue
            name = self._text(key, path)
            below = (*path, name)
            if name in values:
                first = self._marks[below].line + 1
                self._add_issue(key.start_mark, below, f"appears twice, first in line {first}; keep one of them")
            else:
                self._marks[below] = key.start_mark
            values[name] = self._value(value, below)
        return values

    def issue(self, error: ErrorDetails, model: type[BaseModel]) -> DocumentIssue:
        """The issue for an error of pydantic, with its position."""
        path: _Path = tuple(step for step in error["loc"] if step != "[key]")
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, ConflictingFields):
            path = (*path, *cause.at)
        if path[:1] == ("categories",) and path[-1] == "mode" and path not in self._marks:
            path = path[:-1]  # written short: `O6: waive`
        known = path
        while known not in self._marks:
            known = known[:-1]
        mark = self._marks[known]
        message = _describe(error, path, model)
        if known != path and error["type"] == "value_error" and not isinstance(cause, ConflictingFields):
            message += "; it is not given, so its default applies"
        return DocumentIssue(mark.line + 1, mark.column + 1, _join_path(path), message)

    def _value(self, node: yaml.Node, path: _Path) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._marks[*path, index] = item.start_mark
            return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        if node.style is None and node.value in _NULL_TEXTS:
            return None
        return self._text(node, path)

    def _text(self, node: yaml.Node, path: _Path) -> str:
        text = str(node.value)
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            self._add_issue(node.start_mark, path, "has an escape for half of a character; write the whole character")
            return ""
        return text

    def _add_issue(self, mark: yaml.Mark, path: _Path, message: str) -> None:
        self.issues.append(DocumentIssue(mark.line + 1, mark.column + 1, _join_path(path), message))


def _describe(error: ErrorDetails, path: _Path, model: type[BaseModel]) -> str:  # noqa: PLR0911, PLR0912 - a table
    context, value = error.get("ctx", {}), error["input"]
    shown = _display(value)
    if value is None and error["type"] != "missing":
        return "is empty; give it a value, or leave the field out"
    match error["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return f"is not a field; {_suggest(str(path[-1]), _field_names(model, path[:-1]))}"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            if path == ("kind",):
                choices.append(TENANTS)
            own = re.fullmatch(r"O1\d", str(value)) and path[:1] == ("categories",)
            hint = "; a category of your own belongs under own_categories" if own else ""
            return f"{shown} is not allowed; {_suggest(str(value), choices)}{hint}"
        case "value_error":
            return str(context["error"])
        case "float_type" | "float_parsing" | "finite_number":
            return f"{shown} is not a number; write one such as 0.5"
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            return f"{shown} is not a whole number; write one such as 100"
        case "greater_than_equal":
            return f"{shown} is too small; the least is {context['ge']:g}"
        case "greater_than":
            return f"{shown} is too small; it has to be above {context['gt']:g}"
        case "less_than_equal":
            return f"{shown} is too large; the most is {context['le']:g}"
        case "string_type":
            quotes = "; a text that contains `: ` needs quotes" if isinstance(value, dict) else ""
            return f"has to be text{quotes}"
        case "string_pattern_mismatch" if context["pattern"] == NAME_PATTERN:
            return (
                f"{shown} is not a policy's name: lower-case letters, digits, - and _, 64 at most, with a letter or a "
                "digit first"
            )
        case "string_pattern_mismatch":
            return "has to be one line of text without < and >"
        case "string_too_short" | "too_short":
            return "is empty; give it something, or leave the field out" if "can" in path else "must not be empty"
        case "string_too_long":
            return f"has {len(value):,} characters; the most is {context['max_length']:,}"
        case "too_long":
            return f"has {len(value):,} entries; the most is {context['max_length']:,}"
        case "tuple_type":
            return "has to be a list, with a dash before each entry"
        case "dict_type" | "model_type":
            fields = _field_names(model, path)
            return f"has to have fields below it{': ' + ', '.join(fields) if fields else ''}"
        case _:
            return error["msg"]


def _field_names(model: type[BaseModel], path: _Path) -> list[str]:
    """The field names at a path of a document, if they are fixed."""
    annotation: Any = model
    for step in path:
        annotation = _strip_optional(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[str(step)].annotation
        else:
            annotation = get_args(annotation)[1 if get_origin(annotation) is dict else 0]
    annotation = _strip_optional(annotation)
    return [*annotation.model_fields] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _strip_optional(annotation: Any) -> Any:
    """Without Annotated and without `| None`."""
    while hasattr(annotation, "__metadata__") or get_origin(annotation) in {Union, types.UnionType}:
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _suggest(given: str, allowed: Sequence[str]) -> str:
    by_lower = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(given.lower()[:100], by_lower, n=1)
    known = f"allowed are {', '.join(allowed)}"
    return f"did you mean {by_lower[near[0]]}? ({known})" if near else known


def _join_path(path: _Path) -> str:
    steps = (str(step + 1) if isinstance(step, int) else step for step in path)
    return ".".join(step if step.isprintable() and len(step) <= 60 else _display(step) for step in steps)


def _display(value: Any) -> str:
    """A value as a message can hold it: short, and without control characters."""
    if isinstance(value, Mapping | list):
        return "the nested value"
    shown = ascii(value) if not str(value).isprintable() else str(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _issue_at(mark: Any, message: str) -> DocumentIssue:
    return DocumentIssue(mark.line + 1, mark.column + 1, "", message) if mark else _document_issue(message)


def _document_issue(message: str) -> DocumentIssue:
    return DocumentIssue(1, 1, "", message)


class _Folded(str):
    __slots__ = ()


class _Literal(str):
    __slots__ = ()


class _Writer(yaml.SafeDumper):
    """Writes long texts as blocks, and indents lists below their field."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_with(style: str | None) -> Callable[[yaml.SafeDumper, str], yaml.Node]:
    return lambda writer, text: writer.represent_scalar("tag:yaml.org,2002:str", str(text), style=style)


def _text(writer: yaml.SafeDumper, text: str) -> yaml.Node:
    # By default PyYAML writes some line separators that a reader takes for white space.
    return _represent_with(None if text.isprintable() else '"')(writer, text)


_Writer.add_representer(str, _text)
_Writer.add_representer(_Folded, _represent_with(">"))
_Writer.add_representer(_Literal, _represent_with("|"))


def _with_block_styles(value: Any) -> Any:
    """Mark the texts that are written as blocks. Keys stay unchanged."""
    if isinstance(value, dict):
        return {key: _with_block_styles(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_with_block_styles(below) for below in value]
    if not isinstance(value, str) or not all(line.isprintable() and line == line.strip() for line in value.split("\n")):
        # Blocks have no escapes, and white space at the end of a line can change their meaning.
        return value
    if "\n" in value:
        return _Literal(value)
    return _Folded(value) if len(value) > _LONG_TEXT_CHARS and "  " not in value else value
