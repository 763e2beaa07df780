"""Documents as files: YAML to a document with every problem named by its line, and back.

A scalar is text until the field that it belongs to says otherwise. So nothing of YAML 1.1's guesses gets in: `no`,
`on` and `007` are names if they stand where a name belongs, and `1e-3` is a number where a number does.
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
from services.policies.prompt import TRAINED_BLOCKS
from services.policies.tenants import TENANTS, Document, TenantsDocument, parse_document

DOCUMENT_LIMIT_BYTES: Final = 256 * 1024
"""No document is larger."""

_NESTING_LIMIT: Final = 12
"""Levels of nesting. A document needs five; PyYAML's composer is recursive."""

_STAMP_FIELDS: Final = ("version", "digest")
"""What `write_document` puts on top of a document, and what is no part of one."""

_TRAINED_WAIVERS_LIMIT: Final = 3
"""At most so many categories were waived in one training example of LlavaGuard v1.2."""

_LONG_TEXT_CHARS: Final = 80
"""Characters from which a text is written as a block of its own."""

_NULL_TEXTS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_Path = tuple[str | int, ...]


def read_document_file(file: Path) -> Document:
    """Read one YAML document from a file.

    Raises:
        ConfigurationError: the file cannot be read.
        InvalidDocument: as `read_document`.
    """
    try:
        return read_document(file.read_bytes(), str(file))
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None


def read_document(data: bytes, source: str) -> Document:
    """Read one YAML document. `source` is what the bytes are called in messages.

    `version` and `digest` on top are ignored, so that what `write_document` gave can be read.

    Raises:
        InvalidDocument: it is not YAML, not a document, or more than `DOCUMENT_LIMIT_BYTES`.
    """
    if len(data) > DOCUMENT_LIMIT_BYTES:
        raise InvalidDocument(
            source,
            [
                _issue_with_document(
                    f"has {len(data):,} bytes; a document has {DOCUMENT_LIMIT_BYTES:,} at most (256 KiB)"
                )
            ],
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
        raise InvalidDocument(
            source, [_issue_with_document(f"{begins}; a document is made of fields such as `name: shop`")]
        )
    read: Document | None = None
    try:
        read = parse_document({field: value for field, value in document.items() if field not in _STAMP_FIELDS})
    except ValidationError as invalid:
        model = TenantsDocument if document.get("kind") == TENANTS else PolicyDocument
        reader.issues += [reader.issue(error, model) for error in invalid.errors(include_url=False)]
    if read is None or reader.issues:
        raise InvalidDocument(source, reader.issues)
    return read


def find_warnings(document: Document) -> list[str]:
    """What LlavaGuard was not trained for in a document, a sentence each. It is allowed, and worth examples."""
    if isinstance(document, TenantsDocument):
        return []
    waived = [code for code, rules in document.categories.items() if rules.mode == "waive"]
    found = []
    if len(waived) > _TRAINED_WAIVERS_LIMIT:
        found.append(
            f"{len(waived)} categories are waived ({', '.join(waived)}): the model was trained with at most "
            f"{_TRAINED_WAIVERS_LIMIT}, and may obey more of them less well."
        )
    if waived:
        found.append(
            f"The wording that waives {', '.join(waived)} is not verified against the model's training: have examples "
            "that see whether it is obeyed."
        )
    trained = {block.category.partition(":")[0]: block for block in TRAINED_BLOCKS}
    for code, rules in document.categories.items():
        block = trained[code]
        changed = [
            name
            for name, own, learned in (
                ("should_not", rules.should_not, block.should_not),
                ("can", rules.can, block.can),
            )
            if own not in (None, learned)
        ]
        if changed:
            found.append(
                f"categories.{code}: the wording of {' and '.join(changed)} is not that of the model's training."
            )
        if rules.should_not == () and rules.mode == "enforce":
            found.append(f"categories.{code}: without a rule in should_not nothing says what violates it.")
    if document.own_categories:
        names = ", ".join(own.category for own in document.own_categories)
        found.append(f"The model was trained on its nine categories alone, and not on {names}.")
    return found


def write_document(document: Document, *, version: int, digest: str) -> str:
    """The document as YAML, with `version` and `digest` on top: only what differs from the defaults.

    `read_document` makes an equal document of it.
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
    """PyYAML's graph of nodes, without what lets a small text become a large one or name a type."""

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
                _issue_at(event.start_mark, f"is nested deeper than {_NESTING_LIMIT} levels, which no document is")
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _compose(text: str) -> yaml.Node | None:
    """The root of the text's only document, or None where it has none.

    Raises:
        _Rejected: it is not YAML, has several documents, or uses what a document may not.
    """
    if unprintable := yaml.reader.Reader.NON_PRINTABLE.search(text):
        before = text[: unprintable.start()]
        issue = DocumentIssue(
            before.count("\n") + 1,
            len(before) - before.rfind("\n"),
            "",
            f"contains U+{ord(unprintable[0]):04X}, which no text file does; write it as an escape in double quotes",
        )
        raise _Rejected(issue)
    loader = _Composer(text)
    try:
        node = loader.get_single_node()
    except yaml.composer.ComposerError as error:
        raise _Rejected(_issue_at(error.problem_mark, "is a second document; a file has one")) from None
    except yaml.MarkedYAMLError as error:
        raise _Rejected(_issue_at(error.problem_mark or error.context_mark, f"is not YAML: {_reason(error)}")) from None
    except (ValueError, OverflowError):
        # PyYAML hands the number of an escape to chr().
        raise _Rejected(_issue_at(loader.get_mark(), "is not YAML: an escape that names no character")) from None
    return node


def _reason(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join(f"{error.problem or error.context}".split())
    if problem == "mapping values are not allowed here":
        return "a second `: ` in one line, or a wrong indentation; a text that contains `: ` needs quotes"
    return problem


class _NodeReader:
    """Turns nodes into plain values, and remembers where each of them stands."""

    def __init__(self) -> None:
        self.issues: list[DocumentIssue] = []
        self._marks: dict[_Path, yaml.Mark] = {}

    def mapping(self, node: yaml.MappingNode, path: _Path = ()) -> dict[str, Any]:
        """Keys are text, whatever they look like; of a key that is there twice the last value is taken."""
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
                self._add_issue(key.start_mark, below, f"is there twice, first in line {first}; keep one of them")
            else:
                self._marks[below] = key.start_mark
            values[name] = self._value(value, below)
        return values

    def issue(self, error: ErrorDetails, model: type[BaseModel]) -> DocumentIssue:
        """What pydantic says, in words and with its place."""
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
        message = _sentence(error, path, model)
        if known != path and error["type"] == "value_error" and not isinstance(cause, ConflictingFields):
            message += "; it is not given, so its default counts"
        return DocumentIssue(mark.line + 1, mark.column + 1, _dotted(path), message)

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
            self._add_issue(node.start_mark, path, "has an escape for half of a character; write the character itself")
            return ""
        return text

    def _add_issue(self, mark: yaml.Mark, path: _Path, message: str) -> None:
        self.issues.append(DocumentIssue(mark.line + 1, mark.column + 1, _dotted(path), message))


def _sentence(error: ErrorDetails, path: _Path, model: type[BaseModel]) -> str:  # noqa: PLR0911, PLR0912 - a table
    context, value = error.get("ctx", {}), error["input"]
    shown = _shown(value)
    if value is None and error["type"] != "missing":
        return "is empty; give it a value, or leave the field out"
    match error["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return f"is not a field; {_choice(str(path[-1]), _fields(model, path[:-1]))}"
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            if path == ("kind",):
                choices.append(TENANTS)
            own = re.fullmatch(r"O1\d", str(value)) and path[:1] == ("categories",)
            hint = "; a category of your own belongs under own_categories" if own else ""
            return f"{shown} is not allowed; {_choice(str(value), choices)}{hint}"
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
            fields = _fields(model, path)
            return f"has to have fields below it{': ' + ', '.join(fields) if fields else ''}"
        case _:
            return error["msg"]


def _fields(model: type[BaseModel], path: _Path) -> list[str]:
    """The names of the fields at a place of a document, as far as they are fixed."""
    annotation: Any = model
    for step in path:
        annotation = _bare(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[str(step)].annotation
        else:
            annotation = get_args(annotation)[1 if get_origin(annotation) is dict else 0]
    annotation = _bare(annotation)
    return [*annotation.model_fields] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _bare(annotation: Any) -> Any:
    """Without Annotated and without `| None`."""
    while hasattr(annotation, "__metadata__") or get_origin(annotation) in {Union, types.UnionType}:
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _choice(given: str, allowed: Sequence[str]) -> str:
    by_lower = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(given.lower()[:100], by_lower, n=1)
    known = f"allowed are {', '.join(allowed)}"
    return f"did you mean {by_lower[near[0]]}? ({known})" if near else known


def _dotted(path: _Path) -> str:
    steps = (str(step + 1) if isinstance(step, int) else step for step in path)
    return ".".join(step if step.isprintable() and len(step) <= 60 else _shown(step) for step in steps)


def _shown(value: Any) -> str:
    """A value as a message can hold it: short, and without control characters."""
    if isinstance(value, Mapping | list):
        return "what is below"
    shown = ascii(value) if not str(value).isprintable() else str(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _issue_at(mark: Any, message: str) -> DocumentIssue:
    return DocumentIssue(mark.line + 1, mark.column + 1, "", message) if mark else _issue_with_document(message)


def _issue_with_document(message: str) -> DocumentIssue:
    return DocumentIssue(1, 1, "", message)


class _Folded(str):
    __slots__ = ()


class _Literal(str):
    __slots__ = ()


class _Writer(yaml.SafeDumper):
    """Long texts as blocks, and lists indented below their field."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_with(style: str | None) -> Callable[[yaml.SafeDumper, str], yaml.Node]:
    return lambda writer, text: writer.represent_scalar("tag:yaml.org,2002:str", str(text), style=style)


def _text(writer: yaml.SafeDumper, text: str) -> yaml.Node:
    # Left to itself PyYAML writes some line separators where a reader takes them for white space.
    return _represent_with(None if text.isprintable() else '"')(writer, text)


_Writer.add_representer(str, _text)
_Writer.add_representer(_Folded, _represent_with(">"))
_Writer.add_representer(_Literal, _represent_with("|"))


def _with_block_styles(value: Any) -> Any:
    """Says which texts are written as blocks. Keys stay as they are."""
    if isinstance(value, dict):
        return {key: _with_block_styles(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_with_block_styles(below) for below in value]
    if not isinstance(value, str) or not all(line.isprintable() and line == line.strip() for line in value.split("\n")):
        # Blocks have no escapes, and white space at the ends of their lines can mean something else.
        return value
    if "\n" in value:
        return _Literal(value)
    return _Folded(value) if len(value) > _LONG_TEXT_CHARS and "  " not in value else value
