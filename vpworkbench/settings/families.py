"""The visual families as values: what settings must know of one before its network is imported.

A fifth takes one class and one line: `FAMILIES["mine"] = Family(MyClass, step=lambda visual: visual.stride)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Family:
    """One way from an image to visual tokens.

    Attributes
    ----------
    network : class or str
        Called with the `VisualSettings`, gives a module that maps a batch of images to `VisualTokens`, with these as
        `settings` and `width`, the channels of a token; as `module:class` it is imported where a model is built, not
        where settings are read.
    step : callable or None
        Pixels from one token to the next, by the settings; None for tokens on no grid: they are `visual.regions` at
        most, and come with boxes, which the fusion embeds and the explorer draws (0 0 1 1 for one without a place).
    pixels : bool
        Whether it reads images, and then gives as many tokens of each; else the features of `visual.region_files`.
    parsing : bool
        Whether its tokens come with a parsing attention, which attention masks need.
    dictionary : bool
        Whether it can put the codes of a visual dictionary (`visual.dictionary`) in the place of its tokens.
    """

    network: Callable[[Any], Any] | str
    step: Callable[[Any], int] | None
    pixels: bool = True
    parsing: bool = False
    dictionary: bool = False

    @property
    def on_grid(self) -> bool:
        """Whether its tokens are the squares of an image."""
        return self.step is not None

    def build(self, settings: Any) -> Any:
        """The network with random weights; nothing is fetched."""
        if isinstance(self.network, str):
            module, name = self.network.split(":")
            return getattr(import_module(module), name)(settings)
        return self.network(settings)


FAMILIES: dict[str, Family] = {
    "swin": Family(
        "vpworkbench.model.swin:SwinParser",
        step=lambda visual: visual.patch_px * 2 ** (len(visual.depths) - 1),
        parsing=True,
    ),
    "grid": Family("vpworkbench.model.grid:GridFeatures", step=lambda visual: visual.stride, dictionary=True),
    "patch": Family("vpworkbench.model.visual:PatchProjection", step=lambda visual: visual.stride),
    "regions": Family("vpworkbench.model.visual:RegionFeatures", step=None, pixels=False),
}
