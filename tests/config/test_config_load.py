from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rats_video.config import load
from rats_video.config.load import dump_config, load_config, write_resolved
from rats_video.errors import UserError


class Base(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NoGate(Base):
    kind: Literal["none"] = "none"


class MarginGate(Base):
    kind: Literal["margin"] = "margin"
    threshold: float = Field(0.5, gt=0, le=1)
    margin: float = 0.0


Gate = Annotated[NoGate | MarginGate, Field(discriminator="kind")]


class FrameReward(Base):
    kind: Literal["frame"]
    weight: float = 1.0


class ClipReward(Base):
    kind: Literal["clip"]
    weight: float = 1.0
    model: str


class Optimizer(Base):
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 0

    @field_validator("warmup_steps")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even,\nas the paper says")
        return value


class Root(Base):
    name: str
    seed: int | None = 0
    num_steps: int | Literal["auto"] = "auto"
    optimizer: Optimizer = Optimizer(lr=0.5, warmup_steps=8)
    gate: Gate = MarginGate(threshold=0.25)
    second_gate: Gate | None = None
    rewards: list[Annotated[FrameReward | ClipReward, Field(discriminator="kind")]] = []
    extra_args: dict[str, Any] = {}
    kinds: Literal["all"] | tuple[int, ...] = "all"
    shown: bool = True
    noise: Literal["uniform", "normal"] = "uniform"
    title: str = Field("x", pattern=r"^\w+$")
    nothing: None = None

    @model_validator(mode="after")
    def _agree(self) -> Root:
        if self.name == "forbidden":
            raise ValueError("this name is taken")
        return self


TINY = """\
name: tiny
optimizer: {lr: 1e-3}
gate: {kind: margin, threshold: 0.75}
rewards:
  - {kind: frame}
  - {kind: clip, model: small}
"""


@pytest.fixture(autouse=True)
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A packaged `distill` group that holds `tiny`; the working folder is empty."""
    folder = tmp_path / "configs" / "distill"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(load.resources, "files", lambda _: tmp_path / "configs")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return folder


def read(name: str = "tiny", *overrides: str) -> Root:
    return load_config(Root, name, group="distill", overrides=overrides)


def line(name: str = "tiny", *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        read(name, *overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def written(text: str | bytes, name: str = "my.yaml") -> str:
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
    return name


# ------------------------------------------------------------------------------------------------------------ values


def test_reads_by_name_and_by_path(configs: Path) -> None:
    assert read() == read(str(configs / "tiny.yaml")) == read("../configs/distill/tiny.yaml")
    assert read().optimizer == Optimizer(lr=1e-3, warmup_steps=8)
    assert read().rewards[1] == ClipReward(kind="clip", model="small")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=1e-5", "optimizer.lr", 1e-5),
        ("optimizer.betas=[0.5, 0.6]", "optimizer.betas", (0.5, 0.6)),
        ("seed=null", "seed", None),
        ("name='7'", "name", "7"),
        ("name=2024-01-01", "name", "2024-01-01"),
        ("name=a=b", "name", "a=b"),
        ("rewards=[]", "rewards", []),
        ("extra_args.deep.er=1", "extra_args", {"deep": {"er": 1}}),
        ("gate.kind=none", "gate", NoGate()),
        ("gate={kind: none}", "gate", NoGate()),
        ("gate.margin=2", "gate", MarginGate(threshold=0.75, margin=2)),
        ("second_gate.kind=none", "second_gate", NoGate()),
    ],
)
def test_override(override: str, key: str, value: object) -> None:
    found: object = read("tiny", override)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_override_reaches_into_a_list_item() -> None:
    assert [reward.weight for reward in read("tiny", "rewards.1.weight=3").rewards] == [1, 3]


def test_override_of_a_default_model_keeps_its_other_values() -> None:
    config = read(written("name: x"), "optimizer.betas=[0, 0]", "gate.margin=2")
    assert config.optimizer == Optimizer(lr=0.5, warmup_steps=8, betas=(0, 0))
    assert config.gate == MarginGate(threshold=0.25, margin=2)


@pytest.mark.parametrize("swap", [False, True])
def test_changing_kind_drops_the_old_keys_and_keeps_new_ones(*, swap: bool) -> None:
    name = written("name: x\ngate: {kind: none}")
    overrides = ["gate.kind=margin", "gate.margin=2"]
    assert read(name, *(reversed(overrides) if swap else overrides)).gate == MarginGate(margin=2)


def test_later_override_wins() -> None:
    assert read("tiny", "seed=1", "seed=2").seed == 2


def test_comments_alone_are_an_empty_config() -> None:
    assert "name: required, but missing" in line(written("# nothing\n"))


def test_extends_merges_deeply_by_name_and_by_path(configs: Path) -> None:
    (configs / "child.yaml").write_text("extends: tiny\noptimizer: {warmup_steps: 2}\ngate: {kind: none}\n")
    child = read("child")
    assert child.optimizer == Optimizer(lr=1e-3, warmup_steps=2)
    assert child.gate == NoGate()
    Path("sub").mkdir()
    written("seed: 3\nname: base", "sub/base.yaml")
    written("extends: [tiny, ./base.yaml]\nseed: 4", "sub/top.yaml")
    assert (read("sub/top.yaml").seed, read("sub/top.yaml").name) == (4, "base")
    assert read("sub/top.yaml").optimizer.lr == 1e-3


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lrr=1", "--set optimizer.lrr: unknown key (did you mean 'lr'?)"),
        ("optimiser.lr=1", "--set optimiser.lr: optimiser: unknown key (did you mean 'optimizer'?)"),
        ("gate.treshold=1", "--set gate.treshold: unknown key (did you mean 'threshold'?)"),
        ("gate.zzz=1", "--set gate.zzz: unknown key (valid keys: kind, threshold, margin)"),
        ("second_gate={kind: margin, x: 1}", "--set second_gate: second_gate.x: unknown key (valid keys: kind,"),
        ("rewards.1.wieght=1", "--set rewards.1.wieght: unknown key (did you mean 'weight'?)"),
        ("rewards.7.weight=1", "--set rewards.7.weight: rewards: must be a list, got {'7': {'weight': 1}}"),
        ("rewards.0.kind=clip", "--set rewards.0.kind: rewards.0.model: required, but missing"),
        ("gate.kind=margn", "--set gate.kind: unknown kind 'margn' (did you mean 'margin'?)"),
        ("gate.kind=zzz", "--set gate.kind: unknown kind 'zzz' (choose from none, margin)"),
        ("second_gate.margin=1", "second_gate.kind: required, but missing (choose from none, margin)"),
        ("second_gate=3", "--set second_gate: must be a group of keys, got 3 (like {kind: none})"),
        ("optimizer=3", "--set optimizer: must be a group of keys, got 3 (valid keys: lr, betas, warmup_steps)"),
        ("optimizer=null", "--set optimizer: must be a group of keys, got null (valid keys: "),
        ("extra_args=[1]", "--set extra_args: must be a group of keys, got [1]"),
        ("optimizer.betas=0.5", "--set optimizer.betas: must be a list, got 0.5 (like [0.5])"),
        ("optimizer.betas={a: 1}", "--set optimizer.betas: must be a list, got {'a': 1}"),
        ("optimizer.betas=[1, 2, 3]", "--set optimizer.betas: must have at most 2 items, got [1, 2, 3]"),
        ("rewards=frame", "--set rewards: must be a list, got 'frame' (like ['frame'])"),
        ("kinds=few", "--set kinds: must be 'all' or a list, got 'few' (like ['few'])"),
        ("kinds=al", "--set kinds: must be 'all' or a list, got 'al' (did you mean 'all'?)"),
        ("kinds=[3, some]", "--set kinds: kinds.1: must be a whole number, got 'some'"),
        ("shown=2", "--set shown: must be true or false, got 2"),
        ("shown=on it", "--set shown: must be true or false, got 'on it'"),
        ("noise=unifrom", "--set noise: must be 'uniform' or 'normal', got 'unifrom' (did you mean 'uniform'?)"),
        ("noise=true", "--set noise: must be 'uniform' or 'normal', got true"),
        ("title=a b", r"--set title: must be a plain name (of the pattern ^\w+$), got 'a b'"),
        ("nothing=1", "--set nothing: must be null, got 1"),
        ("name=[a]", "--set name: must be text, got ['a']"),
        ("gate.threshold=2", "must be at most 1, got 2 (allowed: > 0 and <= 1)"),
        ("gate.margin=x", "--set gate.margin: must be a number, got 'x'"),
        ("seed=true", "--set seed: must be a number, got true"),
        ("num_steps=on", "--set num_steps: must be a number, got true"),
        ("optimizer.lr=yes", "--set optimizer.lr: must be a number, got true"),
        ("optimizer.betas=[0.9, no]", "--set optimizer.betas: optimizer.betas.1: must be a number, got false"),
        ("optimizer.lr=0", "--set optimizer.lr: must be greater than 0, got 0"),
        ("optimizer.warmup_steps=1.5", "--set optimizer.warmup_steps: must be a whole number, got 1.5"),
        ("optimizer.warmup_steps=3", "--set optimizer.warmup_steps: must be even, as the paper says"),
        ("optimizer.betas=[1]", "--set optimizer.betas: optimizer.betas.1: required, but missing"),
        ("optimizer.betas=[1, x]", "--set optimizer.betas: optimizer.betas.1: must be a number, got 'x'"),
        ("optimizer.lr.x=1", "--set optimizer.lr.x: optimizer.lr: must be a number, got {'x': 1}"),
        ("num_steps=some", "--set num_steps: must be a whole number or 'auto', got 'some'"),
        ("name=7", "--set name: must be text, got 7 (quotes keep a value text)"),
        ("name=forbidden", "configs/distill/tiny.yaml: this name is taken"),
        ("seed", "--set: 'seed' is not KEY=VALUE (like --set seed=1)"),
        ("=1", "--set: '=1' is not KEY=VALUE"),
        ("a..b=1", "--set: 'a..b=1' is not KEY=VALUE"),
        ("se ed=1", "--set: 'se ed=1' is not KEY=VALUE"),
        ("seed=[1", "--set seed: not valid YAML: "),
        ("seed={a: 1, a: 2}", "--set seed: not valid YAML: key 'a' is given twice"),
        ("seed=\x07", "--set seed: not valid YAML: character 1 is not text"),
        ("seed=*a", "aliases (*name) are not allowed"),
        ("seed=!!python/name:os.system", "is not allowed"),
        ("seed=!!int x", "is not allowed"),
        ("seed=" + "9" * 5000, "--set seed: a number that cannot be read"),
        ("name=0x" + "9" * 5000, "a number too long to show"),
        ("seed=" + "[" * 100_000, "--set seed: not valid YAML: nested too deeply"),
        (".".join("a" * 10_000) + "=1", "is not KEY=VALUE"),
    ],
)
def test_override_error(override: str, expected: str) -> None:
    assert expected in line("tiny", override)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\noptimizer: {lrr: 1}", "my.yaml: optimizer.lrr: unknown key (did you mean 'lr'?)"),
        ("nmae: x", "my.yaml: nmae: unknown key (did you mean 'name'?; and 1 more)"),
        (
            "name: x\nseed: a\ngate: {kind: b}\nfoo: 1",
            "my.yaml: gate.kind: unknown kind 'b' (choose from none, margin; and 2",
        ),
        ('name: x\n"a\\nb\\e[1m": 1', r"my.yaml: 'a\nb\x1b[1m': unknown key"),
        ("name: x\n1: 2", "my.yaml: 1: "),
        ("name: x\n  bad: [", "my.yaml, line 2: not valid YAML: "),
        ("name: x\nname: y", "my.yaml, line 2: not valid YAML: key 'name' is given twice"),
        ("name: x\ngate: {kind: none, kind: none}", "my.yaml, line 2: not valid YAML: key 'kind' is given twice"),
        ("- a\n- b", "my.yaml: must hold `key: value` lines, got ['a', 'b']"),
        ("just text", "my.yaml: must hold `key: value` lines, got 'just text'"),
        ("a: &a [x]\nb: *a", "my.yaml, line 2: not valid YAML: aliases (*name) are not allowed"),
        ("&a [*a]", "my.yaml, line 1: not valid YAML: aliases (*name) are not allowed"),
        ("? [a]\n: 1", "my.yaml, line 1: not valid YAML: found unhashable key"),
        ("---\na: 1\n---\nb: 1", "my.yaml, line 3: not valid YAML: "),
        (b"name: \xff", "my.yaml: not UTF-8 text at byte 6 (save it as UTF-8)"),
        (b"name: \x00", "my.yaml: not valid YAML: character 7 is not text"),
        ("extends: 3", "my.yaml: extends: must be a name or a list of names, got 3"),
        ("extends: [tiny, [x]]", "my.yaml: extends: must be a name or a list of names, got ['tiny', ['x']]"),
        ("extends: tinny", "my.yaml: extends: no config 'configs/distill/tinny.yaml' (did you mean 'tiny'?"),
        ("extends: ./your.yaml", "my.yaml: extends: no config 'your.yaml' (available: my)"),
        ('extends: "./a\\0.yaml"', r"my.yaml: extends: not a path: 'a\x00.yaml'"),
        ("extends: ../cwd/my.yaml", "my.yaml: extends itself: my.yaml -> ../cwd/my.yaml"),
    ],
)
def test_file_error(text: str | bytes, expected: str) -> None:
    assert expected in line(written(text))


def test_missing_files_list_what_there_is(configs: Path) -> None:
    assert line("tinny") == "no config 'configs/distill/tinny.yaml' (did you mean 'tiny'? available: tiny)"
    assert line("zzzz") == "no config 'configs/distill/zzzz.yaml' (available: tiny)"
    assert line("no/such.yaml") == "no config 'no/such.yaml' (available: none)"
    (configs / "tiny.yaml").unlink()
    assert line("") == "no config 'configs/distill/.yaml' (available: none)"


def test_folder_and_unreadable_path() -> None:
    Path("folder.yaml").mkdir()
    assert line("folder.yaml") == "folder.yaml: cannot be read: Is a directory"
    assert "File name too long" in line("x" * 5000 + ".yaml")


def test_cycle_of_two(configs: Path) -> None:
    (configs / "a.yaml").write_text("extends: b")
    (configs / "b.yaml").write_text("extends: a")
    loop = "configs/distill/a.yaml -> configs/distill/b.yaml -> configs/distill/a.yaml"
    assert line("a") == f"configs/distill/a.yaml: extends itself: {loop}"


def test_error_names_the_file_that_says_it(configs: Path) -> None:
    (configs / "base.yaml").write_text("optimizer: {lr: -1}")
    (configs / "child.yaml").write_text("extends: [tiny, base]\nseed: 1")
    assert line("child") == "configs/distill/base.yaml: optimizer.lr: must be greater than 0, got -1"


# ------------------------------------------------------------------------------------------------------------ dumping

finite = st.floats(allow_nan=False)
json_floats = st.floats(allow_nan=False, allow_infinity=False)  # what pydantic keeps of an untyped value
gates = st.just(NoGate()) | st.builds(MarginGate, threshold=st.floats(0.01, 1), margin=finite)
roots = st.builds(
    Root,
    name=st.text().filter(lambda name: name != "forbidden"),
    seed=st.none() | st.integers(),
    num_steps=st.just("auto") | st.integers(),
    optimizer=st.builds(Optimizer, lr=st.floats(1e-30, 1), betas=st.tuples(finite, finite)),
    gate=gates,
    second_gate=st.none() | gates,
    rewards=st.lists(st.builds(ClipReward, kind=st.just("clip"), model=st.text(), weight=finite), max_size=2),
    extra_args=st.dictionaries(st.text(), st.text() | json_floats | st.lists(st.integers()) | st.none(), max_size=3),
)
lenient = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@lenient
@given(roots)
def test_dump_loads_back(config: Root) -> None:
    write_resolved(config, Path("out/config.resolved.yaml"))
    assert read("out/config.resolved.yaml") == config
    assert [path.name for path in Path("out").iterdir()] == ["config.resolved.yaml"]


def test_dump_loads_back_what_yaml_takes_for_a_line_break() -> None:
    config = read().model_copy(update={"name": "a\x85b"})
    write_resolved(config, Path("out/config.resolved.yaml"))
    assert read("out/config.resolved.yaml") == config


def test_dump_has_no_aliases() -> None:
    shared = ["x"]
    config = Root(name="x", extra_args={"a": shared, "b": shared})
    assert "&" not in dump_config(config)


def test_failed_write_keeps_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("config.resolved.yaml")
    path.write_text("old")

    def fail(_: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="cannot write the config: No space left on device"):
        write_resolved(Root(name="x"), path)
    assert path.read_text() == "old"
    assert list(Path().iterdir()) == [path]


# ------------------------------------------------------------------------------------------------------------ fuzzing

KEYS = ["name", "optimizer", "gate", "gate.kind", "second_gate", "rewards", "rewards.0", "rewards.0.kind", "num_steps"]
values = st.text() | st.sampled_from(["{kind: margin}", "{kind: frame, frame: 1}", "{1: 2}", "[[]]", "=", "<<", "0b_"])


@lenient
@given(st.lists(st.text() | st.builds("{}={}".format, st.sampled_from(KEYS), values), max_size=3))
def test_any_override_is_taken_or_refused_in_one_line(overrides: list[str]) -> None:
    try:
        read("tiny", *overrides)
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017


@lenient
@given(st.binary() | st.text().map(lambda text: f"name: {text}".encode()))
def test_any_file_is_taken_or_refused_in_one_line(content: bytes) -> None:
    try:
        read(written(content))
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
