"""Checks the gateway of a running service: with OpenAI's client, and with the API of Sluice."""

import base64
import json
from typing import Any

import httpx
import jsonschema
import openai

from pipelines.tiny_guard.drawings import draw
from services.core.values import CATEGORIES

VIOLENCE = CATEGORIES[1]


def check_gateway(settings: dict[str, str], verdict_schema: dict[str, Any]) -> None:
    """Judge images by the URL and the key in .sluice/env."""
    url, key = settings["SLUICE_GATEWAY_URL"], settings["SLUICE_API_KEY"]
    violent, harmless = draw(4711, VIOLENCE).jpeg, draw(4712).jpeg

    def part(data: bytes) -> dict[str, object]:
        return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"}}

    with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        answer = client.moderations.create(model="any", input=[part(violent), part(harmless)])
        assert [result.flagged for result in answer.results] == [True, False]
        first = answer.results[0].model_dump()
        assert (first["category"], first["categories"][VIOLENCE]) == (VIOLENCE, True)
        assert first["category_scores"][VIOLENCE] == first["score"] > 0.5
    assert json.dumps(first)
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        assert client.get("/readyz").status_code == 200
        assessed = client.post("/v1/assessments?wait=60", files={"file": ("a.jpg", violent)})
        jsonschema.validate(assessed.json(), verdict_schema)
        assert (assessed.json()["action"], assessed.json()["category"]) == ("block", VIOLENCE)
        later = client.post("/v1/assessments", json={"uri": "s3://uploads/nothing.jpg"})
        assert later.status_code == 202
        failed = client.get(later.headers["location"], params={"wait": 60})
        assert (failed.status_code, failed.json()["type"]) == (422, "urn:sluice:problem:image-not-found")
