"""SGLang's LLaVA gives its language model what transformers' model gives to its own, from the bytes of an image on.

This runs SGLang's code for loading weights, tiles and tokens without a server. `test_equality` runs the whole engine.
"""

from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.models.llava import LlavaBaseForCausalLM
from sglang.srt.multimodal.mm_utils import expand2square, process_anyres_image
from sglang.srt.utils.hf_transformers_utils import get_config, get_processor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from services.guard.checkpoint_staging import stage
from services.guard.checkpoints import resolve_checkpoint
from tests.support import reference_models
from tests.support.reference_models import draw_fractal

SIZES = [(97, 31), (384, 384), (640, 480), (300, 1500), (984, 1200), (2304, 1728)]
MODE = SimpleNamespace(is_extend=lambda: True, is_decode=lambda: False)


class Language(torch.nn.Module):
    """In place of the language model: it has the embeddings, and returns what it is given."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        if "unpad" in getattr(config, "mm_patch_merge_type", ""):
            self.model.image_newline = torch.nn.Parameter(torch.empty(config.hidden_size))

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name == "model.embed_tokens.weight":
                self.model.embed_tokens.weight.data.copy_(tensor)

    def forward(self, *_: Any, input_embeds: torch.Tensor) -> torch.Tensor:
        return input_embeds


class Llava(LlavaBaseForCausalLM):
    """SGLang's LLaVA with that language model."""

    def __init__(self, config: Any, folder: Path) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = None
        config.vision_config.hidden_size = config.mm_hidden_size
        config.text_config.hidden_size = config.hidden_size
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = Language(config)
        self.load_weights(_read_weights(folder))
        self.float()

    def embed(self, ids: list[int], image: Image.Image, processor: Any) -> torch.Tensor:
        ratio = self.config.image_aspect_ratio
        if "anyres" in ratio:
            pixels = np.asarray(process_anyres_image(image, processor, self.config.image_grid_pinpoints))
        else:
            background = tuple(int(255 * mean) for mean in processor.image_mean)
            pixels = processor(expand2square(image, background), return_tensors="np")["pixel_values"][0]
        item = SimpleNamespace(
            feature=pixels.astype(np.float32),
            image_sizes=[image.size],
            modality=Modality.IMAGE,
            model_specific_data={"image_aspect_ratio": ratio},
            pad_value=self.config.vocab_size - 1,
            is_image=lambda: True,
            is_video=lambda: False,
        )
        inputs = SimpleNamespace(mm_items=[item])
        padded = torch.tensor(self.pad_input_ids(array("q", ids), inputs))
        batch = SimpleNamespace(
            mm_inputs=[inputs],
            forward_mode=MODE,
            batch_size=1,
            extend_start_loc=torch.tensor([0]),
            extend_seq_lens=torch.tensor([len(padded)]),
            extend_prefix_lens_cpu=[0],
        )
        embedded: torch.Tensor = self.forward(padded, torch.arange(len(padded)), batch)
        return embedded


def _read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", reference_models.BUILDERS)
def test_embeddings_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    reference = reference_models.BUILDERS[name](tmp_path / "weights")
    row = replace(resolve_checkpoint(name), folder=reference.folder)
    staged = stage(row, tmp_path / "state")
    config = get_config(str(staged.folder), trust_remote_code=False)
    processor = get_processor(str(staged.tokenizer or staged.folder), trust_remote_code=False).image_processor
    engine = Llava(config, staged.folder)
    ids = reference.tokenizer(row.family.build_example())["input_ids"]
    for size in SIZES:
        expected = reference.embeddings(ids, draw_fractal(*size))
        with torch.no_grad():
            got = engine.embed(ids, draw_fractal(*size), processor)
        assert got.shape == expected.shape, f"{size}: other tokens"
        # Both compute in single precision. Pillow and torchvision scale to within one of 256 levels.
        difference = (got - expected).abs().max() / expected.std()
        assert difference < 0.01, f"{size}: {difference}"
