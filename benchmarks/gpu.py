"""All that is to be measured on a GPU, in one command of at most eight minutes that downloads nothing.

    python benchmarks/gpu.py                      every part but the training -> $OUT, or .gpu/
    python benchmarks/gpu.py --only wan shapes    some parts
    python benchmarks/gpu.py --only train         the embedded model's training
    python benchmarks/gpu.py --rehearse           on this CPU with tiny models: it only tells that everything runs

Each part is a process of its own with a time limit, the most important first. It writes gpu-PART.json anew after every
row, so a break costs no more than what came after it in that part. docs/benchmarks.md has the call on a lent machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOTAL = 480.0  # seconds
SLOWER = 4  # a rehearsal
LOG, SUMMARY = "gpu-log.txt", "gpu-summary.md"


@dataclass(frozen=True)
class Part:
    """A part of the measurement.

    Args:
        name: of its file, gpu-NAME.json.
        limit: seconds that it may take.
        command: to which the path of its file is added.
    """

    name: str
    limit: float
    command: Sequence[str]


def parts(*, rehearse: bool) -> list[Part]:
    """All parts in their order; a rehearsal is given more time, since a CPU may be busy."""

    def part(name: str, limit: float, module: str) -> Part:
        flags = ["--rehearse"] if rehearse else []
        command = [sys.executable, str(HERE / f"{module}.py"), name, *flags, "--output"]
        return Part(name, limit * (SLOWER if rehearse else 1), command)

    return [
        part("correctness", 90, "gpu_correctness"),
        part("wan", 165, "gpu_speed"),
        part("levers", 75, "gpu_speed"),
        part("where", 30, "gpu_speed"),
        part("wan14b", 65, "gpu_speed"),
        part("shapes", 55, "gpu_speed"),
        part("train", TOTAL, "gpu_train"),
    ]


def run_parts(chosen: Iterable[Part], out: Path, total: float = TOTAL) -> str:
    """Run the parts one after the other within `total` seconds; returns the summary, which is in `out` as well."""
    out.mkdir(parents=True, exist_ok=True)
    (out / LOG).write_bytes(b"")
    began, files = time.monotonic(), []
    for part in chosen:
        files.append(out / f"gpu-{part.name}.json")
        run_part(part, files[-1], out / LOG, min(part.limit, total - (time.monotonic() - began)))
        (out / SUMMARY).write_text(summary(files))
    return summary(files)


def run_part(part: Part, path: Path, log: Path, limit: float) -> None:
    """Run one part and add to its file how it ended."""
    path.unlink(missing_ok=True)
    began, ended = time.monotonic(), "not begun: no time was left"
    if limit > 0:
        with log.open("ab") as lines:
            lines.write(f"\n== {part.name}\n".encode())
            lines.flush()
            ended = _wait([*part.command, str(path)], lines.fileno(), limit)
    seconds = round(time.monotonic() - began, 1)
    rows = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({"ended": ended, "seconds": seconds, "rows": rows}, indent=2) + "\n")
    print(f"{part.name}: {ended}, {seconds:.0f} s", flush=True)
    if ended != "done":
        print(*log.read_text(errors="replace").splitlines()[-8:], sep="\n", flush=True)


def _wait(command: Sequence[str], log: int, limit: float) -> str:
    """Wait for a command and say how it ended; its whole process group ends with it."""
    # A group of its own, to be killed as a whole; no new session, which a lent machine would let run on.
    process = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)  # noqa: S603  # our own command
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped at its limit of {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "done" if code == 0 else f"exit code {code}"


def summary(files: Iterable[Path]) -> str:
    """A Markdown table of all rows in these files: their plain figures, and which bars they kept."""
    lines = ["| part | row | figures | bars |", "|---|---|---|---|"]
    for path in files:
        part = json.loads(path.read_text())
        name = path.stem.removeprefix("gpu-")
        lines.append(f"| {name} | | {part['ended']}, {part['seconds']} s | |")
        lines += [f"| | {row} | {_figures(content)} | {_bars(content)} |" for row, content in part["rows"].items()]
    return "\n".join([*lines, ""])


def _figures(row: dict[str, Any]) -> str:
    plain = [f"{key} {value}" for key, value in row.items() if isinstance(value, str | int | float)]
    return "; ".join(plain).replace("|", "/")


def _bars(row: dict[str, Any]) -> str:
    """One bar in words; of several those that were missed, and how many there are."""
    bars = row.get("bars", {})
    told = {name: bar for name, bar in bars.items() if len(bars) == 1 or not bar["kept"]}
    lines = [
        f"{name} {bar['measured']} ({bar['bar']}: {'kept' if bar['kept'] else 'MISSED'})" for name, bar in told.items()
    ]
    if len(bars) > 1:
        lines.append(f"{len(bars) - len(lines)} of {len(bars)} kept")
    return "; ".join(lines)


def main() -> None:
    """Measure, write the files, print the summary."""
    known = {part.name: part for part in parts(rehearse="--rehearse" in sys.argv)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(known), default=[name for name in known if name != "train"])
    parser.add_argument("--rehearse", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".gpu")))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the part at work ends with it
    chosen = [part for name, part in known.items() if name in options.only]
    print("\n" + run_parts(chosen, options.output, TOTAL * (SLOWER if options.rehearse else 1)))


if __name__ == "__main__":
    main()
