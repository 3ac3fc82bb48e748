"""What is in a model: its configurations, its decoder, and what would make a forward random."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PretrainedConfig


def attention_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Every transformers config in `model` and its parts, nested ones too, once each."""
    from transformers import PretrainedConfig

    found: dict[int, PretrainedConfig] = {}
    waiting = [value for module in model.modules() for value in vars(module).values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, PretrainedConfig) and id(value) not in found:
            found[id(value)] = value
            waiting.extend(vars(value).values())
    return list(found.values())


def config_of(model: nn.Module) -> PretrainedConfig | None:
    """The configuration of a model, also inside a wrapper (DataParallel, torch.compile, PEFT); None if it has none."""
    from transformers import PretrainedConfig

    found = (vars(module).get("config") for module in model.modules())
    return next((config for config in found if isinstance(config, PretrainedConfig)), None)


def tower_config(model: nn.Module) -> type[PretrainedConfig] | None:
    """The class of the vision tower's configuration, where the text model has another."""
    config = config_of(model)
    tower, text = type(getattr(config, "vision_config", None)), config and type(config.get_text_config())
    return None if tower in (type(None), dict, text) else tower


def decoder_of(model: nn.Module) -> str | None:
    """Name of the part of a model that is its decoder: a vision tower may run on as many tokens."""
    owner = next((part for part in model.modules() if hasattr(part, "get_decoder")), None)
    decoder = None if owner is None else owner.get_decoder()
    return next((name for name, part in model.named_modules() if part is decoder), "") or None


def refuse_randomness(model: nn.Module) -> None:
    """Raise where dropout is active, or where a forward would update running statistics."""
    for name, module in model.named_modules():
        rate = getattr(module, "p", 0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0
        rate = rate or getattr(module, "drop_prob", 0) or 0  # timm's stochastic depth
        if module.training and rate:
            raise ValueError(f"dropout is left on in {name} (rate {rate}): call model.eval() first")
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name} would update its statistics: call model.eval() first")
