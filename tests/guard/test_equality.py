"""The engine computes what transformers' own models compute, from the bytes of an image to log probabilities.

`tiny` does not show this: it has neither a grid of tiles nor the published tensor names.
"""

import asyncio
import base64
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from services.guard.checkpoints import resolve_checkpoint
from services.guard.engine import Engine
from services.guard.inference import GuardInference
from tests.support import reference_models
from tests.support.reference_models import draw_fractal

SIZES = [(97, 31), (31, 97), (384, 384), (640, 480), (300, 1500), (984, 1200), (1080, 1920), (2304, 1728)]
"""Small, long and wide; one tile and 31; the most tokens, with and without a reduction of the grid."""
TOLERANCE = 0.003
"""The engine computes in half precision, which alone makes differences of up to 0.001."""


def to_data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.mark.engine
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", reference_models.BUILDERS)
async def test_engine_equals_transformers(tmp_path: Path, name: str) -> None:
    reference = reference_models.BUILDERS[name](tmp_path / "weights")
    row = replace(resolve_checkpoint(name), folder=reference.folder)
    text = row.family.build_example()
    tokens = [reference.tokenizer(letter)["input_ids"][-1] for letter in "SUNYsafe {}"]
    expected: dict[tuple[int, int], torch.Tensor] = {}
    for size in SIZES:
        expected[size] = (await asyncio.to_thread(reference.log_probabilities, text, draw_fractal(*size)))[tokens]
    spread = torch.stack(list(expected.values())).std(0).max()
    assert spread > 10 * TOLERANCE, "the image makes no difference, so the test shows nothing"

    chunks = ("--chunked-prefill-size", "4096")  # prompts are cut inside an image
    engine = Engine(row, state_dir=tmp_path / "state", start_s=600, hang_s=300, engine_flags=chunks)
    async with engine:
        await GuardInference(engine).check()

        async def judge(size: tuple[int, int]) -> torch.Tensor:
            request = {
                "text": text,
                "image_data": to_data_url(draw_fractal(*size)),
                "sampling_params": {"temperature": 0, "max_new_tokens": 1},
                "return_logprob": True,
                "token_ids_logprob": tokens,
            }
            (first, *_) = (await engine.generate(request))["meta_info"]["output_token_ids_logprobs"]
            by_token = {int(token): float(logprob) for logprob, token, *_ in first}
            return torch.tensor([by_token[token] for token in tokens])

        judged = await asyncio.gather(*(judge(size) for size in SIZES))
    differences = {size: float((got - expected[size]).abs().max()) for size, got in zip(SIZES, judged, strict=True)}
    assert max(differences.values()) < TOLERANCE, differences
