"""Run as a program: reads thousands of hostile files under a memory limit; `test_hostile_files.py` watches it.

Whatever a file holds, its reader returns or raises UserError. What it read last stays in the folder it was given, should
it die of it.
"""

from __future__ import annotations

# ruff: noqa: E501  # the hostile values are tables
import copy
import io
import json
import resource
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from rats_video.backbones.architecture import find_architecture
from rats_video.backbones.folder import read_index
from rats_video.backbones.lora import LORA_FILE, METADATA_KEY, read_lora
from rats_video.backbones.small_decoder import load_small_decoder
from rats_video.backbones.text_cache import TextCache
from rats_video.commands.runs import load_run
from rats_video.config.load import dump_config, load_config
from rats_video.datasets.prompts.files import read_prompts
from rats_video.datasets.shapes.render import WORDS
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import CONTROLS, UserError
from rats_video.evaluation.tables import read_rows
from rats_video.hub import CARD
from rats_video.inference.student import load_card
from rats_video.inference.video import read_mp4, write_mp4
from rats_video.rewards.files import load_checkpoint_tensors, load_tokenizer
from rats_video.rewards.latent import read_imitated
from rats_video.rewards.video_align import VideoAlignSettings
from rats_video.rewards.word import WordReward

EXTRA_MEMORY = 3 * 2**30  # beyond what the libraries map; an honest file here needs a few MiB
CPU_SECONDS = 20.0  # of one file
COUNTS: Counter[str] = Counter()
TAKEN: Counter[str] = Counter()

torch.set_num_threads(1)


def read(kind: str, reader: Callable[[], object]) -> None:
    """Let `reader` read what was written; count it, and whether it was taken."""
    COUNTS[kind] += 1
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        reader()
        TAKEN[kind] += 1
    except UserError as error:
        line = str(error)
        assert line.strip(), line
        assert not CONTROLS.search(line), line
        assert len(line) < 10_000, line
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def fuzz(count: int, cases: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Check so many cases, the same each time."""
    profile = settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    profile(given(cases)(check))()


# --------------------------------------------------------------------------------------------------------- mutations


class Blob(bytes):
    """Bytes that a failure does not print: they lie in the folder."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


NUMBERS = [
    0,
    1,
    -1,
    7,
    2**31,
    2**32,
    2**48,
    2**63 - 1,
    2**63,
    2**64 - 1,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
]
OTHERS = [
    None,
    True,
    "",
    "x",
    "\x00",
    "\x1b[2J",
    "\u202e",
    "/dev/zero",
    "../../x",
    "a" * 5_000,
    [],
    {},
    [[]],
    [None] * 50,
    {"": {}},
]
hostile = st.sampled_from([*NUMBERS, *OTHERS]) | st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    return [(node, key) for key, _ in items] + [place for _, below in items for place in places(below)]


@st.composite
def json_bytes(draw: st.DrawFn, document: Any) -> bytes:
    """A document with values changed or gone, then perhaps cut off or with bytes changed; or something else whole."""
    if draw(st.integers(0, 9)) == 0:
        return draw(
            st.binary(max_size=40)
            | st.sampled_from(
                [b"", b"null", b"[]", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b"NaN", b"\xff\xfe"]
            )
        )
    tree = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        found = places(tree)
        if found:
            container, key = draw(st.sampled_from(found))
            if isinstance(container, dict) and draw(st.integers(0, 3)) == 0:
                del container[key]
            else:
                container[key] = draw(hostile)
    return draw(damaged(json.dumps(tree).encode()))


@st.composite
def damaged(draw: st.DrawFn, data: bytes, whole: int = 3) -> bytes:
    """Bytes as they are `whole` times of 5, else cut off, or with some of them changed or said twice."""
    change = bytearray(data)
    if not change or draw(st.integers(0, 4)) < whole:
        return Blob(data)
    for _ in range(draw(st.integers(1, 20))):
        at = draw(st.integers(0, len(change) - 1))
        change[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    if draw(st.booleans()):
        del change[draw(st.integers(0, len(change))) :]
    return Blob(change)


@st.composite
def safetensors_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """A safetensors file whose header lies about its own size, shapes, types, places or metadata."""
    (size,) = struct.unpack("<Q", sound[:8])
    header, body = json.loads(sound[8 : 8 + size]), sound[8 + size :]
    text = draw(json_bytes(header)) if draw(st.booleans()) else json.dumps(header).encode()
    told = draw(st.sampled_from([len(text)] * 4 + [0, 1, len(text) - 1, len(text) + 8, 2**24, 2**40, 2**63, 2**64 - 1]))
    body = draw(st.sampled_from([body, body[:-1], b"", body + b"\0" * 8]))
    return draw(damaged(struct.pack("<Q", told) + text + body, whole=4))


# ------------------------------------------------------------------------------------------------------------ readers


def fuzz_weights(here: Path, count: int) -> None:
    """LoRA files, checkpoints, text caches, word rewards and small decoders."""
    lora = save(
        {
            "transformer.blocks.0.to_q.lora_A.weight": torch.ones(2, 4),
            "transformer.blocks.0.to_q.lora_B.weight": torch.ones(4, 2),
        },
        {
            METADATA_KEY: json.dumps(
                {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.target_modules": ["to_q"]}
            )
        },
    )
    cache = save({"0.embeds": torch.ones(1, 2, 3)}, {"identity": "me", "prompts": json.dumps(["a"])})
    words = here / "word"
    WordReward([word for choices in WORDS.values() for word in choices], "frames", width=4).save(words)
    reward, config = (words / "model.safetensors").read_bytes(), json.loads((words / "config.json").read_text())

    def check_lora(data: bytes) -> None:
        (here / LORA_FILE).write_bytes(data)
        read("lora", lambda: read_lora(here / LORA_FILE))

    def check_weights(data: bytes) -> None:
        (here / "model.safetensors").write_bytes(data)
        read("checkpoint", lambda: load_checkpoint_tensors(here / "model.safetensors"))
        read("small decoder", lambda: small_decoder(here / "small", data))

    def check_cache(data: bytes) -> None:
        (here / "text.safetensors").write_bytes(data)
        read("text cache", lambda: TextCache.load(here / "text.safetensors", "me", ["a"]))

    def check_word(case: tuple[bytes, bytes]) -> None:
        (words / "model.safetensors").write_bytes(case[0])
        (words / "config.json").write_bytes(case[1])
        read("word reward", lambda: WordReward.load(words))

    index = {"weight_map": {"a": "model.safetensors", "b": "../../../dev/zero"}}

    def check_index(data: bytes) -> None:
        (here / "shards").mkdir(exist_ok=True)
        (here / "shards" / "model.safetensors.index.json").write_bytes(data)
        (here / "shards" / "model.safetensors").write_bytes(lora)
        read("index of shards", lambda: load_checkpoint_tensors(here / "shards"))

    fuzz(count, safetensors_bytes(lora), check_lora)
    fuzz(count, safetensors_bytes(lora), check_weights)
    fuzz(count, safetensors_bytes(cache), check_cache)
    fuzz(
        count,
        st.tuples(safetensors_bytes(reward), json_bytes(config)) | st.tuples(st.just(Blob(reward)), json_bytes(config)),
        check_word,
    )
    fuzz(count // 2, json_bytes(index), check_index)


def small_decoder(folder: Path, data: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "taew2_1.safetensors").write_bytes(data)
    load_small_decoder(folder, latent_channels=16, spatial_stride=8, temporal_stride=4, where="compute.decode.small")


def fuzz_documents(here: Path, count: int) -> None:
    """Cards, indices, configurations of models, tables, settings of judges, tokenizers and resolved configurations."""
    card = {"model": "tiny-wan", "num_steps": [4], "shift": 3.0, "clip": {"num_frames": 5, "height": 32, "width": 32, "fps": 8.0},
            "steps": 2, "seed": 5, "embedded_guidance": 6.0, "dtype": "float32", "guidance_scale": 1.0, "sigmas": {"4": [1, 0.5, 0]}}  # fmt: skip
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.42",
        "vae": ["diffusers", "AutoencoderKLWan"],
        "boundary_ratio": None,
    }
    table = {
        "rows": [{"arm": "student", "num_steps": 4, "nfe": 4, "num_clips": 2, "seconds_per_clip": 0.1, "metrics": {}}]
    }
    judge = {"data_config": {"max_frame_pixels": 9, "fps": 2.0}, "peft_lora_config": {"lora_r": 64, "lora_alpha": 128},
             "inference_config": {f"{part}_{what}": 1.0 for part in ("VQ", "MQ", "TA") for what in ("mean", "std")}}  # fmt: skip
    tokenizer = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
                 "decoder": None, "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}}  # fmt: skip
    latent = {"space": {}, "imitates": {"kind": "word", "path": "x"}, "network": {"width": 4}}

    def each(name: str, reader: Callable[[], object]) -> Callable[[bytes], None]:
        def check(data: bytes) -> None:
            (here / name).parent.mkdir(exist_ok=True)
            (here / name).write_bytes(data)
            read(name, reader)

        return check

    fuzz(count, json_bytes(card), each(CARD, lambda: load_card(here)))
    fuzz(count, json_bytes(index), each("model_index.json", lambda: read_index(here)))
    fuzz(count // 2, json_bytes(index), each("model_index.json", lambda: find_architecture(str(here), None)))
    fuzz(count, json_bytes(table), each("evaluation.json", lambda: read_rows(here / "evaluation.json")))
    fuzz(
        count, json_bytes(judge), each("model_config.json", lambda: VideoAlignSettings.read(here / "model_config.json"))
    )
    fuzz(count // 2, json_bytes(latent), each("latent/config.json", lambda: read_imitated(here / "latent")))
    fuzz(count, json_bytes(tokenizer), each("tok/tokenizer.json", lambda: load_tokenizer(here / "tok", 2, fix="")))
    resolved = dump_config(load_config(DistillConfig, "tiny", group="distill")).encode()
    fuzz(count // 4, damaged(resolved, whole=0), each("config.resolved.yaml", lambda: load_run(here)))


def fuzz_prompts(here: Path, count: int) -> None:
    """Lists of prompts in whatever bytes."""
    lines = st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=20)
    odd = [
        b"",
        b"\xef\xbb\xbfa",
        b"\0",
        b"\x1b]0;x\x07",
        "\u202eevil".encode(),
        b"a" * 10**6,
        b"a\n" * 10**6 * 2,
        b"\xed\xa0\x80",
        b"\r\r\n",
    ]

    def check(data: bytes) -> None:
        for name in ("prompts.txt", "prompts.jsonl", "prompts.csv", "prompts.json"):
            (here / name).write_bytes(data)
            read("prompts", lambda name=name: read_prompts(here / name))

    for data in odd:
        check(data)
    fuzz(count, st.lists(lines, max_size=5).map(b"\n".join), check)


def fuzz_videos(here: Path, count: int) -> None:
    """Videos cut off anywhere, with changed bytes, sizes beyond all bounds, and files that are no video."""
    frames = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    write_mp4(frames, here / "sound.mp4", fps=8.0)
    sound = (here / "sound.mp4").read_bytes()
    sizes = [
        at
        for at in range(len(sound) - 4)
        if sound[at : at + 4] in {b"avc1", b"tkhd", b"stsz", b"stts", b"moov", b"avcC", b"mdat"}
    ]

    def check(data: bytes) -> None:
        (here / "hostile.mp4").write_bytes(data)
        read("video", lambda: read_mp4(here / "hostile.mp4"))

    @st.composite
    def wild(draw: st.DrawFn) -> bytes:
        """The bytes near a box's name: its size, its counts, its width and height."""
        change = bytearray(sound)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.sampled_from(sizes)) + draw(st.integers(-4, 90))
            change[at : at + 2] = draw(st.sampled_from([b"\xff\xff", b"\0\0", b"\x7f\xff", b"\x40\0"]))
        return Blob(change)

    playlists = [b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", b"ffconcat version 1.0\nfile /etc/passwd\n",
                 b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n", b"\x89PNG\r\n\x1a\n", b"GIF89a\xff\xff\xff\xff", b"RIFF\xff\xff\xff\xffAVI LIST", b""]  # fmt: skip
    for data in (*playlists, sound):
        check(data)
    assert TAKEN["video"] == 1, "the sound one is taken, no playlist is followed"
    fuzz(count, damaged(sound, whole=0), check)
    fuzz(count, wild(), check)
    fuzz(count, st.integers(0, len(sound)).map(lambda end: sound[:end]), check)
    for odd in ("/dev/zero", "/dev/stdin", "/proc/self/mem", str(here)):
        read("video", lambda odd=odd: read_mp4(Path(odd)))


def limit_memory() -> None:
    """Forbid more than EXTRA_MEMORY beyond what is mapped by now."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + EXTRA_MEMORY, mapped + EXTRA_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))


def main(here: Path, count: int) -> None:
    def stop(*_: object) -> None:
        raise AssertionError("hangs on a file")

    signal.signal(signal.SIGVTALRM, stop)
    save_file({"x": torch.zeros(1)}, here / "warm.safetensors")
    write_mp4(torch.zeros(1, 3, 32, 32), here / "warm.mp4", fps=8.0)
    limit_memory()
    fuzz_prompts(here, count)
    fuzz_weights(here, count)
    fuzz_documents(here, count)
    fuzz_videos(here, count)
    sys.stdout.write(json.dumps({"counts": COUNTS, "taken": TAKEN}))


if __name__ == "__main__":
    assert isinstance(sys.stdout, io.TextIOBase)
    main(Path(sys.argv[1]), int(sys.argv[2]))
