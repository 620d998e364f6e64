"""A lever of `compute` saves memory or time and changes nothing else: loss and gradients are the plain step's."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rats_video.backbones import apply_compute
from rats_video.backbones.attention import check_attention, use_attention, used_attention
from rats_video.backbones.offload import OffloadedWeights
from rats_video.backbones.text_cache import TextCache
from rats_video.backbones.wan import WanBackbone
from rats_video.distillation.compute import cached_text, save_text
from rats_video.distillation.method import build_rats
from rats_video.distillation.roles import build_backbone, build_roles
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError
from rats_video.methods.rats import Rats, rats_step
from rats_video.methods.student import student_rollout
from rats_video.seeds import seeded
from rats_video.types import PromptBatch

CPU = torch.device("cpu")
LORA = ("student.weights.kind=lora", "student.weights.rank=4", "student.weights.alpha=4")
EMA = ("teacher.kind=ema", "teacher.num_steps=4")
ROLES = {"full": (), "full-ema": EMA, "lora": LORA, "lora-ema": (*LORA, *EMA)}
Make = Callable[..., DistillConfig]


class Step(NamedTuple):
    rats: Rats
    loss: Tensor
    grads: dict[str, Tensor]


def build(make_config: Make, *overrides: str) -> Rats:
    cfg = make_config(*overrides)
    rats = build_rats(cfg, *build_roles(cfg, build_backbone(cfg, CPU)))
    for i, role in enumerate((rats.student, rats.teacher.backbone)):
        if role.role is not None:  # type: ignore[attr-defined]  # fresh adapters change nothing
            for j, weight in enumerate(role.weights.values()):
                weight.data += 0.1 * torch.randn(weight.shape, generator=seeded(i, j))
    return rats


def take_step(rats: Rats, batch: PromptBatch) -> Step:
    loss, _ = rats_step(rats, batch)
    loss.backward()
    return Step(rats, loss.detach(), {name: weight.grad for name, weight in rats.student.weights.items()})  # type: ignore[misc]


def assert_same(one: Step, other: Step, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(one.loss, other.loss, atol=tolerance, rtol=tolerance)
    assert one.grads.keys() == other.grads.keys()
    assert any(grad.abs().max() > 1e-4 for grad in one.grads.values())
    for name, grad in one.grads.items():
        torch.testing.assert_close(grad, other.grads[name], atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def plain(make_config: Make) -> Callable[[str, PromptBatch], Step]:
    steps: dict[str, Step] = {}

    def call(roles: str, batch: PromptBatch) -> Step:
        if roles not in steps:
            steps[roles] = take_step(build(make_config, *ROLES[roles]), batch)
        return steps[roles]

    return call


@pytest.mark.parametrize(
    ("roles", "lever", "tolerance"),
    [
        ("full", "activation_checkpointing=true", 0.0),
        ("full-ema", "activation_checkpointing=true", 0.0),
        ("lora", "activation_checkpointing=true", 0.0),
        ("lora-ema", "activation_checkpointing=true", 0.0),
        ("lora", "offload=block", 0.0),
        ("lora-ema", "offload=leaf", 0.0),
        ("full", "cache_text=true", 1e-6),
        ("lora-ema", "cache_text=true", 1e-6),
        ("full", "attention=_native_math", 1e-5),
    ],
)
def test_lever_changes_nothing(
    make_config: Make, plain: Callable[[str, PromptBatch], Step], batch: PromptBatch, roles: str, lever: str,
    tolerance: float,
) -> None:  # fmt: skip
    assert_same(plain(roles, batch), take_step(build(make_config, *ROLES[roles], f"compute.{lever}"), batch), tolerance)


def test_offload_and_checkpointing_together(
    make_config: Make, plain: Callable[[str, PromptBatch], Step], batch: PromptBatch
) -> None:
    rats = build(make_config, *LORA, "compute.offload=block", "compute.activation_checkpointing=true")
    assert_same(plain("lora", batch), take_step(rats, batch))


def test_inputs_of_checkpointed_blocks_wait_on_the_host(
    make_config: Make, plain: Callable[[str, PromptBatch], Step], batch: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []

    class Watched(saved_tensors_hooks):
        def __init__(self, *, pin_memory: bool) -> None:
            assert pin_memory
            super().__init__(lambda tensor: kept.append(tensor) or tensor.clone(), lambda tensor: tensor)

    monkeypatch.setattr(apply_compute, "save_on_cpu", Watched)
    levers = ("compute.activation_checkpointing=true", "compute.activation_offload=true")
    for roles in ("full", "lora-ema"):
        assert_same(plain(roles, batch), take_step(build(make_config, *ROLES[roles], *levers), batch))
        tokens = [tensor for tensor in kept if tensor.ndim == 3 and len(tensor) == len(batch.noise)]
        assert len(tokens) >= 2 * 4 * 2  # two blocks, four steps: hidden states and text
        kept.clear()


CHECKPOINT = "activation_checkpointing"


@pytest.mark.parametrize("levers", [CHECKPOINT, f"{CHECKPOINT} activation_offload", "offload"])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_base_in_few_bits_trains_alike_under_every_lever(
    make_config: Make, plain: Callable[[str, PromptBatch], Step], batch: PromptBatch, quantization: str, levers: str
) -> None:
    bits = f"compute.quantization={quantization}"
    on = [f"compute.{lever}={'block' if lever == 'offload' else 'true'}" for lever in levers.split()]
    step = take_step(build(make_config, *ROLES["lora-ema"], bits), batch)
    assert_same(step, take_step(build(make_config, *ROLES["lora-ema"], bits, *on), batch))
    exact = plain("lora-ema", batch)
    ours, theirs = (torch.cat([grad.flatten() for grad in each.grads.values()]) for each in (step, exact))
    assert not torch.equal(ours, theirs)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.9


@pytest.mark.parametrize("between", ["teacher", "base"])
def test_backward_recomputes_under_the_adapter_of_forward(make_config: Make, batch: PromptBatch, between: str) -> None:
    grads = []
    for lever in ("false", "true"):
        rats = build(make_config, *ROLES["lora-ema"], f"compute.activation_checkpointing={lever}")
        student, teacher = rats.student, rats.teacher.backbone
        sigma, text = torch.full((2,), 0.7), student.encode_text(batch.prompts)
        out = student.velocity(batch.noise, sigma, text)
        other = teacher if between == "teacher" else base_of(teacher)
        with torch.no_grad():
            assert not torch.equal(other.velocity(batch.noise, sigma, text), out)
        out.square().sum().backward()
        grads.append({name: weight.grad for name, weight in student.weights.items()})
        assert all(weight.grad is None for weight in teacher.weights.values())
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def base_of(role: Any) -> Any:
    base = copy.copy(role)
    base.role = None
    return base


@pytest.mark.parametrize(("grad_steps", "with_grad"), [("1", {3}), ("2", {2, 3}), ("[0,2]", {0, 2})])
def test_gradient_of_chosen_steps_is_the_truncated_formula(
    make_config: Make, batch: PromptBatch, grad_steps: str, with_grad: set[int]
) -> None:
    rats = build(make_config, f"student.grad_steps={grad_steps}")
    student = rats.student
    weights = list(student.weights.values())
    got = student_rollout(rats, batch).x0
    sigmas, text = student.sigmas(4, rats.shift), student.encode_text(batch.prompts)
    x = batch.noise
    for step in range(4):  # x_{k+1} = x_k + (s_{k+1} - s_k) v(x_k), v held constant where it carries no gradient
        slope = student.velocity(x, sigmas[step].expand(2), text)
        x = x + (sigmas[step + 1] - sigmas[step]) * (slope if step in with_grad else slope.detach())
    torch.testing.assert_close(got, x, atol=1e-6, rtol=0)
    assert got.requires_grad == x.requires_grad == bool(with_grad)
    if with_grad:
        ours, theirs = (torch.autograd.grad(each.square().sum(), weights) for each in (got, x))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- attention


def test_attention_is_set_on_one_model_and_reported_from_its_layers(backbone: WanBackbone) -> None:
    other = backbone.with_own_denoiser().denoiser
    assert used_attention(backbone.denoiser) == "native"
    use_attention(backbone.denoiser, "_native_math", has_mask=False)
    assert used_attention(backbone.denoiser) == "_native_math"
    assert used_attention(other) == "native"
    backbone.denoiser.blocks[0].attn1.set_attention_backend("native")  # type: ignore[index,union-attr]
    assert used_attention(backbone.denoiser) == "_native_math+native"


def test_kernel_without_masks_gets_whole_text(backbone: WanBackbone, batch: PromptBatch) -> None:
    sigma, text = torch.full((2,), 0.7), backbone.encode_text(batch.prompts)
    compact = backbone.velocity(batch.noise, sigma, text)
    use_attention(backbone.denoiser, "_native_flash", has_mask=False)  # refuses any mask
    torch.testing.assert_close(backbone.velocity(batch.noise, sigma, text), compact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "message"),
    [
        ("sage", "cuda", "bfloat16", "sage has no backward pass"),
        ("xformers", "cpu", "float32", "xformers needs a GPU"),
        ("flex", "cpu", "float32", "flex needs a GPU"),
        ("flash", "cuda", "float32", "computes in bfloat16 only (set compute.dtype=bfloat16)"),
        ("flash", "cuda", "bfloat16", "flash is not installed, or too old (pip install 'flash-attn>=2.6.3'"),
        ("_flash_3", "cuda", "bfloat16", "_flash_3 is not installed, or too old (build flash-attn 3"),
        ("xformers", "cuda", "float32", "xformers is not installed, or too old (pip install 'xformers>=0.0.35')"),
    ],
)
def test_attention_that_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, backend: str, device: str, dtype: str, message: str
) -> None:
    for name in ("FLASH_ATTN", "FLASH_ATTN_3", "XFORMERS_ATTN"):
        monkeypatch.setattr(f"diffusers.models.attention_dispatch._CAN_USE_{name}", False)
    with pytest.raises(UserError) as caught:
        check_attention(backend, torch.device(device), dtype)
    assert str(caught.value).startswith("compute.attention: ")
    assert message in str(caught.value)


def test_masked_text_and_flash_do_not_go_together(backbone: WanBackbone) -> None:
    with pytest.raises(UserError, match="WanTransformer3DModel masks padding, which flash cannot"):
        use_attention(backbone.denoiser, "flash", has_mask=True)


# --------------------------------------------------------------------------------------------------------- compile


def test_a_base_in_few_bits_compiles(make_config: Make, batch: PromptBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = partial(apply_compute.compile_blocks, backend="eager")
    monkeypatch.setattr(apply_compute, "compile_blocks", backend)
    levers = (*ROLES["lora"], "compute.quantization=nf4", "compute.activation_checkpointing=true")
    plain, compiled = (build(make_config, *levers, f"compute.compile={on}") for on in ("false", "true"))
    assert_same(take_step(plain, batch), take_step(compiled, batch), 1e-6)


def test_compiled_step_is_the_same_and_switching_roles_compiles_each_once(
    make_config: Make, plain: Callable[[str, PromptBatch], Step], batch: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(apply_compute, "compile_blocks", partial(apply_compute.compile_blocks, backend=count))  # type: ignore[arg-type]
    rats = build(make_config, *ROLES["lora-ema"], "compute.compile=true", "compute.activation_checkpointing=true")
    assert_same(plain("lora-ema", batch), take_step(rats, batch), 1e-6)
    after_one = len(graphs)
    assert after_one >= 2  # the student's, with gradient, and the teacher's
    for index in (1, 2):
        take_step(rats, PromptBatch(index, batch.prompts, batch.noise, batch.num_steps))
    assert len(graphs) == after_one


def test_family_without_repeated_blocks_is_one_line() -> None:
    from diffusers import CogVideoXTransformer3DModel

    network = CogVideoXTransformer3DModel(num_attention_heads=1, attention_head_dim=16, num_layers=1, text_embed_dim=8)
    with pytest.raises(UserError, match=r"^compute.compile: CogVideoXTransformer3DModel has no repeated blocks"):
        apply_compute.compile_blocks(network)


# --------------------------------------------------------------------------------------------------------- offload


@pytest.mark.parametrize("level", ["block", "leaf"])
def test_no_more_than_a_group_is_fetched_at_a_time(
    backbone: WanBackbone, batch: PromptBatch, monkeypatch: pytest.MonkeyPatch, level: Any
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    fetch = OffloadedWeights._fetch

    def watched(self: OffloadedWeights, kept: Tensor) -> Tensor:
        nonlocal most
        tensor = fetch(self, kept)
        alive.append(weakref.ref(tensor.untyped_storage()))  # type: ignore[arg-type]
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    network = backbone.denoiser.requires_grad_(requires_grad=False)
    OffloadedWeights(network, CPU, level)
    monkeypatch.setattr(OffloadedWeights, "_fetch", watched)
    noise = batch.noise.clone().requires_grad_()
    out = backbone.velocity(noise, torch.full((2,), 0.7), backbone.encode_text(batch.prompts))
    forward = len(alive)
    assert sum(ref() is not None for ref in alive) == 0  # autograd keeps none
    out.square().sum().backward()
    assert len(alive) > forward  # they are fetched again
    assert noise.grad is not None
    block = len(list(network.blocks[0].parameters()))  # type: ignore[index,union-attr,arg-type]
    assert most <= (block if level == "block" else 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("compute.offload=block",), "compute.offload: keeps a frozen base in host memory, but all weights train"),
        ((*LORA, "compute.offload=leaf", "compute.compile=true"), "compute.offload: compiled blocks cannot be"),
        (("compute.quantization=nf4",), "compute.quantization: keeps a frozen base in few bits, but all weights train"),
    ],
)
def test_levers_that_exclude_each_other_are_one_line(
    make_config: Make, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        build_backbone(make_config(*overrides), CPU)


# ------------------------------------------------------------------------------------------------------------ text


def test_cached_text_frees_the_encoder_and_serves_a_resumed_run(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, captions: tuple[str, ...]
) -> None:
    from transformers import UMT5EncoderModel

    encoders: list[weakref.ref[Any]] = []
    init = UMT5EncoderModel.__init__

    def watched(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        encoders.append(weakref.ref(self))

    monkeypatch.setattr(UMT5EncoderModel, "__init__", watched)
    cfg, file = make_config("compute.cache_text=true"), tmp_path / "text.safetensors"
    backbone = build_backbone(cfg, CPU)
    gc.collect()
    assert len(encoders) == 1
    assert encoders[0]() is None
    save_text(cfg, backbone, file)
    again = build_backbone(cfg, CPU, text=cached_text(cfg, file))
    assert len(encoders) == 1
    assert again.unknown_words("a red wombat") == ["wombat"]
    for prompt in ("", *captions):
        assert torch.equal(again.encode_text([prompt]).embeds, backbone.encode_text([prompt]).embeds)
    with pytest.raises(UserError, match="was not encoded before the text encoder was freed: 'a red wombat'"):
        again.encode_text(["a red wombat"])


def test_text_of_another_model_or_other_prompts_is_encoded_anew(make_config: Make, tmp_path: Path) -> None:
    cfg, file = make_config("compute.cache_text=true"), tmp_path / "text.safetensors"
    assert cached_text(cfg, file) is None
    save_text(cfg, build_backbone(cfg, CPU), file)
    assert cached_text(cfg, file) is not None
    assert cached_text(make_config("compute.cache_text=true", "compute.dtype=bfloat16"), file) is None
    assert TextCache.load(file, "another model", [""]) is None
    more = tmp_path / "more.txt"
    more.write_text("a blue square\na fast blue square\n")
    assert cached_text(make_config("compute.cache_text=true", f"prompts.train={more}"), file) is None
    file.write_bytes(file.read_bytes()[:-4])
    assert cached_text(cfg, file) is None
    save_file({"0.embeds": torch.zeros(1, 1, 1)}, file)  # not ours
    assert cached_text(cfg, file) is None


# ----------------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("roles", ["full", "lora-ema"])
def test_bfloat16_computes_and_float32_trains(make_config: Make, batch: PromptBatch, roles: str) -> None:
    grads = []
    for dtype in ("float32", "bfloat16"):
        rats = build(make_config, *ROLES[roles], f"compute.dtype={dtype}")
        student = rats.student
        noise = batch.noise[:1, :, :, :2, :2]
        text = student.encode_text(batch.prompts[:1])
        out = student.velocity(noise, torch.full((1,), 0.7), text)
        assert out.dtype == torch.float32
        out.square().mean().backward()
        grads.append(torch.cat([weight.grad.flatten() for weight in student.weights.values()]))  # type: ignore[union-attr]
        for role in (student, rats.teacher.backbone) if roles == "lora-ema" else (student,):
            assert {weight.dtype for weight in role.weights.values()} == {torch.float32}
    base = base_of(rats.teacher.backbone)
    assert base.denoiser.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert base.parts["text_encoder"].dtype == torch.bfloat16
    assert base.parts["vae"].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.999
    assert not torch.equal(*grads)
