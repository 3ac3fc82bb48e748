"""One image and its sentence taken apart, for the tour: tokens, parsing attention, masks, words, answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vpworkbench.boxes import grid_boxes
from vpworkbench.data.inputs import Pixels, prepare
from vpworkbench.data.objects import noise_on_objects, objects_of_pictures
from vpworkbench.data.records import Picture
from vpworkbench.losses import visual_mask
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.readouts import match_probability
from vpworkbench.model.visual import build_visual
from vpworkbench.model.weights import start_visual
from vpworkbench.probes import masks as mask_probes
from vpworkbench.probes.flow import inter_modality_flow
from vpworkbench.probes.layouts import REGIONS_SIDE, modality_masks, painted
from vpworkbench.settings import PretrainSettings
from vpworkbench.stats import Interval, bootstrap_interval, flatten

LARGEST_LOSS = 0.2
"""Share of its masks on objects that a parser may lose in pre-training without a remark."""


class Example(NamedTuple):
    """One image and one sentence, as arrays. A place is a token of a grid, or a square of the raster of regions."""

    image: np.ndarray  # uint8, (height, width, 3)
    boxes: np.ndarray  # (vision, 4): x0 y0 x1 y1 of each token, as shares of the image
    grid: int  # places per side
    parsing: np.ndarray | None  # (vision, vision): parsing attention, mean over heads, rows sum to 1
    pick: int  # the place that all masks hide first
    masks: dict[str, np.ndarray]  # bool, (place,): "attention" if there is a parsing attention, and "random"
    words: list[str]
    word_attention: np.ndarray  # (word, place): of each word to the visual tokens in the last layer, mean over heads


@torch.no_grad()
def take_apart(model: VisualParsingModel, picture: Picture, settings: PretrainSettings, *, seed: int = 0) -> Example:
    """Every step of the model on one picture and its first sentence."""
    visual = model.settings.visual
    inputs = prepare(model, [picture], [picture.captions[0]])
    seen = model.visual(inputs.forward["images"])
    parsing = None if seen.parsing is None else seen.parsing.mean(dim=1).cpu()
    real = seen.not_padding().cpu()
    objects = objects_of_pictures([picture], visual.grid) if visual.kind.on_grid else real.long()
    noise = noise_on_objects(objects, seed=seed)
    words = inputs.forward["words"][0]
    flow = inter_modality_flow(model, inputs.forward, inputs.vision, inputs.tokens, rows=list(range(len(words))))
    boxes = modality_masks(model, inputs.forward).boxes[0, len(words) :].cpu().masked_fill(~real[0, :, None], torch.nan)
    side = visual.grid if visual.kind.on_grid else REGIONS_SIDE
    picked = boxes[int(noise[0].argmax())]
    column, row = ((picked[:2] + picked[2:]) / 2 * side).long().clamp(max=side - 1).tolist()  # its middle

    def drawn(values: Tensor) -> Tensor:
        return painted(values, boxes.expand(*values.shape, 4), side).flatten(-2)

    def masked(ranked: Tensor | None) -> np.ndarray:
        budget = settings.mask.tokens_of(settings.visual)
        hidden = visual_mask(noise, budget, parsing=ranked, select=settings.mask.select, vision_tokens=real)
        return drawn(hidden[0].float()).numpy() > 0

    return Example(
        image=picture.image.pixels(visual.image_px if visual.kind.pixels else None),
        boxes=boxes[real[0]].numpy(),
        grid=side,
        parsing=None if parsing is None else parsing[0].numpy(),
        pick=row * side + column,
        masks=({} if parsing is None else {"attention": masked(parsing)}) | {"random": masked(None)},
        words=model.tokenizer.convert_ids_to_tokens(words.tolist()),
        word_attention=drawn(flow.rows[0, -1].mean(dim=0)[:, len(words) :].cpu()).numpy(),
    )


@torch.no_grad()
def encoded(visual: nn.Module, pictures: Sequence[Picture]) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Pictures by a visual side that reads pixels, 32 at a time, on the CPU.

    uint8 images (image, 3, height, width), features (image, vision, channel) and parsing attention averaged over heads,
    (image, vision, vision), where the family has one.
    """
    for start in range(0, len(pictures), 32):
        images = Pixels(visual.settings.image_px).stack(pictures[start : start + 32])
        found = visual(images.to(next(visual.parameters()).device))
        parsing = None if found.parsing is None else found.parsing.float().mean(dim=1).cpu()
        yield images, found.features.float().cpu(), parsing


def starting_visual(settings: PretrainSettings) -> nn.Module:
    """The visual side that pre-training started from (`init_visual`)."""
    visual = build_visual(settings.visual)
    start_visual(visual, settings.init_visual, preset=settings.preset)
    return visual.eval()


def mask_shares(visual: nn.Module, pictures: Sequence[Picture]) -> mask_probes.ObjectShares:
    """Share of masks as large as an object that lie on it, on pictures whose objects are known.

    The rules are `rows` and `columns` of the parsing attention, averaged over heads, where the family has one; nearest
    by `features`, `colour` and `position`; and `random`. `objects_of_pictures` says when a token is on an object.
    """
    settings, parts = visual.settings, defaultdict(list)
    if not settings.kind.on_grid:
        raise ValueError(f"visual family {settings.family!r} has no grid: its regions are objects already")
    for images, features, parsing in encoded(visual, pictures):
        if parsing is not None:
            parts["rows"].append(parsing)
            parts["columns"].append(parsing.transpose(1, 2))
        parts["features"].append(mask_probes.nearest_by_features(features))
        parts["colour"].append(mask_probes.nearest_by_colour(images, settings.grid))
    rules = {rule: torch.cat(scores) for rule, scores in parts.items()}
    position = mask_probes.nearest_by_position(grid_boxes(settings.grid, settings.grid))
    rules["position"] = position.expand(len(pictures), *position.shape)
    return mask_probes.shares_on_objects(rules, objects_of_pictures(pictures, settings.grid))


class ParserChange(NamedTuple):
    """Share of masks on objects before and after training, by rule, with intervals over objects (see `mask_shares`).

    Both are empty if no objects of three tokens are known, or the visual side has no grid.
    """

    start: dict[str, Interval]
    end: dict[str, Interval]

    def lost(self) -> dict[str, float]:
        """What the parser lost of its share by each of its own rules, relative to the start; negative: it gained."""
        own = [rule for rule in ("rows", "columns", "features") if rule in self.start]
        return {rule: 1 - self.end[rule].mean / self.start[rule].mean for rule in own}

    def summary(self) -> dict[str, float]:
        """Plain numbers for `summary.json`."""
        own = self.lost()
        shares = {f"objects_{rule}_{time}": found[rule] for time, found in self._asdict().items() for rule in own}
        return flatten(shares)

    def __str__(self) -> str:
        if not self.start:
            return "No objects of three tokens or more are known, or the visual tokens form no grid."
        shares = [f"{rule} {self.start[rule].mean:.0%} -> {self.end[rule].mean:.0%}" for rule in self.lost()]
        lines = [f"Masks on objects, start -> end: {', '.join(shares)} (random {self.end['random'].mean:.0%})."]
        if worst := {rule: share for rule, share in self.lost().items() if share > LARGEST_LOSS}:
            losses = ", ".join(f"{share:.0%} of its share by {rule}" for rule, share in worst.items())
            lines.append(f"Your parser lost {losses}: a lower optim.lr_visual keeps more.")
        return "\n".join(lines)


def parser_change(visual: nn.Module, settings: PretrainSettings, pictures: Sequence[Picture]) -> ParserChange:
    """What pre-training changed in the masks that a visual side makes, on the first 200 pictures with known objects."""
    known = [picture for picture in pictures if picture.has_objects][:200]
    if not known or not settings.visual.kind.on_grid:
        return ParserChange({}, {})
    start = starting_visual(settings).to(next(visual.parameters()).device)
    return ParserChange(*(mask_shares(side.eval(), known).intervals() for side in (start, visual)))


def budget_shares(
    model: VisualParsingModel, pictures: Sequence[Picture], settings: PretrainSettings
) -> mask_probes.BudgetShares:
    """Share of the masks of pre-training on the picked object, beside the largest that their fixed budget allows.

    For families with a parsing attention; see `mask_shares` for a share that does not depend on the sizes of objects.
    """
    objects = objects_of_pictures(pictures, model.settings.visual.grid)
    noise = noise_on_objects(objects, seed=0)
    parsing = torch.cat([parsing for _, _, parsing in encoded(model.visual, pictures)])
    masked = visual_mask(noise, settings.mask.tokens_of(settings.visual), parsing=parsing, select=settings.mask.select)
    return mask_probes.shares_at_budget(masked, noise.argmax(dim=1), objects)


@torch.no_grad()
def mask_errors(
    model: VisualParsingModel, pictures: Sequence[Picture], settings: PretrainSettings, *, seed: int = 0
) -> dict[str, Interval]:
    """Squared error of MFR (paper Eq. 9) at the hidden tokens, mean over them and channels, with the first caption.

    `attention` and `random` are masks of these modes around the same picks; `difference` is the first minus the second,
    paired by picture. Empty for families without a parsing attention.
    """
    if not model.settings.visual.kind.parsing:
        return {}
    noise = noise_on_objects(objects_of_pictures(pictures, model.settings.visual.grid), seed=seed)
    budget, found = settings.mask.tokens_of(settings.visual), []
    for rows in torch.arange(len(pictures)).split(32):
        some = [pictures[row] for row in rows.tolist()]
        forward = prepare(model, some, [picture.captions[0] for picture in some]).forward
        visual = model.visual(forward["images"])
        words = {name: forward[name] for name in ("words", "word_tokens")}
        means = []
        for parsing in (visual.parsing.mean(dim=1), None):
            picked = noise[rows].to(model.device)
            hidden = visual_mask(picked, budget, parsing=parsing, select=settings.mask.select)
            guessed = model.mfr(model.fuse(visual, **words, masked=hidden).vision)
            errors = (guessed - visual.features).square().mean(dim=-1)
            means.append((errors * hidden).sum(dim=1) / hidden.sum(dim=1))
        found.append(torch.stack(means).cpu())
    attention, random = torch.cat(found, dim=1).double().numpy()
    each = {"attention": attention, "random": random, "difference": attention - random}
    return {name: bootstrap_interval(values, seed) for name, values in each.items()}


def answers(model: VisualParsingModel, picture: Picture, others: Sequence[Picture]) -> pd.DataFrame:
    """True and false texts about one image, each with the match probability that the model gives it."""
    false = [text for other in others for text in other.captions if picture.denies(text)]
    texts = [*picture.captions[:3], *false[:3]]
    match = match_probability(model, prepare(model, [picture] * len(texts), texts)).numpy().round(3)
    return pd.DataFrame({"text": texts, "true": [text in picture.captions for text in texts], "match": match})
