"""All of peft's adapters run as a whole, and their Jacobian is exact."""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import assert_exact, in_slices
from torch import nn

peft = pytest.importorskip("peft")

LINEAR = ["first", "last"]
ALL = [*LINEAR, "conv"]
ADAPTERS = {
    "LoRA": peft.LoraConfig(r=2, target_modules=ALL),
    "DoRA": peft.LoraConfig(r=2, target_modules=ALL, use_dora=True),
    "LoHa": peft.LoHaConfig(r=2, target_modules=ALL),
    "LoHa, CP": peft.LoHaConfig(r=2, target_modules=ALL, use_effective_conv2d=True),
    "LoKr": peft.LoKrConfig(r=2, target_modules=ALL),
    "LoKr, CP": peft.LoKrConfig(r=2, target_modules=ALL, decompose_both=True, use_effective_conv2d=True),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR, use_cayley_neumann=False),
    "OFT, Neumann": peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=ALL),
    "IA3": peft.IA3Config(target_modules=ALL, feedforward_modules=["last"]),
    "VeRA": peft.VeraConfig(r=2, target_modules=["first"]),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=LINEAR, total_step=100),
    "RandLoRA": peft.RandLoraConfig(r=2, target_modules=LINEAR),
    "HRA": peft.HRAConfig(r=2, target_modules=LINEAR),
    "VB-LoRA": peft.VBLoRAConfig(r=2, target_modules=LINEAR, num_vectors=16, vector_length=4),
}


class Network(nn.Module):
    """A convolution and linear layers; in a denoiser's place."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.conv, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.last(torch.tanh(self.first(x)))
        return self.out(torch.tanh(self.conv(y.view(-1, 4, 2, 2)))).flatten(1)


def adapted(name):
    torch.manual_seed(0)
    model = peft.get_peft_model(Network(), ADAPTERS[name]).double()
    for parameter in model.parameters():
        if parameter.requires_grad:  # adapters begin with zeros
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_run_as_a_whole(name):
    mtl = assert_exact(adapted(name), torch.randn(6, 16, dtype=torch.float64), rtol=1e-6)
    assert in_slices(mtl) == []


def test_a_function_is_as_it_was_after_a_step():
    from peft.tuners.loha.layer import HadaWeight

    assert_exact(adapted("LoHa"), torch.randn(6, 16, dtype=torch.float64))
    assert "apply" not in vars(HadaWeight)


@pytest.mark.compile
def test_lora_of_a_compiled_model_runs_as_a_whole():
    model = adapted("LoRA")
    plain = copy.deepcopy(model)
    model.compile(backend="aot_eager")
    mtl = assert_exact(model, torch.randn(6, 16, dtype=torch.float64), rtol=1e-6, plain=plain)
    assert mtl._engine.compiled is not None
