"""A model behind a LoRA adapter is probed as it computes: like the same model with the adapter merged into it."""

from __future__ import annotations

import copy

import pytest
import torch
from probes.tiny_models import llava

from vpworkbench.answers import read_answer
from vpworkbench.probes import check, inter_modality_flow, knock_out, modality_masks

peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")


class Numbers:
    def decode(self, ids: list[int]) -> str:
        return "".join(f" {number}" for number in ids)


def last_token(outputs) -> torch.Tensor:
    return outputs.logits[:, -1].logsumexp(dim=-1)


def test_an_adapted_model_equals_the_merged_one():
    torch.manual_seed(0)
    family = llava()
    plain = copy.deepcopy(family.model).eval()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(family.model, config).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    masks = modality_masks(adapted, family.inputs)
    sets = family.inputs, masks.vision, masks.tokens
    check(adapted, *sets)

    flows = [inter_modality_flow(model, *sets, layers=None).flow for model in (adapted, merged, plain)]
    torch.testing.assert_close(flows[0], flows[1], equal_nan=True)
    assert (flows[0] - flows[2]).abs().nan_to_num().max() > 1e-3
    effects = [knock_out(model, *sets, last_token).effect for model in (adapted, merged)]
    torch.testing.assert_close(*effects, atol=1e-4, rtol=0)

    one = {name: value[:1] for name, value in family.inputs.items()}
    answers = [read_answer(model, one, [11, 12], Numbers()) for model in (adapted, merged)]
    torch.testing.assert_close(answers[0].attention, answers[1].attention, atol=1e-5, rtol=0)
    torch.testing.assert_close(answers[0].log_probs, answers[1].log_probs, atol=1e-4, rtol=0)
