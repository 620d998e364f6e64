"""examples/quickstart.ipynb runs as it is, but for fewer steps and clips; what it stores is small and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
FEWER = {
    "STEPS = 20": "STEPS = 1", "NUM_CLIPS = 8": "NUM_CLIPS = 1", "nfe=20": "nfe=2",
    '"guard": None': '"guard": None, "teacher.num_steps": 8, "training.batch_size": 4, '
    '"evaluation.teacher_steps": 2, "evaluation.latency_clips": 0, "evaluation.features": None',
}  # fmt: skip


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: Any) -> list[str]:
    """What its cells show, text aside."""
    return [
        kind
        for cell in code(notebook)
        for output in cell.outputs
        for kind in output.get("data", {})
        if kind != "text/plain"
    ]


SHOWN = ["image/gif", "image/gif", "image/png", "text/markdown", "image/gif"]


def test_its_outputs_are_stored_and_small() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
    assert shown(notebook) == SHOWN
    text = NOTEBOOK.read_text()
    assert len(text) < 1_000_000
    assert "Traceback" not in text
    assert str(Path.home()) not in text


@pytest.mark.slow
@pytest.mark.pipeline
def test_it_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    for long, short in FEWER.items():
        holding = [cell for cell in code(notebook) if long in cell.source]
        assert holding, long
        for cell in holding:
            cell.source = cell.source.replace(long, short)
            cell.outputs = []
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert shown(notebook) == SHOWN
    (table,) = [output.data["text/markdown"] for cell in code(notebook) for output in cell.outputs
                if "text/markdown" in output.get("data", {})]  # fmt: skip
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:]] == [
        ["| teacher", "4"], ["| base", "4"], ["| student", "4"]
    ]  # fmt: skip
    assert (tmp_path / "runs" / "quickstart" / "student" / "rats.json").is_file()
