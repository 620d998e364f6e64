"""The kinds of rewards that may be terms of a sum. A new one is a file here and its name below."""

from __future__ import annotations

from typing import Any

from rats_video.config.explain import KIND
from rats_video.rewards.aesthetic import AestheticConfig, AestheticV25Config
from rats_video.rewards.av_sync import AvSyncConfig
from rats_video.rewards.clap_score import ClapScoreConfig
from rats_video.rewards.clip_score import ClipScoreConfig, PickScoreConfig
from rats_video.rewards.custom import CustomRewardConfig
from rats_video.rewards.hpsv2 import HPSv2Config
from rats_video.rewards.hpsv3 import HPSv3Config
from rats_video.rewards.image_reward import ImageRewardConfig
from rats_video.rewards.subject_consistency import SubjectConsistencyConfig
from rats_video.rewards.temporal import TemporalConfig
from rats_video.rewards.viclip import ViClipConfig
from rats_video.rewards.video_align import VideoAlignConfig
from rats_video.rewards.word import WordRewardConfig


def word_by_default(value: Any) -> Any:
    """Settings without a kind are those of a word reward."""
    return {KIND: "word"} | value if isinstance(value, dict) else value


SingleRewardConfig = (
    WordRewardConfig
    | PickScoreConfig
    | ClipScoreConfig
    | HPSv2Config
    | AestheticConfig
    | AestheticV25Config
    | ImageRewardConfig
    | ViClipConfig
    | TemporalConfig
    | SubjectConsistencyConfig
    | ClapScoreConfig
    | AvSyncConfig
    | VideoAlignConfig
    | HPSv3Config
    | CustomRewardConfig
)
"""A reward that may be a term of a sum."""
