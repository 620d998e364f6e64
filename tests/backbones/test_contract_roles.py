"""What every family promises of a student and its teacher: see `Family`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from contract import LORA, PROMPTS, Case, close, disturb
from torch import Tensor

from rats_video.backbones.features import middle_features
from rats_video.errors import UserError

pytestmark = pytest.mark.usefixtures("no_gradient")


def test_middle_features_come_with_the_same_velocity(case: Case) -> None:
    role = case.backbone
    if len(role.denoisers) > 1:
        with pytest.raises(UserError, match="has two experts"):
            middle_features(role)
        return
    see, width = middle_features(role)
    velocity, features = see(case.noise, case.sigma, role.encode_text(PROMPTS))
    assert torch.equal(velocity, case.velocity(role))
    _, _, *size = case.video.shape
    tokens = math.prod(each // patch for each, patch in zip(size, role.patch_size, strict=True))
    assert features.shape == (2, tokens, width)
    network = role.denoiser
    assert not any(module._forward_hooks for module in network.modules())


def test_only_the_denoiser_trains(case: Case) -> None:
    backbone = case.backbone
    assert all(weight.requires_grad for weight in backbone.denoiser.parameters())
    rest = [part for name, part in backbone.parts.items() if name not in backbone.denoiser_parts]
    frozen = [p for part in rest if isinstance(part, torch.nn.Module) for p in part.parameters()]
    assert frozen
    assert not any(p.requires_grad for p in frozen)


def test_full_role_is_a_denoiser_of_its_own(case: Case, tmp_path: Path) -> None:
    twin = case.backbone.with_own_denoiser()
    for name, part in case.backbone.parts.items():
        assert (twin.parts[name] is part) == (name not in case.backbone.denoiser_parts)
    base = case.velocity(case.backbone)
    close(case.velocity(twin), base, 1e-6)  # alone in its expert's batch, a clip's sums depend on memory alignment
    disturb(twin)
    changed = case.velocity(twin)
    assert (changed - base).abs().max() > 1e-3
    twin.save_role(tmp_path)
    close(case.velocity(case.backbone.load_role(tmp_path)), changed, 2e-6)
    with pytest.raises(UserError, match=f"nowhere: no {case.backbone.denoiser_parts[0]}/ in it"):
        case.backbone.load_denoiser(tmp_path / "nowhere")


def test_lora_role_is_an_adapter_on_the_base(case: Case, tmp_path: Path) -> None:
    backbone = case.backbone.with_own_denoiser()  # adapters stay on the denoiser they were added to
    base = case.velocity(backbone)
    student, teacher = backbone.with_adapter("student", LORA), backbone.with_adapter("teacher", LORA)
    assert torch.equal(case.velocity(student), base)
    disturb(student)
    changed = case.velocity(student)
    assert (changed - base).abs().max() > 1e-3
    assert torch.equal(case.velocity(teacher), base)
    assert torch.equal(case.velocity(backbone), base)
    assert torch.equal(case.velocity(student), changed)

    student.save_role(tmp_path)
    assert torch.equal(case.velocity(case.backbone.with_own_denoiser().load_role(tmp_path)), changed)
    pipeline = case.family.load(case.folder)
    case.family.load_lora(pipeline, tmp_path)
    theirs = case.family.native_velocity(pipeline, case.noise, case.sigma, PROMPTS)
    close(changed, theirs)


def test_lora_adapts_attention_and_feed_forward(case: Case) -> None:
    adapted = case.backbone.with_own_denoiser().with_adapter("student", LORA).weights
    for name in case.backbone.lora_targets:
        assert any(f".{name}.lora_A." in key for key in adapted), name


def test_checkpointed_blocks_are_recomputed_under_their_own_adapter(case: Case) -> None:
    backbone = case.backbone.with_own_denoiser()
    student, teacher = backbone.with_adapter("student", LORA), backbone.with_adapter("teacher", LORA)
    disturb(student)
    disturb(teacher)

    def gradients() -> list[Tensor]:
        with torch.enable_grad():
            loss = case.velocity(student).square().mean()
        case.velocity(teacher)
        case.velocity(backbone)
        weights = list(student.weights.values())  # of which Qwen-Image's last block leaves the text's unused
        return list(torch.autograd.grad(loss, weights, materialize_grads=True))

    plain = gradients()
    assert max(float(gradient.abs().max()) for gradient in plain) > 1e-4
    assert backbone.adapters is not None
    for network in backbone.denoisers.values():
        network.enable_gradient_checkpointing(backbone.adapters.checkpointing)
    for ours, theirs in zip(gradients(), plain, strict=True):
        close(ours, theirs)
