from __future__ import annotations

import errno
import functools
import itertools
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from rats_video import configs
from rats_video.cli import app as cli
from rats_video.cli import distill, plan
from rats_video.config.load import load_config
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import UserError

SHARED = ["--gpus", "--nodes", "--node-rank", "--rendezvous"]
TRAIN = ["--config", "--output", "--seed", "--device", "--set", "--overwrite", "--resume"]
VIDEOS = ["--nfe", "--prompt", "--prompts", "--num-videos", "--seed", "--output", "--device", "--base"]
CHOICES = [
    "--negative-prompt",
    "--guidance-scale",
    "--guidance-scale-2",
    "--num-frames",
    "--height",
    "--width",
    "--lora",
    "--offload",
    "--tiled",
    "--image",
    "--last-image",
]
OPTIONS = {
    "distill": [*TRAIN, *SHARED, "--restarts"],
    "run": [*TRAIN, *SHARED, "--restarts"],
    "sample": [*VIDEOS, *SHARED, *CHOICES, "--model", "--batch-size", "--overwrite"],
    "demo": ["--port", "--device", "--base"],
    "export comparison": [*VIDEOS, *SHARED, "RUN"],
    "doctor": [],
    "rate": [*VIDEOS[:-1], "--batch-size", "--port", "--results", "--reward", "--min-attention", "--overwrite"],
    "plan": ["--config", "--set", "--gpu-memory", "--gpus", "--device-name", "--utilisation", "--json"],
    "evaluate": [
        "--base",
        "--nfe",
        "--num-clips",
        "--output",
        "--device",
        "--seed",
        *SHARED,
        "RUN",
        "--vbench-layout",
        "--prompts",
        "--dimensions",
        "--teacher",
    ],
    "prepare": ["--config", "--output", "--device", "--set", "--overwrite", *SHARED],
    "train vae": TRAIN,
    "train teacher": [*TRAIN, *SHARED, "--restarts", "--data"],
    "train paths": TRAIN,
    "calibrate": ["--config", "--set", "--num-prompts", "--output", "--device", "--overwrite"],
    "rewards list": ["--config"],
    "rewards check": ["--config", "--set", "--device"],
    "rewards convert": [],
    "train reward": [*TRAIN, "--latent", "--data", "--preferences"],
}
COMMANDS = (
    "run", "distill", "plan", "sample", "demo", "export", "evaluate", "prepare", "train", "rewards", "calibrate",
    "rate", "doctor",
)  # fmt: skip
SUBCOMMANDS = {
    "": COMMANDS,
    "export": ["comparison"],
    "train": ["vae", "teacher", "paths", "reward"],
    "rewards": ["list", "check", "convert"],
}
BUILDERS = {
    "run": ["run_all"],
    "distill": ["run_distill"],
    "sample": ["run_sample"],
    "export_comparison": ["run_export_comparison"],
    "evaluate": ["run_evaluate"],
    "vbench": ["run_vbench"],
    "demo": ["run_demo"],
    "train": ["run_train_vae", "run_train_teacher", "run_train_paths"],
    "train_reward": ["run_train_reward", "run_train_latent_reward"],
    "finetune": ["run_finetune"],
    "train_preference": ["run_train_preference"],
    "rewards": ["run_list_rewards", "run_check_reward"],
    "calibrate": ["run_calibrate"],
    "prepare": ["run_prepare"],
}
Outcome = tuple[int, str, str]
OFF = {
    "--data", "--dimensions", "--image", "--json", "--last-image", "--preferences", "--prompts", "--push-to-hub",
    "--rendezvous", "--vbench-layout",
}  # fmt: skip
"""Options whose absence needs no explanation."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What the commands ask of stand-ins for the modules of `rats_video.commands`, by function."""
    made: dict[str, dict[str, Any]] = {}

    def stand_in(name: str, /, **kwargs: Any) -> list[str] | None:
        made[name] = kwargs
        return None if name == "run_finetune" else []

    for module, names in BUILDERS.items():
        build = types.ModuleType(f"rats_video.commands.{module}")
        for name in names:
            setattr(build, name, functools.partial(stand_in, name))
        monkeypatch.setitem(sys.modules, build.__name__, build)
    return made


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["rats-video", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (caught.value.code or 0, *capsys.readouterr())

    monkeypatch.setenv("COLUMNS", "200")
    return call


@pytest.mark.parametrize(("name", "options"), OPTIONS.items())
def test_help_lists_every_option_and_an_example(command: Callable[..., Outcome], name: str, options: list[str]) -> None:
    code, out, err = command(*name.split(), "--help")
    assert (code, err) == (0, "")
    assert set(options) <= set(out.split())
    assert f"Example: rats-video {name}" in out
    assert {word for word in out.split() if word.startswith("--")} == {o for o in options if o != "RUN"} | {"--help"}


@pytest.mark.parametrize("example", [distill.EXAMPLE, plan.EXAMPLE])
def test_examples_set_keys_that_are(example: str) -> None:
    words = shlex.split(example.removeprefix("Example: ").strip("`"))
    given = {option: [value for word, value in itertools.pairwise(words) if word == option] for option in words}
    load_config(DistillConfig, *given["--config"], group="distill", overrides=given.get("--set", []))


def leaves(group: Any, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """All commands that do something, with their words."""
    found = []
    for name, below in group.commands.items():
        found += leaves(below, (*words, name)) if hasattr(below, "commands") else [((*words, name), below)]
    return found


LEAVES = dict(leaves(typer.main.get_group(cli.app)))


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_examples_are_calls_of_their_command(words: tuple[str, ...]) -> None:
    command = LEAVES[words]
    example = shlex.split((command.epilog or "").removeprefix("Example: ").strip("`"))
    assert example[: len(words) + 1] == ["rats-video", *words]
    context = command.make_context(words[-1], example[len(words) + 1 :])
    named = context.params.get("config", "tiny")
    groups = [folder for folder in Path(*configs.__path__).iterdir() if (folder / f"{named}.yaml").is_file()]
    assert groups, named


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_option_says_what_it_takes(words: tuple[str, ...]) -> None:
    """And what holds without it, unless it is a flag or something is left out."""
    for option in LEAVES[words].params:
        assert option.help.endswith((".", "]")), option.name
        if option.param_type_name == "option" and not (option.is_flag or option.required or option.multiple):
            assert option.default is not None or "[default: " in option.help or option.opts[0] in OFF, option.opts[0]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("plan",), "on each of 1 x rtx4090"),
        (("rewards", "list"), "motion_smoothness"),
        (("rewards", "check"), "heldout_reward"),
    ],
)
def test_examples_run(command: Callable[..., Outcome], words: tuple[str, ...], shown: str) -> None:
    example = shlex.split((LEAVES[words].epilog or "").removeprefix("Example: ").strip("`"))
    code, out, _ = command(*example[1:])
    assert code == 0
    assert shown in out


@pytest.mark.parametrize(("name", "commands"), SUBCOMMANDS.items())
def test_help_lists_the_commands(command: Callable[..., Outcome], name: str, commands: Sequence[str]) -> None:
    code, out, _ = command(*name.split(), "--help")
    assert code == 0
    assert set(commands) <= set(out.split())


def test_version_and_bare_call(command: Callable[..., Outcome]) -> None:
    assert command("--version") == (0, "rats-video 0.1.0\n", "")
    code, out, _ = command()
    assert code == 0
    assert "Usage: rats-video" in out


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], []),
        (["distill", "--help"], []),
        (["evaluate", "x", "--nfe", "0"], []),
        (["distill", "--set", "model=/nowhere"], ["numpy", "torch"]),
    ],
)
def test_help_and_mistakes_import_what_they_need(tmp_path: Path, arguments: list[str], heavy: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'numpy', 'accelerate', 'av', 'decord', 'sympy'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = ['rats-video', *{arguments!r}]\n"
        "from rats_video.cli.app import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == f"HEAVY {heavy}"
    assert done.returncode == (0 if "--help" in arguments else 2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("distill --foo", "No such option: --foo"),
        ("distill --overwite", "--overwrite"),
        ("distil", "No such command 'distil'. Did you mean 'distill'?"),
        ("train", "Missing command."),
        ("evaluate", "Missing argument 'RUN'."),
        ("distill --seed -1", "'--seed': must be at least 0, got '-1'"),
        ("distill --seed x", "'--seed': must be a whole number, got 'x'"),
        ("distill --device gpu", "'--device': 'gpu' is not one of auto, cpu, cuda, cuda:N"),
        ("distill --device cuda:", "'--device': 'cuda:' is not one of"),
        ("distill --resume --overwrite", "--resume: cannot be used with --overwrite (give one of them)"),
        ("sample --nfe 0", "'--nfe': must be at least 1, got '0'"),
        ("sample --num-videos 0", "'--num-videos'"),
        ("sample --batch-size 0", "'--batch-size'"),
        ("demo --port 0", "'--port'"),
        ("demo --host 0.0.0.0", "No such option: --host"),
        ("demo --share", "No such option: --share"),
        ("sample --prompt a --prompts b", "--prompt: cannot be used with --prompts"),
        ("export comparison r --prompt a --prompts b", "--prompt: cannot be used with --prompts"),
        ("evaluate r --nfe 3,4,x", "--nfe: 'x' is not a whole number from 1 to 9999 (like --nfe 3,4,8)"),
        ("evaluate r --nfe 3,0", "--nfe: '0' is not a whole number"),
        ("evaluate r --nfe 3,,4", "--nfe: '' is not a whole number"),
        ("evaluate r --nfe ²", "--nfe: '²' is not a whole number"),
        ("evaluate r --num-clips 0", "'--num-clips'"),
        ("evaluate r --vbench-layout v", "--vbench-layout: needs prompts (add --prompts VBench_full_info.json)"),
        ("evaluate r --vbench-layout v --prompts p --nfe 3,4", "--nfe: VBench scores one folder of clips at a time"),
        ("evaluate r --vbench-layout v --prompts p --num-clips 3", "--num-clips: does not go with --vbench-layout"),
        ("evaluate r --teacher", "--teacher: is only for clips that VBench scores (add --vbench-layout DIR)"),
    ],
)
def test_bad_value_is_one_line_and_exit_2(
    command: Callable[..., Outcome], calls: dict[str, Any], arguments: str, expected: str
) -> None:
    code, out, err = command(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert calls == {}


RUN = {"config": "tiny", "overrides": [], "seed": None, "device": "auto", "resume": False, "overwrite": False}
VIDEO = {"nfe": 4, "prompts": [], "prompts_file": None, "num_videos": None, "seed": 0, "device": "auto", "base": None}
CHOSEN = {"size": {}, "loras": [], "offload": False, "tiled": False}
GUIDANCE = {"guidance_scale": None, "guidance_scale_2": None}
SAMPLE = VIDEO | CHOSEN | {"nfe": None, "negative_prompt": "", **GUIDANCE, "batch_size": 16, "overwrite": False}
SAMPLE |= {"image": None, "last_image": None}
SAYING = {"run_all", "run_sample", "run_demo", "run_finetune"}


@pytest.mark.parametrize(
    ("arguments", "function", "expected"),
    [
        ("distill", "run_distill", RUN | {"output": Path("runs/tiny")}),
        (
            "distill --config my/big.yaml --set a=1 --set b.c=[2] --seed 7 --device cuda:1 --overwrite",
            "run_distill",
            {
                "config": "my/big.yaml",
                "overrides": ["a=1", "b.c=[2]"],
                "output": Path("runs/big"),
                "seed": 7,
                "device": "cuda:1",
                "resume": False,
                "overwrite": True,
            },
        ),
        ("run --output o --overwrite", "run_all", RUN | {"output": Path("o"), "overwrite": True}),
        ("sample", "run_sample", SAMPLE | {"model": None, "output": Path("samples")}),
        (
            "sample --prompts - --batch-size 2 --overwrite",
            "run_sample",
            SAMPLE
            | {"model": None, "output": Path("samples"), "prompts_file": Path("-"), "batch_size": 2, "overwrite": True},
        ),
        ("demo", "run_demo", {"model": None, "port": 7860, "device": "auto", "base": None}),
        (
            "demo runs/x --port 80 --device cpu --base b",
            "run_demo",
            {"model": Path("runs/x"), "port": 80, "device": "cpu", "base": Path("b")},
        ),
        (
            "sample --lora a:0.5 --lora b --height 64 --num-frames 5 --offload --tiled",
            "run_sample",
            SAMPLE
            | {
                "model": None,
                "output": Path("samples"),
                "loras": ["a:0.5", "b"],
                "offload": True,
                "tiled": True,
                "size": {"height": 64, "num_frames": 5},
            },
        ),
        (
            "sample --prompt a --prompt b --model m --num-videos 3",
            "run_sample",
            SAMPLE | {"model": Path("m"), "output": Path("samples"), "prompts": ["a", "b"], "num_videos": 3},
        ),
        (
            "export comparison r --prompts f --nfe 8",
            "run_export_comparison",
            VIDEO | {"run": Path("r"), "prompts_file": Path("f"), "output": None, "nfe": 8},
        ),
        (
            "evaluate r --nfe 8,3,3",
            "run_evaluate",
            {
                "run": Path("r"),
                "base": None,
                "nfe": (8, 3),
                "num_clips": None,
                "seed": 0,
                "output": None,
                "device": "auto",
            },
        ),
        (
            "evaluate r --vbench-layout v --prompts p.json --dimensions scene,color --teacher --nfe 4",
            "run_vbench",
            {
                "run": Path("r"),
                "base": None,
                "prompts": Path("p.json"),
                "dimensions": ("scene", "color"),
                "nfe": 4,
                "with_teacher": True,
                "seed": 0,
                "output": Path("v"),
                "device": "auto",
            },
        ),
        (
            "calibrate --config c.yaml --set a=1 --num-prompts 8",
            "run_calibrate",
            {
                "config": "c.yaml",
                "overrides": ["a=1"],
                "num_prompts": 8,
                "output": Path("calibrated.yaml"),
                "device": "auto",
                "overwrite": False,
            },
        ),
        ("rewards list", "run_list_rewards", {"config": None}),
        ("rewards list --config my.yaml", "run_list_rewards", {"config": "my.yaml"}),
        (
            "rewards check hpsv2 --config c --set a=1 --device cpu",
            "run_check_reward",
            {"name": "hpsv2", "config": "c", "overrides": ["a=1"], "device": "cpu"},
        ),
        ("train vae", "run_train_vae", RUN | {"output": Path("runs/vae-tiny")}),
        ("train teacher --output o", "run_train_teacher", RUN | {"output": Path("o")}),
        (
            "train teacher --data c",
            "run_finetune",
            RUN | {"data": Path("c"), "output": Path("runs/finetune-tiny")},
        ),
        ("train reward --overwrite", "run_train_reward", RUN | {"output": Path("runs/reward-tiny"), "overwrite": True}),
        ("train reward --latent", "run_train_latent_reward", RUN | {"output": Path("runs/latent-reward-tiny")}),
        (
            "train reward --data c --preferences p",
            "run_train_preference",
            RUN | {"data": Path("c"), "preferences": Path("p"), "output": Path("runs/reward-tiny")},
        ),
    ],
)
def test_command_calls_build(
    command: Callable[..., Outcome], calls: dict[str, Any], arguments: str, function: str, expected: dict[str, Any]
) -> None:
    assert command(*arguments.split()) == (0, "" if function in SAYING else "\n", "")
    say = calls[function].pop("echo", None)
    assert (say is not None) == (function in SAYING)
    assert calls == {function: expected}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            UserError("no [bold]such[/bold] :smile:\nfile " + "x" * 300, where="a/b"),
            2,
            "a/b: no [bold]such[/bold] :smile:",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "o/a.mp4"), 2, "disk full while writing o/a.mp4"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disk full while writing the output"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failure_is_one_line(
    command: Callable[..., Outcome],
    calls: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["rats_video.commands.distill"], "run_distill", fail)
    found, out, err = command("distill")
    assert (found, out, calls) == (code, "", {})
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied", "x"), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["rats_video.commands.distill"], "run_distill", fail)
    monkeypatch.setattr(sys, "argv", ["rats-video", "distill"])
    with pytest.raises(type(error)):
        cli.main()
    assert calls == {}
