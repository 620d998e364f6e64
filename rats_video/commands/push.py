"""`export model --push-to-hub` and `export push`: an export goes to the model hub once it is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rats_video.commands.export_model import ExportRequest, run_export_model, with_output
from rats_video.errors import UserError
from rats_video.export.push import check_export, check_name, push
from rats_video.hub import CARD


def run_push(folder: Path, repository: str, *, private: bool) -> list[str]:
    """Upload a folder that `export model` wrote; returns the lines to show.

    Raises:
        UserError: it is none, or was not compared with its student; or the hub does not take it.
    """
    check_name(repository, where="USER/NAME")
    check_export(folder)
    return _push(folder, repository, private=private)


def export_and_push(
    order: ExportRequest, device: str, repository: str, *, private: bool, echo: Callable[[str], None]
) -> None:
    """Export, and upload what passed its check; what cannot be uploaded is still there.

    Raises:
        UserError: as `run_export_model` and `run_push`.
    """
    check_name(repository, where="--push-to-hub")
    if not order.verify:
        raise UserError("nothing goes to the hub unchecked", where="--no-verify", fix="leave it or --push-to-hub out")
    order, folder = with_output(order)
    for line in run_export_model(order, device):
        echo(line)
    for line in _push(folder, repository, private=private):
        echo(line)


def _push(folder: Path, repository: str, *, private: bool) -> list[str]:
    address = push(folder, repository, private=private)
    command = f"to sample it: rats-video sample --model {repository}"
    return [f"on the hub: {address}", *([command] if (folder / CARD).is_file() else [])]
