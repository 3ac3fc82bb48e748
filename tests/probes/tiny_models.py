"""Tiny random models of every family that the documentation names, with padded inputs of two examples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers as hf
from probes.any_config import CODES
from probes.any_model import build
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from vpworkbench.boxes import grid_boxes

IMAGE = 90  # id of an image place
WIDE = 0.5  # range of the initial weights: near-uniform attention would hide mistakes
TEXT = dict(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=WIDE,
    pad_token_id=0,
)
VIT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=8
)


class Numbers:
    """A tokenizer whose words are the ids."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {number}" for number in ids)


class Family(NamedTuple):
    """A tiny model of a family, its inputs, and the boxes of its first image's tokens."""

    model: nn.Module
    inputs: dict[str, Any]
    boxes: torch.Tensor | None = None


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def padded(count: int, words: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of two examples: a word, `count` image places, words; the second padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 80, (2, count + words), generator=generator)
    ids[0, 1 : 1 + count] = ids[1, 3 : 3 + count] = IMAGE
    ids[1, :2] = 0
    return ids, (ids != 0).long()


def llava() -> Family:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    ids, mask = padded(9)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 24, 24)}
    return Family(hf.LlavaForConditionalGeneration(config), inputs, grid_boxes(3, 3))


def vipllava() -> Family:
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, 0],
    )
    ids, mask = padded(9)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 24, 24)}
    return Family(hf.VipLlavaForConditionalGeneration(config), inputs, grid_boxes(3, 3))


def paligemma() -> Family:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VIT, projection_dim=32),
        text_config=hf.GemmaConfig(**TEXT),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    ids, mask = padded(9)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels(2, 3, 24, 24),
        "token_type_ids": torch.zeros_like(ids),
    }
    return Family(hf.PaliGemmaForConditionalGeneration(config), inputs, grid_boxes(3, 3))


def qwen(kind: str) -> Family:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10_000.0}
    shared = dict(image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
    vision = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
    text = dict(TEXT, rope_parameters=rope)
    text.pop("head_dim")
    if kind == "qwen2_vl":
        config = hf.Qwen2VLConfig(vision_config=dict(vision, embed_dim=16, hidden_size=32), text_config=text, **shared)
        model = hf.Qwen2VLForConditionalGeneration
    elif kind == "qwen2_5_vl":
        tower = dict(
            vision, hidden_size=16, intermediate_size=32, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]
        )
        config = hf.Qwen2_5_VLConfig(vision_config=tower, text_config=text, **shared)
        model = hf.Qwen2_5_VLForConditionalGeneration
    else:
        tower = dict(
            vision,
            hidden_size=16,
            intermediate_size=32,
            out_hidden_size=32,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        )
        config = hf.Qwen3VLConfig(vision_config=tower, text_config=dict(text, head_dim=8), **shared)
        model = hf.Qwen3VLForConditionalGeneration
    ids = torch.tensor([[5, 92, *[IMAGE] * 6, 93, 6, 7, 8], [0, 0, 5, 92, *[IMAGE] * 4, 93, 6, 7, 8]])
    grids = torch.tensor([[1, 4, 6], [1, 4, 4]])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixels(24 + 16, 3 * 2 * 4 * 4),
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    return Family(model(config), inputs, grid_boxes(2, 3))


def idefics3(kind: str) -> Family:
    tower = dict(VIT, image_size=16, patch_size=4)
    if kind == "smolvlm":
        config = hf.SmolVLMConfig(
            vision_config=tower, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
        )
        model = hf.SmolVLMForConditionalGeneration
    else:
        config = hf.Idefics3Config(
            vision_config=tower, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
        )
        model = hf.Idefics3ForConditionalGeneration
    tile, around, line = [IMAGE] * 4, 80, 85  # 2 x 2 tokens a tile; 81... name rows and columns, 79 the whole

    def tiles(*names: int) -> list[int]:
        return [token for name in names for token in (around, name, *tile)]

    split = [*tiles(81, 82, 83), line, *tiles(86, 87, 88), line, line, *tiles(79), around]
    single = [*tiles(79), around]
    first = [5, *split, 6, 7]
    second = [5, *single, 6, *single, 8]
    ids = torch.tensor([first, [0] * (len(first) - len(second)) + second])
    images = pixels(2, 7, 3, 16, 16)
    images[1, 2:] = 0  # the processor's padding: no images
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": images}
    parts = [grid_boxes(2, 2, tuple(box.tolist())) for box in grid_boxes(2, 3)]
    return Family(model(config), inputs, torch.cat([*parts, grid_boxes(2, 2)]))


def internvl() -> Family:
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**dict(VIT, image_size=(16, 16), patch_size=(4, 4))),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    ids, mask = padded(4)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 16, 16)}
    return Family(hf.InternVLForConditionalGeneration(config), inputs, grid_boxes(2, 2))


def gemma3() -> Family:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = hf.Gemma3TextConfig(**TEXT, sliding_window=6, layer_types=kinds)
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**dict(VIT, image_size=32)),
        text_config=text,
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=91,
        eoi_token_index=92,
    )
    ids, mask = padded(4, words=8)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels(2, 3, 32, 32),
        "token_type_ids": (ids == IMAGE).long(),
    }
    return Family(hf.Gemma3ForConditionalGeneration(config), inputs, grid_boxes(2, 2))


def chameleon() -> Family:
    names = {"<image>": IMAGE} | {f"IMGIMG{chr(65 + i)}Z": 60 + i for i in range(10)}
    codes = CODES | dict(num_embeddings=10, resolution=8)
    config = hf.ChameleonConfig(**TEXT, vq_config=codes, vocabulary_map=names)
    ids, mask = padded(4)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 8, 8)}
    return Family(hf.ChameleonForConditionalGeneration(config), inputs, grid_boxes(2, 2))


ENCODER = {
    key: TEXT[key]
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "initializer_range",
        "num_hidden_layers",
    )
}


def words(right: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 80, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7 - right :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def vilt() -> Family:
    model = hf.ViltModel(hf.ViltConfig(**ENCODER, image_size=24, patch_size=8, max_image_length=-1))
    mask = torch.ones(2, 24, 24, dtype=torch.long)
    mask[1, :, 16:] = 0  # the second image is narrower
    return Family(model, words() | {"pixel_values": pixels(2, 3, 24, 24), "pixel_mask": mask})


def visual_bert() -> Family:
    model = hf.VisualBertModel(hf.VisualBertConfig(**ENCODER, visual_embedding_dim=12))
    mask = torch.ones(2, 5)
    mask[0, 4:] = 0
    return Family(model, words() | {"visual_embeds": pixels(2, 5, 12), "visual_attention_mask": mask})


def flava() -> Family:
    own = dict(ENCODER, num_hidden_layers=2)
    config = hf.FlavaConfig(
        text_config=own,
        image_config=dict(own, image_size=16, patch_size=8),
        multimodal_config=dict(ENCODER),
        hidden_size=32,
        projection_dim=32,
        initializer_range=WIDE,
    )
    boxes = torch.cat([grid_boxes(1, 1), grid_boxes(2, 2)])
    return Family(hf.FlavaModel(config), words() | {"pixel_values": pixels(2, 3, 16, 16)}, boxes)


def lxmert() -> Family:
    config = hf.LxmertConfig(
        **{key: value for key, value in ENCODER.items() if key != "num_hidden_layers"},
        l_layers=1,
        x_layers=2,
        r_layers=1,
        visual_feat_dim=12,
    )
    boxes = pixels(2, 5, 4).sort(dim=-1).values[..., [0, 1, 2, 3]]
    mask = torch.ones(2, 5)
    mask[0, 4:] = 0
    inputs = words() | {"visual_feats": pixels(2, 5, 12), "visual_pos": boxes, "visual_attention_mask": mask}
    return Family(hf.LxmertModel(config), inputs, boxes[0])


def bridgetower() -> Family:
    text = dict(ENCODER, num_hidden_layers=3, max_position_embeddings=40, hidden_size=64, initializer_factor=20)
    config = hf.BridgeTowerConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=48,
        initializer_factor=20,
        text_config=text,
        vision_config=dict(hidden_size=64, num_hidden_layers=3, patch_size=8, image_size=16),
    )
    boxes = torch.cat([grid_boxes(1, 1), grid_boxes(2, 2)])
    return Family(hf.BridgeTowerModel(config), words() | {"pixel_values": pixels(2, 3, 16, 16)}, boxes)


FAMILIES = {
    "llava": llava,
    "vipllava": vipllava,
    "paligemma": paligemma,
    "qwen2_vl": lambda: qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: qwen("qwen3_vl"),
    "idefics3": lambda: idefics3("idefics3"),
    "smolvlm": lambda: idefics3("smolvlm"),
    "internvl": internvl,
    "gemma3": gemma3,
    "chameleon": chameleon,
    "vilt": vilt,
    "visual_bert": visual_bert,
    "flava": flava,
    "lxmert": lxmert,
    "bridgetower": bridgetower,
    "florence2": lambda: Family(*build("florence2"), torch.cat([grid_boxes(1, 1), grid_boxes(4, 4)])),
    "git": lambda: Family(*build("git"), torch.cat([grid_boxes(1, 1), grid_boxes(4, 4)])),
}


def llava_with_processor(question: str) -> tuple[nn.Module, hf.LlavaProcessor]:
    """A tiny LLaVA with words for its tokens, and a chat template."""
    torch.manual_seed(0)
    words = ["<pad>", "<unk>", "<eos>", "<image>", *question.split(), "a", "red", "ball", "user", "bot"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<image>"], **special)
    images = hf.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    template = (
        "{% for message in messages %}user {% for part in message.content %}"
        "{% if part.type == 'image' %}<image> - {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}bot {% endif %}"
    )
    counts = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaProcessor(images, fast, image_token="<image>", chat_template=template, **counts)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VIT),
        text_config=hf.LlamaConfig(**TEXT | dict(vocab_size=len(words), eos_token_id=2)),
        image_token_index=3,
        vision_feature_layer=-1,
    )
    return hf.LlavaForConditionalGeneration(config).eval(), processor
