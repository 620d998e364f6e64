"""A hundred SIGKILLs in a row: is the run that was killed, bit for bit, the run that was not?

    python benchmarks/kills.py --work DIR [--kills 100] [--steps 200] [--processes 1]

A tiny random Wan is distilled twice with an EMA teacher whose rollouts serve two updates each, a guard that looks every
10 steps, and checkpoints every 3: once undisturbed, and once killed again and again, each time gone on with by the
same command line and --resume. The moment of a kill is drawn uniformly over what a session lives: starting up,
looking, training, saving, and after the last step writing the student. How long that is, is set on the way, so that the
kills spread over the whole run: longer where it has come too short a way for their number, shorter where too long.

Sessions are forks of this process: a real start differs by its imports alone, which take longer than all the rest.
Every `fresh`-th session is a new interpreter. Then the last session is left alone, and everything that a run leaves is
compared: student, last checkpoint, best student, and guard record bit for bit, all metrics rows but for seconds, and
that no half-written file is left. Writes results/kills.json.

With `--processes 2` the weights are split (`parallel.shard`) and checkpoints are shards, which both processes write. A
kill takes one of them or all at once; those left live on for up to half a second. Writes results/kills_in_shards.json.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on so small a model only wait for each other

from rats_video.training.metrics import read_metrics

CONFIG = """
seed: 3
model: {work}/model
clip: {{num_frames: 5, height: 32, width: 32}}
prompts: {{kind: shapes}}
reward: {{kind: word, path: {work}/reward}}
method: {{alpha: 2.0, gate: {{kind: sigmoid, tau: 0.05, floor: 0.1}}}}
teacher: {{kind: ema, num_steps: 4, guidance_scale: 2.0, decay: 0.9, reuse: 2}}
student: {{num_steps: [2]}}
guard: {{every: 10, num_clips: 2}}
training: {{steps: {steps}, batch_size: 2, optimizer: {{lr: 1.0e-3}}, checkpoint_every: 3}}
parallel: {{shard: {shard}}}
"""
RESULTS = Path(__file__).parent / "results"


def prepare(work: Path, steps: int, *, shard: bool) -> None:
    """A pipeline folder and a reward of random weights, and the configuration of a distillation on them."""
    import torch

    from rats_video.backbones.wan import WanBackbone
    from rats_video.datasets.shapes.render import WORDS
    from rats_video.pretraining.flow import save_pipeline
    from rats_video.pretraining.teacher import (
        TextEncoderConfig,
        TransformerConfig,
        build_text_encoder,
        build_tokenizer,
        build_transformer,
    )
    from rats_video.pretraining.vae import VaeConfig, build_vae
    from rats_video.rewards.word import WordReward

    torch.manual_seed(0)
    vae_cfg = VaeConfig.model_validate({
        "model": {"base_dim": 8, "dim_mult": (1, 1, 1), "latent_channels": 4, "patch_size": 2},
        "stages": [{"num_frames": 1, "batch_size": 2, "steps": 2, "lr": 1e-2}],
    })  # fmt: skip
    tokenizer = build_tokenizer()
    shape = TransformerConfig(num_heads=2, head_dim=8, ffn_dim=32, num_layers=2, patch_size=(1, 2, 2))
    backbone = WanBackbone(
        transformer=build_transformer(shape, latent_channels=4, text_dim=16), vae=build_vae(vae_cfg),
        text_encoder=build_text_encoder(TextEncoderConfig(d_model=16, num_layers=1, num_heads=2), len(tokenizer)),
        tokenizer=tokenizer,
    )  # fmt: skip
    save_pipeline(backbone, work / "model", shift=3.0)
    WordReward([word for words in WORDS.values() for word in words], "frames", width=16).save(work / "reward")
    (work / "config.yaml").write_text(CONFIG.format(work=work.resolve(), steps=steps, shard=shard))


# --------------------------------------------------------------------------------------------------------- sessions


def command(work: Path, run: Path) -> list[str]:
    """The command line that starts a run, or goes on with one."""
    resume = ["--resume"] if (run / "config.resolved.yaml").is_file() else []
    return ["distill", "--config", f"{work}/config.yaml", "--output", str(run), "--device", "cpu", *resume]


class Session:
    """The processes of a command: forks of this one, or new interpreters.

    Args:
        arguments: the command line.
        log: where they print.
        count: how many processes.
        fresh: new interpreters.
    """

    def __init__(self, arguments: list[str], log: Path, count: int, *, fresh: bool = False) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self._codes: dict[int, int | None] = {}
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
                     "MASTER_ADDR": "localhost", "MASTER_PORT": port} if count > 1 else {}  # fmt: skip
            env = {name: str(value) for name, value in place.items()}
            self._codes[_start(arguments, log, env, fresh=fresh)] = None

    def ended(self, seconds: float | None = None) -> int | None:
        """The exit code, once all have ended, of the first that failed; None if one lives on after these seconds."""
        began = time.monotonic()
        while seconds is None or time.monotonic() - began < seconds:
            for pid in self._alive:
                found, status = os.waitpid(pid, os.WNOHANG)
                self._codes[pid] = os.waitstatus_to_exitcode(status) if found else None
            if not self._alive:
                return next(filter(None, self._codes.values()), 0)
            time.sleep(0.002)
        return None

    def kill(self, draw: random.Random) -> None:
        """Kill some of them, drawn, and soon the others, as a launcher does with those that are left."""
        for pid in draw.sample(self._alive, draw.randint(1, len(self._alive))):
            os.kill(pid, signal.SIGKILL)
        if self.ended(0.5 * draw.random()) is None:
            for pid in self._alive:
                os.kill(pid, signal.SIGKILL)
            self.ended()

    @property
    def _alive(self) -> list[int]:
        return [pid for pid, code in self._codes.items() if code is None]


def _start(arguments: list[str], log: Path, env: dict[str, str], *, fresh: bool) -> int:
    with log.open("a") as file:
        if fresh:
            line = [sys.executable, "-m", "rats_video.cli", *arguments]
            return subprocess.Popen(line, stdout=file, stderr=file, env=os.environ | env).pid  # noqa: S603
        if pid := os.fork():
            return pid
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 1
    try:
        os.environ.update(env)
        code = run_here(arguments)
    finally:
        os._exit(code)


def run_here(arguments: list[str]) -> int:
    """The exit code of the command in this process."""
    from rats_video.cli import app

    sys.argv = ["rats-video", *arguments]
    try:
        app.main()
    except SystemExit as end:
        return int(end.code or 0)


class Kill(NamedTuple):
    """One session: how long it lived, and how far the run's metrics and checkpoints reach after it."""

    seconds: float
    fresh: bool
    row: int
    checkpoint: int
    left_over: int


def look(run: Path) -> tuple[int, int, int]:
    """Newest metrics row, newest checkpoint, and how many half-written files lie about."""
    rows = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    steps = [int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")]
    left = [path for path in run.rglob(".*") if path.name != ".lock"]
    return int(rows[-1]["step"]) if rows else 0, max(steps, default=0), len(left)


def kill_again_and_again(options: argparse.Namespace, work: Path, run: Path) -> list[Kill]:
    """Sessions that are killed at a random moment of what they would live."""
    draw = random.Random(options.seed)
    kills: list[Kill] = []
    life = {True: options.life + 10.0, False: options.life}  # seconds, of a new interpreter and of a fork
    while len(kills) < options.kills:
        fresh = len(kills) % options.fresh == 0
        seconds = draw.random() * life[fresh]
        session = Session(command(work, run), work / "killed.log", options.processes, fresh=fresh)
        if code := session.ended(seconds):
            sys.exit(f"a session ended by itself with code {code}: see {work / 'killed.log'}")
        if code is None:
            session.kill(draw)
            kills.append(Kill(round(seconds, 3), fresh, *look(run)))
            print(f"kill {len(kills)}: {kills[-1]}")
        is_early = code == 0 or look(run)[0] > options.steps * len(kills) / options.kills
        life[fresh] = max(options.life, life[fresh] * (0.7 if is_early else 1.15))  # long enough to begin
    return kills


# -------------------------------------------------------------------------------------------------------- comparison


def differences(one: Path, other: Path) -> dict[str, bool]:
    """What a run leaves, by name: whether both hold the same."""
    files = sorted({
        str(path.relative_to(run)) for run in (one, other) for path in run.rglob("*.safetensors")
    } | {"guard.json", "student/rats.json"})  # fmt: skip
    same = {name: (content := _content(one / name)) is not None and content == _content(other / name) for name in files}
    rows = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in read_metrics(run / "metrics.jsonl")]
        for run in (one, other)
    ]
    return same | {"metrics.jsonl but for seconds": rows[0] == rows[1]}


def _content(path: Path) -> Any:
    """Bytes; of safetensors the header as an object, whose metadata come in any order, and the bytes of the tensors."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def main() -> None:
    """Run both, compare, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fresh", type=int, default=20, help="every how many-th session is a new interpreter")
    parser.add_argument("--processes", type=int, default=1, help="2: split weights, checkpoints in shards")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder, kept")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True)
    prepare(work, options.steps, shard=options.processes > 1)

    for module in ("accelerate", "torch.distributed.fsdp", "rats_video.training.shards"):
        importlib.import_module(module)  # for the forks
    warm_up = ["--set", "training.steps=1", "--set", "parallel.shard=false"]
    if code := run_here([*command(work, work / "warm-up"), *warm_up]):
        sys.exit(f"the first run ended with code {code}")
    began = time.monotonic()
    if code := Session(command(work, work / "whole"), work / "whole.log", options.processes).ended():
        sys.exit(f"the undisturbed run ended with code {code}: see {work / 'whole.log'}")
    whole = time.monotonic() - began
    options.life = 2.5 * whole / options.kills
    kills = kill_again_and_again(options, work, work / "killed")
    last = Session(command(work, work / "killed"), work / "killed.log", options.processes).ended()

    same = differences(work / "whole", work / "killed")
    _, _, left = look(work / "killed")
    result: dict[str, Any] = {
        "kills": len(kills), "processes": options.processes, "steps": options.steps, "seed": options.seed,
        "fresh_interpreters": options.fresh,
        "identical": last == 0 and left == 0 and all(same.values()), "same": same, "left_over_at_the_end": left,
        "killed_before_a_new_row": sum(b.row <= a.row for a, b in itertools.pairwise(kills)),
        "killed_with_something_half_written": sum(kill.left_over > 0 for kill in kills),
        "killed_after_the_last_step": sum(kill.row == options.steps for kill in kills),
        "seconds_undisturbed": round(whole, 1), "seconds_in_all": round(time.monotonic() - began, 1),
        "sessions": [kill._asdict() for kill in kills],
    }  # fmt: skip
    name = "kills.json" if options.processes == 1 else "kills_in_shards.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "sessions"}, indent=1))
    sys.exit(not result["identical"])


if __name__ == "__main__":
    main()
