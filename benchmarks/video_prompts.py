"""The packaged prompts for real models, written by a small grammar.

`python benchmarks/video_prompts.py configs/prompts` writes them.

A prompt is who does what, where, in which light, seen by which camera. Each pair of subject and action is used once, so
the held-out prompts share none with the training prompts. No people by name, no brands.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

NUM_TRAIN, NUM_HELDOUT = 512, 64


@dataclass(frozen=True)
class Scene:
    """Subjects that can do any of the actions at any of the places."""

    subjects: tuple[str, ...]
    actions: tuple[str, ...]
    places: tuple[str, ...]


SCENES = (
    Scene(  # animals on land
        ("a golden retriever", "a gray wolf", "a red fox", "a tabby cat", "a white horse", "a brown bear cub",
         "a young deer", "a lion", "a mountain goat", "a border collie", "a tortoiseshell kitten", "a baby elephant"),
        ("running at full speed", "trotting towards the camera", "leaping over a fallen log",
         "shaking water off its coat", "turning its head to look back", "digging in the ground with its front paws",
         "walking slowly from left to right", "rolling over on its back", "stretching and then sitting down"),
        ("through a field of tall grass", "on a snowy hillside", "in a pine forest", "along a muddy river bank",
         "on a sandy beach", "in a meadow full of poppies", "on a dusty plain", "in a garden after the rain"),
    ),
    Scene(  # birds and insects
        ("a bald eagle", "a white owl", "a hummingbird", "a flamingo", "a seagull", "a blue kingfisher",
         "a monarch butterfly", "a dragonfly", "a black raven", "a green parrot"),
        ("taking off with strong wing beats", "gliding in a wide circle", "landing softly", "hovering in place",
         "diving steeply and pulling up", "spreading its wings", "flying low from right to left"),
        ("above a still lake", "over a canyon", "beside a waterfall", "above a field of sunflowers",
         "in a misty valley", "over a rocky coast", "between tall reeds"),
    ),
    Scene(  # water
        ("a green sea turtle", "a dolphin", "a humpback whale", "a jellyfish", "an octopus", "a manta ray",
         "a seahorse", "a school of silver fish", "a sea lion", "a small shark"),
        ("swimming slowly past", "spiralling upwards", "gliding over the bottom", "turning sharply",
         "drifting with the current", "emerging from the dark", "chasing its own shadow"),
        ("above a coral reef", "in clear turquoise water", "in a kelp forest", "near a sunken ship",
         "under a sheet of ice", "in the deep blue sea"),
    ),
    Scene(  # people
        ("a young woman in a yellow raincoat", "an old man with a white beard", "a boy with a red cap",
         "a girl in a blue dress", "a dancer in black", "a man in a gray suit", "a woman with curly hair",
         "a child in a striped sweater", "a chef in a white apron", "an astronaut in a dusty suit",
         "a farmer with a straw hat", "a drummer with tattooed arms", "a gardener in green boots",
         "a painter with a long brush", "a skater in a loose hoodie", "a fisherman in a blue jacket"),
        ("walking towards the camera", "spinning around with open arms", "jumping over a puddle",
         "laughing and waving", "running up a flight of stairs", "dancing with quick steps",
         "throwing a ball high and catching it", "opening an umbrella", "turning around slowly",
         "clapping to a rhythm"),
        ("in a narrow old street", "on a city rooftop", "in a crowded market", "on an empty beach",
         "in a bright kitchen", "on a wooden bridge", "in a park full of fallen leaves", "in front of a brick wall",
         "on a train platform"),
    ),
    Scene(  # vehicles
        ("a red vintage car", "a steam train", "a yellow taxi", "a sailing boat", "a motorcycle", "a hot-air balloon",
         "a small propeller plane", "a blue pickup truck", "a wooden rowing boat", "a silver spaceship",
         "a double-decker bus", "a white camper van", "a cable car", "a bicycle with a basket"),
        ("moving fast from left to right", "coming slowly towards the camera", "turning around a bend",
         "disappearing into the distance", "passing close by", "starting to move", "slowing down to a stop",
         "crossing the frame in the background"),
        ("with snowy mountains behind", "under a bridge", "in light fog", "at the edge of a desert",
         "beside a harbor", "near a green valley", "against a city skyline", "in heavy rain"),
    ),
    Scene(  # things that move by themselves
        ("a paper boat", "a red balloon", "a spinning top", "a campfire", "a glass ball", "a field of wheat",
         "a cup of steaming coffee", "a burning candle", "a wind chime", "a stack of books", "a wooden toy robot",
         "a bouquet of tulips"),
        ("swaying in the wind", "lit by a passing lantern", "slowly revolving on a turntable",
         "half hidden by drifting smoke", "with sparks flying past", "covered by falling petals",
         "with raindrops running down in front of it", "while shadows sweep across it"),
        ("on a wooden table", "beside a window", "on a stone wall", "on wet cobblestones", "at the edge of a pond",
         "on a dark stage", "in a white studio"),
    ),
)  # fmt: skip
LIGHT = (
    "at sunrise", "at golden hour", "at blue hour", "at bright noon", "on an overcast day", "by moonlight",
    "in neon light", "with strong backlight", "with long evening shadows", "in soft diffuse light",
    "under a stormy sky", "with sunbeams in the haze",
)  # fmt: skip
CAMERA = (
    "static wide shot", "slow push-in", "slow pull-back", "tracking shot from the side", "low-angle shot",
    "aerial shot, camera descending", "handheld camera", "close-up with shallow depth of field",
    "camera orbiting to the left", "pan to the right", "slow motion", "time lapse", "tilt up from the ground",
)  # fmt: skip
STYLE = ("photorealistic", "cinematic", "documentary style", "35mm film look", "watercolor animation", "clay animation")


def write_prompts(seed: int = 0) -> tuple[list[str], list[str]]:
    """Training and held-out prompts; the same for the same seed."""
    draw = random.Random(seed)
    pairs = [(scene, who, what) for scene in SCENES for who in scene.subjects for what in scene.actions]
    prompts = []
    for scene, who, what in draw.sample(pairs, NUM_TRAIN + NUM_HELDOUT):
        subject = f"{who[0].upper()}{who[1:]}"
        scenery = f"{subject} {what} {draw.choice(scene.places)} {draw.choice(LIGHT)}"
        prompts.append(f"{scenery}, {draw.choice(CAMERA)}, {draw.choice(STYLE)}.")
    return prompts[:NUM_TRAIN], prompts[NUM_TRAIN:]


if __name__ == "__main__":  # pragma: no cover
    folder = Path(sys.argv[1])
    for name, lines in zip(("video-train", "video-heldout"), write_prompts(), strict=True):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
