"""What clips are made of: encoded prompts, and the frames that are given where a video starts from a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, cat


@dataclass(frozen=True)
class GivenFrames:
    """What is known of the frames of B clips before they are made: the picture that a video starts from.

    A family takes it in one of two ways, or both: as latents that are held while the others are denoised, or as further
    channels of the denoiser's input.

    Args:
        held: latents `[B, C, F, H, W]` that hold the given frames; what is in the others counts for nothing.
        is_held: for each of the F latent frames, if it is one of them.
        channels: `[B, C', F, H, W]`, put behind the noisy latents' own.
        image: `[B, L, D]`, features of an image encoder that the denoiser attends to (Wan 2.1's CLIP).
    """

    held: Tensor | None = None
    is_held: tuple[bool, ...] = ()
    channels: Tensor | None = None
    image: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> GivenFrames:
        """The same with every tensor changed, e.g. moved or expanded along the batch."""
        held, channels, image = (
            None if part is None else change(part) for part in (self.held, self.channels, self.image)
        )
        return GivenFrames(held, self.is_held, channels, image)

    @staticmethod
    def hold_first(latents: Tensor, frames: int) -> GivenFrames:
        """First frames' latents `[B, C, 1, H, W]`, held in clips of that many latent frames."""
        return GivenFrames(latents.expand(-1, -1, frames, -1, -1), (True, *(False,) * (frames - 1)))

    def hold(self, latents: Tensor) -> Tensor:
        """The latents `[B, C, F, H, W]` with these frames in them, free of noise."""
        if self.held is None:
            return latents
        frames = self.held_frames
        latents = latents.clone()
        latents[:, :, frames] = self.held[:, :, frames].to(latents.dtype)
        return latents

    def free(self, latents: Tensor) -> Tensor:
        """1 where latents `[B, C, F, H, W]` are sampled, 0 in the frames that are held."""
        mask = latents.new_ones(latents.shape)
        mask[:, :, self.held_frames] = 0
        return mask

    @staticmethod
    def cat(parts: Sequence[GivenFrames]) -> GivenFrames:
        """Those of several batches of one kind, one behind the other."""

        def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
            there = [tensor for tensor in tensors if tensor is not None]
            return cat(there) if there else None

        held, channels, image = zip(*((part.held, part.channels, part.image) for part in parts), strict=True)
        return GivenFrames(joined(held), parts[0].is_held, joined(channels), joined(image))

    @property
    def tensors(self) -> list[Tensor]:
        """All that there are."""
        return [part for part in (self.held, self.channels, self.image) if part is not None]

    @property
    def held_frames(self) -> list[int]:
        """The latent frames that are held."""
        return [frame for frame, is_held in enumerate(self.is_held) if is_held]


@dataclass(frozen=True)
class Condition:
    """What B clips are made of: encoded prompts, and given frames where a video starts from a picture.

    Args:
        embeds: `[B, L, D]`, padded to one length as the backbone's own pipeline pads them.
        mask: `[B, L]`, 1 where there is a token; None for models that attend to padding as well.
        pooled: `[B, P]`, for models that also take one vector a prompt (HunyuanVideo's CLIP).
        given: frames that are known; None makes a video from text alone.
    """

    embeds: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    given: GivenFrames | None = None

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """The same with every tensor changed, e.g. moved or expanded along the batch."""
        return Condition(
            change(self.embeds),
            None if self.mask is None else change(self.mask),
            None if self.pooled is None else change(self.pooled),
            None if self.given is None else self.given.map(change),
        )

    @staticmethod
    def of_text(parts: Mapping[str, Tensor]) -> Condition:
        """Encoded prompts by the names of their parts, as files have them; raises TypeError where one is unknown."""
        if unknown := parts.keys() - {"embeds", "mask", "pooled"}:
            raise TypeError(f"{min(unknown)!r} is no part of an encoded prompt")
        if "embeds" not in parts:
            raise TypeError("an encoded prompt needs 'embeds'")
        return Condition(parts["embeds"], parts.get("mask"), parts.get("pooled"))

    def with_given(self, given: GivenFrames | None) -> Condition:
        """The same prompts with frames that are known."""
        return replace(self, given=given)

    def hold(self, latents: Tensor) -> Tensor:
        """The latents `[B, C, F, H, W]` with the given frames in them, free of noise."""
        return latents if self.given is None else self.given.hold(latents)

    def at_rest(self, velocity: Tensor) -> Tensor:
        """The velocity `[B, C, F, H, W]` without that of given frames: they stay as they are."""
        if self.given is None or self.given.held is None:
            return velocity
        velocity = velocity.clone()
        velocity[:, :, self.given.held_frames] = 0
        return velocity

    def levels(self, sigma: Tensor) -> Tensor:
        """The noise levels `[B]` as they are or, where frames are given, one a latent frame: `[B, F]`, 0 for those."""
        if self.given is None or self.given.held is None:
            return sigma
        free = sigma.new_tensor([not is_held for is_held in self.given.is_held])
        return sigma[:, None] * free

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """All prompts of all parts in one batch; shorter ones are padded with zero rows, which the mask skips.

        All parts have given frames of one kind, or none has.
        """
        length = max(part.embeds.shape[1] for part in parts)
        masks = [_pad_rows(part.mask, length) for part in parts if part.mask is not None]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        given = [part.given for part in parts if part.given is not None]
        return Condition(
            cat([_pad_rows(part.embeds, length) for part in parts]),
            cat(masks) if masks else None,
            cat(pooled) if pooled else None,
            GivenFrames.cat(given) if given else None,
        )


def _pad_rows(rows: Tensor, length: int) -> Tensor:
    return (
        rows
        if rows.shape[1] == length
        else cat([rows, rows.new_zeros(len(rows), length - rows.shape[1], *rows.shape[2:])], dim=1)
    )
