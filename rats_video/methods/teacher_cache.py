"""A frozen teacher's rollouts on disk: computed once, found again by every run with the same teacher and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rats_video.errors import warn
from rats_video.files import replacing, write_json
from rats_video.methods.teacher import TeacherRollout
from rats_video.runtime import ALONE, Runtime
from rats_video.types import PromptBatch, RewardScores, Trajectory


class DiskRolloutCache:
    """One safetensors file a batch, under a folder named after everything the rollout depends on.

    Args:
        root: parent folder.
        identity: of teacher, reward and sampling; rollouts of another identity are never mixed in.
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
        for part in () if batch.given is None else batch.given.tensors:
            content.update(_bytes(part))
        return self._folder / f"{batch.index:06d}-{batch.num_steps}-{content.hexdigest()[:12]}.safetensors"

    def load(self, batch: PromptBatch) -> TeacherRollout | None:
        """The stored rollout, or None; a damaged file counts as none, with a warning."""
        rollout = self._read(self._path(batch))
        return None if self._runtime.any(rollout is None) else rollout

    def _read(self, path: Path) -> TeacherRollout | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                written, digest = file.metadata()["guide"], file.metadata()["sha256"]
            if digest == _digest(path, written, tensors):
                return _parse({name: tensor.to(self._device) for name, tensor in tensors.items()}, json.loads(written))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            pass  # it is no rollout
        warn("damaged, computed again", where=f"teacher rollout {path}")
        return None

    def save(self, batch: PromptBatch, rollout: TeacherRollout) -> None:
        """Write a rollout whole or not at all; one that is not finite is not kept.

        Raises:
            UserError: it cannot be written.
        """
        path, trajectory, scores = self._path(batch), rollout.trajectory, rollout.scores
        tensors = {f"latents.{k}": latents for k, latents in enumerate(trajectory.latents)}
        tensors |= {f"part.{name}": part for name, part in scores.parts.items()} | {"clip": scores.clip}
        tensors |= {f"judged.{name}": part for name, part in scores.judged.items()}
        if scores.frames is not None:
            tensors["frames"] = scores.frames
        if (clean := trajectory.predictions) is not None:
            tensors |= {f"clean.{k}": latents for k, latents in enumerate(clean.latents)}
        header = {
            "sigmas": trajectory.sigmas, "nfe": trajectory.nfe, "parts": list(scores.parts), "seconds": rollout.seconds,
            "clean_sigmas": () if clean is None else clean.sigmas,
        }  # fmt: skip
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in host.values()):
            return  # what went wrong once must not come back for ever
        written = json.dumps(header)
        with replacing(path, "teacher rollout") as aside:
            save_file(host, aside, {"guide": written, "sha256": _digest(path, written, host)})


def _digest(path: Path, header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything in a file and of its name, which tells whose batch it is."""
    digest = hashlib.sha256(f"{path.name} {header}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _parse(tensors: dict[str, Tensor], header: dict[str, Any]) -> TeacherRollout:
    latents = tuple(tensors[f"latents.{k}"] for k in range(len(header["sigmas"])))
    parts = {name: tensors[f"part.{name}"] for name in header["parts"]}
    judged = {name.removeprefix("judged."): part for name, part in tensors.items() if name.startswith("judged.")}
    scores = RewardScores(tensors["clip"], tensors.get("frames"), parts, judged)
    predictions = None
    if levels := tuple(header.get("clean_sigmas", ())):  # older files have none
        predictions = Trajectory(levels, tuple(tensors[f"clean.{k}"] for k in range(len(levels))), header["nfe"])
    path = Trajectory(tuple(header["sigmas"]), latents, header["nfe"], predictions)
    return TeacherRollout(path, scores, header.get("seconds", 0.0))  # older files have none
