"""Someone else's run, model or reward: code needs consent, pickles are refused, links lead nowhere."""

from __future__ import annotations

# ruff: noqa: E501  # the hostile values are tables
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rats_video.assets import ASSETS
from rats_video.backbones.kinds import load_backbone
from rats_video.commands.folders import claim_folder
from rats_video.commands.rewards import run_list_rewards
from rats_video.commands.runs import load_run
from rats_video.distillation.settings import DistillConfig
from rats_video.errors import CONTROLS, UserError, printable, warn
from rats_video.files import replacing
from rats_video.reading import MOST_LAYERS, read_json, read_sizes, read_text, strays
from rats_video.rewards.custom import CustomRewardConfig
from rats_video.rewards.files import load_tokenizer, load_transformers_model
from rats_video.rewards.reward import build_reward, reward_folders
from rats_video.training.run_folder import RunFolder
from rats_video.user_code import TRUST

MakeConfig = Callable[..., DistillConfig]
CPU = torch.device("cpu")
EVIL = """
from pathlib import Path
Path("ran").touch()
def score(videos, prompts):
    return videos.mean(dim=(1, 2, 3, 4))
"""


def custom(target: str, **options: Any) -> CustomRewardConfig:
    return CustomRewardConfig(kind="custom", target=target, options=options)


# --------------------------------------------------------------------------------------------------- code of rewards


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules leave a file `ran` when they are imported; nobody has consented."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delenv(TRUST)
    (tmp_path / "evil_reward.py").write_text(EVIL)
    (tmp_path / "evil_package").mkdir()
    (tmp_path / "evil_package" / "__init__.py").write_text(EVIL)
    (tmp_path / "evil_package" / "inner.py").write_text(EVIL)
    return tmp_path


@pytest.mark.parametrize("target", ["evil_reward:score", "evil_package.inner:score"])
def test_code_is_not_run_without_consent(evil: Path, target: str) -> None:
    with pytest.raises(UserError, match=r"is code, in .*evil.*RATS_VIDEO_TRUST_CODE=1"):
        build_reward(custom(target), CPU, where="reward")
    assert not (evil / "ran").exists()


def test_no_program_is_started_by_a_configuration(evil: Path) -> None:
    cfg = custom("subprocess:Popen", args=["touch", str(evil / "ran")])
    with pytest.raises(UserError, match=r"is code, in .*subprocess.py"):
        build_reward(cfg, CPU, where="reward")
    assert not (evil / "ran").exists()


@pytest.mark.parametrize("value", ["", "0", "true", "yes"])
def test_consent_is_one_word(evil: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(TRUST, value)
    with pytest.raises(UserError, match="is code"):
        build_reward(custom("evil_reward:score"), CPU, where="reward")
    assert not (evil / "ran").exists()


def test_with_consent_it_runs_and_says_so_first(
    evil: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TRUST, "1")
    try:
        scores = build_reward(custom("evil_package.inner:score"), CPU, where="reward")(torch.ones(1, 2, 3, 4, 4), ["a"])
    finally:
        for name in ("evil_package", "evil_package.inner"):
            sys.modules.pop(name, None)
    assert scores.clip.tolist() == [1.0]
    assert (evil / "ran").exists()
    assert capsys.readouterr().err == f"reward: runs code of {evil}/evil_package/inner.py\n"


def test_listing_and_hashing_run_nothing(evil: Path, config_file: Path) -> None:
    tree = yaml.safe_load(config_file.read_text())
    tree["reward"] = {"kind": "custom", "target": "evil_package.inner:score"}
    (evil / "mine.yaml").write_text(yaml.safe_dump(tree))
    run_list_rewards(config=str(evil / "mine.yaml"))
    inner = evil / "evil_package" / "inner.py"
    assert reward_folders(custom("evil_package.inner:score"), where="reward") == [inner.with_name("__init__.py"), inner]
    assert not (evil / "ran").exists()
    for built_in in ("sys:exit", "os:system", "builtins:exec", "evil_reward.no:x", "no_such.module:x"):
        with pytest.raises(UserError):
            build_reward(custom(built_in), CPU, where="reward")


@pytest.mark.parametrize(
    "verb",
    [("evaluate",), ("export", "comparison"), ("calibrate", "--config"), ("rewards", "check", "reward", "--config")],
)
def test_a_strangers_run_does_not_run_its_reward(
    evil: Path, make_config: MakeConfig, command: Callable[..., Any], verb: tuple[str, ...]
) -> None:
    run = RunFolder(evil / "run")
    run.root.mkdir()
    tree = make_config().model_dump(mode="json") | {"reward": {"kind": "custom", "target": "evil_reward:score"}}
    run.config.write_text(yaml.safe_dump(tree))
    shutil.copytree(ASSETS / "tiny-wan-student", run.student)
    where = run.config if "--config" in verb else run.root
    found = command(*verb, where, "--device", "cpu")
    assert found.code == 2
    assert "evil_reward:score is code" in found.err
    assert TRUST in found.err
    assert not (evil / "ran").exists()


# -------------------------------------------------------------------------------------------------- pickles and models


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_folder_of_pickles_is_refused(tiny_wan: Path, tmp_path: Path, part: str) -> None:
    model = copy_of(tiny_wan, tmp_path)
    for file in (model / part).glob("*.safetensors"):
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save({"weight": Bomb(tmp_path / "ran")}, model / part / name)
        file.unlink()
    with pytest.raises(UserError, match=f"/{part}: only has pickled weights"):
        load_backbone(model)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_runs_no_code_and_asks_nothing(
    tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy_of(tiny_wan, tmp_path)
    (model / "tokenizer" / "evil.py").write_text(EVIL)
    file = model / "tokenizer" / "tokenizer_config.json"
    config = read_json(file) | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    file.write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)

    def asked(*_: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(UserError):
        load_tokenizer(model / "tokenizer", 10**9, fix="")
    assert not (tmp_path / "ran").exists()


HOSTILE_SIZES = [
    {"num_layers": 10**9}, {"num_layers": -1}, {"num_layers": "x"}, {"num_layers": None}, {"ffn_dim": 10**12}, {"ffn_dim": 0},
    {"num_attention_heads": 2**40}, {"patch_size": [0, 0, 0]}, {"patch_size": []}, {"patch_size": "abc"}, {"in_channels": [1]},
    {"rope_max_seq_len": 10**12}, {"attention_head_dim": 3}, {"quantization_config": {"quant_method": "bitsandbytes"}},
    {"quantization_config": {"quant_method": "no such"}}, {"quantization_config": 3}, {"_class_name": "os.system"}, {"eps": "x"},
]  # fmt: skip


def test_hostile_sizes_of_a_network_get_a_line(tiny_wan: Path, tmp_path: Path) -> None:
    model, refused = copy_of(tiny_wan, tmp_path), 0
    file = model / "transformer" / "config.json"
    sound = read_json(file)
    for change in HOSTILE_SIZES:
        file.write_text(json.dumps(sound | change))
        try:
            load_backbone(model)
        except UserError:
            refused += 1
    assert refused >= len(HOSTILE_SIZES) - 3  # some are sound: diffusers reads what it needs


def test_sizes_have_bounds(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"rope_theta": 5000000, "text_config": {"num_hidden_layers": 1000}, "vocab_size": 256384}')
    assert read_sizes(file)["vocab_size"] == 256384
    for text in ('{"a": {"num_layers": 1001}}', '{"a": [1048577]}', '{"a": -1048577}', "[]", "null"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"is over|no JSON object"):
            read_sizes(file)
    assert MOST_LAYERS == 1000


def test_a_pickled_reward_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPModel

    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    torch.save({"weight": Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="only has pickled weights"):
        load_transformers_model(CLIPModel, tmp_path, "clip", torch.float32)
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------------- files and folders


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to open one waits for a writer
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "text").write_text("sound")
    assert read_text(tmp_path / "text") == "sound"
    for odd in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"plain file|Is a directory"):
            read_text(odd)
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_text(tmp_path / "text", most=4)
    (tmp_path / "text").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="too deeply"):
        read_json(tmp_path / "text")


def test_overwrite_deletes_links_and_not_what_they_point_to(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep")
    output = tmp_path / "output"
    output.mkdir()
    (output / "student").symlink_to(precious)
    (output / "metrics.jsonl").symlink_to(precious / "file")
    claim_folder(output, overwrite=True)
    assert list(output.iterdir()) == []
    assert (precious / "file").read_text() == "keep"


def test_overwrite_refuses_an_output_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("keep")
    (tmp_path / "output").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="output: is a link"):
        claim_folder(tmp_path / "output", overwrite=True)
    assert (tmp_path / "real" / "file").read_text() == "keep"


def test_replacing_replaces_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("keep")
    for name, target in (("folder", "real"), ("file", "real/file")):
        (tmp_path / name).symlink_to(tmp_path / target)
    with replacing(tmp_path / "folder", "student") as partial:
        partial.mkdir()
    with replacing(tmp_path / "file", "video") as partial:
        partial.write_text("new")
    assert (tmp_path / "real" / "file").read_text() == "keep"
    assert not (tmp_path / "folder").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "real"]


@pytest.mark.parametrize("name", ["comparison", "evaluation/evaluation.md", "metrics.jsonl", "pipe"])
def test_a_run_that_leads_elsewhere_is_not_opened(tmp_path: Path, make_config: MakeConfig, name: str) -> None:
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    (run / "inside").symlink_to(run / "evaluation")
    (run / "loop").symlink_to(run / "loop")
    load_run(run)
    assert strays(run) == []
    if name == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out of the run's folder"):
        load_run(run)


# ------------------------------------------------------------------------------------------------------- the terminal


def test_control_codes_are_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]0;owned\x07\x9b2J\u202egnp.exe\r\x00\ud800"
    spelled = r"\x1b]0;owned\x07\x9b2J\u202egnp.exe\r\x00\ud800"
    assert printable(hostile) == spelled
    assert (
        printable("tab\tline\n\u00e4\u20ac\U0001f468\u200d\U0001f469")
        == "tab\tline\n\u00e4\u20ac\U0001f468\u200d\U0001f469"
    )
    assert str(UserError(hostile, where=hostile, fix=hostile)) == f"{spelled}: {spelled} ({spelled})"
    warn(hostile, where="x")
    assert capsys.readouterr().err == f"warning: x: {spelled}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--model", "no\x1b[2Jsuch"),
        ("sample", "--prompt", "a red \x1b[2J circle"),
        ("sample", "--prompt", "\udcff"),
        ("sample", "--prompt", "a" * 20_000),
        ("distill", "--config", "no\x1b[2Jsuch.yaml"),
        ("distill", "--set", 'model="\\e[2J"'),
        ("distill", "--set", "model=" + "a" * 5_000),
        ("distill", "--set", "model=~nobody-here/x"),
        ("distill", "--set", "seed=1e30"),
        ("distill", "--set", "clip.num_frames=1000000000"),
        ("distill", "--set", "\x1b[2J=1"),
        ("evaluate", "no\u202esuch"),
        ("\x1b[2J",),
    ],
    ids=range(13),
)
def test_no_argument_reaches_the_terminal_raw(command: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    found = command(*arguments)
    assert found.code == 2
    assert found.err.startswith("error: ")
    assert not CONTROLS.search(found.err + found.out)


def test_a_strangers_prompts_get_a_line(tmp_path: Path, command: Callable[..., Any]) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"a red circle\n\x1b[2Ja blue square\n")
    found = command("sample", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out")
    assert found.code == 2
    assert r"prompts.txt, line 2: holds the control character '\x1b'" in found.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "override",
    [
        "model=/dev/zero", "model=/proc/self", "model=''", "model=..", "reward.path=/dev", "heldout_reward.path=~nobody/x",
        "prompts.train=/dev/zero", "prompts.train=/dev/stdin", "prompts.train=pipe", "prompts.train=" + "a" * 5_000, "prompts.heldout=/",
        "compute.decode.small=/dev/zero", "compute.decode.small=pipe", "teacher.cache=/dev/null/x", "teacher.cache=" + "a" * 5_000,
        "seed=-99999999999999999999", "clip={num_frames: 1000001, height: 32, width: 32}",
        "clip={num_frames: 5, height: 2147483647, width: 32}", "student.num_steps=[9999]", "teacher.num_steps=10000",
        "method.shaping.horizon_weights=[0, 0, 0, 0]", "student.weights={kind: lora, targets: ['*']}", "parallel.context=99",
    ],
    ids=range(23),
)  # fmt: skip
def test_a_config_that_loads_may_still_be_refused_before_the_folder_is_touched(
    tmp_path: Path, config_file: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    found = command(
        "distill", "--config", config_file, "--output", tmp_path / "run", "--set", override, "--device", "cpu"
    )
    assert found.code == 2, found.err
    assert found.err.count("error: ") == 1
    assert len(found.err.splitlines()[-1]) < 10_000
    assert not (tmp_path / "run").exists()
