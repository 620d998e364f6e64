"""`prepare --gpus 2` makes what one process makes, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from forks import command_line

CONFIG = """
model: {model}
buckets: [{{num_frames: 5, height: 32, width: 32}}, {{num_frames: 1, height: 32, width: 32}}]
num_shapes: 70
shard_clips: 10
workers: 1
"""


def test_two_processes_make_what_one_makes(command: Callable[..., Any], tiny_wan: Path, tmp_path: Path) -> None:
    (tmp_path / "shapes.yaml").write_text(CONFIG.format(model=tiny_wan))
    options = ["prepare", "shapes", "--config", str(tmp_path / "shapes.yaml"), "--device", "cpu", "--output"]
    together = command_line(*options, tmp_path / "two", "--gpus", 2)
    alone = command(*options, tmp_path / "one")
    out, err = together.communicate(timeout=300)
    assert (together.returncode, alone.code) == (0, 0), err
    assert out.replace(str(tmp_path / "two"), str(tmp_path / "one")) == alone.out
    one, two = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert len([name for name in one if name.startswith("shards/")]) == 10  # in units of 32 and 6: 16 are 10 and 6
