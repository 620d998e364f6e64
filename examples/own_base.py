"""The embedded model with another VAE and more words, to fine-tune on videos that show no shapes.

rats-video train vae --config videos --set videos=clips --output runs/vae
python examples/own_base.py clips runs/vae/vae runs/base

Its text encoder is random anyway (contextual features of some words are all that such a small model needs), so a new
word is a new random vector; those of the old words stay. A published model spells any word, and needs none of this.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rats_video.assets import resolve_folder
from rats_video.datasets.video.settings import BucketConfig, PrepareConfig
from rats_video.datasets.video.sources import find_sources
from rats_video.seeds import seeded


def add_words(folder, words):
    """Teach the pipeline in `folder` words that its tokenizer does not have."""
    path = folder / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(sorted(set(words) - set(vocabulary)))}
    path.write_text(json.dumps(tokenizer, indent=2))

    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    table = weights["shared.weight"]
    new = torch.randn(len(vocabulary) - len(table), table.shape[1], generator=seeded(0))
    save_file({**weights, "shared.weight": torch.cat([table, new])}, path, {"format": "pt"})
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": len(vocabulary)}, indent=2))


def main(videos, vae, output):
    """Write OUTPUT: the embedded model with the VAE, and the words of the videos' captions."""
    size = BucketConfig(num_frames=17, height=64, width=64)
    sources = find_sources(videos, PrepareConfig(model="tiny-wan", buckets=(size,)))
    words = [word for source in sources.videos for word in re.findall(r"\w+", (source.caption or "").lower())]
    shutil.copytree(resolve_folder("tiny-wan", where="model"), output)
    shutil.rmtree(Path(output) / "vae")
    shutil.copytree(vae, Path(output) / "vae")
    add_words(Path(output), words)
    print(f"{len(set(words))} words of {len(sources.videos)} captions: {output}")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:4])
