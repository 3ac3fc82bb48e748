"""SOHO's visual dictionary: nearest codes, straight-through gradients, the moving average, and what is guessed."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import FEW, narrow_model, without_dropout
from torch.nn import functional

from vpworkbench.errors import SettingsError
from vpworkbench.losses import code_mask, masked_visual_modeling
from vpworkbench.model.dictionary import Dictionary
from vpworkbench.runs import open_run
from vpworkbench.settings import VisualSettings, checked, pretrain_settings
from vpworkbench.train.engine import accumulate_gradients
from vpworkbench.train.objective import Pretraining, group_batches
from vpworkbench.train.pretrain import prepare, pretrain
from vpworkbench.train.processes import Processes

ALONE = Processes(torch.device("cpu"))


@pytest.fixture
def dictionary() -> Dictionary:
    torch.manual_seed(0)
    return Dictionary(5, 3)


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed))


def test_the_nearest_code_stands_for_a_token_and_the_gradient_passes_through(dictionary):
    given = features(2, 4).requires_grad_()
    found, taken = dictionary(given)
    for image in range(2):
        for token in range(4):
            distances = [float((given[image, token] - code).square().sum().detach()) for code in dictionary.codes]
            assert int(taken[image, token]) == int(np.argmin(distances))
    torch.testing.assert_close(found, dictionary.codes[taken])
    weights = features(2, 4, seed=1)
    (found * weights).sum().backward()
    torch.testing.assert_close(given.grad, weights)


def test_codes_move_a_hundredth_to_the_mean_of_their_tokens(dictionary):
    """SOHO's moving average keeps 0.99 of a code."""
    dictionary.idle.zero_()
    before, given = dictionary.codes.clone(), features(4, 6)
    _, taken = dictionary(given)
    dictionary.update_codes(ALONE)
    for code in range(5):
        mine = given[taken == code]
        expected = 0.99 * before[code] + 0.01 * mine.mean(dim=0) if len(mine) else before[code]
        torch.testing.assert_close(dictionary.codes[code], expected)
        assert dictionary.idle[code] == (0 if len(mine) else 1)


def test_micro_batches_change_nothing(dictionary):
    other = Dictionary(5, 3)
    other.load_state_dict(dictionary.state_dict())
    given = features(8, 6)
    dictionary(given)
    for part in given.chunk(4):
        other(part)
    for one in (dictionary, other):
        one.update_codes(ALONE)
    torch.testing.assert_close(dictionary.codes, other.codes, rtol=0, atol=1e-6)
    assert torch.equal(dictionary.idle, other.idle)


def test_dead_codes_become_tokens_of_the_step(dictionary):
    given = features(1, 6) + 50  # all nearest to one code
    _, taken = dictionary(given)
    assert len(taken.unique()) == 1 and dictionary.dead == 0
    dictionary.update_codes(ALONE)
    assert dictionary.dead == 4
    for code in set(range(5)) - {int(taken[0, 0])}:
        assert (given[0] == dictionary.codes[code]).all(dim=1).any()
    dictionary(given)
    dictionary.update_codes(ALONE)
    assert dictionary.dead < 4


def test_it_rests_in_evaluation_and_without_gradients(dictionary):
    before = {name: value.clone() for name, value in dictionary.state_dict().items()}
    with torch.no_grad():
        dictionary(features(2, 4))
    dictionary.eval()(features(2, 4))
    dictionary.update_codes(ALONE)
    for name, value in dictionary.state_dict().items():
        assert torch.equal(value, before[name])


def test_every_code_of_an_image_is_picked_as_often_and_hidden_as_a_whole():
    codes = torch.tensor([[3, 3, 3, 3, 7, 1]]).expand(3_000, -1)
    masked = code_mask(torch.rand(3_000, 6, generator=torch.Generator().manual_seed(0)), codes)
    hidden = [codes[0][row].unique().tolist() for row in masked]
    assert all(
        len(some) == 1 and int(row.sum()) == int((codes[0] == some[0]).sum())
        for some, row in zip(hidden, masked, strict=True)
    )
    shares = [sum(some == [code] for some in hidden) / 3_000 for code in (3, 7, 1)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)


def test_mvm_is_the_mean_likelihood_of_the_hidden_code():
    logits, codes = torch.randn(2, 4, 5), torch.tensor([[1, 1, 0, 2], [4, 3, 3, 3]])
    masked = torch.tensor([[True, True, False, False], [False, True, True, True]])
    expected = functional.cross_entropy(logits[0, :2], codes[0, :2]) + functional.cross_entropy(
        logits[1, 1:], codes[1, 1:]
    )
    torch.testing.assert_close(masked_visual_modeling(logits, codes, masked), expected)


def test_what_needs_a_dictionary_says_so():
    with pytest.raises(SettingsError, match="'swin' has none .only 'grid'"):
        checked(VisualSettings, {"dictionary": 8})
    chosen = pretrain_settings(visual="grid", overrides={"visual.dictionary": 8}, init_visual="")
    assert chosen.mask.mode == "code"


def few(**overrides: object):
    small = FEW | {"train.log_every": 2, "visual.dictionary": 16}
    small |= {"fusion.width": 32, "fusion.heads": 2, "fusion.layers": 1, "fusion.feed_forward": 64}
    return pretrain_settings(visual="grid", init_visual="", steps=4, checkpoint_every=2, overrides=small | overrides)


def test_a_resumed_run_has_the_same_dictionary_bit_for_bit(runs_folder, monkeypatch):
    chosen = few()
    whole, left = (open_run("01_pretrain", chosen, name=name) for name in ("whole", "left"))
    pretrain(whole, prepare(chosen), chosen)
    losses = Pretraining.losses

    def cut_off(self, model, batch):
        if int(model.visual.dictionary.steps) == 3:
            raise KeyboardInterrupt
        return losses(self, model, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pretraining, "losses", cut_off)
        pretrain(left, prepare(chosen), chosen)
    pretrain(left, prepare(chosen), chosen)
    one, other = ((run.folder / "checkpoint" / "model.safetensors").read_bytes() for run in (whole, left))
    assert one == other
    metrics = whole.metrics()
    assert metrics.drop(columns="step_s").equals(left.metrics().drop(columns="step_s"))
    assert {"mvm", "dead_codes"} <= set(metrics) and metrics["dead_codes"].between(0, 16).all()
    assert np.isfinite(metrics.to_numpy(dtype=float)).all() and "mfr" not in metrics


def test_accumulation_changes_neither_the_losses_nor_the_codes(scenes):
    """Batch norm apart, which follows its own batches: it is frozen, as where weights are taken over."""
    model = narrow_model(scenes, family="grid", dictionary=16).double()
    objective = Pretraining(few())
    batch = group_batches(scenes, model, few().data, images=8, seed=0)[0]
    states = []
    for count in (1, 4):
        twin = narrow_model(scenes, family="grid", dictionary=16, frozen_norm=True).double()
        twin.load_state_dict(model.state_dict())
        without_dropout(twin.train())
        means = accumulate_gradients(twin, objective, batch, count, nullcontext)
        states.append((means, twin.state_dict(), {name: p.grad for name, p in twin.named_parameters()}))
    (one, codes, gradients), (other, same, equal) = states
    assert one["mvm"] > 0
    for name in one:
        torch.testing.assert_close(one[name], other[name])
    torch.testing.assert_close(codes["visual.dictionary.codes"], same["visual.dictionary.codes"])
    assert not torch.equal(codes["visual.dictionary.codes"], model.state_dict()["visual.dictionary.codes"])
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(gradient, equal[name], rtol=1e-6, atol=1e-9)
    assert gradients["mvm.weight"].abs().sum() > 0
