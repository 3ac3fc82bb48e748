"""The configuration of any image-text class of the installed transformers, shrunk to a tiny one.

It is the default one of the class: every size is shrunk by the name of its setting. `EDITS` lists what that gets wrong.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

# Llama 4's forward asks its text model for this field, and fails without it.
transformers.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None

WIDTH, VOCABULARY, FIRST_SPECIAL = 64, 160, 60
SIDE = 32  # of an image in pixels; a patch has 8

CLASSES: dict[str, str] = {
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "blip-vqa": modeling_auto.MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES["blip"],
    "phi4_multimodal": "Phi4MultimodalForCausalLM",
    "mistral4": "Mistral3ForConditionalGeneration",  # transformers lists the text model alone
}
"""`model_type` -> class. Those whose attention is outside the interface, or has two streams, are in `tiny_models`."""

CONFIGS = {"blip-vqa": "blip", "mistral4": "mistral3"}
"""Where the configuration has another name."""
TEXT_MODELS = {"mistral4": "mistral4"}
"""Where the text model is not the one of the default configuration."""

SIZES: dict[str, int | float] = (
    dict.fromkeys(
        "hidden_size d_model embed_dim embedding_dim encoder_hidden_size decoder_hidden_size projection_dim hidden_dim "
        "out_hidden_size text_hidden_size projector_hidden_size word_embed_proj_dim output_dim vision_output_dim "
        "projection_hidden_dim image_text_hidden_size n_embd dim adapter_out_dim projector_input_dim "
        "vision_hidden_size projector_output_dim projection_hidden_size patch_embed_hidden_size share_expert_dim "
        "hc_lowrank adapter_in_dim adapter_input_size codebook_dim".split(),
        WIDTH,
    )
    | dict.fromkeys(
        "intermediate_size moe_intermediate_size ffn_dim mlp_dim d_ff encoder_ffn_dim decoder_ffn_dim moe_latent_size "
        "shared_expert_intermediate_size intermediate_size_mlp moe_shared_expert_intermediate_size".split(),
        48,
    )
    | dict.fromkeys(
        "num_attention_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "n_routed_experts swa_num_attention_heads num_sliding_attention_heads num_local_experts num_experts "
        "moe_num_experts "
        "linear_num_value_heads linear_num_heads num_query_tokens mm_tokens_per_image mamba_num_heads "
        "num_hidden_layers num_layers pooling_kernel_size".split(),
        4,
    )
    | dict.fromkeys(
        "num_key_value_heads swa_num_key_value_heads num_global_key_value_heads depth layers encoder_layers "
        "decoder_layers num_experts_per_tok moe_topk top_k_experts moe_k index_n_heads linear_num_key_heads "
        "temporal_patch_size spatial_merge_size pooling_kernel_size heads_per_ngram ngram_size".split(),
        2,
    )
    | dict.fromkeys("head_dim d_kv global_head_dim qk_head_dim v_head_dim swa_head_dim index_head_dim".split(), 16)
    | dict.fromkeys("kv_lora_rank q_lora_rank ssm_state_size window_size mamba_head_dim".split(), 16)
    | dict.fromkeys("qk_nope_head_dim qk_rope_head_dim linear_key_head_dim linear_value_head_dim".split(), 8)
    | dict.fromkeys("linear_head_dim hidden_size_per_layer_input laurel_rank patch_size pos_emb_height".split(), 8)
    | dict.fromkeys("pos_emb_width".split(), 8)
    | dict.fromkeys("n_group topk_group n_groups first_k_dense_replace pretraining_tp".split(), 1)
    | dict.fromkeys(
        "attention_dropout dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob activation_dropout "
        "dropout_rate drop_path_rate layerdrop router_jitter_noise num_nextn_predict_layers num_kv_shared_layers "
        "projector_dropout".split(),
        0,
    )
    | dict(vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, max_position_embeddings=2048)
    | dict(image_size=SIDE, num_position_embeddings=64, layer_norm_eps=1e-6, position_embedding_size=64)
)
"""What a setting of this name becomes."""

_SPECIAL = re.compile(r"(token_id|token_index|_id|_index)$")
_LAYERS = ("num_hidden_layers", "num_layers", "depth", "layers")
_TOWER = re.compile("vision|vq|audio|tower|perceiver|qformer|sam|encoder_config|image_config")
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
MROPE = {"text_config.rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}}
CODES = dict(
    num_embeddings=20,
    embed_dim=8,
    latent_channels=8,
    base_channels=32,
    resolution=16,
    num_res_blocks=1,
    channel_multiplier=[1, 1, 1],
    double_latent=False,
)
REMOVED = object()
PINPOINTS = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
NO_LAYER_CONFIG = {"text_config.per_layer_config": REMOVED}

GEMMA_TOWER = dict(
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    patch_size=8,
    position_embedding_size=64,
    pooling_kernel_size=2,
)
PERCEPTION = dict(
    embed_dim=WIDTH,
    img_size=[SIDE, SIDE],
    depth=2,
    global_pool="",
    use_post_transformer_norm=False,
    init_values=0.1,
    ref_feat_shape=[4, 4],
    patch_size=8,
    num_heads=4,
)
FAST_VIT = dict(layers=[1] * 5, embed_dims=[16, 16, 32, 32, 32], inference_mode=True)
MOBILE_NET = dict(channel_multiplier=0.05, msfa_output_resolution=4)
DAVIT = dict(
    depths=[1, 1],
    patch_size=[4, 2],
    patch_stride=[4, 2],
    patch_padding=[0, 0],
    patch_prenorm=[False, True],
    embed_dim=[32, WIDTH],
    num_heads=[4, 4],
    num_groups=[4, 4],
)
INTERNVL = {"vision_config.image_size": [SIDE, SIDE], "vision_config.patch_size": [8, 8]}
CHAMELEON_WORDS = {f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 100 + i for i in range(20)} | {"<image>": 149}
EMU_WORDS = {f"<|visual token {i:06}|>": 100 + i for i in range(20)} | {"<image>": 149, "<|extra_200|>": 148}
NAMED = {"image_token_id": 149}
OMNI = MROPE | {"vision_start_token_id": 148}

EDITS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "image_token_id": 149,
        "vision_config": CODES | {"codebook_size": 20, "attn_resolutions": []},
        "text_config.rope_parameters": ROPE,
        "image_token_offset": 100,
        "audio_token_offset": 120,
        "audio_config.codebook_size": 20,
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}, "vision_config.image_size": SIDE},
    "blip-2": NAMED,
    "chameleon": NAMED | {"vq_config": CODES, "vocabulary_map": CHAMELEON_WORDS},
    "cohere2_vision": {"downsample_factor": 2, "alignment_intermediate_size": 64},
    "cohere_compass": {
        "text_config.rope_parameters": dict.fromkeys(
            ("full_attention", "sliding_attention"), ROPE | {"mrope_section": [4, 2, 2]}
        )
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"] * 2,
        "text_config.num_experts_per_tok": 2,
        "vision_config.sam_config.downsample_channels": [64, 64],
    },
    "deepseek_vl_hybrid": {"high_res_vision_config.global_attn_indexes": [0, 1]},
    "diffusion_gemma": NO_LAYER_CONFIG
    | {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 48,
        "canvas_length": 4,
        "vision_config": GEMMA_TOWER | {"model_type": "gemma4_vision"},
    },
    "dots3_note": {
        "text_config.per_layer_config": {},
        "text_config.num_key_value_heads": 4,
        "text_config.index_topk": 4,
        "vision_config.per_layer_config": {},
    },
    "emu3": NAMED
    | {
        "vocabulary_map": EMU_WORDS,
        "vq_config.codebook_size": 20,
        "vq_config.base_channels": 64,
        "vq_config.num_res_blocks": 1,
        "vq_config.channel_multiplier": [1, 1],
    },
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": ROPE | {"mrope_section": [2, 2, 4]},
        "text_config.moe_intermediate_size": [48, 48],
    },
    "fast_vlm": {"vision_config.model_args": FAST_VIT},
    "florence2": {f"vision_config.{name}": value for name, value in DAVIT.items()},
    "fuyu": {"patch_size": 8},
    "gemma3n": {
        "vision_config.model_args": MOBILE_NET,
        "vision_config.hidden_size": 2048,
        "vision_config.vocab_offset": 150,
        "audio_config.vocab_offset": 155,
        "vision_soft_tokens_per_image": 16,
    },
    "gemma4": NO_LAYER_CONFIG | {"vision_config": GEMMA_TOWER | {"model_type": "gemma4_vision"}},
    "gemma4_unified": NO_LAYER_CONFIG
    | {"vision_config": {"patch_size": 8, "pooling_kernel_size": 2, "mm_embed_dim": WIDTH, "output_proj_dims": WIDTH}},
    "glm4v_moe": {"text_config.rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm5_next": {"text_config.num_key_value_heads": 4, "text_config.qk_rope_head_dim": 0},
    "granite4_vision": PINPOINTS
    | {"downsample_rate": "2/4", "deepstack_layer_map": [[1, 0]], "spatial_target_layers": [1]},
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters": ROPE | {"mrope_section": [2, 2, 2, 2]}},
    "hy_v4_vl": {"text_config.rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "inkling2": {"text_config.unpadded_vocab_size": VOCABULARY},
    "inkling2_loop": {"text_config.unpadded_vocab_size": VOCABULARY},
    "inkling_mm_model": {"vision_config.n_layers": 2},
    "instructblip": NAMED,
    "instructblipvideo": {"video_token_id": 149},
    "internvl": INTERNVL,
    "kimi_k25": {"text_config.head_dim": 8, "text_config.num_key_value_heads": 4},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4, "vision_config.num_attention_heads": 4},
    "llama4": {"vision_config.intermediate_size": 256, "vision_config.projector_input_dim": 64},
    "llava_next": PINPOINTS,
    "llava_next_video": PINPOINTS,
    "llava_onevision": PINPOINTS,
    "minicpm_ocr": NAMED,
    "minicpmv4_6": NAMED,
    "minicpmv4_7": NAMED,
    "minimax_m3_vl": {"text_config.index_topk_blocks": 1, "text_config.index_block_size": 4},
    "mistral_large4": {"text_config.num_key_value_heads": 4, "text_config.head_dim": 16, "text_config.index_topk": 4},
    "mllama": {
        "vision_config.intermediate_layers_indices": [0, 1],
        "vision_config.vision_output_dim": 3 * WIDTH,
        "vision_config.num_global_layers": 1,
        "text_config.cross_attention_layers": [1, 3],
    },
    "mistral4": {"text_config.num_key_value_heads": 4},
    "molmo2": {
        "adapter_config.vision_feature_layer": [1, 0],
        "vision_config.image_size": [SIDE, SIDE],
        "vision_config.num_position_embeddings": 16,
        "text_config.rope_scaling_layers": [0],
    },
    "muse_spark": {"out_hidden_size": 4 * WIDTH},
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH},
    "nemotron_h_omni": NAMED,
    "perception_lm": {
        "vision_config.architecture": "vit_pe_core_large_patch14_336",
        "vision_config.model_args": PERCEPTION,
        "vision_config.do_pooling": False,
    },
    "phi4_multimodal": {"vision_config.crop_size": SIDE},
    "pi0": {"vlm_config.image_token_id": 149},
    "qianfan_ocr": INTERNVL,
    "qwen2_5_omni_thinker": OMNI,
    "qwen3_omni_moe_thinker": OMNI,
    "qwen4_exp": {
        "text_config.indexer_budget": 8,
        "text_config.indexer_compress_ratio": 2,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_n_heads": 2,
        "text_config.rope_parameters": ROPE | {"mrope_section": [4, 2, 2]},
        "text_config.ngram_vocab_size_base": 100,
    },
    "step3p7": {"text_config.sliding_window": 8},
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [64, 64], "text_config.num_key_value_heads": 4},
    "vipllava": {"vision_feature_layers": [-1, 0]},
} | dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glmga", "glm_ocr", "paddleocr_vl"), MROPE)
"""`model_type` -> settings by path that shrinking by name gets wrong."""


def tiny_config(kind: str) -> PretrainedConfig:
    """The default configuration of a model type, shrunk and edited."""
    config = AutoConfig.for_model(CONFIGS.get(kind, kind))
    settings = config.to_dict()
    if kind in TEXT_MODELS:
        settings["text_config"] = AutoConfig.for_model(TEXT_MODELS[kind]).to_dict()
    settings = _shrunk(settings, {}, "")
    for path, value in EDITS.get(kind, {}).items():
        *parents, last = path.split(".")
        node = settings
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is REMOVED:
            node.pop(last, None)
        else:
            node[last] = value
    return type(config).from_dict(settings)


def _shrunk(settings: Mapping[str, Any], ids: dict[int, int], path: str) -> dict[str, Any]:
    """`ids` are the new numbers of special tokens: one number stays one number."""
    layers = next((settings[name] for name in _LAYERS if isinstance(settings.get(name), int)), 0)
    kept = 2 if _TOWER.search(path) else 4
    small: dict[str, Any] = {}
    for name, value in settings.items():
        if name in ("transformers_version", "id2label", "label2id", "architectures", "dtype"):
            continue
        name = str(name)
        if isinstance(value, dict):
            rope = name.startswith("rope")
            small[name] = _rope(value) if rope else _shrunk(value, ids, f"{path}.{name}")
        elif name == "eos_token_id":
            small[name] = 1
        elif isinstance(value, bool) or not isinstance(value, int | float | list | tuple):
            small[name] = value
        elif isinstance(value, int) and _SPECIAL.search(name):
            small[name] = value if value < FIRST_SPECIAL else ids.setdefault(value, 150 - len(ids))
        elif name in _LAYERS:
            small[name] = kept
        elif name in SIZES and not isinstance(value, list | tuple):
            small[name] = type(value)(SIZES[name])  # some settings insist on a float
        elif isinstance(value, list | tuple) and layers and len(value) == layers:
            kinds = {str(kind): kind for kind in value}  # each kind of layer once, then again
            small[name] = (list(kinds.values())[:kept] * kept)[:kept]
        else:
            small[name] = value
    return small


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    rope = copy.deepcopy(dict(settings))
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if "mrope_section" in part:
            part["mrope_section"] = [4, 2, 2]
    return rope
