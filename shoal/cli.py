"""The `shoal` command. What a command needs is imported when it runs, so that help comes at once.

Exit status: 0 done, 1 failed, 2 cannot start: a wrong setting, argument or data folder (told in one
sentence on standard error), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar, get_origin

if TYPE_CHECKING:
    from shoal.configuration import LoadedSettings
    from shoal.settings import Process

__all__ = ["Parser", "main"]

P = TypeVar("P", bound="Process")

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
        lines = (f"  {command:<13} {about}" for command, (about, _) in _COMMANDS.items())
        print(_OVERVIEW.format(commands="\n".join(lines)), end="")
        return 0 if arguments else 2
    if name in ("-V", "--version"):
        name = "version"
    if name not in _COMMANDS:
        close = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f" Did you mean `shoal {close[0]}`?" if close else " `shoal --help` lists them."
        return _refuse(f"There is no command {name!r}.{hint}")
    serves = name in _SERVING or arguments[:2] == ["encoder", "serve"]
    if argv is None and serves:  # we are the program, and not called by one
        # Until it serves, SIGTERM ends it at once: also as the first process of a container, where
        # a signal that nobody has asked for does nothing.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
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


def _add_settings(parser: Parser, process: type[Process]) -> None:
    """A flag for every setting, with its description, variable and default."""
    from shoal.configuration import CONFIG_VARIABLE, display
    from shoal.settings import ENV_PREFIX, setting_names

    parser.usage = f"{parser.prog} [-h] [--config FILE] [--SETTING VALUE ...]"

    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f'TOML file with settings, such as log_level = "info" (or {CONFIG_VARIABLE}).',
    )
    for name in setting_names(process):
        field = process.model_fields[name]
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "none" if default is None else display(name, default)
        variable = ENV_PREFIX + name.upper()
        several = get_origin(field.annotation) is tuple
        about = f"{field.description} [default {shown}; {variable}]".replace("%", "%%")
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=argparse.SUPPRESS,
            action="append" if several else "store",
            metavar=name.rpartition("_")[2].upper(),
            help=about,
        )


def _load_settings(parsed: argparse.Namespace, process: type[P]) -> LoadedSettings[P]:
    from shoal.configuration import load_settings
    from shoal.settings import setting_names

    given = vars(parsed)
    flags = {name: _joined(given[name]) for name in setting_names(process) if name in given}
    return load_settings(flags, parsed.config, process)


def _joined(value: str | list[str]) -> str:
    """A flag that was given several times, as if it had been given once."""
    return value if isinstance(value, str) else ",".join(value)


_PRECEDENCE = "Flags win over SHOAL_ variables, variables over the settings file."


# -- commands --------------------------------------------------------------------------------------


def _process_settings(name: str, about: str, process: type[P], arguments: list[str]) -> P:
    """What the command of a process was told."""
    parser = Parser(f"shoal {name}", f"{about}\n{_PRECEDENCE}")
    _add_settings(parser, process)
    settings = _load_settings(parser.parse_args(arguments), process).settings
    from shoal.cpu import prepare_environment

    prepare_environment()
    return settings


def _serve(arguments: list[str]) -> int:
    from shoal.settings import ServeSettings

    about = "Serve everything in one process."
    settings = _process_settings("serve", about, ServeSettings, arguments)
    from shoal.all_in_one import serve

    serve(settings)
    return 0


def _coordinator(arguments: list[str]) -> int:
    from shoal.settings import CoordinatorProcess

    about = "Answer the public APIs of a cluster. It keeps nothing; run two or more."
    settings = _process_settings("coordinator", about, CoordinatorProcess, arguments)
    from shoal.roles.coordinator import run

    run(settings)
    return 0


def _storage_node(arguments: list[str]) -> int:
    from shoal.settings import StorageProcess

    about = "Hold replicas of shards in a cluster. Each needs a data folder of its own."
    settings = _process_settings("storage-node", about, StorageProcess, arguments)
    from shoal.roles.storage_node import run

    run(settings)
    return 0


def _index_node(arguments: list[str]) -> int:
    from shoal.settings import IndexProcess

    about = "Build indexes for the storage nodes of a cluster. It keeps nothing."
    settings = _process_settings("index-node", about, IndexProcess, arguments)
    from shoal.roles.index_node import run

    run(settings)
    return 0


def _monitor(arguments: list[str]) -> int:
    from shoal.settings import MonitorProcess

    about = "Watch over a cluster and repair it. One leads; run two, so that another can take over."
    settings = _process_settings("monitor", about, MonitorProcess, arguments)
    from shoal.roles.monitor import run

    run(settings)
    return 0


def _encoder(arguments: list[str]) -> int:
    actions = {"serve": _encoder_serve, "train": _encoder_train, "mine": _encoder_mine}
    action = actions.get(arguments[0]) if arguments else None
    if action is None:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(_ENCODER_OVERVIEW, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return action(arguments[1:])


_ENCODER_OVERVIEW = """\
usage: shoal encoder ACTION ...

  serve         in a cluster: turn texts into vectors, over one process or several
  train         fine-tune a model on pairs of texts, over one process or several
  mine          write pairs with hard negatives, found in a collection

`shoal encoder ACTION --help` tells more about each.
"""


def _encoder_serve(arguments: list[str]) -> int:
    from shoal.settings import EncoderProcess

    about = (
        "Turn texts into vectors for the coordinators of a cluster, with tp × pp processes.\n"
        "Run it several times, under different --node-id, for more throughput and no gap."
    )
    settings = _process_settings("encoder serve", about, EncoderProcess, arguments)
    from shoal.roles.encoder import run

    run(settings)
    return 0


def _encoder_train(arguments: list[str]) -> int:
    from encoder.train.command import run

    return run(arguments)


def _encoder_mine(arguments: list[str]) -> int:
    from shoal.cpu import prepare_environment

    prepare_environment()
    from encoder.train.mining import run

    return run(arguments)


def _settings(arguments: list[str]) -> int:
    from shoal.settings import PROCESSES

    # The role decides which flags there are, so it is looked for before they are parsed.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--role", default="serve")
    role = first.parse_known_args(arguments)[0].role
    parser = Parser(
        "shoal settings",
        f"Show what `shoal serve`, or the process of that role, would use with the same flags, and "
        f"where it comes from.\n{_PRECEDENCE} Keys are not shown.",
    )
    parser.add_argument("--role", choices=list(PROCESSES), help="Whose settings [default serve].")
    process = PROCESSES.get(role, PROCESSES["serve"])
    _add_settings(parser, process)
    loaded = _load_settings(parser.parse_args(arguments), process)
    from shoal.configuration import display

    for name, origin in loaded.origins.items():
        print(f"{name} = {display(name, getattr(loaded.settings, name))}  # {origin}")
    return 0


def _health(arguments: list[str]) -> int:
    parser = Parser(
        "shoal health",
        "Ask a process of Shoal on this machine whether it is ready: exit status 0 or 1.",
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        help="Where it writes server.json or node.json: its data or run folder "
        "[default: SHOAL_RUN_DIR, else SHOAL_DATA_DIR].",
    )
    folder = parser.parse_args(arguments).folder
    from shoal.announcement import ask_health

    print(ask_health(folder))
    return 0


def _cluster(arguments: list[str]) -> int:
    parser = Parser(
        "shoal cluster",
        "A whole cluster on this machine, as processes of their own, to try it out.\n"
        "  up      start what does not run, and wait until everything is ready\n"
        "  down    stop it; the data stays\n"
        "  status  list the processes",
    )
    parser.add_argument("action", choices=["up", "down", "status"])
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("cluster-data"),
        help="Where it keeps data, logs and process ids [default cluster-data].",
    )
    parsed = parser.parse_args(arguments)
    from shoal.local_cluster import command

    command(parsed.action, parsed.dir, print)
    return 0


def _demo(arguments: list[str]) -> int:
    from shoal.cpu import prepare_environment

    prepare_environment()
    from shoal.demo import run

    return run(arguments)


def _import(arguments: list[str]) -> int:
    from shoal.importing import run

    return run(arguments)


def _migrate(arguments: list[str]) -> int:
    from shoal.migrating import run

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
    "migrate": ("change the model of a vector of a live collection", _migrate),
    "cluster": ("start, stop and list a cluster on this machine", _cluster),
    "coordinator": ("in a cluster: answer the public APIs", _coordinator),
    "storage-node": ("in a cluster: hold replicas of shards", _storage_node),
    "index-node": ("in a cluster: build indexes", _index_node),
    "monitor": ("in a cluster: fail over and repair", _monitor),
    "encoder": ("serve a text model over several processes; fine-tune one", _encoder),
    "settings": ("show the effective settings and where each comes from", _settings),
    "health": ("ask a process on this machine whether it is ready", _health),
    "version": ("print the version", _version),
}
_SERVING = ("serve", "coordinator", "storage-node", "index-node", "monitor")
