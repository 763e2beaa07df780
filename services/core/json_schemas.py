"""Exports the JSON Schemas of the three messages, for clients in other languages."""

import json
from pathlib import Path
from typing import Any, Final

from pydantic.json_schema import JsonSchemaMode

from services.core.messages import DeadLetter, Submission, Verdict
from services.core.values import WireModel

MESSAGES: Final[dict[str, type[WireModel]]] = {"submission": Submission, "verdict": Verdict, "dead-letter": DeadLetter}


def build_schema(message: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of `submission` (as it is read), `verdict` or `dead-letter` (as they are written)."""
    mode: JsonSchemaMode = "validation" if message == "submission" else "serialization"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | MESSAGES[message].model_json_schema(mode=mode)


def export_schemas(folder: Path) -> list[Path]:
    """Write `<message>.schema.json` for each message and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for message in MESSAGES:
        file = folder / f"{message}.schema.json"
        file.write_text(json.dumps(build_schema(message), indent=2) + "\n", encoding="utf-8")
        files.append(file)
    return files
