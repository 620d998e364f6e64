"""Decoding with a bounded graph: the VAE's own pixels always, its own gradients where that is promised."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rats_video.backbones.chunked import Caches, chunk_sizes, decode_chunks
from rats_video.backbones.cogvideox_decode import decode_cogvideox
from rats_video.backbones.compute import DecodeConfig
from rats_video.backbones.wan import WanBackbone, use_fast_norms
from rats_video.backbones.wan_decode import decode_unclamped, wan_step
from rats_video.distillation.roles import build_backbone, prepare_base
from rats_video.distillation.settings import DistillConfig
from rats_video.distillation.teacher_identity import teacher_identity
from rats_video.errors import UserError
from rats_video.methods.teacher import FrozenTeacherConfig
from rats_video.seeds import seeded
from rats_video.training.batches import draw_batch

pytestmark = pytest.mark.pipeline

PLAIN, CHECKPOINT = DecodeConfig(), DecodeConfig(checkpoint=True)
OFFLOAD = DecodeConfig(checkpoint=True, offload=True)
Decode = Callable[[Any, Tensor, DecodeConfig | None, range | None], Tensor]


@dataclass(frozen=True)
class Codec:
    """A VAE, our decode of it, and how many latent frames it decodes at a time when there are F of them."""

    vae: Any
    decode: Decode
    sizes: Callable[[int], list[int]]
    channels: int = 4

    def latents(self, frames: int) -> Tensor:
        return torch.randn(1, self.channels, frames, 2, 2, generator=seeded(frames)).requires_grad_()

    def __call__(self, latents: Tensor, decoding: DecodeConfig = PLAIN, grad_frames: range | None = None) -> Tensor:
        return self.decode(self.vae, latents, decoding, grad_frames)

    def widened(self, frames: int, window: range) -> list[bool]:
        """Which latent frames share a chunk with the window."""
        chunk = [index for index, size in enumerate(self.sizes(frames)) for _ in range(size)]
        return [index in {chunk[frame] for frame in window} for index in chunk]


def wan(**changes: Any) -> Any:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    options = {
        "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "attn_scales": [],
        "temperal_downsample": [True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
    }  # fmt: skip
    return AutoencoderKLWan(**options | changes).eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def codecs() -> dict[str, Codec]:
    from diffusers import AutoencoderKLCogVideoX

    fast = wan()
    use_fast_norms(fast)
    patched = wan(is_residual=True, patch_size=2, in_channels=12, out_channels=12)
    torch.manual_seed(1)
    cogvideox = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
    ).eval().requires_grad_(requires_grad=False)  # fmt: skip
    return {
        "wan21": Codec(fast, decode_unclamped, lambda frames: [1] * frames),
        "wan22": Codec(patched, decode_unclamped, lambda frames: [1] * frames),
        "cogvideox": Codec(cogvideox, decode_cogvideox, lambda frames: chunk_sizes(frames, 2)),
    }


@pytest.fixture(params=["wan21", "wan22", "cogvideox"])
def codec(request: pytest.FixtureRequest, codecs: dict[str, Codec]) -> Codec:
    ours = codecs[request.param]
    return replace(ours, vae=copy.deepcopy(ours.vae))


def gradient(pixels: Tensor, latents: Tensor, frames: slice = slice(None)) -> Tensor:
    """Of a loss that weighs every pixel of some frames differently."""
    weights = torch.randn(pixels.shape, generator=seeded(7))
    return torch.autograd.grad((pixels * weights)[:, :, frames].sum(), latents, retain_graph=True)[0]


def saved_bytes(codec: Codec, frames: int, decoding: DecodeConfig, grad_frames: range | None) -> int:
    """What autograd keeps on the device; the hooks of an offload take theirs before these see it."""
    latents, storages = codec.latents(frames), {}
    weights = {weight.untyped_storage().data_ptr() for weight in codec.vae.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        codec(latents, decoding, grad_frames)
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in weights)


# --------------------------------------------------------------------------------------------------- the whole clip


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_plain_decode_is_the_vaes(codec: Codec, frames: int) -> None:
    ours, theirs = codec.latents(frames), codec.latents(frames)
    pixels, native = codec(ours), codec.vae.decode(theirs, return_dict=False)[0]
    if codec.decode is decode_unclamped:
        pixels = pixels.clamp(-1, 1)
    assert 0.01 < native.std() < 1
    assert torch.equal(pixels, native)
    torch.testing.assert_close(gradient(pixels, ours), gradient(native, theirs), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("decoding", [CHECKPOINT, OFFLOAD])
def test_recomputing_changes_neither_pixels_nor_gradients(codec: Codec, decoding: DecodeConfig) -> None:
    latents = codec.latents(5)
    plain, ours = codec(latents), codec(latents, decoding)
    assert torch.equal(ours, plain)
    expected = gradient(plain, latents)
    assert expected.abs().amin(dim=(0, 1, 3, 4)).min() > 0  # through the whole clip
    torch.testing.assert_close(gradient(ours, latents), expected, atol=1e-6, rtol=1e-6)


def test_without_gradient_nothing_is_saved(codec: Codec) -> None:
    latents = codec.latents(3)
    with torch.no_grad():
        assert torch.equal(codec(latents, OFFLOAD), codec(latents))
        assert saved_bytes(codec, 3, CHECKPOINT, None) == 0


# -------------------------------------------------------------------------------------------------------- a window


@pytest.mark.parametrize("decoding", [PLAIN, CHECKPOINT, OFFLOAD])
@pytest.mark.parametrize("window", [range(1), range(2, 4), range(4, 5)])
def test_a_window_has_all_pixels_and_its_own_gradient(codec: Codec, window: range, decoding: DecodeConfig) -> None:
    latents = codec.latents(5)
    plain, ours = codec(latents), codec(latents, decoding, window)
    assert torch.equal(ours, plain)
    reached = codec.widened(5, window)
    assert gradient(ours, latents).abs().amax(dim=(0, 1, 3, 4)).gt(0).tolist() == reached

    # As autograd has it for the window's pixels and latents in the decode of the whole clip.
    first, last = reached.index(True), 5 - reached[::-1].index(True)
    pixels = slice(max(0, 4 * first - 3), 4 * last - 3)
    expected = gradient(plain, latents, pixels)[:, :, first:last]
    torch.testing.assert_close(gradient(ours, latents)[:, :, first:last], expected, atol=1e-6, rtol=1e-6)


def test_pixels_outside_a_window_carry_no_gradient(codecs: dict[str, Codec]) -> None:
    latents = codecs["wan21"].latents(4)
    pixels = codecs["wan21"](latents, PLAIN, range(1, 2))
    assert not gradient(pixels, latents, slice(1)).any()
    assert gradient(pixels, latents, slice(1, 5)).any()
    assert not gradient(pixels, latents, slice(5, None)).any()


# --------------------------------------------------------------------------------------------------------- memory


def test_plain_decode_saves_more_for_a_longer_clip(codec: Codec) -> None:
    assert saved_bytes(codec, 9, PLAIN, None) > 1.7 * saved_bytes(codec, 5, PLAIN, None)


@pytest.mark.parametrize("decoding", [PLAIN, CHECKPOINT])
def test_a_window_saves_the_same_for_any_clip(codec: Codec, decoding: DecodeConfig) -> None:
    short, long = (saved_bytes(codec, frames, decoding, range(3, 4)) for frames in (5, 9))
    assert 0 < long < 1.02 * short


def test_checkpointing_saves_the_caches_only(codec: Codec) -> None:
    plain = saved_bytes(codec, 5, PLAIN, None)
    assert 0 < saved_bytes(codec, 5, CHECKPOINT, None) < plain / 5


@pytest.mark.parametrize("grad_frames", [None, range(1, 3)])
def test_offloading_leaves_the_latents_on_the_device(codec: Codec, grad_frames: range | None) -> None:
    assert saved_bytes(codec, 9, OFFLOAD, grad_frames) <= codec.latents(9).nbytes


@pytest.mark.parametrize("decoding", [CHECKPOINT, OFFLOAD])
def test_only_offloading_frees_the_caches(codec: Codec, decoding: DecodeConfig) -> None:
    caches: list[weakref.ref[Any]] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        after = output[1] if "conv_cache" in kwargs else kwargs["feat_cache"]
        kept = [entry for entry in tree_leaves(after) if isinstance(entry, Tensor)]
        caches.extend(weakref.ref(entry.untyped_storage()) for entry in kept)

    codec.vae.decoder.register_forward_hook(note, with_kwargs=True)
    latents = codec.latents(5)
    pixels = codec(latents, decoding)
    gc.collect()
    assert len(caches) > 10
    assert any(cache() is not None for cache in caches) == (not decoding.offload)
    assert gradient(pixels, latents).any()


def test_checkpointing_computes_one_block_at_a_time(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved_bytes(codec, 3, PLAIN, None)
    names = list(codec.vae.state_dict())
    with monkeypatch.context() as patch:  # the blocks of a chunk recompute, the chunk around them does not
        patch.setattr("rats_video.backbones.chunked.recomputed", lambda function, *args: function(*args))
        assert saved_bytes(codec, 3, CHECKPOINT, None) < whole / 2
    assert list(codec.vae.state_dict()) == names


def test_checkpointing_is_switched_off_again(codec: Codec) -> None:
    whole = saved_bytes(codec, 3, PLAIN, None)
    assert saved_bytes(codec, 3, CHECKPOINT, None) < whole / 2
    assert saved_bytes(codec, 3, PLAIN, None) == whole


def test_cogvideox_keeps_no_input_of_a_convolution_without_memory(codecs: dict[str, Codec]) -> None:
    codec = codecs["cogvideox"]
    latents = codec.latents(2)
    everything = codec.vae.decoder(latents, conv_cache=None)[1]
    assert "conv_y" in everything["norm_out"]
    seen: list[Caches] = []
    hook = codec.vae.decoder.register_forward_hook(
        lambda _module, _args, kwargs, _output: seen.append(kwargs["conv_cache"]), with_kwargs=True
    )
    codec(codec.latents(4))
    hook.remove()
    assert seen[0] is None
    assert set(seen[1]) == set(everything)
    assert seen[1]["norm_out"] == {}
    assert set(seen[1]["mid_block"]["resnet_0"]) == set(everything["mid_block"]["resnet_0"])


# ----------------------------------------------------------------------------------------------- what a step must be


def test_wan_steps_leave_their_caches_alone(codecs: dict[str, Codec]) -> None:
    codec = codecs["wan22"]
    step, frame = wan_step(codec.vae), codec.latents(1).detach()
    _, first = step(frame, None)
    assert {"Rep", None} <= {entry for entry in first if not isinstance(entry, Tensor)}
    before = [entry.clone() if isinstance(entry, Tensor) else entry for entry in first]
    once, second = step(frame, first)
    assert "Rep" not in [entry for entry in second if not isinstance(entry, Tensor)]
    twice, _ = step(frame, first)
    assert torch.equal(once, twice)
    for entry, old in zip(first, before, strict=True):
        assert torch.equal(entry, old) if isinstance(entry, Tensor) else entry == old


@dataclass
class Recurrence:
    """The simplest thing with a memory: two pixel frames a latent one, both of which see all of the past."""

    calls: int = 0

    def __call__(self, chunk: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
        self.calls += 1
        mode, nested, count = caches or ("Rep", {"past": None}, 0)
        past = torch.zeros_like(chunk[:, :, 0]) if nested["past"] is None else nested["past"]
        pixels = []
        for frame in chunk.unbind(dim=2):
            past = torch.tanh(past * 1.5 + frame) + 0.1 * count
            pixels += [past.sin(), past.cos()]
        return torch.stack(pixels, dim=2), (mode, {"past": past}, count + 1)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.booleans(), st.booleans())
def test_any_window_of_any_clip_in_any_chunks(data: st.DataObject, checkpoint: bool, offload: bool) -> None:  # noqa: FBT001
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    frames = sum(sizes)
    first = data.draw(st.integers(0, frames - 1))
    window = data.draw(st.none() | st.integers(first + 1, frames).map(lambda last: range(first, last)))
    latents = torch.randn(2, 3, frames, 1, 1, generator=seeded(frames)).requires_grad_()
    decoding = DecodeConfig(checkpoint=checkpoint, offload=checkpoint and offload)
    step = Recurrence()

    plain = decode_chunks(Recurrence(), latents, sizes)
    ours = decode_chunks(step, latents, sizes, decoding=decoding, grad_frames=window)
    assert torch.equal(ours, plain)

    inside = [not window or any(start <= frame < start + size for frame in window)
              for start, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True)]  # fmt: skip
    mask = torch.tensor([near for near, size in zip(inside, sizes, strict=True) for _ in range(size)])
    weights = mask.repeat_interleave(2).float()[None, None, :, None, None]
    expected = torch.autograd.grad((plain * weights).sum(), latents)[0] * mask[None, None, :, None, None]
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), latents)[0], expected, atol=1e-6, rtol=1e-6)
    assert step.calls == len(sizes) + checkpoint * sum(inside)  # backward computes each checkpointed chunk once more


@pytest.mark.parametrize(
    ("frames", "sizes"), [(1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (13, [3, 2, 2, 2, 2, 2])]
)
def test_cogvideox_chunks(frames: int, sizes: list[int]) -> None:
    assert chunk_sizes(frames, 2) == sizes


# ---------------------------------------------------------------------------------------------- in a training run


def test_decoding_in_bfloat16_rounds_pixels_and_gradients(make_config: Callable[..., DistillConfig]) -> None:
    latents, found = torch.randn(1, 4, 2, 4, 4, generator=seeded(5)).requires_grad_(), {}
    cfg = make_config("clip.num_frames=5")
    backbone = build_backbone(cfg, torch.device("cpu"))
    assert cfg.compute.decode.dtype == "float32"
    means = [buffer.clone() for buffer in backbone.vae.buffers()]
    for dtype in ("float32", "bfloat16"):
        prepare_base(make_config(f"compute.decode.dtype={dtype}"), backbone, torch.device("cpu"))
        assert {str(weight.dtype) for weight in backbone.vae.parameters()} == {f"torch.{dtype}"}
        pixels = backbone.with_own_denoiser().decode(latents)
        assert pixels.dtype == torch.float32
        found[dtype] = (pixels.detach(), gradient(pixels, latents).flatten())
    (exact, wanted), (rounded, ours) = found["float32"], found["bfloat16"]
    assert 0 < (rounded - exact).abs().mean() < 0.01
    assert 0.99 < torch.cosine_similarity(ours, wanted, dim=0) < 1
    assert all(torch.equal(old, new) for old, new in zip(means, backbone.vae.buffers(), strict=True))


def test_a_stored_teacher_knows_what_it_was_decoded_in(make_config: Callable[..., DistillConfig]) -> None:
    def identity(dtype: str) -> dict[str, object]:
        cfg = make_config(f"compute.decode.dtype={dtype}")
        assert isinstance(cfg.teacher, FrozenTeacherConfig)
        return teacher_identity(cfg, cfg.teacher)

    assert identity("float32") != identity("bfloat16")


def test_the_levers_reach_the_backbone(loaded: WanBackbone, backbone: WanBackbone) -> None:
    latents = (4 * torch.randn(1, 4, 4, 4, 4, generator=seeded(5))).requires_grad_()
    backbone.decoding = OFFLOAD
    plain, videos = loaded.decode(latents), backbone.decode(latents, range(2, 3))
    assert torch.equal(videos, plain)
    saturated = (videos <= 0) | (videos >= 1)
    saturated[:, :5] = saturated[:, 9:] = False  # the pixels of latent frame 2
    (grad,) = torch.autograd.grad(videos[saturated].sum(), latents)
    assert grad.abs().amax(dim=(0, 1, 3, 4)).gt(0).tolist() == [False, False, True, False]


def test_a_window_moves_every_step_and_changes_nothing_else(
    loaded: WanBackbone, make_config: Callable[..., DistillConfig], captions: tuple[str, ...]
) -> None:
    reuse = ("clip.num_frames=17", "teacher.reuse=2")
    whole, windowed = make_config(*reuse), make_config(*reuse, "compute.decode.window=2")
    places = []
    for step in range(12):
        one, other = (draw_batch(loaded, cfg, captions, step) for cfg in (whole, windowed))
        assert one.prompts == other.prompts
        assert torch.equal(one.noise, other.noise)
        assert one.grad_frames is None
        assert other.grad_frames is not None
        assert len(other.grad_frames) == 2
        places.append(other.grad_frames.start)
        again = draw_batch(loaded, windowed, captions, step)
        assert again.grad_frames == other.grad_frames
    assert set(places) == {0, 1, 2, 3}
    assert places[::2] != places[1::2]  # updates that share a teacher rollout do not share a window


def test_offload_without_checkpoint_is_refused(make_config: Callable[..., DistillConfig]) -> None:
    with pytest.raises(UserError, match=r"compute\.decode.*checkpoint"):
        make_config("compute.decode.offload=true")
