"""Tests a reward on two clips before anything is trained on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rats_video.errors import UserError
from rats_video.rewards.base import frames_seen_for, is_differentiable
from rats_video.seeds import seeded
from rats_video.sound import Sound, hears, sees
from rats_video.types import ClipSpec, LatentScorer, Reward, RewardScores

_RATE = 24_000  # of the sound that a reward is tested on, a second
_SAME = 5e-3  # of a score: bfloat16 rounds other batch sizes differently
_SAME_OF_GAP = 0.25  # of the two clips' difference: a mean over both clips would change a score by half of it


@dataclass(frozen=True)
class SelfTest:
    """The result of a test.

    Args:
        where: the key of the reward.
        scores: of the two clips.
        differentiable: as the reward says.
        seen: indices of the frames (of a latent reward: latent frames) that it claims to look at.
        gradient: of the first clip's score, by frame of each clip: norms `[2, frames]`; None if not asked for.
        forward_seconds: of the two clips together.
        backward_seconds: of the first clip's score.
    """

    where: str
    scores: RewardScores
    differentiable: bool
    seen: tuple[int, ...]
    gradient: Tensor | None
    forward_seconds: float
    backward_seconds: float

    def require_loss(self) -> None:
        """Raise UserError unless the reward can be maximised by its gradient."""
        if not self.differentiable:
            fix = "set method.policy of rats or method.kind=grpo, which need no gradient, or method.reward_weight=0"
            raise UserError("is not differentiable and cannot be a direct loss", where=self.where, fix=fix)
        assert self.gradient is not None
        first, second = self.gradient
        if not bool(self.gradient.isfinite().all()):
            raise UserError("its gradient is not finite on smooth clips", where=self.where, fix="use float32 weights")
        if blind := [frame for frame in self.seen if first[frame] == 0]:
            fix = "say so in its looks_at(num_frames), declare it `differentiable = False`, or mend its gradient"
            raise UserError(f"no gradient reaches {_frames(blind)}", where=self.where, fix=fix)
        if bool(second.any()):
            raise UserError("the gradient of a clip's score reaches another clip", where=self.where, fix=_ALONE)


_ALONE = "score each clip of a batch on its own"


def self_test(
    reward: Reward | LatentScorer,
    clip: ClipSpec,
    prompts: Sequence[str],
    *,
    where: str,
    device: torch.device | str = "cpu",
    latent_shape: Sequence[int] | None = None,
    with_gradient: bool = True,
) -> SelfTest:
    """Score two smooth seeded clips of the run's size, together and alone.

    Args:
        reward: one that scores latents is given smooth latents.
        clip: the run's size.
        prompts: some of the run's; the first and the last are used.
        where: the reward's key, for errors.
        device: the reward's.
        latent_shape: `[C, F, H, W]`, for a reward that scores latents.
        with_gradient: also backpropagate the first clip's score, if the reward says that it is differentiable.

    Raises:
        UserError: scores have another shape than `RewardScores` says, are not finite, or depend on the other clip.
    """
    pair, score = (prompts[0], prompts[-1]), _scorer(reward, clip, device)
    if isinstance(reward, LatentScorer):
        assert latent_shape is not None
        inputs, frame_dim = smooth_latents(latent_shape).to(device), 2
        seen = torch.arange(latent_shape[1])
    elif not sees(reward):
        inputs, frame_dim, seen = smooth_sound(clip).to(device), 1, torch.arange(clip.num_frames)
    else:
        inputs, frame_dim = smooth_clips(clip).to(device), 1
        seen = frames_seen_for(reward, pair[0], clip.num_frames)
    differentiable = is_differentiable(reward)
    inputs.requires_grad_(with_gradient and differentiable)

    began = _now(device)
    with torch.set_grad_enabled(inputs.requires_grad):
        scores = score(inputs, pair, 0)
    forward_seconds = _now(device) - began
    _check_scores(scores, clip.num_frames, where)
    began = _now(device)
    gradient = _gradient(scores.clip[0], inputs, frame_dim) if inputs.requires_grad else None
    backward_seconds = _now(device) - began
    with torch.no_grad():
        alone = torch.cat([score(inputs[i : i + 1], pair[i : i + 1], i).clip for i in range(2)])
    _check_alone(scores.clip.detach(), alone, where)
    return SelfTest(where, scores, differentiable, tuple(seen.tolist()), gradient, forward_seconds, backward_seconds)


def _scorer(
    reward: Reward | LatentScorer, clip: ClipSpec, device: torch.device | str
) -> Callable[[Tensor, Sequence[str], int], RewardScores]:
    """Scores the inputs: latents, pixels, or the sound of a reward that only hears, cut into a stretch a frame.

    The last argument says which of the two clips is the first of them.
    """

    def score(inputs: Tensor, prompts: Sequence[str], first: int) -> RewardScores:
        if isinstance(reward, LatentScorer):
            return reward.score_latents(inputs, prompts)
        if not hears(reward):
            return reward(inputs, prompts)
        stretches = inputs if not sees(reward) else smooth_sound(clip)[first : first + len(inputs)].to(device)
        sound = Sound(stretches.flatten(1)[:, None], _RATE)
        scores: RewardScores = reward(inputs, prompts, sound)  # type: ignore[call-arg]
        return scores

    return score


def smooth_sound(clip: ClipSpec) -> Tensor:
    """The sound of two clips `[2, T, samples a frame]`: two chords with a little noise, always the same ones."""
    samples = round(_RATE / clip.fps)
    time = torch.arange(clip.num_frames * samples) / _RATE
    chords = [[220.0, 523.0, 1318.0], [311.0, 740.0, 2489.0]]
    waves = torch.stack([sum((torch.sin(2 * torch.pi * tone * time) for tone in chord), time * 0) for chord in chords])
    noise = torch.randn(waves.shape, generator=seeded(0, 8))
    stretches: Tensor = (0.1 * waves + 0.02 * noise).unflatten(1, (clip.num_frames, samples))
    return stretches


def smooth_clips(clip: ClipSpec) -> Tensor:
    """Two clips `[2, T, 3, height, width]` in [0.1, 0.9] that change slowly in space and time, always the same two.

    A fine grain is added: with quite even change, rewards that compare neighbours would have no slope in the frames
    between.
    """
    smooth = _smooth(3, (clip.num_frames, clip.height, clip.width)).transpose(1, 2).contiguous()
    return smooth * 0.78 + 0.1 + 0.02 * torch.rand(smooth.shape, generator=seeded(0, 7))


def smooth_latents(shape: Sequence[int]) -> Tensor:
    """Two latents `[2, C, F, H, W]` of about unit size."""
    channels, *sizes = shape
    return (_smooth(channels, sizes) - 0.5) * 12**0.5  # a uniform's standard deviation is 1 / sqrt(12)


def _smooth(channels: int, sizes: Sequence[int]) -> Tensor:
    """Uniform noise on a grid of a twelfth of the frames and 5 by 5 places, `[2, channels, *sizes]`."""
    num_frames = sizes[0]
    coarse = torch.rand(2, channels, num_frames // 12 + 2, 5, 5, generator=seeded(0, 6))
    return F.interpolate(coarse, tuple(sizes), mode="trilinear", align_corners=True)


def _gradient(score: Tensor, inputs: Tensor, frame_dim: int) -> Tensor:
    """Norms `[2, frames]`; zeros without a path in the graph."""
    if not score.requires_grad:
        return torch.zeros(2, inputs.shape[frame_dim])
    (gradient,) = torch.autograd.grad(score, inputs, allow_unused=True)
    if gradient is None:
        return torch.zeros(2, inputs.shape[frame_dim])
    norms: Tensor = gradient.movedim(frame_dim, 1).flatten(2).norm(dim=-1)
    return norms.cpu()


def _check_scores(scores: RewardScores, num_frames: int, where: str) -> None:
    named = {"clip": scores.clip, **{f"parts[{name!r}]": part for name, part in scores.parts.items()}}
    shapes = dict.fromkeys(named, (2,)) | {"frames": (2, num_frames)}
    if scores.frames is not None:
        named["frames"] = scores.frames
    for name, values in named.items():
        shape = list(shapes[name])
        if list(values.shape) != shape:
            what = f"{name} of two clips of {num_frames} frames must be {shape}, got {list(values.shape)}"
            raise UserError(what, where=where)
        if not bool(values.isfinite().all()):
            raise UserError(f"{name} of a smooth clip is not finite: {values.tolist()}", where=where)


def _check_alone(together: Tensor, alone: Tensor, where: str) -> None:
    gap = (together[0] - together[1]).abs()
    if bool(((together - alone).abs() > _SAME * together.abs().max() + _SAME_OF_GAP * gap).any()):
        what = f"a clip's score depends on the batch: {together.tolist()} together, {alone.tolist()} alone"
        raise UserError(what, where=where, fix=_ALONE)


def _frames(frames: Sequence[int]) -> str:
    """`frames 1 to 48`, `frame 3`, `frames 0, 4, 8 ... 48`."""
    if len(frames) == 1:
        return f"frame {frames[0]}"
    if frames[-1] - frames[0] == len(frames) - 1:
        return f"frames {frames[0]} to {frames[-1]}"
    shown = [str(frame) for frame in frames]
    return f"frames {', '.join(shown if len(shown) <= 4 else [*shown[:3], '...', shown[-1]])}"


def _now(device: torch.device | str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
