"""Messages of commands, said in the words of the Python API."""

from __future__ import annotations

import pytest

from rats_video.arguments import as_arguments, in_python
from rats_video.errors import Interrupted, UserError, warn


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("add --overwrite or another --output", "add overwrite=True or another output"),
        ("--nfe 3", "nfe=3"),
        ("--num-frames 9 --height 16", "num_frames=9 height=16"),
        ("use a --batch-size below 8", "use a batch_size below 8"),
        ("start fewer, or use --device cpu", 'start fewer, or use device="cpu"'),
        ("where it has moved to, say --base DIR", "where it has moved to, say base=DIR"),
        ("--set training.stps: unknown key", "settings training.stps: unknown key"),
        ("--set, the first saves most: compute.tiles=true", "settings, the first saves most: compute.tiles=true"),
        ("add --set a.b=[2, 3]; or --set c=/x/y", "add settings={'a.b': [2, 3]}; or settings={'c': '/x/y'}"),
        ("if not: --set shift=5 --set guard=null", "if not: settings={'shift': 5, 'guard': None}"),
        ("add --set a=[", "add settings={'a': '['}"),
        ("one: rats-video train reward --seed 3", "one: rats-video train reward --seed 3"),
        ("`rats-video sample --model` takes it; --model", "`rats-video sample --model` takes it; model"),
        ("hf download a/b --local-dir x --model y; --model", "hf download a/b --local-dir x --model y; model"),
        ("--nfeature and --sets stay", "--nfeature and --sets stay"),
    ],
)  # fmt: skip
def test_options_become_arguments(told: str, expected: str) -> None:
    assert as_arguments(told) == expected


def test_errors_warnings_and_interruptions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^output: is there \(add overwrite=True\)$"), in_python():
        raise UserError("is there", where="--output", fix="add --overwrite")
    with pytest.raises(Interrupted, match=r"^stopped; resume=True goes on$") as caught, in_python():
        raise Interrupted("stopped; --resume goes on", 75)
    assert caught.value.code == 75
    with in_python():
        warn("quality may drop", where="--nfe 3")
    warn("quality may drop", where="--nfe 3")
    assert capsys.readouterr().err == "warning: nfe=3: quality may drop\nwarning: --nfe 3: quality may drop\n"
