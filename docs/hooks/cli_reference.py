"""The page of the command line, made from its Typer app."""

from __future__ import annotations

from typing import Any

import typer
from markdown_table import table

from rats_video.cli.app import app


def page() -> str:
    """Every command with its arguments and options, as Markdown."""
    root = typer.main.get_command(app)
    return f"# Command line\n\n{root.help}\n\n" + "".join(_section(name, each) for name, each in commands().items())


def commands(group: Any = None, words: str = "") -> dict[str, Any]:
    """Every command that does something, by its words after `rats-video`."""
    found = {}
    for name, each in (group or typer.main.get_command(app)).commands.items():
        found |= commands(each, f"{words}{name} ") if hasattr(each, "commands") else {words + name: each}
    return found


def options(command: Any) -> list[Any]:
    """Its options, without those that help does not show."""
    return [each for each in command.params if each.param_type_name == "option" and not each.hidden]


def _section(words: str, command: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    usage = " ".join(each.metavar if each.required else f"[{each.metavar}]" for each in arguments)
    rows = [(f"`{each.metavar}`", "", _default(each), each.help or "") for each in arguments]
    rows += [
        (" ".join(f"`{flag}`" for flag in (*each.opts, *each.secondary_opts)), _value(each), _default(each), each.help)
        for each in options(command)
    ]
    return (
        f"## {words}\n\n```\nrats-video {f'{words} {usage}'.strip()} [OPTIONS]\n```\n\n{command.help}\n\n"
        f"{table(['option', 'value', 'default', 'meaning'], rows)}\n\n"
        + (f"{command.epilog}\n\n" if command.epilog else "")
    )


def _value(option: Any) -> str:
    if option.is_flag:
        return ""
    words = option.metavar or option.type_descriptor.annotation.__name__
    return f"`{words}`" + (f", {option.min} or more" if option.min is not None else "")


def _default(option: Any) -> str:
    if option.required:
        return "required"
    return "" if option.default in {None, False, ""} else f"`{option.default}`"
