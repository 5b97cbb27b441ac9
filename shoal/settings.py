"""Every setting of `shoal serve`, described once; flags, variables and files are made from here.

A setting named `http_port` is the flag `--http-port`, the variable `SHOAL_HTTP_PORT` and the key
`http_port` of the TOML file that `--config` or `SHOAL_CONFIG` names. Flags win over variables,
variables over the file, the file over the defaults. Each part of Shoal asks for the small model
that it needs (`StorageSettings`, ...); `ServeSettings` is all of them together.

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
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from shoal import limits
from shoal.errors import SettingsError

__all__ = [
    "CONFIG_VARIABLE",
    "ENV_PREFIX",
    "SETTING_NAMES",
    "CoordinatorSettings",
    "EncoderSettings",
    "LoadedSettings",
    "ServeSettings",
    "StorageSettings",
    "display",
    "load_settings",
    "nearest",
]

ENV_PREFIX = "SHOAL_"
CONFIG_VARIABLE = "SHOAL_CONFIG"  # names the TOML file; no setting itself
FAULT_VARIABLE_PREFIX = "SHOAL_FAULT"  # read by fault points in crash tests, never by settings


_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {unit + "B": size for unit, size in _UNITS.items() if unit not in ("", "B")}
_UNITS |= {f"{unit}IB": 1024 ** (power + 1) for power, unit in enumerate("KMGT")}


def _parse_bytes(value: object) -> object:
    """Text such as 16MiB, 16 MB or 16777216 -> bytes; pydantic refuses what is left as text."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        return value
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


Bytes = Annotated[int, BeforeValidator(_parse_bytes)]


def _cores() -> int:
    return os.cpu_count() or 1


def _setting(default: object = ..., *, right: str, about: str, **bounds: Any) -> Any:
    """A documented field. `right` says what a right value looks like: "a port from 0 to 65535"."""
    if callable(default):
        return Field(
            default_factory=default,
            description=about,
            json_schema_extra={"right": right},
            validate_default=True,
            **bounds,
        )
    return Field(
        default,
        description=about,
        json_schema_extra={"right": right},
        validate_default=True,
        **bounds,
    )


class StorageSettings(BaseModel):
    """What a storage node needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seal_bytes: Bytes = _setting(
        limits.SEAL_BYTES,
        right="a size of at least 64KiB, such as 16MiB",
        about="A growing segment of this size, vectors and payload together, is sealed: written "
        "to disk for good. Searches read the growing segment in full, so larger is slower.",
        ge=64 * limits.KIB,
    )
    disk_free_bytes_min: Bytes = _setting(
        limits.DISK_FREE_BYTES_MIN,
        right="a size such as 64MiB",
        about="With less free disk space than this, writes are refused with status 507. "
        "Reads go on, and so do writes once there is space again.",
        ge=0,
    )
    verify_on_open_bytes_max: Bytes = _setting(
        limits.VERIFY_ON_OPEN_BYTES_MAX,
        right="a size such as 4GiB, or 0 for none",
        about="How many bytes of segments are checked against their checksums before the "
        "server is ready.",
        ge=0,
    )
    index_threads: int = _setting(
        lambda: max(1, _cores() // 2),
        right="a whole number from 1 to 1024",
        about="Threads that build one index, at low priority. Default: half of the cores.",
        ge=1,
        le=1024,
    )
    filter_cache_bytes_max: Bytes = _setting(
        limits.FILTER_CACHE_BYTES_MAX,
        right="a size such as 64MiB, or 0 for none",
        about="Memory for the results of filters, so that a filter that is asked again costs "
        "almost nothing.",
        ge=0,
    )


class EncoderSettings(BaseModel):
    """What the text encoder needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder_model: str = _setting(
        "sentence-transformers/all-minilm-l6-v2",
        right="a model's name, a folder with a model, or none",
        about="The model that turns text into vectors: the name of the one that comes with Shoal, "
        'or a folder on disk; "none" switches text off.',
        min_length=1,
    )
    encoder_preload: bool = _setting(
        False,
        right="true or false",
        about="Load that model right after the start; otherwise the first text does and waits.",
    )
    encoder_threads: int = _setting(
        lambda: max(1, _cores() - 1),
        right="a whole number from 1 to 1024",
        about="Threads that the encoder computes with. Default: one core is left to the rest.",
        ge=1,
        le=1024,
    )
    encoder_precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto",
        right="auto, float32 or bfloat16",
        about="Numbers that the encoder computes with; auto takes bfloat16 where the CPU has it.",
    )


class CoordinatorSettings(BaseModel):
    """What the coordinator needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default_shard_number: int = _setting(
        1,
        right=f"a whole number from 1 to {limits.SHARDS_PER_COLLECTION_MAX}",
        about="Shards of a new collection whose creator did not say how many.",
        ge=1,
        le=limits.SHARDS_PER_COLLECTION_MAX,
    )


class ServeSettings(BaseSettings, CoordinatorSettings, EncoderSettings, StorageSettings):
    """Everything that `shoal serve` can be told."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=ENV_PREFIX)

    data_dir: Path = _setting(
        Path("shoal-data"),
        right="a folder that this user may write to; it is made if it is not there",
        about="Where everything is kept. One server at a time.",
    )
    http_host: str = _setting(
        "127.0.0.1",
        right="an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all",
        about="The address to listen on. The default answers this machine only.",
        min_length=1,
    )
    http_port: int = _setting(
        6333,
        right="a port from 0 to 65535",
        about="The port to listen on; 0 picks a free one, which server.json in the data folder "
        "then names.",
        ge=0,
        le=65535,
    )
    api_key: SecretStr | None = _setting(
        None,
        right="a text that is not empty; leave it out to let everybody in",
        about="The key that every request must show.",
        min_length=1,
    )
    read_only_api_key: SecretStr | None = _setting(
        None,
        right="a text that is not empty and not the api_key",
        about="A second key, which may read and not write.",
        min_length=1,
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info",
        right="debug, info, warning or error",
        about="How much is logged, to standard error.",
    )
    shutdown_grace_s: float = _setting(
        30.0,
        right="a number of seconds from 0 to 3600",
        about="How long requests in flight may take to finish after SIGTERM or SIGINT.",
        ge=0,
        le=limits.REQUEST_TIMEOUT_S_MAX,
    )

    @model_validator(mode="after")
    def _keys_make_sense(self) -> ServeSettings:
        if self.read_only_api_key is not None:
            if self.api_key is None:
                raise ValueError(
                    "read_only_api_key is set and api_key is not, so nobody could write: "
                    "set api_key too"
                )
            if self.api_key.get_secret_value() == self.read_only_api_key.get_secret_value():
                raise ValueError(
                    "read_only_api_key and api_key are the same, so the first would be allowed "
                    "to write: make them differ"
                )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load_settings` merged: it knows where each value came from."""
        return (init_settings,)


SETTING_NAMES = (
    *(name for name in ServeSettings.model_fields if name in ServeSettings.__annotations__),
    *(name for name in ServeSettings.model_fields if name not in ServeSettings.__annotations__),
)  # in the order to show them: where and how to serve first, then tuning


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """origins: setting -> "--http-port", "SHOAL_HTTP_PORT", "shoal.toml" or "default"."""

    settings: ServeSettings
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
    if "bytes" in name and isinstance(value, int):
        for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if value and value % size == 0:
                return f"{value // size}{unit}"
    return str(value)


def nearest(name: str, names: Iterable[str]) -> str:
    """ " Did you mean X?" for the most similar of `names`, or "" when none is similar."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" Did you mean {found[0]}?" if found else ""


def load_settings(flags: Mapping[str, object], config: Path | None = None) -> LoadedSettings:
    """Merge flags, environment variables, the settings file and defaults; check every value.

    flags    setting name -> value, only those that were given.
    config   the TOML file of `--config`; None: the one that SHOAL_CONFIG names, or no file.
    Raises   SettingsError.
    """
    if config is None and os.environ.get(CONFIG_VARIABLE):
        config = Path(os.environ[CONFIG_VARIABLE])
    layers: list[tuple[Mapping[str, object], Callable[[str], str]]] = [
        ({} if config is None else _read_file(config), lambda _: str(config)),
        (_read_variables(), lambda name: ENV_PREFIX + name.upper()),
        (flags, lambda name: "--" + name.replace("_", "-")),
    ]
    values: dict[str, object] = {}
    origins = dict.fromkeys(SETTING_NAMES, "default")
    for layer, origin_of in layers:
        for name, value in layer.items():
            values[name], origins[name] = value, origin_of(name)
    try:
        return LoadedSettings(ServeSettings(**values), origins)  # type: ignore[arg-type]
    except ValidationError as error:
        raise SettingsError(_explain(error, values, origins)) from None


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SettingsError(f"The settings file {path} does not exist.")
    try:
        values = TomlConfigSettingsSource(ServeSettings, toml_file=path)()
    except OSError as error:
        raise SettingsError(f"The settings file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {path} is no valid TOML: {error}.") from None
    for name in values:
        if name not in ServeSettings.model_fields:
            raise SettingsError(
                f"The settings file {path} has {name}, which is no setting of Shoal."
                + nearest(name, ServeSettings.model_fields)
                + " `shoal settings` lists all."
            )
    return values


def _read_variables() -> dict[str, Any]:
    known = {ENV_PREFIX + name.upper() for name in ServeSettings.model_fields} | {CONFIG_VARIABLE}
    for variable in os.environ:
        if (
            variable.startswith(ENV_PREFIX)
            and not variable.startswith(FAULT_VARIABLE_PREFIX)
            and variable not in known
        ):
            raise SettingsError(
                f"The environment variable {variable} is no setting of Shoal."
                + nearest(variable, known)
                + " `shoal settings` lists all."
            )
    return EnvSettingsSource(ServeSettings)()


def _explain(
    error: ValidationError, values: Mapping[str, object], origins: Mapping[str, str]
) -> str:
    """One sentence or two per wrong setting."""
    sentences = []
    for problem in error.errors(include_url=False):
        why = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:
            sentences.append(f"{why}.")
            continue
        name = str(problem["loc"][0])
        extra = ServeSettings.model_fields[name].json_schema_extra
        right = extra["right"] if isinstance(extra, dict) else ""
        shown = "" if name.endswith("api_key") else f" {_shown(values.get(name))}"
        sentences.append(
            f"The setting {name} has a wrong value{shown} (from {origins[name]}): "
            f"{why[:1].lower() + why[1:]}. It should be {right}."
        )
    return " ".join(sentences)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
