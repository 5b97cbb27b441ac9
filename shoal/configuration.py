"""Settings from flags, environment variables and a TOML file.

A setting named `http_port` is the flag `--http-port`, the variable `SHOAL_HTTP_PORT` and the key
`http_port` of the TOML file that `--config` or `SHOAL_CONFIG` names. Flags win over variables,
variables over the file, the file over the defaults.

Whatever is wrong raises `SettingsError` with a sentence: which setting, where it came from, why it
is wrong, what would be right. A name that nobody knows is an error too: a setting that is silently
ignored is found out on the worst day. The value of a secret is never in a message.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from pydantic import SecretStr, ValidationError
from pydantic_settings import EnvSettingsSource, TomlConfigSettingsSource

from shoal.errors import SettingsError
from shoal.settings import (
    ENV_PREFIX,
    PROCESSES,
    Process,
    ServeSettings,
    names_passed_over,
    setting_names,
)

__all__ = ["CONFIG_VARIABLE", "LoadedSettings", "display", "load_settings", "nearest"]

CONFIG_VARIABLE = "SHOAL_CONFIG"  # names the TOML file; no setting itself
FAULT_VARIABLE_PREFIX = "SHOAL_FAULT"  # read by fault points in crash tests, never by settings

S = TypeVar("S", bound=Process)


@dataclass(frozen=True, slots=True)
class LoadedSettings(Generic[S]):
    """origins: setting -> "--http-port", "SHOAL_HTTP_PORT", "shoal.toml" or "default"."""

    settings: S
    origins: dict[str, str]


def display(name: str, value: object) -> str:
    """A value for people, as the settings file would have it. Sizes in the largest whole unit;
    of a secret only that it is set."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, SecretStr):
        return "(set)"
    if isinstance(value, tuple):
        return ", ".join(value)
    if "bytes" in name and isinstance(value, int):
        for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value and value % size == 0:
                return f"{value // size}{unit}"
    return str(value)


def nearest(name: str, names: Iterable[str]) -> str:
    """ " Did you mean X?" for the most similar of `names`, or "" when none is similar."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


@overload
def load_settings(
    flags: Mapping[str, object], config: Path | None = None
) -> LoadedSettings[ServeSettings]: ...
@overload
def load_settings(
    flags: Mapping[str, object], config: Path | None, process: type[S]
) -> LoadedSettings[S]: ...
def load_settings(
    flags: Mapping[str, object],
    config: Path | None = None,
    process: type[Process] = ServeSettings,
) -> LoadedSettings[Any]:
    """Merge flags, environment variables, the settings file and defaults; check every value.

    flags    setting name -> value, only those that were given.
    config   the TOML file of `--config`; None: the one that SHOAL_CONFIG names, or no file.
    process  whose settings: one of PROCESSES.
    Raises   SettingsError.
    """
    if config is None and os.environ.get(CONFIG_VARIABLE):
        config = Path(os.environ[CONFIG_VARIABLE])
    layers: list[tuple[Mapping[str, object], Callable[[str], str]]] = [
        ({} if config is None else _read_file(config, process), lambda _: str(config)),
        (_read_variables(process), lambda name: ENV_PREFIX + name.upper()),
        (flags, lambda name: "--" + name.replace("_", "-")),
    ]
    values: dict[str, object] = {}
    origins = dict.fromkeys(setting_names(process), "default")
    for layer, origin_of in layers:
        for name, value in layer.items():
            values[name], origins[name] = value, origin_of(name)
    try:
        return LoadedSettings(process(**values), origins)
    except ValidationError as error:
        raise SettingsError(_explain(error, process, values, origins)) from None


def _read_file(path: Path, process: type[Process]) -> dict[str, Any]:
    if not path.is_file():
        raise SettingsError(f"The settings file {path} does not exist.")
    try:
        values = TomlConfigSettingsSource(process, toml_file=path)()
    except OSError as error:
        raise SettingsError(f"The settings file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {path} is no valid TOML: {error}.") from None
    own, passed_over = setting_names(process), names_passed_over(process)
    for name in values:
        if name not in own and name not in passed_over:
            raise SettingsError(
                f"The settings file {path} has {name}, which is no setting of "
                f"`shoal {_command(process)}`."
                + nearest(name, [*own, *passed_over])
                + f" {_lists_all(process)}"
            )
    return {name: value for name, value in values.items() if name in own}


def _read_variables(process: type[Process]) -> dict[str, Any]:
    own, passed_over = setting_names(process), names_passed_over(process)
    known = {ENV_PREFIX + name.upper() for name in (*own, *passed_over)} | {CONFIG_VARIABLE}
    for variable in os.environ:
        if (
            variable.startswith(ENV_PREFIX)
            and not variable.startswith(FAULT_VARIABLE_PREFIX)
            and variable not in known
        ):
            raise SettingsError(
                f"The environment variable {variable} is no setting of "
                f"`shoal {_command(process)}`."
                + nearest(variable, known)
                + f" {_lists_all(process)}"
            )
    return {name: value for name, value in EnvSettingsSource(process)().items() if name in own}


def _command(process: type[Process]) -> str:
    return next(command for command, settings in PROCESSES.items() if settings is process)


def _lists_all(process: type[Process]) -> str:
    role = "" if process is ServeSettings else f" --role {_command(process)}"
    return f"`shoal settings{role}` lists all."


def _explain(
    error: ValidationError,
    process: type[Process],
    values: Mapping[str, object],
    origins: Mapping[str, str],
) -> str:
    """One sentence or two per wrong setting."""
    sentences = []
    for problem in error.errors(include_url=False):
        why = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            sentences.append(f"{why}.")
            continue
        name = str(problem["loc"][0])
        field = process.model_fields[name]
        extra = field.json_schema_extra
        right = extra["right"] if isinstance(extra, dict) else ""
        secret = field.annotation == SecretStr | None
        shown = "" if secret else f" {_shown(values.get(name))}"
        sentences.append(
            f"The setting {name} has a wrong value{shown} (from {origins[name]}): "
            f"{why[:1].lower() + why[1:]}. It should be {right}."
        )
    return " ".join(sentences)


def _shown(value: object) -> str:
    text = re.sub(r"//[^/]*@", "//…@", repr(value))  # a password in an address is not for logs
    return text if len(text) <= 80 else text[:77] + "..."
