"""A frozen teacher's rollouts on disk: computed once, found again by every run with the same teacher and seed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rats_video.distill.teacher import Guide
from rats_video.files import replacing, write_json
from rats_video.runtime import ALONE, Runtime
from rats_video.types import PromptBatch, RewardScores, Trajectory


class DiskGuideStore:
    """One safetensors file a batch, under a folder named after everything the rollout depends on.

    Args:
        root: parent folder.
        identity: what the teacher, its reward and its sampling are; rollouts of another identity are never mixed in.
        device: where loaded tensors go.
        runtime: the processes that store theirs beside each other; what one of them lacks is none for all, because a
            teacher whose weights are split over them must be rolled out by all of them together.
    """

    def __init__(self, root: Path, identity: dict[str, object], device: torch.device, runtime: Runtime = ALONE) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self._folder, self._device, self._runtime = root / digest, device, runtime
        write_json(self._folder / "identity.json", identity)

    def _path(self, batch: PromptBatch) -> Path:
        content = hashlib.sha256(repr(batch.prompts).encode() + batch.noise.cpu().numpy().tobytes())
        return self._folder / f"{batch.index:06d}-{batch.num_steps}-{content.hexdigest()[:12]}.safetensors"

    def load(self, batch: PromptBatch) -> Guide | None:
        """The stored rollout, or None; an unreadable file is as good as none."""
        guide = self._read(self._path(batch))
        return None if self._runtime.any(guide is None) else guide

    def _read(self, path: Path) -> Guide | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors: dict[str, Tensor] = {key: file.get_tensor(key).to(self._device) for key in file.keys()}  # noqa: SIM118
                header = json.loads(file.metadata()["guide"])
            return _guide(tensors, header)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None

    def save(self, batch: PromptBatch, guide: Guide) -> None:
        """Write a rollout whole or not at all."""
        path, trajectory, scores = self._path(batch), guide.trajectory, guide.scores
        tensors = {f"latents.{k}": latents for k, latents in enumerate(trajectory.latents)}
        tensors |= {f"part.{name}": part for name, part in scores.parts.items()} | {"clip": scores.clip}
        if scores.frames is not None:
            tensors["frames"] = scores.frames
        header = {"sigmas": trajectory.sigmas, "nfe": trajectory.nfe, "parts": list(scores.parts)}
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with replacing(path, "teacher rollout") as aside:
            save_file(host, aside, {"guide": json.dumps(header)})


def _guide(tensors: dict[str, Tensor], header: dict[str, Any]) -> Guide:
    latents = tuple(tensors[f"latents.{k}"] for k in range(len(header["sigmas"])))
    parts = {name: tensors[f"part.{name}"] for name in header["parts"]}
    scores = RewardScores(tensors["clip"], tensors.get("frames"), parts)
    return Guide(Trajectory(tuple(header["sigmas"]), latents, header["nfe"]), scores)
