"""What makes a step fast changes nothing else: no waiting for the device, checkpointing, compilation, trackers."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections import Counter

import pytest
import torch
from conftest import NARROW, narrow_model, without_dropout
from torch.utils._python_dispatch import TorchDispatchMode

from vpworkbench.errors import SettingsError
from vpworkbench.runs import open_run
from vpworkbench.settings import pretrain_settings
from vpworkbench.train.engine import accumulate_gradients, fit, speed_options
from vpworkbench.train.evaluate import held_out_probe
from vpworkbench.train.objective import Pretraining, group_batches

pytestmark = pytest.mark.usefixtures("runs_folder")


def settings(**changes):
    few = NARROW | {"train.images": 4, "train.log_every": 2}
    return pretrain_settings(steps=4, init_visual="", overrides=few | changes)


class Asked(TorchDispatchMode):
    """Notes every operation whose result the host needs before it continues: on a GPU it waits for each."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        indices = arguments[1] if name.startswith("index") and len(arguments) > 1 else ()
        by_bool = any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in indices or ())
        if name in self.WAITING or by_bool:
            self.seen.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("mode, where", [("attention", "tokens"), ("random", "tokens"), ("random", "pixels")])
def test_a_step_never_waits_for_the_device(scenes, mode, where):
    model = narrow_model(scenes).train()
    chosen = settings(**{"mask.mode": mode, "mask.where": where})
    batch = group_batches(scenes, model, chosen.data, images=4, seed=0)[0].to("cpu")
    with Asked() as asked:
        sums = Pretraining(chosen).losses(model, batch)
        sum(sums.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert not asked.seen
    with Asked() as asked:
        batch.images[batch.matched[: len(batch.images)]]
    assert asked.seen  # it would be noticed


class Called(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))


def test_attention_is_fused_everywhere_but_in_the_last_block_of_the_parser(scenes):
    """Without dropout and gradients of the position bias, for which a CPU has no fused kernel."""
    model = narrow_model(scenes).eval()
    batch = group_batches(scenes, model, settings().data, images=4, seed=0)[0]
    with torch.no_grad(), Called() as called:
        Pretraining(settings()).losses(model, batch)
    blocks = sum(model.visual.settings.depths) + model.fusion.bert.config.num_hidden_layers
    fused = sum(count for name, count in called.counts.items() if name.startswith("_scaled_dot_product"))
    assert fused == blocks - 1 and called.counts["_softmax"] == 1


def gradients(scenes, chosen, dropout: float) -> dict[str, torch.Tensor]:
    model = without_dropout(narrow_model(scenes).train(), dropout)
    batch = group_batches(scenes, model, chosen.data, images=4, seed=0)[0]
    torch.manual_seed(1)  # dropout
    with speed_options(model, chosen.train):
        accumulate_gradients(model, Pretraining(chosen), batch, 2, contextlib.nullcontext)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    "option",
    [
        "gradient_checkpointing",
        pytest.param(
            "compile",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"),
            ],
        ),
    ],
)
def test_options_of_speed_change_no_gradient(scenes, option):
    dropout = 0.1 if option == "gradient_checkpointing" else 0.0  # compiled, other places are drawn
    plain = gradients(scenes, settings(), dropout)
    other = gradients(scenes, settings(**{f"train.{option}": True}), dropout)
    assert plain.keys() == other.keys() and len(plain) > 50
    if option == "gradient_checkpointing":
        assert all(torch.equal(plain[name], other[name]) for name in plain)
    for name, gradient in plain.items():
        assert (gradient - other[name]).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_checkpointed_blocks_are_computed_twice(scenes):
    model, seen = narrow_model(scenes).train(), []
    model.fusion.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: seen.append(1))
    batch = group_batches(scenes, model, settings().data, images=4, seed=0)[0]
    with speed_options(model, settings(**{"train.gradient_checkpointing": True}).train):
        accumulate_gradients(model, Pretraining(settings()), batch, 1, contextlib.nullcontext)
    assert len(seen) == 2
    accumulate_gradients(model, Pretraining(settings()), batch, 1, contextlib.nullcontext)
    assert len(seen) == 3  # and it is a plain model again


def test_probes_are_logged_and_disturb_nothing(scenes):
    """The run with probes and a tracker ends with the weights of the one without."""
    weights = []
    for number, more in enumerate([{}, {"train.probe_every": 2, "train.tracker": "tensorboard"}]):
        chosen = settings(**more)
        run, model = open_run("01_pretrain", chosen, name=str(number)), narrow_model(scenes)
        probe = functools.partial(held_out_probe, pictures=scenes, settings=chosen, images=4)
        batches = group_batches(scenes, model, chosen.data, images=4, seed=0)
        fit(model, Pretraining(chosen, probe), batches, run, optim=chosen.optim, train=chosen.train, seed=0)
        weights.append((run.folder / "checkpoint" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    metrics = run.metrics()
    assert metrics["flow"].between(0, 1).all() and metrics["nmi"].between(0, 1).all()
    assert (metrics["held_out_loss"] > 1).all() and len(metrics) == 2
    (events,) = (run.folder / "tensorboard").glob("events*")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(events)).Reload()
    assert [event.step for event in accumulator.Scalars("itm")] == [2, 4]
    assert accumulator.Scalars("flow")[-1].value == pytest.approx(metrics["flow"].iloc[-1])


def test_a_tracker_that_is_not_installed_is_refused(scenes):
    from accelerate.tracking import is_wandb_available

    if is_wandb_available():
        pytest.skip("wandb is installed")
    chosen = settings(**{"train.tracker": "wandb"})
    run, model = open_run("01_pretrain", chosen, name="a"), narrow_model(scenes)
    batches = group_batches(scenes, model, chosen.data, images=4, seed=0)
    with pytest.raises(SettingsError, match="train.tracker: wandb is not installed"):
        fit(model, Pretraining(chosen), batches, run, optim=chosen.optim, train=chosen.train, seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_waits_for_no_gpu(scenes):
    model = narrow_model(scenes).cuda().train()
    batch = group_batches(scenes, model, settings().data, images=4, seed=0)[0].pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulate_gradients(model, Pretraining(settings()), batch, 1, contextlib.nullcontext)
    finally:
        torch.cuda.set_sync_debug_mode("default")
