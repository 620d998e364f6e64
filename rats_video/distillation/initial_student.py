"""The student that a run starts from, where that is an earlier student and not the base itself."""

from __future__ import annotations

from pathlib import Path

import torch

from rats_video.assets import model_name, resolve_folder
from rats_video.backbones.base import PipelineBackbone
from rats_video.backbones.compute import LoraConfig
from rats_video.backbones.folder import load_parts
from rats_video.backbones.lora import LORA_FILE, read_lora
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError, warn
from rats_video.hub import CARD
from rats_video.inference.student import ITSELF, StudentCard, load_card

WHERE = "student.init"


@torch.no_grad()
def start_from(cfg: DistillConfig, init: str, student: PipelineBackbone) -> None:
    """Give the student the weights of `student.init`, in place; all weights also take an adapter, merged into them.

    Raises:
        UserError: there is no student, or one of another model, kind of weights, rank or targets.
    """
    folder, file = _find(init)
    if (folder / CARD).is_file():
        _compare(cfg, load_card(folder), folder)
    match cfg.student.weights:
        case LoraConfig() as lora:
            _fill_adapter(student, lora, file)
        case _ if file.is_file():
            _merge(student, file)
        case _:
            _fill_denoiser(student, folder)


def _find(init: str) -> tuple[Path, Path]:
    """The student's folder, and its LoRA file, which may not be there."""
    path = Path(init).expanduser()
    if path.is_file():
        return path.parent, path
    folder = resolve_folder(init, where=WHERE)
    folder = folder / "student" if (folder / "student").is_dir() else folder
    if not (folder / CARD).is_file() and not (folder / LORA_FILE).is_file():
        raise UserError(
            f"no student in it: neither {CARD} nor {LORA_FILE}", where=f"{WHERE}={init}",
            fix="give a finished run, a student's folder or a LoRA file",
        )  # fmt: skip
    return folder, folder / LORA_FILE


def _compare(cfg: DistillConfig, card: StudentCard, folder: Path) -> None:
    """Warn of what makes an earlier student a poor start."""
    if (theirs := model_name(card.model)) not in {(ours := model_name(cfg.model)), ITSELF}:
        warn(f"was trained on {theirs}, this run's model is {ours}", where=f"{WHERE}={folder}")
    if card.shift != cfg.shift:
        warn(f"was trained at shift {card.shift:g}, this run's is {cfg.shift:g}", where=f"{WHERE}={folder}")
    if card.seed == cfg.seed:
        warn(
            f"{WHERE} was trained with seed {card.seed} as well, and saw the same prompts and noise; give another",
            where="seed",
        )


def _fill_adapter(student: PipelineBackbone, lora: LoraConfig, file: Path) -> None:
    if not file.is_file():
        raise UserError(
            f"{file.parent} is a whole denoiser, this student a LoRA", where=WHERE, fix="set student.weights.kind=full"
        )
    found, tensors = read_lora(file)
    if found.rank != lora.rank:
        raise UserError(
            f"{file} is of rank {found.rank}, this student of {lora.rank}", where=WHERE,
            fix=f"set student.weights.rank={found.rank}",
        )  # fmt: skip
    targets = lora.targets or student.lora_targets
    if set(found.targets or ()) != set(targets):
        raise UserError(
            f"{file} adapts {', '.join(sorted(found.targets or ()))}, this student {', '.join(sorted(targets))}",
            where=WHERE, fix="set student.weights.targets to the same",
        )  # fmt: skip
    assert student.adapters is not None
    assert student.role is not None
    student.adapters.load(student.role, tensors, where=file)
    for name, weight in student.weights.items():
        if ".lora_B." in name:  # the same change of the base, whatever this run's alpha
            weight.mul_(found.alpha / lora.alpha)


def _merge(student: PipelineBackbone, file: Path) -> None:
    found, tensors = read_lora(file)
    adapters = student.with_adapter("init", found).adapters
    assert adapters is not None
    adapters.load("init", tensors, where=file)
    adapters.merge("init")
    student.adapters = None  # plain again
    student.denoiser.requires_grad_()


def _fill_denoiser(student: PipelineBackbone, folder: Path) -> None:
    """Read in float32, as it was trained, whatever the base's precision."""
    classes = {name: kind for name, kind in student.component_classes().items() if name in student.denoiser_parts}
    fix = "give the folder of a student"
    parts = load_parts(folder, classes, "cpu", torch.float32, family=student.family, fix=fix)
    for name, network in student.denoisers.items():
        theirs = dict(parts[name].named_parameters())
        for key, weight in network.named_parameters():
            if key not in theirs or theirs[key].shape != weight.shape:
                raise UserError(f"{folder} is of another model: {name}.{key} does not match", where=WHERE)
            weight.copy_(theirs[key])
