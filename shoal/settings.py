"""Every setting of every process, described once; flags, variables, files and the tables of the
documents are made from here (shoal/configuration.py reads them).

Each part of Shoal asks for the small model that it needs (`StorageSettings`, ...); a process has all
that its parts need:

    serve           ServeSettings         one machine, everything in one process
    coordinator     CoordinatorProcess  \
    storage-node    StorageProcess       |  the processes of a cluster: they share ClusterSettings,
    index-node      IndexProcess         |  and one file with settings may serve all of them
    monitor         MonitorProcess       |
    encoder         EncoderProcess      /
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from shoal import limits

__all__ = [
    "ENV_PREFIX",
    "PROCESSES",
    "ClusterProcess",
    "ClusterSettings",
    "CoordinatorProcess",
    "CoordinatorSettings",
    "DataSettings",
    "EncoderProcess",
    "EncoderSettings",
    "GrpcSettings",
    "HttpSettings",
    "IndexProcess",
    "MonitorProcess",
    "MonitorSettings",
    "Process",
    "ProcessSettings",
    "ServeSettings",
    "StorageProcess",
    "StorageSettings",
    "names_passed_over",
    "setting_names",
]

ENV_PREFIX = "SHOAL_"

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


def _split_names(value: object) -> object:
    """ "a, b" -> a and b, for flags, variables and files alike. An array in a file is taken as it is."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split_names), NoDecode]


def _cores() -> int:
    return os.cpu_count() or 1


def _setting(
    default: object = ..., *, right: str, about: str, cluster: bool = False, **bounds: Any
) -> Any:
    """A documented field. `right` says what a right value looks like: "a port from 0 to 65535".
    cluster: means something between several machines only; `shoal serve` does not offer it."""
    documented: dict[str, Any] = {
        "description": about,
        "json_schema_extra": {"right": right, "cluster": cluster},
        "validate_default": True,
        **bounds,
    }
    if callable(default):
        return Field(default_factory=default, **documented)
    return Field(default, **documented)


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
    replica_timeout_s: float = _setting(
        3.0,
        right="a number of seconds from 0.1 to 60",
        about="A replica that does not confirm writes for so long is taken out of the in-sync set, "
        "and writes go on without it.",
        cluster=True,
        ge=0.1,
        le=60,
    )
    transfer_bytes_per_s_max: Bytes = _setting(
        64 * limits.MIB,
        right="a size of at least 64KiB, such as 64MiB",
        about="How fast this node fetches the files of a replica that it is given, all together, "
        "so that searches and writes keep their share of the network.",
        cluster=True,
        ge=64 * limits.KIB,
    )


class EncoderSettings(BaseModel):
    """What the text encoder needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder_model: Names = _setting(
        ("sentence-transformers/all-minilm-l6-v2",),
        right="models' names, folders with models, or NAME=FOLDER, with commas between them; or none",
        about="The models that turn text into vectors, beside the one that comes with Shoal: folders on "
        "disk, or NAME=FOLDER for a name of your choice; several with commas, or as an array, or by "
        'giving the flag several times. "none" switches text off.',
        min_length=1,
    )
    encoder_preload: bool = _setting(
        False,
        right="true or false",
        about="Load those models right after the start; otherwise the first text for each does and "
        "waits.",
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

    @field_validator("encoder_model")
    @classmethod
    def _none_is_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) > 1 and any(name.strip().lower() == "none" for name in value):
            raise ValueError("none switches text off, so it stands alone")
        return value

    @property
    def encoder_is_off(self) -> bool:
        return [name.strip().lower() for name in self.encoder_model] == ["none"]


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
    default_replication_factor: int = _setting(
        1,
        right="a whole number from 1 to 16",
        about="Copies of each shard of a new collection whose creator did not say how many; fewer "
        "where fewer storage nodes run.",
        cluster=True,
        ge=1,
        le=16,
    )


class MonitorSettings(BaseModel):
    """What the monitor of a cluster needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    failover_grace_s: float = _setting(
        3.0,
        right="a number of seconds from 0 to 60",
        about="How long a node may be without its lease before the shards that it leads are led "
        "by others.",
        cluster=True,
        ge=0,
        le=60,
    )
    rereplicate_after_s: float = _setting(
        60.0,
        right="a number of seconds from 0 to 86400",
        about="How long a shard may miss a replica before another node is given a new one: longer "
        "than a restart takes.",
        cluster=True,
        ge=0,
        le=86_400,
    )


class ProcessSettings(BaseModel):
    """What every process can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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


class DataSettings(BaseModel):
    """Of a process that keeps data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = _setting(
        Path("shoal-data"),
        right="a folder that this user may write to; it is made if it is not there",
        about="Where everything is kept. One server at a time.",
    )


class HttpSettings(BaseModel):
    """Of a process that answers the public APIs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    http_host: str = _setting(
        "127.0.0.1",
        right="an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all",
        about="The address to listen on. The default answers this machine only.",
        min_length=1,
    )
    http_port: int = _setting(
        6333,
        right="a port from 0 to 65535",
        about="The port to listen on; 0 picks a free one, which server.json (in a cluster: "
        "node.json) then names.",
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

    @model_validator(mode="after")
    def _keys_make_sense(self) -> HttpSettings:
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


class GrpcSettings(BaseModel):
    """Of a process that answers gRPC: the public API, or what nodes ask of each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grpc_host: str = _setting(
        "127.0.0.1",
        right="an address of this machine, such as 10.0.0.7, or 0.0.0.0 for all",
        about="The address to listen on for gRPC. Other machines cannot reach the default.",
        min_length=1,
    )
    grpc_port: int = _setting(
        6334,
        right="a port from 0 to 65535",
        about="The port to listen on for gRPC; 0 picks a free one, which node.json then names.",
        ge=0,
        le=65535,
    )


_ENDPOINT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):(\d{1,5})")


class ClusterSettings(BaseModel):
    """What every process of a cluster needs to know: where metadata is, and who it is itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metadata: str = _setting(
        "etcd://127.0.0.1:2379",
        right="etcd:// and the members' addresses: etcd://host1:2379,host2:2379,host3:2379",
        about="The etcd cluster that holds the metadata; name all of its members.",
    )
    cluster_name: str = _setting(
        "shoal",
        right="up to 64 letters, digits, dots, dashes and underscores",
        about="Clusters of different names may share one etcd and know nothing of each other.",
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
    )
    node_id: str | None = _setting(
        None,
        right="up to 64 letters, digits, dots, dashes and underscores, unlike every other node's",
        about="The name of this process in the cluster. Default: made of its role and the name of "
        "the machine; a storage node keeps the one that it had first.",
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
    )
    zone: str = _setting(
        "",
        right="a text of up to 64 characters, such as eu-west-1a",
        about="What may fail together with this machine: replicas of a shard are put in different "
        "zones while there are enough.",
        max_length=64,
    )
    advertise_host: str | None = _setting(
        None,
        right="a name or address that the other machines reach this one by",
        about="What the others are told to connect to. Default: the address that it listens on, "
        "and for 0.0.0.0 the name of the machine.",
        min_length=1,
    )
    advertise_grpc_port: int | None = _setting(
        None,
        right="a port from 1 to 65535",
        about="The gRPC port that the others are told to connect to, where it is another one than "
        "this process listens on: behind a proxy, or a mapped port.",
        ge=1,
        le=65535,
    )
    node_lease_s: int = _setting(
        10,
        right="a whole number of seconds from 1 to 300",
        about="A process that does not reach the metadata for so long counts as gone. Below 10 "
        "a busy etcd is taken for dead nodes; above, failover takes longer.",
        ge=1,
        le=300,
    )
    run_dir: Path | None = _setting(
        None,
        right="a folder that this user may write to; it is made if it is not there",
        about="Where node.json is written when the process is ready: its pid, addresses and ports. "
        "Default: the data folder of a storage node, nowhere for the others.",
    )
    node_ca_file: Path | None = _setting(
        None,
        right="a PEM file with certificates",
        about="Who may have signed the certificates of nodes. Given, nodes speak TLS and prove "
        "themselves to each other; without it, whoever reaches their ports may do everything.",
    )
    node_cert_file: Path | None = _setting(
        None,
        right="a PEM file with a certificate",
        about="This node's own certificate.",
    )
    node_key_file: Path | None = _setting(
        None,
        right="a PEM file with a private key",
        about="The key of node_cert_file.",
    )
    etcd_ca_file: Path | None = _setting(
        None,
        right="a PEM file with certificates",
        about="Who may have signed etcd's certificate. Given, etcd is spoken to over TLS.",
    )
    etcd_cert_file: Path | None = _setting(
        None,
        right="a PEM file with a certificate",
        about="This process's own certificate, for an etcd that asks for one.",
    )
    etcd_key_file: Path | None = _setting(
        None,
        right="a PEM file with a private key",
        about="The key of etcd_cert_file.",
    )
    etcd_user: str | None = _setting(
        None,
        right="a name that is not empty",
        about="The user to log in to etcd as. Certificates are the better way: a login lives in "
        "one member, and a failover asks for it again.",
        min_length=1,
    )
    etcd_password: SecretStr | None = _setting(
        None,
        right="a text that is not empty",
        about="The password of etcd_user.",
        min_length=1,
    )

    @field_validator("metadata")
    @classmethod
    def _is_etcd(cls, value: str) -> str:
        if not value.startswith("etcd://"):
            raise ValueError("only etcd:// is known")
        if "@" in value:
            raise ValueError("user and password belong into etcd_user and etcd_password")
        for endpoint in value.removeprefix("etcd://").split(","):
            match = _ENDPOINT.fullmatch(endpoint)
            if match is None or not 0 < int(match[2]) <= 65535:
                raise ValueError(f"{endpoint!r} is no host:port")
        return value

    @model_validator(mode="after")
    def _pairs_are_whole(self) -> ClusterSettings:
        if (self.etcd_cert_file is None) != (self.etcd_key_file is None):
            raise ValueError("etcd_cert_file and etcd_key_file go together: set both or neither")
        if self.etcd_cert_file is not None and self.etcd_ca_file is None:
            raise ValueError(
                "etcd_cert_file is set and etcd_ca_file is not, so etcd would be spoken to "
                "without TLS: set etcd_ca_file too"
            )
        node_tls = (self.node_ca_file, self.node_cert_file, self.node_key_file)
        if None in node_tls and node_tls != (None, None, None):
            raise ValueError(
                "node_ca_file, node_cert_file and node_key_file go together: set all or none"
            )
        if (self.etcd_user is None) != (self.etcd_password is None):
            raise ValueError("etcd_user and etcd_password go together: set both or neither")
        return self

    @property
    def etcd_endpoints(self) -> tuple[str, ...]:
        """ "host:port" of every member."""
        return tuple(self.metadata.removeprefix("etcd://").split(","))

    @property
    def metadata_prefix(self) -> str:
        """In front of every key in etcd."""
        return f"/shoal/{self.cluster_name}/"


# -- processes -------------------------------------------------------------------------------------
_CONFIG = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=ENV_PREFIX)


class Process(BaseSettings):
    """All settings of one process. It takes only what `shoal.configuration` merged, which knows where
    each value came from."""

    model_config = _CONFIG

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


# Settings are shown in the order of their classes from the last base to the first: where and how to
# serve comes before tuning.
class ServeSettings(
    Process,
    CoordinatorSettings,
    EncoderSettings,
    StorageSettings,
    ProcessSettings,
    GrpcSettings,
    HttpSettings,
    DataSettings,
):
    """Everything that `shoal serve` can be told."""

    model_config = _CONFIG


class ClusterProcess(Process, ProcessSettings, GrpcSettings, ClusterSettings):
    """What the processes of a cluster have in common."""

    model_config = _CONFIG


class CoordinatorProcess(CoordinatorSettings, EncoderSettings, ClusterProcess, HttpSettings):
    """Everything that `shoal coordinator` can be told."""

    model_config = _CONFIG

    default_replication_factor: int = _setting(
        3,
        right="a whole number from 1 to 16",
        about="Copies of each shard of a new collection whose creator did not say how many; fewer "
        "where fewer storage nodes run.",
        cluster=True,
        ge=1,
        le=16,
    )


class StorageProcess(StorageSettings, ClusterProcess, DataSettings):
    """Everything that `shoal storage-node` can be told."""

    model_config = _CONFIG

    grpc_port: int = _setting(
        6335,
        right="a port from 0 to 65535",
        about="The port to listen on for gRPC; 0 picks a free one, which node.json then names.",
        ge=0,
        le=65535,
    )


class IndexProcess(ClusterProcess):
    """Everything that `shoal index-node` can be told."""

    model_config = _CONFIG

    grpc_port: int = _setting(
        6336,
        right="a port from 0 to 65535",
        about="The port to listen on for gRPC; 0 picks a free one, which node.json then names.",
        ge=0,
        le=65535,
    )


class MonitorProcess(MonitorSettings, ClusterProcess):
    """Everything that `shoal monitor` can be told."""

    model_config = _CONFIG

    grpc_port: int = _setting(
        6337,
        right="a port from 0 to 65535",
        about="The port to listen on for gRPC; 0 picks a free one, which node.json then names.",
        ge=0,
        le=65535,
    )


class EncoderProcess(ClusterProcess):
    """Everything that `shoal encoder serve` can be told."""

    model_config = _CONFIG

    model: str = _setting(
        "sentence-transformers/all-minilm-l6-v2",
        right="a model's name, a folder with a model, or NAME=FOLDER",
        about="The model to serve: the name of the one that comes with Shoal, a folder on disk, "
        "NAME=FOLDER for a name of your choice, or a name in this user's Hugging Face cache.",
        cluster=True,
        min_length=1,
    )
    tp: int = _setting(
        1,
        right="a whole number from 1 to 64 that divides the model's attention heads",
        about="Processes among which every layer is divided (tensor parallel).",
        cluster=True,
        ge=1,
        le=64,
    )
    pp: int = _setting(
        1,
        right="a whole number from 1 to 64, at most the model's layers",
        about="Processes in a row, each with some of the layers (pipeline parallel).",
        cluster=True,
        ge=1,
        le=64,
    )
    threads: int = _setting(
        1,
        right="a whole number from 1 to 1024",
        about="Threads that each of the tp × pp processes computes with.",
        cluster=True,
        ge=1,
        le=1024,
    )
    encoder_precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto",
        right="auto, float32 or bfloat16",
        about="Numbers that the encoder computes with; auto takes bfloat16 where the hardware has "
        "it and probe texts come out the same.",
    )
    batch_tokens_max: int = _setting(
        limits.ENCODER_BATCH_TOKENS_MAX,
        right="a whole number from 16 to 1048576",
        about="Tokens that go through the model together, padding included. A query waits for one "
        "such batch at most.",
        cluster=True,
        ge=16,
        le=1 << 20,
    )
    queue_tokens_max: int = _setting(
        limits.ENCODER_QUEUE_TOKENS_MAX,
        right="a whole number from 1024 to 1073741824",
        about="Tokens that may wait; beyond that callers are told to come back.",
        cluster=True,
        ge=1024,
        le=1 << 30,
    )
    grpc_port: int = _setting(
        6338,
        right="a port from 0 to 65535",
        about="The port to listen on for gRPC; 0 picks a free one, which node.json then names.",
        ge=0,
        le=65535,
    )


PROCESSES: dict[str, type[Process]] = {
    "serve": ServeSettings,
    "coordinator": CoordinatorProcess,
    "storage-node": StorageProcess,
    "index-node": IndexProcess,
    "monitor": MonitorProcess,
    "encoder": EncoderProcess,
}


def setting_names(process: type[Process]) -> tuple[str, ...]:
    """The settings that this process offers, in the order to show them."""
    names = []
    for name, field in process.model_fields.items():
        extra = field.json_schema_extra
        in_cluster_only = isinstance(extra, dict) and extra["cluster"]
        if not in_cluster_only or process is not ServeSettings:
            names.append(name)
    return tuple(names)


def names_passed_over(process: type[Process]) -> frozenset[str]:
    """Names that this process passes over: settings of the other processes of a cluster, so that
    one file, or one set of variables, is enough for all. `shoal serve` passes over none: who sets
    them there expects a cluster, and would not have one."""
    if process is ServeSettings:
        return frozenset()
    others = (other for other in PROCESSES.values() if other is not ServeSettings)
    names = {name for other in others for name in setting_names(other)}
    return frozenset(names - set(setting_names(process)))
