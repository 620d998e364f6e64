"""The harness of benchmarks/gpu.py: a part that breaks or hangs costs itself alone."""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import gpu_train
import pytest
from gpu import HERE, LOG, SUMMARY, TOTAL, Part, parts, run_parts
from gpu_rows import Rows, bar
from gpu_train import run_and_pack

WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"a row\": {\"seconds\": 1.5}}'); print('said')"
BREAKS = WRITES + "; 1 / 0"
HANGS = (
    WRITES
    + """
import subprocess, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
print('child', child.pid, flush=True)
time.sleep(60)"""
)


def part(name: str, code: str, limit: float = 30) -> Part:
    return Part(name, limit, [sys.executable, "-S", "-c", code])


def read(out: Path, name: str) -> Any:
    return json.loads((out / f"gpu-{name}.json").read_text())


def test_a_part_that_breaks_or_hangs_costs_itself_alone(tmp_path: Path) -> None:
    table = run_parts([part("broken", BREAKS), part("hanging", HANGS, 1), part("sound", WRITES)], tmp_path)
    ends = {name: read(tmp_path, name)["ended"] for name in ("broken", "hanging", "sound")}
    assert ends == {"broken": "exit code 1", "hanging": "stopped at its limit of 1 s", "sound": "done"}
    for name, end in ends.items():  # what was measured before the break is there
        assert read(tmp_path, name)["rows"] == {"a row": {"seconds": 1.5}}
        assert f"| {name} | | {end}, " in table
    assert table.count("| | a row | seconds 1.5 |") == 3
    assert (tmp_path / SUMMARY).read_text() == table
    log = (tmp_path / LOG).read_text()
    assert log.index("== broken") < log.index("ZeroDivisionError") < log.index("== hanging") < log.index("== sound")
    assert not alive(int(log.partition("child ")[2].split()[0]))


def alive(pid: int) -> bool:
    """Still running a moment after it was killed; one that nobody has waited for yet is not."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.01)
    return True


def test_no_part_begins_when_the_time_is_up(tmp_path: Path) -> None:
    run_parts([part("first", WRITES), part("second", WRITES)], tmp_path, total=0)
    for name in ("first", "second"):
        assert read(tmp_path, name) == {"ended": "not begun: no time was left", "seconds": 0.0, "rows": {}}


def test_a_result_of_an_earlier_run_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "gpu-broken.json").write_text('{"old": 1}')
    run_parts([part("broken", "1 / 0")], tmp_path)
    assert read(tmp_path, "broken")["rows"] == {}


def test_all_parts_come_back_and_fit_the_time() -> None:
    """Eight files come back from a lent machine; the training writes more of them, and runs alone."""
    *measured, train = parts(rehearse=False)
    assert train.name == "train"
    assert len([*measured, LOG, SUMMARY]) <= 8
    assert sum(each.limit for each in measured) <= TOTAL == 480
    assert train.limit <= TOTAL
    for each in (*measured, train):
        assert Path(each.command[1]).parent == HERE
        assert Path(each.command[1]).is_file()
        assert os.fspath(each.command[-1]) == "--output"


def test_rows_are_written_as_they_come_and_a_broken_one_costs_itself(tmp_path: Path) -> None:
    def broken() -> Any:
        raise RuntimeError("CUDA out of memory\nand a long story")

    path = tmp_path / "gpu-x.json"
    rows = Rows(path)
    assert rows.add("first", lambda: {"seconds": 2})["seconds"] == 2
    assert json.loads(path.read_text())["first"]["seconds"] == 2
    rows.add("second", broken)
    rows.add("third", lambda: {"bars": {"ratio": bar(1.04, at_most=1.1)}})
    found = json.loads(path.read_text())
    assert list(found) == ["first", "second", "third"]
    assert found["second"]["failed"] == "RuntimeError: CUDA out of memory"
    assert found["third"]["bars"] == {"ratio": {"measured": 1.04, "bar": "<= 1.1", "kept": True}}
    assert [file.name for file in tmp_path.iterdir()] == ["gpu-x.json"]


def test_docs_give_the_limits_and_a_command_that_fits_the_call() -> None:
    text = (HERE.parent / "docs" / "benchmarks.md").read_text()
    limits = re.findall(r"^\| `(\w+)` \| (\d+) \|", text, re.MULTILINE)
    assert limits == [(each.name, f"{each.limit:.0f}") for each in parts(rehearse=False)]
    command = text.partition("as `command`\n\n```\n")[2].partition("```")[0]
    assert command.rstrip().endswith("python3 benchmarks/gpu.py")
    assert len(command) <= 2000
    assert TOTAL + 60 <= int(text.partition("timeout_s: ")[2].partition("`")[0]) <= 600


@pytest.mark.parametrize(("bars", "kept"), [({"at_most": 1.02}, False), ({"at_least": 0.45}, True)])
def test_bars(bars: dict[str, float], kept: bool) -> None:  # noqa: FBT001
    assert bar(1.03, **bars)["kept"] is kept


def test_summary_says_which_bars_were_missed(tmp_path: Path) -> None:
    missed, kept = bar(1.2, at_most=1.1), bar(1, at_most=1.1)
    rows = {
        "step": {"seconds": 3.5, "parts": {"decode": 1}, "bars": {"step over calls": missed}},
        "trace": {"bars": {"loss": kept, "reward": missed, "lr": kept}},
    }
    code = f"import sys, pathlib; pathlib.Path(sys.argv[1]).write_text({json.dumps(json.dumps(rows))})"
    lines = run_parts([part("wan", code)], tmp_path).splitlines()
    assert lines[-2] == "| | step | seconds 3.5 | step over calls 1.2 (<= 1.1: MISSED) |"
    assert lines[-1] == "| | trace |  | reward 1.2 (<= 1.1: MISSED); 2 of 3 kept |"


def test_a_trained_folder_comes_back_as_one_file_also_when_its_command_broke(tmp_path: Path) -> None:
    made, out = tmp_path / "vae", tmp_path / "out"
    made.mkdir()
    out.mkdir()
    (made / "weights").write_bytes(b"kept")
    row = run_and_pack(["train", "no-such-model"], made, out, 60)
    assert row["ended"] == "exit code 2"
    with tarfile.open(out / "vae.tar.gz") as packed:
        assert packed.extractfile("vae/weights").read() == b"kept"  # type: ignore[union-attr]  # it is a file
    assert "MiB" in row


def test_a_folder_too_large_to_come_back_is_told_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_train, "LARGEST", 2**10)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "weights").write_bytes(os.urandom(2**12))
    assert gpu_train.pack(tmp_path / "made", tmp_path / "made.tar.gz") == {"left out": "0 MiB"}
    assert not (tmp_path / "made.tar.gz").exists()
