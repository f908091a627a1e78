"""--ref_kl_coeff: the KL divergence from the base model, for full models and for adapters."""

from fastvideo import train_grpo_flux
from fastvideo.utils.sampling_utils import gaussian_kl

import pytest
import torch

LORA = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8}
KINDS = pytest.mark.parametrize("kind", [{}, LORA], ids=["whole", "adapters"])


def test_the_formula_is_the_kl_divergence_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    mean, reference = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)[:, None, None]
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(reference, std)).mean(dim=(1, 2))
    torch.testing.assert_close(gaussian_kl(mean, reference, std), expected)


@KINDS
def test_it_is_zero_before_the_first_update_and_grows_with_the_distance(train, kind):
    settings = {"learning_rate": 1e-3, "max_train_steps": 2, "gradient_accumulation_steps": 4, **kind}
    far, near = (train(ref_kl_coeff=1e-9, **settings | {"learning_rate": rate}).metrics for rate in (1e-3, 1e-4))
    # One optimizer step per iteration: the first starts at the base model. AdamW's first step is as long as its rate.
    assert far[0]["ref_kl_loss"] == near[0]["ref_kl_loss"] == 0
    assert 0 < near[1]["ref_kl_loss"] < 0.1 * far[1]["ref_kl_loss"]
    assert "ref_kl_loss" not in train(**settings).metrics[0]
    (line,) = train(ref_kl_coeff=1e-9, mixed_precision="bf16", **settings | {"max_train_steps": 1}).metrics
    assert line["ref_kl_loss"] == 0


@KINDS
def test_it_holds_the_model_near_the_base(train, kind):
    settings = {"learning_rate": 1e-3, "max_train_steps": 4, **kind}
    free, held = (train(ref_kl_coeff=coeff, **settings).metrics[-1] for coeff in (1e-9, 1e3))
    assert held["ref_kl_loss"] < 0.5 * free["ref_kl_loss"]


@KINDS
def test_it_is_added_to_the_loss_with_its_weight(train, kind):
    settings = {"learning_rate": 1e-3, "gradient_accumulation_steps": 4, **kind}
    for line in train(ref_kl_coeff=0.25, **settings).metrics:
        assert line["loss"] == pytest.approx(line["policy_loss"] + 0.25 * line["ref_kl_loss"], abs=1e-6)


def test_a_resumed_run_measures_from_the_base_model_not_from_the_checkpoint(train):
    settings = {"learning_rate": 1e-3, "max_train_steps": 4, "checkpointing_steps": 2, "ref_kl_coeff": 0.1}
    whole = train(**settings)
    rest = train(**settings, resume_from_checkpoint=whole.checkpoints[0])
    assert rest.numbers() == whole.numbers()[2:]


def test_the_adapters_are_back_and_still_trained_after_the_reference_ran(train, monkeypatch):
    trainers, real = [], train_grpo_flux.train
    monkeypatch.setattr(train_grpo_flux, "train", lambda t, *rest: trainers.append(t) or real(t, *rest))
    run = train(ref_kl_coeff=0.1, learning_rate=1e-3, **LORA)
    assert [line["optimizer_steps"] for line in run.metrics] == [2, 2]
    trained = dict(trainers[0].engine.transformer.named_parameters())
    assert {name for name, p in trained.items() if p.requires_grad} == {name for name in trained if "lora_" in name}
    assert all(p.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)
