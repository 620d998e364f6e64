"""Which reward to trust: every reward at hand scores the clips that people chose between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from rats_video.assets import is_embedded
from rats_video.commands.runs import config_near
from rats_video.commands.students import find_student
from rats_video.config.explain import KIND
from rats_video.errors import UserError, warn
from rats_video.hub import CARD
from rats_video.inference.audio import read_sound
from rats_video.inference.student import load_card
from rats_video.inference.video import read_clip
from rats_video.methods.scoring import score_pixels
from rats_video.pretraining.preference import Accuracy, accuracy
from rats_video.rating.results import Ballot, among_people
from rats_video.rewards.reward import RewardConfig, build_reward, check_reward_prompts, reward_folders, reward_kinds
from rats_video.rewards.sum import SumRewardConfig
from rats_video.rewards.word import WordRewardConfig
from rats_video.types import ClipSpec

PEOPLE = "another person"


def agreement(
    votes: Sequence[Ballot], rewards: Mapping[str, RewardConfig], device: torch.device, folder: Path
) -> dict[str, Accuracy]:
    """For each reward the share of choices that it ranks as people did, the best first; people among themselves too.

    Votes for no difference are left out. Prompts are what intervals count. A reward that cannot be loaded or cannot
    score these prompts is warned of and left out.
    """
    chosen = [vote for vote in votes if vote.score != 0.5]
    if not chosen:
        return {}
    prompt_of = {file: vote.prompt for vote in chosen for file in vote.files}
    found = {}
    for name, cfg in rewards.items():
        try:
            scores = _scores(cfg, prompt_of, device, folder, where=name)
        except UserError as error:
            warn(f"left out: {error.what}", where=name)
            continue
        margins = [(2 * vote.score - 1) * (scores[vote.files[0]] - scores[vote.files[1]]) for vote in chosen]
        found[name] = accuracy(margins, [vote.prompt for vote in chosen])
    ranked = dict(sorted(found.items(), key=lambda item: -item[1].share))
    if together := among_people(votes):
        ranked[PEOPLE] = accuracy([2 * same - 1 for same, _ in together], [prompt for _, prompt in together])
    return ranked


@torch.no_grad()
def _scores(
    cfg: RewardConfig, prompt_of: Mapping[str, str], device: torch.device, folder: Path, *, where: str
) -> dict[str, float]:
    """The score of each file, read one by one."""
    frames, fps = read_clip(folder / next(iter(prompt_of)))
    spec = ClipSpec(len(frames), frames.shape[2], frames.shape[3], fps)
    reward = build_reward(cfg, device, where=where, clip=spec)
    check_reward_prompts(reward, [*dict.fromkeys(prompt_of.values())])
    scores = {}
    for file, prompt in prompt_of.items():
        videos = read_clip(folder / file)[0][None].to(device)
        scores[file] = float(score_pixels(reward, videos, [prompt], read_sound(folder / file)).clip)
    return scores


def rewards_at_hand(runs: Sequence[str], folders: Sequence[Path], *, with_sound: bool) -> dict[str, RewardConfig]:
    """All rewards that can be had without a setting.

    Those of `folders`, which `train reward` wrote; those that the runs were trained and judged by; and every kind whose
    weights are where they are looked for. Kinds that hear are for clips with sound.
    """
    found: dict[str, RewardConfig] = {str(folder): WordRewardConfig(path=str(folder)) for folder in folders}
    for run in runs:
        for role, cfg in _of_run(run).items():
            found.setdefault(_title(role, cfg), cfg)
    adapter: TypeAdapter[RewardConfig] = TypeAdapter(RewardConfig)
    for kind in reward_kinds():
        try:
            plain = adapter.validate_python({KIND: kind})
            reward_folders(plain, where=kind)
        except (ValidationError, UserError):
            continue
        if plain not in found.values() and (with_sound or not plain.hears):
            found[kind] = plain
    return found


def _of_run(run: str) -> dict[str, RewardConfig]:
    """The rewards of a run's configuration; none where the run is no longer there, or is a folder of clips."""
    try:
        folder = find_student(run, where="RUN")
        student = folder if (folder / CARD).is_file() else folder / "student"
        cfg = config_near(folder, load_card(student).model)
    except UserError:
        return {}
    if cfg is None:
        return {}
    return {"reward": cfg.reward} | ({} if cfg.heldout_reward is None else {"heldout_reward": cfg.heldout_reward})


def _title(role: str, cfg: RewardConfig) -> str:
    """E.g. "word shapes-reward (heldout_reward)"."""
    path = "" if isinstance(cfg, SumRewardConfig) else str(getattr(cfg, "path", ""))
    named = path if is_embedded(path) else Path(path).name
    return f"{cfg.kind} {named}".strip() + f" ({role})"
