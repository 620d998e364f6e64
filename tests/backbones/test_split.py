"""Splitting denoisers over processes, as far as a stand-in for the others shows it; tests/distributed has the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from rats_video.backbones.split import split_tokens, split_weights
from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.checks import check_compute
from rats_video.distillation.parallel import split_roles
from rats_video.distillation.roles import build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.runtime import ALONE, Runtime

CPU = torch.device("cpu")
MakeConfig = Callable[..., DistillConfig]


@pytest.fixture
def _of_four(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the first of four, of which the others never answer."""
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # diffusers divides by it
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_of_four")
def test_every_weight_is_split(loaded: WanBackbone, make_config: MakeConfig) -> None:
    roles = build_roles(make_config("student.weights.kind=lora", "student.weights.rank=8"), loaded.with_own_denoiser())
    whole = [(name, tuple(weight.shape)) for name, weight in roles[0].denoiser.named_parameters()]
    split_weights([roles[0].denoiser], Runtime.join(CPU))
    weights = list(roles[0].denoiser.named_parameters())
    assert [(name, tuple(weight.shape)) for name, weight in weights] == whole
    assert all(isinstance(weight, DTensor) for _, weight in weights)
    local = sum(weight.to_local().numel() for _, weight in weights)
    assert local == pytest.approx(sum(weight.numel() for _, weight in weights) / 4, rel=0.05)
    assert (
        roles[0].weights.keys()
        == build_roles(make_config("student.weights.kind=lora", "student.weights.rank=8"), loaded.with_own_denoiser())[
            0
        ].weights.keys()
    )


@pytest.mark.usefixtures("_of_four")
def test_processes_are_split_by_role() -> None:
    runtime = Runtime.join(CPU, context=2, reward_ranks=2)
    assert (runtime.rank, runtime.trainers, runtime.context, len(runtime.links)) == (0, 2, 2, 2)
    with pytest.raises(UserError, match=r"^parallel\.context: 3 training processes are no multiple of 2"):
        Runtime.join(CPU, context=2, reward_ranks=1)
    with pytest.raises(UserError, match=r"^parallel\.reward_ranks: 4 of 4 processes leave none to train"):
        Runtime.join(CPU, reward_ranks=4)


@pytest.mark.usefixtures("_of_four")
def test_clips_that_cannot_be_shared_are_one_line(loaded: WanBackbone) -> None:
    runtime = Runtime.join(CPU, context=2)
    odd_one = CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1)
    with pytest.raises(
        UserError,
        match=r"^parallel\.context: CogVideoXTransformer3DModel cannot share a clip \(use 1; these can: Wan, LTX-",
    ):
        split_tokens([odd_one], 32, runtime)
    with pytest.raises(UserError, match=r"^parallel\.context: 2 does not divide the 33 tokens of a clip$"):
        split_tokens([loaded.with_own_denoiser().denoiser], 33, runtime)
    with pytest.raises(UserError, match=r"^parallel\.context: 4 does not divide the 2 attention heads$"):
        split_tokens([loaded.with_own_denoiser().denoiser], 32, Runtime.join(CPU, context=4))


@pytest.mark.usefixtures("_of_four")
def test_kernel_that_cannot_share_a_clip_is_one_line(loaded: WanBackbone) -> None:
    network = loaded.with_own_denoiser().parts["transformer"]
    for block in network.blocks:
        block.attn1.processor._attention_backend = "xformers"
    with pytest.raises(UserError, match=r"^compute\.attention: .* cannot share a clip \(use native or flash\)$"):
        split_tokens([network], 32, Runtime.join(CPU, context=2))


@pytest.mark.parametrize(
    ("lever", "expected"),
    [
        ("compute.offload=block", r"^compute\.offload: does not go with parallel\.shard"),
        ("training.optimizer.kind=adamw8bit", r"^training\.optimizer\.kind: does not go with parallel\.shard"),
        (
            "method={kind: dmd2, fake_score: {optimizer: {kind: adamw8bit, lr: 1e-3}}}",
            r"^method\.fake_score\.optimizer\.kind: does not go with parallel\.shard",
        ),
    ],
)
def test_levers_that_do_not_go_with_split_weights(make_config: MakeConfig, lever: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_compute(make_config("parallel.shard=true", lever), CPU)


@pytest.mark.parametrize("kind", ["dmd2", "senseflow", "advdmd", "rtdmd", "dollar", "consistency", "t2v_turbo"])
def test_experts_that_clips_call_on_their_own_are_not_split(
    loaded: WanBackbone, make_config: MakeConfig, kind: str
) -> None:
    experts = loaded.with_own_denoiser()
    experts.denoiser_parts = ("transformer", "transformer_2")
    experts.parts["transformer_2"] = experts.parts["transformer"]
    split_roles(make_config(f"method.kind={kind}"), [experts], [], ALONE)  # each process has all of them
    with pytest.raises(UserError, match=rf"^parallel\.shard: .*{kind} draws a noise level a clip.*two experts"):
        split_roles(make_config(f"method.kind={kind}", "parallel.shard=true"), [experts], [], ALONE)
    split_roles(make_config("method.kind=refl", "parallel.shard=true"), [experts], [], ALONE)


@pytest.mark.usefixtures("_of_four")
def test_clips_cannot_be_shared_without_a_gpu(loaded: WanBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"^parallel\.context: clips can only be shared by GPUs, 0 seen \(use 1\)$"):
        split_tokens([loaded.with_own_denoiser().denoiser], 32, Runtime.join(CPU, context=2))
