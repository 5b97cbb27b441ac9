"""What may be asked for when a collection or a payload index is made. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, JsonValue

from shoal.api.models import CreateCollection, CreateFieldIndex, FieldParams
from shoal.errors import BadRequest, InvalidField
from shoal.limits import NAME_LENGTH_MAX
from shoal.metadata.schema import named_vectors

__all__ = ["check_factors", "check_name", "check_request", "index_params", "unknown_fields"]

_FORBIDDEN_IN_NAMES = set("/\\") | {chr(code) for code in range(32)} | {"\x7f"}


def check_name(name: str, what: str) -> None:
    """what: "collection" or "vector". Raises InvalidField."""
    if not name or len(name.encode()) > NAME_LENGTH_MAX or name in (".", ".."):
        raise InvalidField(
            f"Validation error in JSON body: [{what} name: must have 1 to {NAME_LENGTH_MAX} bytes "
            "and not be a dot or two]"
        )
    bad = sorted(set(name) & _FORBIDDEN_IN_NAMES)
    if bad:
        raise InvalidField(
            f"Validation error in JSON body: [{what} name: may not contain {bad[0]!r}]"
        )


def check_request(request: CreateCollection) -> None:
    """What the model alone does not see. Raises BadRequest."""
    vectors = named_vectors(request)
    sparse = request.sparse_vectors or {}
    for name in [*vectors, *sparse]:
        if name:
            check_name(name, "vector")
    if both := sorted(vectors.keys() & sparse.keys()):
        raise BadRequest(
            f"Wrong input: `{both[0]}` is both a dense and a sparse vector: rename one"
        )
    if request.sharding_method == "custom":
        raise BadRequest(
            "Wrong input: `sharding_method` custom is not supported by this version of Shoal: "
            "points are spread by a hash of their id"
        )


def check_factors(replication_factor: int, write_consistency_factor: int, *, alone: bool) -> None:
    """alone: one machine, which holds one replica whatever was asked for. Raises BadRequest when
    every write would be refused for want of replicas."""
    if alone and write_consistency_factor > 1:
        raise BadRequest(
            "Wrong input: `write_consistency_factor` above 1 cannot be met by one machine: every "
            "write would be refused"
        )
    if write_consistency_factor > replication_factor:
        raise BadRequest(
            f"Wrong input: `write_consistency_factor` {write_consistency_factor} is more than "
            f"`replication_factor` {replication_factor}: every write would be refused"
        )


def unknown_fields(block: BaseModel, path: str = "") -> list[str]:
    """Paths of settings that were sent and that no code here reads."""
    found = [path + name for name in block.model_extra or ()]
    for name, value in block:
        values: Mapping[str, Any] = value if isinstance(value, dict) else {"": value}
        for inner, part in values.items():
            if isinstance(part, BaseModel):
                found += unknown_fields(
                    part, f"{path}{name}.{inner}." if inner else f"{path}{name}."
                )
    return found


def index_params(request: CreateFieldIndex) -> dict[str, JsonValue]:
    """The payload index as it is written down."""
    schema = request.field_schema
    if isinstance(schema, FieldParams):
        params: dict[str, JsonValue] = schema.model_dump(mode="json", exclude_unset=True)
        return params
    return {"type": schema.value}
