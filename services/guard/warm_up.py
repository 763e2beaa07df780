"""The requests with which a server proves that it can judge: before it is ready, and while it runs."""

import base64
from collections.abc import Mapping
from typing import Any, Final

from services.core.probe_image import draw_probe_image
from services.guard.checkpoints import Checkpoint

_PROBE_PRIORITY: Final = 3
"""Above that of every submission."""
_ANSWER_TOKENS: Final = 32

Request = Mapping[str, Any]


def build_probe(checkpoint: Checkpoint) -> Request:
    """One token about one small image. The server finds the image in its cache after the first probe.

    A text without an image would not do: SGLang's Gemma 3 cannot prefill it together with images on a GPU.
    """
    return {
        "text": checkpoint.family.build_example(),
        "image_data": _data_url(draw_probe_image()),
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "priority": _PROBE_PRIORITY,
    }


def build_first_verdict(checkpoint: Checkpoint) -> Request:
    """An answer with all that verdicts use (grammar, log probabilities), so that its kernels are compiled."""
    return _build_verdict(checkpoint, draw_probe_image(number=1))


def build_large_images(checkpoint: Checkpoint, count: int) -> list[Request]:
    """Verdicts about different images of the largest size, to run at the same time.

    A GPU with too little memory fails on them at the start, not on a submission.
    """
    width = checkpoint.max_side_px
    return [
        _build_verdict(checkpoint, draw_probe_image(width, 3 * width // 4, number=number))
        for number in range(2, count + 2)
    ]


def _build_verdict(checkpoint: Checkpoint, jpeg: bytes) -> Request:
    grammar = checkpoint.family.build_example_grammar()
    sampling = {"temperature": 0, "max_new_tokens": _ANSWER_TOKENS} | ({} if grammar is None else {"ebnf": grammar})
    return {
        "text": checkpoint.family.build_example(),
        "image_data": _data_url(jpeg),
        "sampling_params": sampling,
        "return_logprob": True,
        "token_ids_logprob": [0, 1],
    }


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
