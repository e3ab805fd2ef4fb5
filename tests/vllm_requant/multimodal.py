"""Small random models that see images, as the hub's files have them, with processors; for every entry of MULTIMODAL."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from requant.models import auto_class
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, ProcessorMixin

from tests.configurations import KEYS_AS_VALUES, linear_attention
from tests.vllm_requant.checkpoints import randomize

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
FIXTURE = Path(__file__).parents[1] / "fixtures/micro-llama-en"
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2112,
    "max_position_embeddings": 256,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 320,
    "norm_topk_prob": True,  # which vLLM asks for, and the hub's files say
}
SIDE = {"height": 28, "width": 28}
NEWLINES = {f"newline_{n}": "\n" * n for n in range(1, 5)}  # which vLLM's Gemma 3 looks for

Made = tuple[dict[str, Any], ProcessorMixin]


def image(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8))


def make(kind: str, folder: Path) -> Path:
    """A model with a processor; what stands for an image in its prompts is ``PLACEHOLDERS[kind]``."""
    config, processor = _MAKERS[kind](kind)
    model = auto_class(AutoConfig.for_model(kind)).from_config(
        AutoConfig.for_model(kind, **config), dtype=torch.bfloat16
    )
    randomize(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    if kind in ("gemma3", "llava"):  # which the hub's files, and vLLM, have under one more name than transformers
        tensors = load_file(folder / "model.safetensors")
        named = {name.replace("vision_tower.", "vision_tower.vision_model."): one for name, one in tensors.items()}
        save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder


def _tokenizer(**special: str) -> tuple[PreTrainedTokenizerFast, Callable[[str], int]]:
    """The fixture's, with further tokens, and what finds their numbers."""
    fixture = AutoTokenizer.from_pretrained(FIXTURE)
    end = dict.fromkeys(("bos_token", "eos_token", "pad_token"), fixture.eos_token)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fixture._tokenizer, extra_special_tokens=special, **end)
    return tokenizer, tokenizer.convert_tokens_to_ids


def _with_tower(text_type: str, tower_type: str, **more: Any) -> dict[str, Any]:
    text, tower = TEXT | {"model_type": text_type}, TOWER | {"model_type": tower_type}
    return {"text_config": text, "vision_config": tower, "tie_word_embeddings": False} | more


def _gemma3(kind: str) -> Made:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer, number = _tokenizer(**names, **NEWLINES)
    tokens = {"boi_token_index": number("<start_of_image>"), "eoi_token_index": number("<end_of_image>")}
    tokens |= {"image_token_index": number("<image_soft_token>"), "mm_tokens_per_image": 1}
    config = {"text_config": TEXT, "vision_config": TOWER, "tie_word_embeddings": True} | tokens
    images = transformers.Gemma3ImageProcessor(size=SIDE)
    return config, transformers.Gemma3Processor(images, tokenizer, image_seq_length=1)


def _gemma4(kind: str) -> Made:
    names = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    names |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    tokenizer, number = _tokenizer(**names, video_token="<|video|>")
    tokens = {"image_token_id": number("<|image|>"), "video_token_id": number("<|video|>")}
    tokens |= {
        "boi_token_id": number("<|image>"),
        "eoi_token_id": number("<image|>"),
        "audio_token_id": number("<|audio|>"),
    }
    tower = TOWER | {"patch_size": 16, "head_dim": 32, "num_key_value_heads": 2, "position_embedding_size": 64}
    tower["default_output_length"] = 70  # which vLLM asks for, and the hub's files say
    config = {
        "text_config": TEXT | KEYS_AS_VALUES,
        "vision_config": tower,
        "audio_config": None,
        "tie_word_embeddings": True,
    } | tokens
    images = transformers.Gemma4ImageProcessor(max_soft_tokens=70)
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        images,
        tokenizer,
        transformers.Gemma4VideoProcessor(),
        image_seq_length=70,
    )
    return config, processor


def _qwen_vl(kind: str) -> Made:
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer, number = _tokenizer(**names, start="<|vision_start|>", end="<|vision_end|>")
    tokens = {"image_token_id": number("<|image_pad|>"), "video_token_id": number("<|video_pad|>")}
    tokens |= {"vision_start_token_id": number("<|vision_start|>"), "vision_end_token_id": number("<|vision_end|>")}
    text: dict[str, Any] = {}
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    tower: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 14}
    if kind == "qwen2_vl":
        tower |= {"embed_dim": 64, "hidden_size": 192, "mlp_ratio": 2}
    else:
        tower |= {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 192}
    if kind == "qwen2_5_vl":
        tower["fullatt_block_indexes"] = [1]
    if kind.startswith("qwen3"):
        tower["num_position_embeddings"] = 16
        rope["mrope_interleaved"] = True
    if kind.startswith("qwen3_vl"):
        tower["deepstack_visual_indexes"] = [0]
    if kind.startswith("qwen3_5"):
        text |= linear_attention(64) | {"shared_expert_intermediate_size": 192}  # which misleads vLLM in others
        rope["partial_rotary_factor"] = 1.0
    if kind.endswith("_moe"):
        text |= EXPERTS
    config = {"text_config": TEXT | text | {"rope_parameters": rope}, "vision_config": tower}
    config["tie_word_embeddings"] = False
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 112}
    patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    processor, videos = {
        "qwen2_vl": (transformers.Qwen2VLProcessor, transformers.Qwen2VLVideoProcessor),
        "qwen2_5_vl": (transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor),
    }.get(kind, (transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor))
    images = transformers.Qwen2VLImageProcessor(**patches)
    return config | tokens, processor(images, tokenizer, videos(**patches))


def _mistral3(kind: str) -> Made:
    names = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    tokenizer, number = _tokenizer(**names)
    config = _with_tower("mistral", "pixtral", image_token_index=number("[IMG]"))
    config["vision_config"] |= {"image_size": 56, "head_dim": 32}
    images = transformers.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14)
    return config, transformers.PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=2)


def _llava(kind: str) -> Made:
    tokenizer, number = _tokenizer(image_token="<image>")
    config = _with_tower("llama", "clip_vision_model", image_token_index=number("<image>"))
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SIDE)
    more = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, transformers.LlavaProcessor(images, tokenizer, **more)


def _internvl(kind: str) -> Made:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer, number = _tokenizer(**names, video_token="<video>")
    config = _with_tower("qwen3", "internvl_vision", image_token_id=number("<IMG_CONTEXT>"))
    config["vision_config"] |= {"image_size": [28, 28], "patch_size": [14, 14]}
    images = transformers.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=False)
    videos = transformers.InternVLVideoProcessor(size=SIDE)
    return config, transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=1)


_MAKERS: dict[str, Callable[[str], Made]] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    **dict.fromkeys(QWEN, _qwen_vl),
    "mistral3": _mistral3,
    "llava": _llava,
    "internvl": _internvl,
}
PLACEHOLDERS = {
    "gemma3": "<start_of_image>",
    "gemma4": "<|image|>",
    **dict.fromkeys(QWEN, "<|vision_start|><|image_pad|><|vision_end|>"),
    "mistral3": "[IMG]",
    "llava": "<image>",
    "internvl": "<IMG_CONTEXT>",
}
