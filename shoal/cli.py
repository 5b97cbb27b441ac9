"""The `shoal` command. What a command needs is imported when it runs, so that help comes at once.

Exit status: 0 done, 1 failed, 2 cannot start: a wrong setting, argument or data folder (told in one
sentence on standard error), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from shoal.settings import LoadedSettings

__all__ = ["Parser", "main"]

_OVERVIEW = """\
usage: shoal COMMAND ...

Shoal: a durable vector database with its own text encoder; works with Qdrant clients.

{commands}

`shoal COMMAND --help` tells more about each.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        lines = (f"  {command:<10} {about}" for command, (about, _) in _COMMANDS.items())
        print(_OVERVIEW.format(commands="\n".join(lines)), end="")
        return 0 if arguments else 2
    if name in ("-V", "--version"):
        name = "version"
    if name not in _COMMANDS:
        close = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f" Did you mean `shoal {close[0]}`?" if close else " `shoal --help` lists them."
        return _refuse(f"There is no command {name!r}.{hint}")
    from shoal.errors import ShoalError, StartupError

    try:
        return _COMMANDS[name][1](arguments[1:])
    except StartupError as error:
        return _refuse(error.message)
    except ShoalError as error:
        return _refuse(error.message, status=1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `shoal settings | head`
        sys.stderr.close()
        return 1


def _refuse(message: str, status: int = 2) -> int:
    print(f"shoal: {message}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """Names the right flag when one is misspelt."""

    def __init__(self, prog: str, about: str) -> None:
        super().__init__(
            prog=prog,
            description=about,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flag = message.removeprefix(prefix).split()[0]
            known = [name for action in self._actions for name in action.option_strings]
            close = difflib.get_close_matches(flag.split("=")[0], known, n=1)
            message = f"there is no argument {flag}."
            message += f" Did you mean {close[0]}?" if close else ""
        print(f"{self.prog}: {message}\n`{self.prog} --help` lists all.", file=sys.stderr)
        raise SystemExit(2)


# -- settings from flags ---------------------------------------------------------------------------


def _add_settings(parser: Parser) -> None:
    """A flag for every setting, with its description, variable and default."""
    from shoal.settings import (
        CONFIG_VARIABLE,
        ENV_PREFIX,
        SETTING_NAMES,
        ServeSettings,
        display,
    )

    parser.usage = f"{parser.prog} [-h] [--config FILE] [--SETTING VALUE ...]"

    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"TOML file with settings, such as http_port = 6333 (or {CONFIG_VARIABLE}).",
    )
    for name in SETTING_NAMES:
        field = ServeSettings.model_fields[name]
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "none" if default is None else display(name, default)
        variable = ENV_PREFIX + name.upper()
        about = f"{field.description} [default {shown}; {variable}]".replace("%", "%%")
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=argparse.SUPPRESS,
            metavar=name.rpartition("_")[2].upper(),
            help=about,
        )


def _load_settings(parsed: argparse.Namespace) -> LoadedSettings:
    from shoal.settings import SETTING_NAMES, load_settings

    given = vars(parsed)
    flags = {name: given[name] for name in SETTING_NAMES if name in given}
    return load_settings(flags, parsed.config)


_PRECEDENCE = "Flags win over SHOAL_ variables, variables over the settings file."


# -- commands --------------------------------------------------------------------------------------


def _serve(arguments: list[str]) -> int:
    parser = Parser("shoal serve", f"Serve everything in one process.\n{_PRECEDENCE}")
    _add_settings(parser)
    loaded = _load_settings(parser.parse_args(arguments))
    from shoal.cpu import prepare_environment

    prepare_environment()
    from shoal.all_in_one import serve

    serve(loaded.settings)
    return 0


def _settings(arguments: list[str]) -> int:
    parser = Parser(
        "shoal settings",
        f"Show what `shoal serve` with the same flags would use, and where it comes from.\n"
        f"{_PRECEDENCE} Keys are not shown.",
    )
    _add_settings(parser)
    loaded = _load_settings(parser.parse_args(arguments))
    from shoal.settings import display

    for name, origin in loaded.origins.items():
        print(f"{name} = {display(name, getattr(loaded.settings, name))}  # {origin}")
    return 0


def _demo(arguments: list[str]) -> int:
    from shoal.cpu import prepare_environment

    prepare_environment()
    from shoal.demo import run

    return run(arguments)


def _import(arguments: list[str]) -> int:
    from shoal.importing import run

    return run(arguments)


def _version(arguments: list[str]) -> int:
    Parser("shoal version", "Print the version.").parse_args(arguments)
    from shoal.version import VERSION

    print(f"shoal {VERSION}")
    return 0


_COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "serve": ("run the server: everything in one process", _serve),
    "demo": ("index Python's own documentation and ask it questions", _demo),
    "import": ("load a Parquet, JSONL, CSV or .npy file into a collection", _import),
    "settings": ("show the effective settings and where each comes from", _settings),
    "version": ("print the version", _version),
}
