"""Shell completion, as a shell asks for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("words", "found"), [("rats-video ra", ["rate"]), ("rats-video rate --re", ["--results", "--reward"])]
)
def test_completion(words: str, found: list[str]) -> None:
    environment = os.environ | {
        "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_RATS_VIDEO_COMPLETE": "complete_bash",
    }  # fmt: skip
    code = "import sys; sys.argv[0] = 'rats-video'; from rats_video.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == found
