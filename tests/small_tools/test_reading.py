"""Weights that are not finite numbers are refused where they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rats_video.errors import UserError
from rats_video.reading import check_finite, load_tensors


def test_first_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    whole = {"a": torch.ones(2), "b": torch.tensor([1, 2]), "c": torch.ones(3, dtype=torch.bfloat16)}
    save_file(whole, path)
    assert load_tensors(path).keys() == whole.keys()
    save_file({**whole, "c": torch.tensor([torch.inf, 0, torch.nan], dtype=torch.bfloat16)}, path)
    with pytest.raises(UserError) as caught:
        load_tensors(path)
    line = "c holds NaN or infinity (2 of its 3 numbers) (download, convert or train it again)"
    assert str(caught.value) == f"{path}: {line}"


def test_eight_bit_weights_pass() -> None:
    check_finite([("a", torch.zeros(2).to(torch.float8_e4m3fn))], where=Path("x"))
