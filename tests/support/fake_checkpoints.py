"""Checkpoints with random weights in architectures that are not in the repository: a few megabytes each."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

_TOWER_PX = 56


def _tokenizer(special: list[str], **named: Any) -> PreTrainedTokenizerFast:
    """A token for each byte, and the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def _save(folder: Path, config: Any, tensors: dict[str, torch.Tensor], documents: dict[str, dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    document = config.to_dict() | documents.pop("config.json", {})
    (folder / "config.json").write_text(json.dumps(document, indent=2, default=str))
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    # Tied weights are in the file once.
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )


def shieldgemma(folder: Path) -> Path:
    """As google/shieldgemma-2-4b-it is laid out: Gemma 3 in a wrapper, with a processor that writes prompts itself."""
    torch.manual_seed(1)
    tokens = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    image = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer(
        [*tokens, *image.values()],
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=image,
    )
    text = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "sliding_window": 1024,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": _TOWER_PX,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        old = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
        if "vision_model" not in old:
            old = old.replace("vision_tower.", "vision_tower.vision_model.", 1)
        tensors[f"model.{old}"] = tensor
    image_processor = {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "ShieldGemma2Processor",
        "size": {"height": _TOWER_PX, "width": _TOWER_PX},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_seq_length": 4,
    }
    _save(
        folder,
        config,
        tensors,
        {
            "config.json": {"architectures": ["ShieldGemma2ForImageClassification"], "model_type": "shieldgemma2"},
            "preprocessor_config.json": image_processor,
            "processor_config.json": {"processor_class": "ShieldGemma2Processor", "image_seq_length": 4},
        },
    )
    tokenizer.save_pretrained(folder)
    return folder


def qwenguard(folder: Path) -> Path:
    """Qwen2.5-VL, as QwenGuard is."""
    torch.manual_seed(2)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    image = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(
        [*special, *image],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in [*special, *image]}
    text = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "window_size": 112,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)
        tensors[old] = tensor
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 3136,
        "max_pixels": 100352,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    _save(
        folder,
        config,
        tensors,
        {
            "config.json": {"architectures": ["Qwen2_5_VLForConditionalGeneration"]},
            "preprocessor_config.json": image_processor,
        },
    )
    tokenizer.save_pretrained(folder)
    return folder


def llavaguard_1(folder: Path) -> Path:
    """LLaVA-1.5 as LlavaGuard v1.0 and v1.1 are: a CLIP tower beside it, and a tokenizer from elsewhere."""
    torch.manual_seed(3)
    tokenizer = _tokenizer(["<s>", "</s>", "<pad>", "<image>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    width, tower_width = 64, 32
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=width,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.convert_tokens_to_ids("<s>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("</s>"),
    )
    tensors = dict(LlamaForCausalLM(config).state_dict())
    tensors |= {
        "model.mm_projector.0.weight": torch.randn(width, tower_width),
        "model.mm_projector.0.bias": torch.zeros(width),
        "model.mm_projector.2.weight": torch.randn(width, width),
        "model.mm_projector.2.bias": torch.zeros(width),
    }
    llava = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "image_aspect_ratio": "pad",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "mm_hidden_size": tower_width,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "clip-made-up",
    }
    _save(folder, config, tensors, {"config.json": llava})
    tower = CLIPVisionConfig(
        hidden_size=tower_width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_TOWER_PX,
        patch_size=14,
    )
    CLIPVisionModel(tower).save_pretrained(folder / "clip-made-up")
    tokenizer.save_pretrained(folder / "tokenizer")
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": _TOWER_PX},
        "crop_size": {"height": _TOWER_PX, "width": _TOWER_PX},
    }
    processor = {"processor_class": "LlavaProcessor", "patch_size": 14, "vision_feature_select_strategy": "default"}
    (folder / "tokenizer" / "preprocessor_config.json").write_text(json.dumps(image_processor))
    (folder / "tokenizer" / "processor_config.json").write_text(json.dumps(processor))
    return folder
