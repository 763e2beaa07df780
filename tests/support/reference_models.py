"""Checkpoints with the published configurations, reduced in width and depth only, and transformers' model of each.

The tokenizers have the published ids of the special tokens. Their other tokens are bytes.
"""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

GRID: Final = [[high * 384, wide * 384] for high in range(1, 7) for wide in range(1, 7)]
"""The pinpoints of LLaVA-OneVision."""


@dataclass(frozen=True)
class Reference:
    """A checkpoint for the engine, and the model that it must equal."""

    folder: Path
    model: Any
    tokenizer: PreTrainedTokenizerFast
    image_token: int
    vocabulary: int
    """The rows of the checkpoint's embedding table."""

    def log_probabilities(self, text: str, image: Image.Image) -> torch.Tensor:
        """Of the token that follows the text, over the vocabulary."""
        embeddings = self.embeddings(self.tokenizer(text)["input_ids"], image)
        with torch.no_grad():
            outputs = self.model(inputs_embeds=embeddings[None], logits_to_keep=1)
        return torch.log_softmax(outputs.logits[0, -1, : self.vocabulary], -1)

    def embeddings(self, ids: list[int], image: Image.Image) -> torch.Tensor:
        """What the language model gets for these tokens, with the image in the place of its token."""
        with torch.no_grad():
            if isinstance(self.model, LlavaForConditionalGeneration):
                found = self.model.model.get_image_features(
                    _pad_and_scale(image), vision_feature_layer=-2, vision_feature_select_strategy="default"
                ).pooler_output
            else:
                tiles = LlavaOnevisionImageProcessor(
                    image_grid_pinpoints=GRID, image_mean=[0.5] * 3, image_std=[0.5] * 3
                )(image, return_tensors="pt")
                found = self.model.model.get_image_features(
                    tiles["pixel_values"],
                    tiles["image_sizes"],
                    vision_feature_layer=self.model.config.vision_feature_layer,
                    vision_feature_select_strategy="full",
                    vision_aspect_ratio=self.model.config.vision_aspect_ratio,
                ).pooler_output
            text = self.model.get_input_embeddings()(torch.tensor(ids))
        at = ids.index(self.image_token)
        return torch.cat([text[:at], torch.cat(list(found)).reshape(-1, text.shape[1]), text[at + 1 :]])


def draw_fractal(width: int, height: int) -> Image.Image:
    """Edges and gradients of all sizes below a few ellipses; each size has another image."""
    draw_from = random.Random(width * 10_000 + height)
    image = Image.effect_mandelbrot((width, height), (-2, -1.2, 0.6, 1.2), 60).convert("RGB")
    canvas = ImageDraw.Draw(image)
    for _ in range(8):
        left, top = draw_from.randrange(width), draw_from.randrange(height)
        colour = tuple(draw_from.randrange(256) for _ in range(3))
        canvas.ellipse((left, top, left + width // 3, top + height // 4), fill=colour)
    return image


def _pad_and_scale(image: Image.Image) -> torch.Tensor:
    """As LLaVA-1.5: padded to a square with the mean colour of CLIP's training."""
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in processor.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels: torch.Tensor = processor(square, return_tensors="pt")["pixel_values"]
    return pixels


def _tokenizer(words: int, special: list[str], **named: Any) -> PreTrainedTokenizerFast:
    """Bytes are the first tokens. Fillers give the special tokens the ids from `words` on."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"filler {index}": index for index in range(len(vocabulary), words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if bos := named.get("bos_token"):
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        tokenizer.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights in bfloat16 with which the image changes the answer, and half precision keeps three digits of it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.7 * parameter[0].numel() ** -0.5)
            parameter.copy_(parameter.to(torch.bfloat16))


def _save(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    halves = {name: tensor.detach().to(torch.bfloat16).contiguous().clone() for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})


def _onevision_model(*, tied: bool) -> LlavaOnevisionForConditionalGeneration:
    text = Qwen2Config(
        vocab_size=152064,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=tied,
    )
    tower = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=151646,
        image_grid_pinpoints=GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        tie_word_embeddings=tied,
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    _draw_weights(model, 5)
    return model


def _onevision_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    return _tokenizer(151643, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def onevision(folder: Path) -> Reference:
    """As AIML-TUDA/LlavaGuard-v1.2-7B-OV: LLaVA-NeXT's tensor names, and Google's whole SigLIP beside it."""
    model = _onevision_model(tied=False)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        plain = name.removeprefix("model.")
        if plain.startswith("vision_tower."):
            plain = plain.removeprefix("vision_tower.").removeprefix("vision_model.")
            tensors[f"model.vision_tower.vision_tower.vision_model.{plain}"] = tensor
        elif plain.startswith("multi_modal_projector."):
            number = {"linear_1": 0, "linear_2": 2}[plain.split(".")[1]]
            tensors[f"model.mm_projector.{number}.{plain.split('.')[2]}"] = tensor
        elif plain.startswith("language_model."):
            tensors[f"model.{plain.removeprefix('language_model.')}"] = tensor
        else:
            tensors[name] = tensor
    text = model.config.text_config
    _save(
        folder,
        {
            "architectures": ["LlavaQwenForCausalLM"],
            "model_type": "llava",
            "text_config": {"model_type": "llama"},
            "vocab_size": 152000,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-06,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "eos_token_id": 151645,
            "image_aspect_ratio": "anyres_max_9",
            "image_crop_resolution": None,
            "image_grid_pinpoints": GRID,
            "mm_hidden_size": 64,
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "google/siglip-so400m-patch14-384",
            "use_mm_proj": True,
        },
        tensors,
    )
    tower = folder / "google" / "siglip-so400m-patch14-384"
    whole = SiglipConfig(
        vision_config=model.config.vision_config.to_dict() | {"num_hidden_layers": 4, "vision_use_head": True},
        text_config={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
    )
    SiglipModel(whole).save_pretrained(tower)
    tokenizer = _onevision_tokenizer()
    tokenizer.save_pretrained(folder)
    return Reference(folder, model, tokenizer, 151646, 152064)


def onevision_of_transformers(folder: Path) -> Reference:
    """As AIML-TUDA/LlavaGuard-v1.2-0.5B-OV-hf: transformers' own layout, tied embeddings, the tower inside."""
    model = _onevision_model(tied=True)
    # A cast of the model itself would also round the frequencies of its rotary embedding.
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = _onevision_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(
        '{"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 729}'
    )
    return Reference(folder, model, tokenizer, 151646, 152064)


def llava_1_5(folder: Path) -> Reference:
    """As liuhaotian/llava-v1.5-7b: CLIP as a pickle with old names, no `text_config`, no `image_token_index`."""
    text = LlamaConfig(
        # Transformers needs a row for the token of an image. The checkpoint has none, as those of the trainer.
        vocab_size=32064,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    tower = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        projection_dim=64,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    _draw_weights(model, 6)
    tensors: dict[str, torch.Tensor] = {}
    tower_tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        plain = name.removeprefix("model.")
        if plain.startswith("vision_tower."):
            plain = plain.removeprefix("vision_tower.").removeprefix("vision_model.")
            tower_tensors[f"vision_model.{plain}"] = tensor.detach().to(torch.float16)
        elif plain.startswith("multi_modal_projector."):
            number = {"linear_1": 0, "linear_2": 2}[plain.split(".")[1]]
            tensors[f"model.mm_projector.{number}.{plain.split('.')[2]}"] = tensor
        elif plain.startswith("language_model.embed_tokens"):
            tensors["model.embed_tokens.weight"] = tensor[:32000]
        elif plain.startswith("language_model."):
            tensors[f"model.{plain.removeprefix('language_model.')}"] = tensor
        else:
            tensors[name] = tensor[:32000]  # the head
    _save(
        folder,
        {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "vocab_size": 32000,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rms_norm_eps": text.rms_norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "image_aspect_ratio": "pad",
            "image_grid_pinpoints": None,
            "mm_hidden_size": 64,
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "use_mm_proj": True,
        },
        tensors,
    )
    clip = folder / "openai" / "clip-vit-large-patch14-336"
    clip.mkdir(parents=True)
    document = {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": tower.to_dict()}
    document |= {"text_config": {"hidden_size": 64, "num_attention_heads": 4}, "projection_dim": 64}
    (clip / "config.json").write_text(json.dumps(document, default=str))
    tower_tensors["vision_model.embeddings.position_ids"] = torch.arange(577)[None]
    torch.save(tower_tensors, clip / "pytorch_model.bin")

    # The ids 0 to 2 are bytes here; the prompt has none of them.
    tokenizer = _tokenizer(31999, ["<s>", "<image>", "<pad>"], bos_token="<s>", pad_token="<pad>")
    other = folder / "tokenizer"
    tokenizer.save_pretrained(other)
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    document = processor.to_dict() | {"processor_class": "LlavaProcessor"}
    (other / "preprocessor_config.json").write_text(json.dumps(document, default=str))
    (other / "config.json").write_text('{"model_type": "llava"}')
    (other / "processor_config.json").write_text('{"processor_class": "LlavaProcessor", "patch_size": 14}')
    return Reference(folder, model, tokenizer, 32000, 32000)


BUILDERS: Final[dict[str, Callable[[Path], Reference]]] = {
    "LlavaGuard-v1.2-7B-OV": onevision,
    "LlavaGuard-v1.2-0.5B-OV-hf": onevision_of_transformers,
    "LlavaGuard-v1.1-7B": llava_1_5,
}
"""By the row that the checkpoint stands for."""
