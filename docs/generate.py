"""Write the reference pages from the code: settings.md, commands.md, metrics.md and policy-document.md.

python docs/generate.py            # write them
python docs/generate.py --check    # print the pages that are not current; exit status 1 if there are any
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import typer.main
from pydantic.fields import FieldInfo
from ray.util.metrics import Metric
from typer.cli import get_docs_for_click

from pipelines.cli.main import app
from services.core import telemetry
from services.core.settings import Settings
from services.policies.document import PolicyDocument
from services.policies.tenants import TenantsDocument

FOLDER: Final = Path(__file__).parent
_WRITTEN_BY: Final = "<!-- Written by docs/generate.py from {source}; `make docs` writes it again. -->\n\n"
_MIB: Final = 1 << 20


def settings_page() -> str:
    """Every setting with its default, under the headings that are comments in the class."""
    lines = [
        _WRITTEN_BY.format(source="services/core/settings.py") + "# Settings\n",
        "Every setting is an environment variable. Sluice checks all of them at the start and names each one that is "
        "missing or wrong. Sizes are in bytes and durations in seconds unless the name says otherwise; lists are "
        "separated by commas. An empty variable counts as unset, except `SLUICE_BACKFILL_STREAM`.\n",
        "Credentials have no settings of their own, except `SLUICE_REDIS_SIGNING_KEY`. "
        "S3 credentials come from the usual AWS sources (environment, "
        "profile, instance role), Kafka credentials from `SLUICE_KAFKA_OPTIONS`, and Redis credentials from the URL.\n",
        "While `sluice up` is ready, it keeps its settings in `.sluice/env` in the folder where it was started. Other "
        "commands in that folder read from there what their environment does not set. `SLUICE_KAFKA_OPTIONS` is not "
        "in that file, because a shell that reads the file would remove the quotes, and `SLUICE_REDIS_SIGNING_KEY` "
        "is not in it, because it is a secret. A folder that you got from somebody else can contain such a file, too. "
        "So commands refuse the file, and end with status 1, unless it belongs to you, has mode 0600 and sets only "
        "variables that `sluice up` writes. They ignore it, and say so, unless the service that wrote it still runs: "
        "the service keeps a lock on the file.\n",
    ]
    for heading, names in _sections().items():
        lines += [f"## {heading}\n", "| Setting | Default | Meaning |", "|---|---|---|"]
        lines += [_setting_row(name, Settings.model_fields[name]) for name in names]
        lines.append("")
    return "\n".join(lines)


def commands_page() -> str:
    """Every command with its arguments and options, as typer's own `utils docs` writes them."""
    command = typer.main.get_command(app)
    with command.make_context("sluice", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="sluice", title="Commands")
    return _WRITTEN_BY.format(source="the commands in pipelines/cli") + text.strip() + "\n"


def metrics_page() -> str:
    """Every metric with its labels and what it counts."""
    lines = [
        _WRITTEN_BY.format(source="services/core/telemetry.py") + "# Metrics\n",
        "Ray exports each metric to Prometheus with the prefix `ray_`, on port 8090 of every node. "
        "[Monitoring](monitoring.md) says how Prometheus finds the nodes.\n",
        "| Metric | Labels | Meaning |",
        "|---|---|---|",
    ]
    metrics = {id(value): value for value in vars(telemetry).values() if isinstance(value, Metric)}
    for metric in metrics.values():
        info = metric.info
        labels = ", ".join(f"`{label}`" for label in info["tag_keys"])
        lines.append(f"| `{info['name']}` | {labels} | {_cell(info['description'])} |")
    return "\n".join(lines) + "\n"


def policy_document_page() -> str:
    """Every field of a policy document and of the tenants document, from their JSON schemas."""
    lines = [
        _WRITTEN_BY.format(source="services/policies/document.py") + "# Policy documents\n",
        "A document is YAML, or JSON over HTTP. Unknown fields are errors. An omitted field has its default. "
        "[Policies](policies.md) shows how to test and roll out a document. `services/policies/documents/default.yaml` "
        "is a commented example.\n",
        "## Policy\n",
        *_tables(PolicyDocument.model_json_schema()),
        "## Tenants document\n",
        "One document of `kind: tenants` assigns policies to tenants.\n",
        *_tables(TenantsDocument.model_json_schema()),
    ]
    return "\n".join(lines)


def _tables(schema: dict[str, Any]) -> Iterator[str]:
    """A table of the fields of a document, then one for each of its nested models, under the path of the model."""
    models = [("", schema)]
    for path, model in models:  # grows in the loop
        if path:
            yield f"### `{path}`\n"
        yield "| Field | Values | Default | Meaning |\n|---|---|---|---|"
        for name, field in model["properties"].items():
            below = f"{path}.{name}" if path else name
            values, reference = _values(field, below)
            if reference:
                models.append((below, schema["$defs"][reference]))
            default = "required" if name in model.get("required", ()) else _schema_default(field, reference)
            yield f"| `{name}` | {values} | {default} | {_cell(field.get('description', ''))} |"
        yield ""


def _values(field: dict[str, Any], path: str) -> tuple[str, str | None]:  # noqa: PLR0911 - a table
    """The allowed values in words, and the name of the nested model, if there is one."""
    if "anyOf" in field:
        return _values(next(each for each in field["anyOf"] if each.get("type") != "null"), path)
    if "$ref" in field:
        return f"[fields](#{path.replace('.', '')})", field["$ref"].rpartition("/")[2]
    if "const" in field:
        return f"`{field['const']}`", None
    if "enum" in field:
        return _join_choices(field["enum"]), None
    match field.get("type"):
        case "array":
            items, reference = _values(field["items"], path)
            return f"list{_bounds(field, 'Items', ' entries')} of {items}", reference
        case "object":
            keys = _join_choices(field["propertyNames"]["enum"]) if "enum" in field.get("propertyNames", {}) else "text"
            items, reference = _values(field["additionalProperties"], path)
            return f"mapping{_bounds(field, 'Properties', ' entries')} of {keys} to {items}", reference
        case "string":
            return f"text{_bounds(field, 'Length', ' characters')}", None
        case number:
            return f"{number}{_bounds(field, 'imum', '')}", None


def _join_choices(choices: list[str]) -> str:
    """The choices; consecutive category codes as a range."""
    codes = [choice for choice in choices if re.fullmatch(r"O\d+", choice)]
    spans = [f"`{codes[0]}` to `{codes[-1]}`"] if codes else []
    return " or ".join([*spans, *(f"`{choice}`" for choice in choices if choice not in codes)])


def _bounds(field: dict[str, Any], of: str, unit: str) -> str:
    least, most = field.get(f"min{of}"), field.get(f"max{of}")
    bounds = [
        f"at least {least:,}" if least is not None else "",
        f"above {field['exclusiveMinimum']:g}" if of == "imum" and "exclusiveMinimum" in field else "",
        f"at most {most:,}" if most is not None else "",
    ]
    given = ", ".join(filter(None, bounds))
    return f" ({given}{unit})" if given else ""


def _schema_default(field: dict[str, Any], reference: str | None) -> str:
    value = field.get("default")
    if reference or value in (None, "", [], {}):
        return ""
    return f"`{value}`"


PAGES: Final[dict[str, Callable[[], str]]] = {
    "settings.md": settings_page,
    "commands.md": commands_page,
    "metrics.md": metrics_page,
    "policy-document.md": policy_document_page,
}


def main(arguments: list[str]) -> int:
    """Write the pages, or with `--check` compare them; the exit status."""
    pages = {name: write() for name, write in PAGES.items()}
    if "--check" in arguments:
        stale = [name for name, text in pages.items() if _committed(name) != text]
        if stale:
            sys.stderr.write(f"not current: {', '.join(f'docs/{name}' for name in stale)}; run `make docs`\n")
        return 1 if stale else 0
    for name, text in pages.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


def _committed(name: str) -> str | None:
    path = FOLDER / name
    return path.read_text(encoding="utf-8") if path.exists() else None


def _sections() -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    heading = "Settings"
    for line in inspect.getsource(Settings).splitlines():
        if comment := re.fullmatch(r"    # (.+)", line):
            heading = comment[1]
        elif (field := re.match(r"    (\w+): ", line)) and field[1] in Settings.model_fields:
            sections.setdefault(heading, []).append(field[1])
    return sections


def _setting_row(name: str, field: FieldInfo) -> str:
    meaning = " ".join(filter(None, [_choices(field), field.description]))
    return f"| `SLUICE_{name.upper()}` | {_default(name, field)} | {_cell(meaning)} |"


def _choices(field: FieldInfo) -> str:
    if get_origin(field.annotation) is not Literal:
        return ""
    return " or ".join(f"`{choice}`" for choice in get_args(field.annotation)) + ":"


def _default(name: str, field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is None or value in ("", (), {}):
        return "unset"
    if isinstance(value, Path):
        return f"`{str(value).replace(str(Path.home()), '~')}`"
    if name.endswith("_bytes"):
        return f"`{value}` ({value // _MIB} MiB)"
    return f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(_sentence(text).replace("|", "\\|").split())


def _sentence(text: str) -> str:
    begun = text[:1].upper() + text[1:] if re.match(r"[a-z]+(?:[ ,;]|:(?!//))", text) else text
    return begun if begun.endswith((".", "`")) or not begun else f"{begun}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
