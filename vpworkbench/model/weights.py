"""Starts: trained weights for the visual side and for the fusion; every start reports what became of each key.

`published` finds and reads the weights; a name of timm or of the hub is the only thing that is ever downloaded.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import BertConfig, BertModel

from vpworkbench.errors import CheckpointError, SettingsError, first_line
from vpworkbench.model.fusion import Fusion
from vpworkbench.model.published import fitted_by_timm, published, read_weights, without_nan
from vpworkbench.model.words import bert_folder
from vpworkbench.settings import VisualSettings

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parents[1] / "shipped"
BERT_SIZES = {  # settings of the fusion that must be the BERT's
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "positions": "max_position_embeddings",
}


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

    `source` empty: nothing is loaded, None is returned. `scenes`: the weights that ship for this preset, trained on
    scene labels (notebook 09_visual_init). `imagenet`: those of timm for the network that the settings build. Otherwise
    a name, a file or a folder, see `published`. A `CheckpointError` or `SettingsError` if there are no such weights, or
    they fit half of the network or less.
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
    else:
        source = imagenet_name(visual.settings) if source == "imagenet" else source
        tensors = without_nan(published(source), source)
    report = _load_visual(visual, tensors, source)
    _check_coverage(report)
    if any(isinstance(module, _BatchNorm) for module in visual.modules()):
        visual.settings = visual.settings.model_copy(update={"frozen_norm": True})
    return report


def imagenet_name(settings: VisualSettings) -> str:
    """The name of timm that `imagenet` means; `SettingsError` if timm has no such network."""
    name = settings.kind.imagenet(settings) if settings.kind.imagenet else ""
    if not name:
        raise SettingsError(
            f"init_visual: no 'imagenet' weights for this {settings.family!r}: timm has Swins of the sizes of presets "
            "ablation-224 and paper-384, CNNs (visual.backbone) and ViTs (visual.vit)"
        )
    return name


def start_text(fusion: Fusion, source: str) -> KeyReport | None:
    """Load the embeddings and the first L layers of a BERT into an L-layer fusion.

    `source` is `bert` (bert-base-uncased), OWNER/NAME on the hub, `minilm` (the installed package) or a folder in the
    layout of Hugging Face; empty: nothing is loaded, None is returned. A `CheckpointError` if the BERT has other sizes,
    lacks tensors, or cannot be read.
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
    fitted, resized = fitted_by_timm(inside or tensors, network, source)
    if not inside:
        return load_into(network, fitted, source, resized)
    whole = tensors | {f"network.{name}": value for name, value in fitted.items()}  # as scene labels trained it
    return load_into(visual, whole, source, {f"network.{name}" for name in resized})


def _check_coverage(report: KeyReport) -> None:
    """Warn if a part of the network stays random; refuse weights that fit half of it or less."""
    needless = re.compile(r"^dictionary\.|\.num_batches_tracked$")  # tensors that no start needs to have
    missing = [name for name in report.missing if not needless.search(name)]
    fitting = [name for name in report.matched + report.resized if not needless.search(name)]
    if missing:
        message = (
            f"{report.source}: {len(missing)} of {len(fitting) + len(missing)} tensors of the visual side are missing "
            f"({', '.join(missing[:3])}): weights of another network? Set visual.backbone to theirs (for Swin "
            "visual.width, visual.depths and visual.heads; for vit visual.vit; for patches visual.stride), or start "
            "from scratch with init_visual=''"
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


def digest(module: nn.Module, *more: str) -> str:
    """A hash of a module's weights and buffers, and of `more`."""
    key = hashlib.sha256("".join(more).encode())
    for name, tensor in module.state_dict().items():
        key.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return key.hexdigest()
