"""The mask probe: the object under a token, shares on it for masks of its size and of a fixed budget."""

from itertools import combinations

import numpy as np
import pytest
import torch

from vpworkbench.probes import mask_on_object, objects_of_boxes, objects_of_tokens, shares_on_objects
from vpworkbench.probes.layouts import grid_boxes
from vpworkbench.probes.masks import nearest_by_colour, nearest_by_features, nearest_by_position, shares_at_budget

# ------------------------------------------------------------------------------------------- the object of a token


def naive_objects(object_map, rows, columns, share):
    height, width = object_map.shape
    found = []
    for row in range(rows):
        for column in range(columns):
            pixels = [
                int(object_map[y, x])
                for y in range(height)
                for x in range(width)
                if int((y + 0.5) * rows / height) == row and int((x + 0.5) * columns / width) == column
            ]
            objects = set(pixels) - {0}
            most = min(objects, key=lambda name: (-pixels.count(name), name), default=0)
            found.append(most if pixels.count(most) >= share * len(pixels) else 0)
    return found


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("height, width, grid", [(8, 8, (2, 2)), (9, 14, (4, 3)), (5, 5, (5, 5)), (12, 12, (3, 3))])
def test_the_object_of_a_token_covers_most_of_it_and_enough(height, width, grid, share):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 4, (3, height, width), generator=generator) * 5  # numbers with gaps
    maps[1, torch.rand(height, width, generator=generator) < 0.7] = 0
    tokens = objects_of_tokens(maps, grid, share)
    for one, expected in zip(tokens.tolist(), maps, strict=True):
        assert one == naive_objects(expected, *grid, share)


def test_a_fifth_of_the_pixels_is_enough_even_where_background_has_more():
    object_map = torch.zeros(10, 10, dtype=torch.uint8)
    object_map[:2] = 3  # exactly a fifth of the only token
    assert objects_of_tokens(object_map, 1).tolist() == [3]
    assert objects_of_tokens(object_map, 1, share=0.5).tolist() == [0]
    object_map[0, 0] = 0
    assert objects_of_tokens(object_map, 1).tolist() == [0]


def test_boxes_of_a_grid_are_its_tokens():
    object_map = torch.randint(0, 5, (24, 36), generator=torch.Generator().manual_seed(0))
    assert objects_of_boxes(object_map, grid_boxes(4, 6)).equal(objects_of_tokens(object_map, (4, 6)))
    assert objects_of_boxes(object_map, torch.tensor([[0.5, 0.5, 0.5, 0.9]])).tolist() == [0]  # an empty box


# -------------------------------------------------------------------------------- masks as large as the picked object


def naive_share(scores, objects, pick):
    """Mean over all masks that the ranking allows, of as many tokens as the object has beside the pick."""
    hidden = objects.count(objects[pick]) - 1
    others = [token for token in range(len(objects)) if token != pick]
    best = max(sum(scores[token] for token in mask) for mask in combinations(others, hidden))
    masks = [mask for mask in combinations(others, hidden) if sum(scores[token] for token in mask) == best]
    return np.mean([np.mean([objects[token] == objects[pick] for token in mask]) for mask in masks])


def test_shares_on_objects_equal_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    objects = torch.randint(0, 3, (6, 9), generator=generator)
    scores = torch.randint(0, 5, (6, 9, 9), generator=generator).float()  # many ties
    found = shares_on_objects({"rule": scores}, objects)
    expected, random, sizes, images = [], [], [], []
    for image, row in enumerate(objects.tolist()):
        for number in sorted(set(row) - {0}):
            if row.count(number) < 3:
                continue
            picks = [token for token in range(9) if row[token] == number]
            expected.append(np.mean([naive_share(scores[image, pick].tolist(), row, pick) for pick in picks]))
            random.append((row.count(number) - 1) / 8)
            sizes.append(row.count(number))
            images.append(image)
    np.testing.assert_allclose(found.shares["rule"], expected)
    np.testing.assert_allclose(found.shares["random"], random)
    assert found.sizes.tolist() == sizes and found.images.tolist() == images and len(sizes) >= 5


def test_perfect_attention_scores_one_on_objects_of_any_size():
    objects = torch.tensor([[1] * 3 + [2] * 7 + [0] * 6, [0] * 2 + [4] * 12 + [5] * 2])
    perfect = (objects[:, :, None] == objects[:, None]).float()
    found = shares_on_objects({"perfect": perfect, "opposite": -perfect, "even": torch.ones(2, 16, 16)}, objects)
    assert found.sizes.tolist() == [3, 7, 12]  # the object of two tokens is not picked
    assert (found.shares["perfect"] == 1).all()
    assert found.shares["opposite"][:2].tolist() == [0, 0]
    np.testing.assert_array_equal(found.shares["even"], found.shares["random"])
    np.testing.assert_allclose(found.shares["random"], [2 / 15, 6 / 15, 11 / 15])


def test_the_score_of_the_pick_itself_does_not_count():
    objects = torch.tensor([[1, 1, 1, 0, 0, 0]])
    scores = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0))
    found = shares_on_objects({"rule": scores}, objects)
    other = shares_on_objects({"rule": scores + 9 * torch.eye(6)}, objects)
    np.testing.assert_array_equal(found.shares["rule"], other.shares["rule"])


def test_padding_is_never_hidden():
    objects, real = torch.tensor([[1, 1, 1, 0, 0, 0]]), torch.tensor([[True] * 4 + [False] * 2])
    found = shares_on_objects({"rule": torch.arange(6.0).expand(1, 6, 6)}, objects, real)
    assert found.shares["random"].tolist() == [pytest.approx(2 / 3)]
    assert found.shares["rule"].tolist() == [0.5]  # token 3, and the larger of those on the object


def test_intervals_are_over_objects():
    rng = np.random.default_rng(0)
    objects = torch.from_numpy(np.repeat(np.arange(1, 5), 9)[None].repeat(100, axis=0))
    noisy = (objects[:, :, None] == objects[:, None]).double() + torch.from_numpy(rng.normal(0, 0.6, (100, 36, 36)))
    found = shares_on_objects({"rows": noisy}, objects)
    rows, shares = found.intervals()["rows"], found.shares["rows"]
    half = 1.96 * shares.std(ddof=1) / np.sqrt(400)
    assert rows.mean == pytest.approx(shares.mean()) and 0.4 < rows.mean < 0.95 and rows.count == 400
    assert rows.high - rows.low == pytest.approx(2 * half, rel=0.1)
    assert found.difference("rows", "random").mean == pytest.approx(rows.mean - 8 / 35)


def test_rules_rank_what_their_names_say():
    position = nearest_by_position(grid_boxes(3, 3))
    assert position[4].argsort(descending=True, stable=True).tolist() == [4, 1, 3, 5, 7, 0, 2, 6, 8]
    assert position[4, 1] == position[4, 7]  # exact ties
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    images[0, 0, :2, :2], images[0, 0, :2, 2:], images[0, 1, 2:] = 200, 190, 250
    assert nearest_by_colour(images, 2)[0, 0].argsort(descending=True, stable=True).tolist() == [0, 1, 2, 3]
    features = torch.tensor([[[1.0, 0.0], [5.0, 0.1], [0.9, 0.5], [-1.0, 0.0]]])
    assert nearest_by_features(features)[0, 0].argsort(descending=True).tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------- masks of a fixed budget


def test_shares_by_hand():
    objects = torch.tensor([[0, 1, 1, 2], [0, 1, 1, 2]])
    masked = torch.tensor([[False, True, True, False], [True, True, False, False]])
    share = mask_on_object(masked, torch.tensor([1, 0]), objects).share
    assert share[0] == 1 and share[1].isnan()  # the second pick is background
    share = mask_on_object(masked, torch.tensor([1, 1]), objects).share
    assert share.tolist() == [1.0, 0.5]


def test_the_largest_share_is_that_of_the_best_mask_of_the_budget():
    objects = torch.tensor([[1, 1, 2, 2, 2, 0]])
    masks = torch.tensor([[token in mask for token in range(6)] for mask in combinations(range(6), 3)])
    for pick in (0, 2):
        some = masks[masks[:, pick]]
        found = mask_on_object(some, torch.full((len(some),), pick), objects.expand(len(some), -1))
        assert found.largest.unique() == found.share.max()


def test_random_control_is_the_mean_over_all_masks_of_the_budget():
    generator = torch.Generator().manual_seed(0)
    objects = torch.randint(0, 3, (1, 12), generator=generator)
    objects[0, 4] = 1
    masks = torch.tensor([[token in mask for token in range(12)] for mask in combinations(range(12), 4)])
    masks = masks[masks[:, 4]]
    found = mask_on_object(masks, torch.full((len(masks),), 4), objects.expand(len(masks), -1))
    torch.testing.assert_close(found.random, found.share.mean().expand(len(masks)))


def test_comparison_finds_masks_that_follow_objects():
    objects = torch.arange(16).repeat(40, 1) // 4  # object 0 is background
    pick = torch.arange(40) % 16
    follows = objects == objects.gather(1, pick[:, None])
    result = shares_at_budget(follows, pick, objects)
    assert result.share.mean == result.largest.mean == 1 and result.share.low == 1
    assert result.difference.low > 0.5
    assert result.images + result.on_background == 40 and result.on_background == 12
    assert result.random.mean == pytest.approx((1 + 3 * 3 / 15) / 4)


def test_refusals():
    with pytest.raises(ValueError, match="must be masked too"):
        mask_on_object(torch.tensor([[True, False]]), torch.tensor([1]), torch.tensor([[1, 1]]))
    with pytest.raises(ValueError, match="cannot be divided"):
        objects_of_tokens(torch.zeros(4, 4, dtype=torch.long), (5, 4))
