"""Any image-text class of the installed transformers, tiny and random, with inputs on which it runs.

The pixels are made as the forward's signature asks; `PIXELS` lists what that does not find out.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from probes.any_config import CLASSES, SIDE, WIDTH, tiny_config
from torch import Tensor, nn

GRIDS = ((1, 4, 4), (1, 4, 6))  # frames, rows, columns of patches of the two examples' images


def pixels(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def _number(config: Any, *names: str, default: int) -> int:
    found = next(
        (value for name in names if isinstance(value := getattr(config, name, None), int | list | tuple)), default
    )
    return found if isinstance(found, int) else found[0]


def pixel_inputs(model: nn.Module) -> list[dict[str, Tensor]]:
    """Pixels that the signature of the forward allows, likely ones first; two images."""
    kind = getattr(model.config, "model_type", "")
    if kind in PIXELS:
        return [PIXELS[kind](model)]
    asked = inspect.signature(model.forward).parameters
    tower = getattr(model.config, "vision_config", None) or getattr(model.config, "vq_config", None) or model.config
    side, patch = _number(tower, "image_size", "resolution", default=SIDE), _number(tower, "patch_size", default=8)
    found = []
    if "image_grid_thw" in asked:
        grid, count = torch.tensor(GRIDS), sum(rows * columns for _, rows, columns in GRIDS)
        shapes = [(3 * frames * patch * patch,) for frames in (1, 2)] + [(3, patch, patch), (patch, patch, 3)]
        found = [{"pixel_values": pixels(count, *shape), "image_grid_thw": grid} for shape in shapes]
    sizes = torch.tensor([[side, side], [side, side]])
    if "image_sizes" in asked:
        found += [{"pixel_values": pixels(2, 3, 3, side, side), "image_sizes": sizes * torch.tensor([1, 2])}]
        found += [{"pixel_values": pixels(2, 3, side, side), "image_sizes": sizes}]
    shapes = [(2, 3, side, side), (2, 1, 3, side, side)]
    return found + [{"pixel_values": pixels(*shape)} for shape in shapes if "pixel_values" in asked]


def _minicpm(model: nn.Module) -> dict[str, Tensor]:
    return {"pixel_values": pixels(1, 3, 8, 8 * 64), "target_sizes": torch.tensor([[4, 8], [8, 4]])}


def _positions() -> Tensor:
    """x, y of 4 x 4 patches, of two images."""
    return torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1).expand(2, -1, -1)


def _blocks(model: nn.Module) -> dict[str, Tensor]:
    """Blocks of 2 x 2 patches, channels last."""
    return {"pixel_values": pixels(40, 16, 16, 3), "image_grid_thw": torch.tensor(GRIDS)}


PIXELS: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "blip-2": lambda model: {"pixel_values": pixels(2, 3, SIDE, SIDE)},
    "deepseek_vl_hybrid": lambda model: {
        "pixel_values": pixels(2, 3, SIDE, SIDE),
        "high_res_pixel_values": pixels(2, 3, SIDE, SIDE),
    },
    "fast_vlm": lambda model: {"pixel_values": pixels(2, 3, 128, 128)},
    "fuyu": lambda model: {"pixel_values": pixels(2, 16, 192)},
    "gemma4": lambda model: {"pixel_values": pixels(2, 16, 192), "image_position_ids": _positions()},
    "gemma4_unified": lambda model: {"pixel_values": pixels(2, 16, 768), "image_position_ids": _positions()},
    "diffusion_gemma": lambda model: {
        "pixel_values": pixels(2, 16, 192),
        "image_position_ids": _positions(),
        "decoder_input_ids": torch.full((2, 4), 70),
    },
    "granite_docling": lambda model: {
        "pixel_values": pixels(2, 2, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(2, 2, dtype=torch.bool),
    },
    "idefics": lambda model: {
        "pixel_values": pixels(2, 1, 3, SIDE, SIDE),
        "image_attention_mask": torch.ones(2, 12, 1, dtype=torch.long),
    },
    "inkling2": _blocks,
    "inkling2_loop": _blocks,
    "inkling_mm_model": lambda model: {"pixel_values": pixels(32, 2, 8, 8, 3)},
    "instructblip": lambda model: {
        "pixel_values": pixels(2, 3, SIDE, SIDE),
        "qformer_input_ids": torch.ones(2, 3, dtype=torch.long),
    },
    "instructblipvideo": lambda model: {
        "pixel_values": pixels(2, 2, 3, SIDE, SIDE),
        "qformer_input_ids": torch.ones(2, 3, dtype=torch.long),
    },
    "kosmos-2": lambda model: {
        "pixel_values": pixels(2, 3, SIDE, SIDE),
        "image_embeds_position_mask": torch.stack(
            [torch.arange(12).sub(start).div(4).floor() == 0 for start in (1, 2)]
        ),
    },
    "kosmos-2.5": lambda model: {
        "flattened_patches": torch.cat([_positions() + 1, pixels(2, 16, 64)], dim=-1),
        "width": torch.full((2,), 4),
        "height": torch.full((2,), 4),
        "image_embeds_position_mask": torch.stack(
            [torch.arange(12).sub(start).div(4).floor() == 0 for start in (1, 2)]
        ),
    },
    "lfm2_vl": lambda model: {
        "pixel_values": pixels(2, 24, 192),
        "pixel_attention_mask": torch.arange(24)[None] < torch.tensor([[16], [24]]),
        "spatial_shapes": torch.tensor([[4, 4], [4, 6]]),
    },
    "minicpm_ocr": _minicpm,
    "minicpmv4_6": _minicpm,
    "minicpmv4_7": _minicpm,
    "mllama": lambda model: {
        "pixel_values": pixels(2, 1, 4, 3, SIDE, SIDE),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]).expand(2, -1, -1),
    },
    "molmo2": lambda model: {
        "pixel_values": pixels(2, 16, 192),
        "image_token_pooling": torch.arange(32).view(2, 2, 2, 2, 2).transpose(2, 3).reshape(8, 4),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * 2),
    },
    "nemotron_h_omni": lambda model: {
        "pixel_values": pixels(40, 192),
        "image_grid_hw": torch.tensor([grid[1:] for grid in GRIDS]),
    },
    "paddleocr_vl": lambda model: {"pixel_values": pixels(40, 3, 8, 8), "image_grid_thw": torch.tensor(GRIDS)},
    "phi4_multimodal": lambda model: {
        "image_pixel_values": pixels(2, 2, 3, SIDE, SIDE),
        "image_sizes": torch.tensor([[SIDE, SIDE]] * 2),
        "image_attention_mask": torch.ones(2, 2, 4, 4),
    },
    "pi0": lambda model: {
        "pixel_values": pixels(2, 1, 3, SIDE, SIDE),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "state": pixels(2, 32),
        "noise": pixels(2, 50, 32),
        "timestep": pixels(2),
    },
    "t5gemma2": lambda model: {"pixel_values": pixels(2, 3, SIDE, SIDE), "decoder_input_ids": torch.full((2, 3), 70)},
    "video_llama_3": lambda model: {
        "pixel_values": pixels(40, 192),
        "image_grid_thw": torch.tensor(GRIDS),
        "image_merge_sizes": torch.tensor([2, 2]),
    },
}
"""`model_type` -> pixels of two images, where the signature does not say enough."""


def image_id(config: Any) -> int | None:
    """The id of an image token."""
    for part in (config, *(getattr(config, f"{name}_config", None) for name in ("text", "vision", "vlm"))):
        for name in ("image_token_id", "image_token_index", "image_patch_id", "video_token_index"):
            if isinstance(getattr(part, name, None), int):
                return getattr(part, name)
    return None


COUNTS = {"pi0": (16, 16)}
"""Tokens of the two images, where a forward runs on any number."""


def text_inputs(model: nn.Module, counts: tuple[int, int], words: int = 6) -> dict[str, Tensor]:
    """A word, `counts` image tokens, words, in two examples; the second is padded on the left."""
    image, length = image_id(model.config), max(counts) + words + 2
    ids = torch.randint(70, 100, (2, length), generator=torch.Generator().manual_seed(5))
    first = length - counts[1] - words
    ids[1, : first - 1] = 0
    if image is not None:
        ids[0, 1 : 1 + counts[0]] = ids[1, first : first + counts[1]] = image
    asked = inspect.signature(model.forward).parameters
    kinds = {"mm_token_type_ids": torch.int, "moe_mm_token_type_ids": torch.int, "token_type_ids": torch.long}
    marks = {name: (ids == image).to(dtype) for name, dtype in kinds.items() if name in asked and image is not None}
    return {"input_ids": ids, "attention_mask": (ids != 0).long()} | marks


_MISMATCH = re.compile(
    r"tokens:? (?P<tokens>\d+),? .*?features:? (?P<features>\d+)"
    r"|Got (?P<features_1>\d+) feature vectors for (?P<tokens_1>\d+)"
    r"|value tensor of shape \[(?P<features_2>\d+), \d+\] cannot .* shape \[(?P<tokens_2>\d+),"
)


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Inputs on which the forward runs; the model's own complaint says how many tokens an image has."""
    faults = []
    for of_pixels in pixel_inputs(model):
        counts = COUNTS.get(model.config.model_type, (4, 4))
        for _ in range(3):
            inputs = text_inputs(model, counts) | of_pixels
            try:
                with torch.no_grad():
                    model(**inputs)
                return inputs
            except Exception as fault:  # noqa: BLE001
                said = _MISMATCH.search(str(fault))
                faults.append(f"{type(fault).__name__} {str(fault)[-160:]}")
            if not said:
                break
            found = {name[0]: int(number) for name, number in said.groupdict().items() if number}
            given, features = found["t"], found["f"]  # both may count numbers rather than tokens
            features //= WIDTH if given == features else max(1, given // max(1, sum(counts)))
            counts = _counts(features, of_pixels)
    raise RuntimeError(" | ".join(faults))


def _counts(features: int, of_pixels: Mapping[str, Tensor]) -> tuple[int, int]:
    """Tokens of the two images, perhaps with separators at the ends of rows and images."""
    if "image_grid_thw" in of_pixels:
        for at_row, at_image in ((0, 0), (1, 0), (1, 1), (1, 2)):
            counts = tuple(rows // 2 * (columns // 2 + at_row) + at_image for _, rows, columns in GRIDS)
            if sum(counts) == features:
                return counts
    shares = (
        [rows * columns for _, rows, columns in GRIDS]
        if sum(grid[1] * grid[2] for grid in GRIDS) in (len(part) for part in of_pixels.values())
        or "spatial_shapes" in of_pixels
        else [1, 1]
    )
    return tuple(features * share // sum(shares) for share in shares)


def build(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in evaluation mode, and its inputs."""
    model = build_model(kind)
    return model, inputs_of(model)


def build_model(kind: str) -> nn.Module:
    """The model in evaluation mode."""
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[kind])(tiny_config(kind)).eval()
    widen(model)
    return model


def widen(model: nn.Module, scale: float = 0.3) -> None:
    """Larger projections than a default start: near-uniform attention would hide mistakes."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and re.search(r"(q|k|qkv|query|key|q_b|kv_b|c_attn)[a-z_]*(proj)?\.weight$", name):
            parameter.data.normal_(0, scale)
        elif parameter.ndim == 4 and "timm" in name:  # a long chain of convolutions would shrink the image to nothing
            nn.init.kaiming_normal_(parameter)
        elif parameter.ndim > 1 and parameter.abs().max() < 1e-4:  # towers that start at zero, or at 1e-10 as in SAM
            parameter.data.normal_(0, scale)
