"""The mask probe: objects of tokens, shares, their random control."""

import pytest
import torch

from vpworkbench.probes import compare_masks, mask_on_object, object_tokens, random_on_object


def naive_object_tokens(object_map, rows, columns):
    height, width = object_map.shape
    found = []
    for row in range(rows):
        for column in range(columns):
            pixels = [
                int(object_map[y, x])
                for y in range(height)
                for x in range(width)
                if y * rows // height == row and x * columns // width == column
            ]
            found.append(min(set(pixels), key=lambda name: (-pixels.count(name), name)))
    return found


@pytest.mark.parametrize("height, width, grid", [(8, 8, (2, 2)), (9, 14, (4, 3)), (5, 5, (5, 5))])
def test_the_object_of_a_token_is_the_majority_of_its_pixels(height, width, grid):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 4, (3, height, width), generator=generator) * 5  # numbers with gaps
    tokens = object_tokens(maps, grid)
    for one, expected in zip(tokens.tolist(), maps, strict=True):
        assert one == naive_object_tokens(expected, *grid)


def test_shares_by_hand():
    objects = torch.tensor([[0, 1, 1, 2], [0, 1, 1, 2]])
    masked = torch.tensor([[False, True, True, False], [True, True, False, False]])
    share = mask_on_object(masked, torch.tensor([1, 0]), objects)
    assert share[0] == 1 and share[1].isnan()  # the second pick is background
    share = mask_on_object(masked, torch.tensor([1, 1]), objects)
    assert share.tolist() == [1.0, 0.5]


def test_random_control_is_the_mean_over_all_masks_of_the_budget():
    generator = torch.Generator().manual_seed(0)
    objects = torch.randint(0, 3, (1, 12), generator=generator)
    objects[0, 4] = 1
    masked = torch.zeros(1, 12, dtype=torch.bool)
    masked[0, [4, 1, 2, 3]] = True
    pick = torch.tensor([4])
    draws = torch.rand(4000, 12, generator=generator)
    draws[:, 4] = 2  # the pick is always there
    drawn = torch.zeros(4000, 12, dtype=torch.bool).scatter(1, draws.topk(4).indices, True)
    mean = mask_on_object(drawn, pick.expand(4000), objects.expand(4000, -1)).mean()
    assert abs(random_on_object(masked, pick, objects)[0] - mean) < 0.01


def test_comparison_finds_masks_that_follow_objects():
    objects = torch.arange(16).repeat(40, 1) // 4  # object 0 is background
    pick = torch.arange(40) % 16
    follows = objects == objects.gather(1, pick[:, None])
    result = compare_masks(follows, pick, objects)
    assert result.share.mean == 1 and result.share.low == 1
    assert result.difference.low > 0.5
    assert result.images + result.on_background == 40 and result.on_background == 12
    assert result.random.mean == pytest.approx((1 + 3 * 3 / 15) / 4)


def test_refusals():
    masked = torch.tensor([[True, False]])
    objects = torch.tensor([[1, 1]])
    with pytest.raises(ValueError, match="must be masked too"):
        mask_on_object(masked, torch.tensor([1]), objects)
    with pytest.raises(ValueError, match="one token for each of 1"):
        mask_on_object(masked, torch.tensor([0, 1]), objects)
    with pytest.raises(ValueError, match="masked must be bool"):
        mask_on_object(masked.long(), torch.tensor([0]), objects)
    with pytest.raises(ValueError, match="cannot be divided"):
        object_tokens(torch.zeros(4, 4, dtype=torch.long), (5, 4))
    with pytest.raises(ValueError, match="whole numbers"):
        object_tokens(torch.zeros(4, 4), (2, 2))
