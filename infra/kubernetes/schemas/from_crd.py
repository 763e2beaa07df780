"""Convert KubeRay's CustomResourceDefinition of RayService to the JSON Schema beside this file; see README.md.

The schema is as strict as `kubeconform -strict`: an unknown field is an error. The API server would silently drop it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

_TEMPLATE = "template"


def strict(node: Any) -> Any:
    """The schema without descriptions and Kubernetes' own keywords, and without further properties."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    open_ended = node.get("x-kubernetes-preserve-unknown-fields", False)
    integer_or_text = node.get("x-kubernetes-int-or-string", False)
    kept = {
        key: strict(value)
        for key, value in node.items()
        if not key.startswith("x-kubernetes-") and not (key == "description" and isinstance(value, str))
    }
    if integer_or_text:
        kept.pop("type", None)
        kept["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in kept and "additionalProperties" not in kept and not open_ended:
        kept["additionalProperties"] = False
    return kept


def with_one_template(schema: dict[str, Any]) -> dict[str, Any]:
    """Define the schema of a pod template once; head and workers refer to it."""
    cluster = schema["properties"]["spec"]["properties"]["rayClusterConfig"]["properties"]
    head, worker = cluster["headGroupSpec"]["properties"], cluster["workerGroupSpecs"]["items"]["properties"]
    template = head[_TEMPLATE]
    if worker[_TEMPLATE] == template:
        head[_TEMPLATE] = worker[_TEMPLATE] = {"$ref": f"#/$defs/{_TEMPLATE}"}
        schema["$defs"] = {_TEMPLATE: template}
    return schema


def main() -> None:
    definition = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    (version,) = (each for each in definition["spec"]["versions"] if each["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    for metadata in (schema["properties"], schema["properties"]["spec"]["properties"]):
        if "metadata" in metadata:
            metadata["metadata"] = {"type": "object"}
    json.dump(with_one_template(schema), sys.stdout, indent=None, separators=(",", ":"), sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
