"""The joint objective of pre-training (paper Sec. 3.3), and the batches it is computed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vpworkbench import losses
from vpworkbench.boxes import grid_boxes
from vpworkbench.data.batches import Batch, GroupBatches, Guide
from vpworkbench.data.inputs import VisualInput, visual_input
from vpworkbench.data.records import Picture
from vpworkbench.model.model import Joint, VisualParsingModel
from vpworkbench.model.visual import VisualTokens
from vpworkbench.probes.masks import mask_scores
from vpworkbench.settings import DataSettings, PretrainSettings


def group_batches(
    pictures: Sequence[Picture],
    model: VisualParsingModel,
    data: DataSettings,
    *,
    images: int,
    seed: int,
    inputs: VisualInput | None = None,
    guide: Guide | None = None,
) -> GroupBatches:
    """Batches of images and their texts, as a model takes them; a `guide` for `mask.source` and mode `object`."""
    visual = model.settings.visual
    options = {"images": images, "inputs": inputs or visual_input(visual), "seed": seed, "guide": guide}
    return GroupBatches(pictures, model.words, data, vision=visual.tokens, **options)


class Pretraining(losses.Objective):
    """MLM + lambda1 (ITM + 0.1 VLA) + lambda2 MFR, all from one forward (paper Eq. 10); MVM for MFR as in SOHO; MRC.

    `probe` gives held-out numbers of a model, such as `evaluate.held_out_probe`.
    """

    def __init__(
        self, settings: PretrainSettings, probe: Callable[[nn.Module], dict[str, float]] | None = None
    ) -> None:
        self.settings, self._probe = settings, probe
        loss = settings.loss
        vla = loss.itm * loss.vla
        of_images = {"mfr": loss.mfr, "mvm": loss.mvm, "mrc": loss.mrc}
        self.weights: Mapping[str, float] = {"mlm": 1.0, "itm": loss.itm, "vla": vla} | of_images
        self.budget = settings.mask.tokens_of(settings.visual)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden words of matched pairs; pairs; matched pairs."""
        pairs, matched = len(batch.matched), int(batch.matched.sum())
        return {"mlm": len(batch.scored[0]), "itm": pairs, "vla": pairs} | dict.fromkeys(("mfr", "mvm", "mrc"), matched)

    def losses(self, model: VisualParsingModel, batch: Batch) -> dict[str, Tensor]:
        """Sum of each loss over a batch; an image is encoded once for all its texts.

        With masks in the pixels it is encoded twice: whole for the masks and the target of MFR, masked for the fusion.
        """
        mask = self.settings.mask
        in_pixels = mask.mode != "none" and mask.where == "pixels"
        if in_pixels:
            with torch.no_grad():
                visual = model.visual(batch.images)
        else:
            visual = model.encode(batch.images)
            if self.settings.visual.sampled and model.training:
                visual = visual.subset(self.sampled(batch))
        masked = self.masked(visual, batch)
        shown = model.visual(losses.hide_pixels(batch.images, masked[_first_texts(batch)])) if in_pixels else visual
        options = {"image_index": batch.image_index, "masked": masked, "causal": self.causal(batch)}
        joint = model.fuse(shown, batch.words, batch.word_tokens, **options)
        hidden_words = model.word_logits(joint.text[batch.scored])
        sums = {"mlm": losses.masked_language_modeling(hidden_words, batch.labels[batch.scored])}
        if self.weights["itm"]:
            sums["itm"] = losses.image_text_matching(model.itm(joint.cls), batch.matched)
        if self.weights["vla"]:
            sums["vla"] = losses.token_alignment(word_distance(model, joint, batch), batch.matched)
        classified = "mvm" if mask.mode == "code" else "mrc"
        if masked is not None and self.weights[classified]:
            rows = batch.matched_rows
            codes = visual.codes[batch.image_index[rows]]
            sums[classified] = losses.masked_visual_modeling(model.mvm(joint.vision[rows]), codes, masked[rows])
        if mask.hides_k and self.weights["mfr"]:
            sums["mfr"] = self._regression(model, joint, visual, masked, batch)
        return sums

    def _regression(
        self, model: VisualParsingModel, joint: Joint, visual: VisualTokens, masked: Tensor, batch: Batch
    ) -> Tensor:
        """MFR of matched pairs; `masked` is bool (text, vision)."""
        rows = batch.matched_rows[:, None]
        # Each row hides k tokens: their positions, in order, without asking a GPU how many there are.
        hidden = masked[batch.matched_rows].byte().topk(self.budget, dim=1).indices.sort(dim=1).values
        target = visual.features[batch.image_index[rows], hidden].flatten(0, 1)
        predicted = model.mfr(joint.vision[rows, hidden].flatten(0, 1))
        if visual.tokens is not None:  # an image of few regions hides fewer than k; the rest gets no error
            predicted = torch.where(masked[rows, hidden].flatten()[:, None], predicted, target.to(predicted))
        return losses.masked_feature_regression(predicted, target, reduction=self.settings.loss.mfr_reduction)

    def causal(self, batch: Batch) -> Tensor | None:
        """Texts whose words see no later words, bool (text,): the share `loss.seq2seq`; None if there are none.

        Unified VLP draws whole batches. Here the later digits of a pair's noise decide, so that batches can be split.
        """
        share = self.settings.loss.seq2seq
        return (batch.noise[:, 0] * 997) % 1 < share if share else None

    def sampled(self, batch: Batch) -> Tensor:
        """Positions of the tokens that are kept in training (`visual.sampled`), in order; int64 (image, sampled).

        They are those of the largest noise of each image's first text. Their order by noise, which decides its mask,
        is as random as that of all tokens.
        """
        return batch.noise[_first_texts(batch)].topk(self.settings.visual.sampled, dim=1).indices.sort(dim=1).values

    def masked(self, visual: VisualTokens, batch: Batch) -> Tensor | None:
        """Visual tokens to hide, bool (text, vision), in matched and unmatched pairs alike; None in mode `none`.

        With masks in the pixels all texts of an image share one mask.
        """
        mask = self.settings.mask
        if mask.mode == "none":
            return None
        index = batch.image_index
        noise = batch.noise if visual.positions is None else batch.noise.gather(1, visual.positions[index])
        if mask.mode == "code":
            masked = losses.code_mask(noise, visual.codes[index])
        else:
            tokens = None if visual.tokens is None else visual.tokens[index]
            if batch.scores.shape[1]:  # those of the pick, chosen where the guide is
                scores, select = batch.scores[:, None].expand(-1, noise.shape[1], -1), "row"
            else:
                scores, select = self._scores(visual), mask.select
                scores = None if scores is None else scores[index]
            masked = losses.visual_mask(noise, self.budget, parsing=scores, select=select, vision_tokens=tokens)
        if mask.where == "pixels":
            masked = masked[torch.searchsorted(index, index)]  # that of the first text
        return masked

    @torch.no_grad()
    def _scores(self, visual: VisualTokens) -> Tensor | None:
        """How the mode ranks tokens for each pick, (image, vision, vision); None: at random."""
        parsing = None if visual.parsing is None else visual.parsing.mean(dim=1)
        boxes = visual.boxes
        if boxes is None:
            grid = grid_boxes(self.settings.visual.grid, self.settings.visual.grid).to(visual.features.device)
            boxes = grid.expand(len(visual.features), -1, -1) if visual.positions is None else grid[visual.positions]
        return mask_scores(self.settings.mask.mode, visual.features, parsing, boxes)

    def watch(self, model: VisualParsingModel, batch: Batch) -> dict[str, float]:
        """Variance and effective rank of the visual features, which fall if MFR's target collapses; and dead codes."""
        visual = model.encode(batch.images[:16])
        features = visual.features.float().flatten(0, 1)
        if visual.tokens is not None:
            features = features[visual.tokens.flatten()]
        watched = {"target_variance": features.var(dim=0).mean().item(), "target_rank": effective_rank(features)}
        if (dictionary := getattr(model.visual, "dictionary", None)) is not None:
            watched["dead_codes"] = float(dictionary.dead)
        return watched

    def probe(self, model: nn.Module) -> dict[str, float]:
        return self._probe(model) if self._probe else {}


def _first_texts(batch: Batch) -> Tensor:
    """Row of the first text of each image, (image,)."""
    return torch.searchsorted(batch.image_index, torch.arange(len(batch.images), device=batch.words.device))


def word_distance(model: VisualParsingModel, joint: Joint, batch: Batch) -> Tensor:
    """OT distance of each pair, without [CLS], [SEP] and pads; (text,)."""
    tokenizer = model.tokenizer
    words = batch.word_tokens & (batch.words != tokenizer.cls_token_id) & (batch.words != tokenizer.sep_token_id)
    vision_tokens = joint.visual.not_padding()[batch.image_index]
    with torch.autocast(batch.words.device.type, enabled=False):  # 50 iterations in bfloat16 would drift
        return losses.transport_distance(joint.text, joint.vision, words, vision_tokens)


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the covariance's spectrum, from 1 to the number of channels; features (row, channel)."""
    values = torch.linalg.eigvalsh(torch.cov(features.T.double().cpu())).clamp(min=0)
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.special.entr(shares).sum().exp())
