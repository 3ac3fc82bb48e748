"""Masks and losses against exact solvers, counts and gradients."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from torch.nn import functional

from vpworkbench.losses import (
    cosine_cost,
    hide_pixels,
    image_text_matching,
    masked_feature_regression,
    masked_language_modeling,
    token_alignment,
    transport_distance,
    transport_plan,
    visual_mask,
)


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("select", ["row", "column", "symmetric"])
@pytest.mark.parametrize("budget", [1, 2, 7, 49])
def test_attention_mask_has_exactly_k_tokens_with_the_pick(select, budget):
    noise, parsing = uniform(8, 49), torch.softmax(4 * torch.randn(8, 49, 49), dim=-1)
    masked = visual_mask(noise, budget, parsing=parsing, select=select)
    assert (masked.sum(dim=1) == budget).all()
    assert masked[torch.arange(8), noise.argmax(dim=1)].all()


def test_attention_mask_is_the_top_of_the_row_of_a():
    """Against A = 0.5 (I + W) written out, paper Eq. 3: the pick is its own top-1."""
    noise, parsing = uniform(5, 12), torch.softmax(3 * torch.randn(5, 12, 12), dim=-1)
    masked = visual_mask(noise, 4, parsing=parsing)
    for text in range(5):
        row = (0.5 * (torch.eye(12) + parsing[text]))[noise[text].argmax()]
        assert set(masked[text].nonzero().flatten().tolist()) == set(row.topk(4).indices.tolist())


def test_random_mask_has_the_same_budget_and_is_uniform():
    noise = uniform(4_000, 10)
    masked = visual_mask(noise, 3)
    assert (masked.sum(dim=1) == 3).all()
    assert masked[torch.arange(4_000), noise.argmax(dim=1)].all()
    assert (masked.float().mean(dim=0) - 0.3).abs().max() < 0.03


@pytest.mark.parametrize("budget", [0, 11])
def test_mask_refuses_more_tokens_than_there_are(budget):
    with pytest.raises(ValueError, match="10 visual tokens"):
        visual_mask(uniform(2, 10), budget)


def unit_vectors(count: int, width: int, seed: int) -> torch.Tensor:
    return functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("words, vision", [(8, 36), (12, 49), (20, 20), (1, 9)])
def test_transport_distance_is_within_a_percent_of_the_exact_lp(words, vision):
    for seed in range(5):
        text, seen = unit_vectors(words, 32, seed), unit_vectors(vision, 32, seed + 100)
        exact = ot.emd2(np.full(words, 1 / words), np.full(vision, 1 / vision), (1 - text @ seen.T).double().numpy())
        ones = torch.ones(1, words, dtype=torch.bool), torch.ones(1, vision, dtype=torch.bool)
        ours = transport_distance(text[None], seen[None], *ones).item()
        assert ours == pytest.approx(exact, rel=0.01)


def test_transport_plan_has_the_marginals_and_skips_padding():
    cost = cosine_cost(torch.randn(3, 7, 16), torch.randn(3, 11, 16))
    words, vision = (
        torch.arange(7)[None] < torch.tensor([[7], [5], [3]]),
        torch.arange(11)[None] < torch.tensor([[11], [4], [9]]),
    )
    plan = transport_plan(cost, words, vision)
    assert (plan[~(words[:, :, None] & vision[:, None])] == 0).all()
    # the last half-step makes the columns exact; the rows converge
    torch.testing.assert_close(plan.sum(dim=1), vision / vision.sum(dim=1, keepdim=True), rtol=0, atol=1e-5)
    torch.testing.assert_close(plan.sum(dim=2), words / words.sum(dim=1, keepdim=True), rtol=0, atol=2e-2)


def test_transport_distance_ignores_padding():
    text, vision = torch.randn(1, 6, 16), torch.randn(1, 9, 16)
    plain = transport_distance(text, vision, torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 9, dtype=torch.bool))
    longer = transport_distance(
        torch.cat([text, torch.randn(1, 5, 16)], 1),
        torch.cat([vision, torch.randn(1, 2, 16)], 1),
        torch.arange(11)[None] < 6,
        torch.arange(11)[None] < 9,
    )
    torch.testing.assert_close(longer, plain)


def test_transport_distance_is_zero_on_identical_sets():
    vectors = unit_vectors(10, 32, 0)[None]
    ones = torch.ones(1, 10, dtype=torch.bool)
    assert transport_distance(vectors, vectors, ones, ones).item() == pytest.approx(0, abs=1e-4)


def test_transport_distance_of_an_empty_set_is_zero():
    distance = transport_distance(
        torch.randn(1, 4, 8),
        torch.randn(1, 5, 8),
        torch.zeros(1, 4, dtype=torch.bool),
        torch.ones(1, 5, dtype=torch.bool),
    )
    assert distance.item() == 0


def test_gradient_of_the_distance_reaches_both_modalities():
    text, vision = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    ones = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    token_alignment(transport_distance(text, vision, *ones), torch.tensor([True, False])).backward()
    assert text.grad.abs().sum(dim=(1, 2)).min() > 0 and vision.grad.abs().sum(dim=(1, 2)).min() > 0


def test_alignment_draws_matched_pairs_together_and_pushes_others_apart():
    distance = torch.tensor([0.5, 0.25, 1.0])
    assert token_alignment(distance, torch.tensor([True, False, True])).item() == 0.5 - 0.25 + 1.0


def test_no_gradient_reaches_the_target_of_mfr():
    predicted, target = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    masked_feature_regression(predicted, target).backward()
    assert target.grad is None and predicted.grad.abs().sum() > 0


def test_mfr_is_eq_9():
    predicted, target = torch.randn(3, 8), torch.randn(3, 8)
    printed = sum(torch.linalg.vector_norm(p - t) ** 2 for p, t in zip(predicted, target, strict=True))
    torch.testing.assert_close(masked_feature_regression(predicted, target, reduction="sum"), printed)
    torch.testing.assert_close(masked_feature_regression(predicted, target), printed / 8)


def test_hidden_pixels_are_the_squares_of_hidden_tokens():
    images = torch.randint(0, 100, (2, 3, 12, 12), dtype=torch.uint8)
    masked = torch.zeros(2, 9, dtype=torch.bool)
    masked[0, 5] = masked[1, 0] = True
    hidden = hide_pixels(images, masked)
    assert (hidden[0, :, 4:8, 8:] == 128).all() and (hidden[1, :, :4, :4] == 128).all()
    assert int((hidden != images).sum()) == 2 * 3 * 16 and not (images == 128).any()


def test_likelihoods_are_eq_7_and_8():
    logits, labels = torch.randn(6, 11), torch.randint(0, 11, (6,))
    printed = -torch.log_softmax(logits, dim=-1)[torch.arange(6), labels].sum()
    torch.testing.assert_close(masked_language_modeling(logits, labels), printed)
    matched = torch.tensor([True, False, True])
    printed = -torch.log_softmax(logits[:3, :2], dim=-1)[torch.arange(3), matched.long()].sum()
    torch.testing.assert_close(image_text_matching(logits[:3, :2], matched), printed)
