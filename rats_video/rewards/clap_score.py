"""CLAP score: how well the sound of a clip fits the prompt, by a CLAP model in transformers' format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from rats_video.config.fields import PositiveInt
from rats_video.errors import UserError
from rats_video.rewards.base import BaseRewardConfig, RewardContext, free_reward
from rats_video.rewards.clip_text import ClipText
from rats_video.rewards.files import load_tokenizer, load_transformers_model
from rats_video.rewards.prompted import Condition, PromptedReward, score_in_chunks
from rats_video.sound import Sound
from rats_video.types import Reward, RewardScores

RATE, SECONDS = 48_000, 10  # what every published CLAP hears; a shorter sound is repeated as often as it fits
WINDOW, HOP, MELS, HIGHEST = 1024, 480, 64, 14_000  # of its spectrogram, in samples; bands; Hz
FLOOR = 1e-10  # power that counts as silence


class ClapScoreConfig(BaseRewardConfig):
    """Fit of the sound to the prompt (CLAP, arXiv 2211.06687): cos(sound, prompt), about 0 to 0.6."""

    per = "clip"
    source = "laion/clap-htsat-unfused"
    hears = True

    kind: Literal["clap_score"]
    path: str = Field("models/clap-htsat-unfused", description="folder of the model and its tokenizer, in safetensors")
    chunk: PositiveInt = Field(4, description="sounds a forward; they are recomputed in backward, so it bounds memory")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the model's weights")

    def build(self, context: RewardContext) -> ClapReward:
        """Load it.

        Raises:
            UserError: the folder holds another model, or a CLAP that fuses several cuts of a long sound.
        """
        from transformers import ClapModel

        folder = self.folder(context.where, "path")
        model = load_transformers_model(ClapModel, folder, "clap", getattr(torch, self.dtype))
        if model.config.audio_config.enable_fusion:
            what = "fuses cuts of a sound that it draws at random: its scores would not be the same twice"
            raise UserError(what, where=str(folder), fix=f"give an unfused one, such as {self.source}")
        words = model.config.text_config.vocab_size
        tokenizer = load_tokenizer(folder, words, fix=f"give the whole folder of {self.source}")
        return ClapReward(model.to(context.device), tokenizer, self)

    def on_meta(self, context: RewardContext) -> Reward:  # noqa: ARG002
        """For a plan: it costs next to nothing beside a denoiser, and no pixel reaches it."""
        return free_reward


class ClapReward(PromptedReward):
    """`cos(sound, prompt)`: one score a clip, of its sound alone. Of one longer than ten seconds it hears the middle.

    Args:
        model: a `ClapModel`.
        tokenizer: its tokenizer.
        cfg: how many sounds at a time.
    """

    hears, sees = True, False

    def __init__(self, model: Any, tokenizer: Any, cfg: ClapScoreConfig) -> None:
        from transformers.audio_utils import mel_filter_bank

        super().__init__()
        self.model, self.cfg = model.requires_grad_(requires_grad=False).eval(), cfg
        self.text_limit = int(model.config.text_config.max_position_embeddings) - 2  # RoBERTa's first two are padding's
        self.text = ClipText(tokenizer, self.text_limit, clean=str)
        bank = mel_filter_bank(WINDOW // 2 + 1, MELS, 0, HIGHEST, RATE, norm="slaney", mel_scale="slaney")
        self.register_buffer("bank", torch.from_numpy(bank).float().to(model.device), persistent=False)
        self.bank: Tensor

    def forward(self, videos: Tensor, prompts: Sequence[str], sound: Sound) -> RewardScores:  # noqa: ARG002  # deaf to pixels
        """Score the sound of B clips; a prompt longer than the model reads is cut, with one warning."""
        self.check_prompts(prompts)
        with torch.no_grad():
            condition = self.condition(prompts)
        waves = fill(resample(sound.waves.float().mean(dim=1), sound.rate, RATE), RATE * SECONDS)
        clip = score_in_chunks(self.score_waves, waves, condition, self.cfg.chunk)
        return RewardScores(clip, judged={"audio": clip})

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Unit features `[B, D]` of the prompts."""
        return {"text": self.text.unit_features(self.model, prompts)}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt with start and end."""
        return self.text.counts(prompts)

    def score_waves(self, waves: Tensor, condition: Condition) -> Tensor:
        """Scores `[N]` of waves `[N, samples]` of ten seconds."""
        seen = spectrogram(waves, self.bank)[:, None].to(self.model.dtype)
        features = self.model.get_audio_features(input_features=seen).pooler_output
        return (F.normalize(features.float(), dim=-1) * condition["text"]).sum(dim=-1)


def resample(waves: Tensor, rate: int, to: int) -> Tensor:
    """Waves `[B, samples]` at another rate, by their spectrum: all below half of the lower rate stays as it is."""
    if rate == to:
        return waves
    samples = round(waves.shape[1] * to / rate)
    kept = min(samples, waves.shape[1]) // 2 + 1
    spectrum = torch.fft.rfft(waves)[:, :kept]
    made: Tensor = torch.fft.irfft(F.pad(spectrum, (0, samples // 2 + 1 - kept)), n=samples)
    return made * (samples / waves.shape[1])


def fill(waves: Tensor, samples: int) -> Tensor:
    """Waves `[B, samples]` of that length: repeated as often as they fit and padded with silence, or their middle."""
    if (extra := waves.shape[1] - samples) > 0:
        return waves[:, extra // 2 : extra // 2 + samples]
    repeated = waves.repeat(1, samples // waves.shape[1])
    return F.pad(repeated, (0, samples - repeated.shape[1]))


def spectrogram(waves: Tensor, bank: Tensor) -> Tensor:
    """Decibels `[B, time, bands]` of waves `[B, samples]`, as transformers' `ClapFeatureExtractor` has them."""
    window = torch.hann_window(WINDOW, device=waves.device)
    power = torch.stft(waves, WINDOW, HOP, window=window, return_complex=True).abs().square()
    decibels: Tensor = 10 * torch.log10((power.transpose(1, 2) @ bank).clamp(min=FLOOR))
    return decibels
