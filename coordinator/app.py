"""The ASGI application: hot paths in front, FastAPI behind, one table of routes for both.

FastAPI gives routing of the rest, `/openapi.json` and `/docs`. Request bodies are read by our own
code, so that errors have one shape and numbers of any size survive; the models in the table say what
is accepted, and tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from coordinator.hot import App, HotPath
from coordinator.http import Answer, Api, Route
from coordinator.metrics import Metrics
from coordinator.render import render_error
from coordinator.routes import ROUTES, UNSUPPORTED
from coordinator.service import Coordinator
from shoal.api.models import ErrorBody
from shoal.health import HealthReport
from shoal.limits import REQUEST_TIMEOUT_S_MAX
from shoal.version import VERSION

__all__ = ["create_app"]

_STATIC = Path(__file__).parent / "static"
_STATIC_TYPES = {  # also the list of what there is: no path of a request is ever opened
    "dashboard.html": "text/html; charset=utf-8",
    "dashboard.css": "text/css; charset=utf-8",
    "dashboard.js": "text/javascript; charset=utf-8",
}
_STATIC_HEADERS = {
    # The page takes everything from this server and runs no script that stands in a collection.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

_DESCRIPTION = (
    "A durable vector database with its own text encoder. The API works with Qdrant clients (a subset "
    "of the REST API 1.18 to 1.20); Shoal is not affiliated with or endorsed by Qdrant. What is "
    "Shoal's own lies under `/shoal/v1`."
)


def create_app(
    coordinator: Coordinator,
    *,
    health: Callable[[], HealthReport],
    api_key: str | None,
    read_only_api_key: str | None,
    metrics: Metrics | None = None,
) -> App:
    """The application to give to an ASGI server.

    health: the monitor's latest report. Without api_key everybody may do everything. metrics: shared
    with what else the process answers.
    """
    api = Api(coordinator, health, api_key, read_only_api_key, metrics or Metrics())
    app = FastAPI(
        title="Shoal",
        version=VERSION,
        description=_DESCRIPTION,
        exception_handlers={HTTPException: _http_error},
        redirect_slashes=False,
    )
    for route in ROUTES:
        app.add_api_route(
            route.path,
            _endpoint(api, route),
            methods=[route.method],
            operation_id=route.operation,
            summary=route.summary,
            tags=[route.tag],
            response_model=route.result,
            response_model_exclude_unset=True,
            responses={"4XX": {"model": ErrorBody}},
            openapi_extra=_request_schema(route),
        )
    for route in UNSUPPORTED:
        app.add_api_route(
            route.path, _endpoint(api, route), methods=[route.method], include_in_schema=False
        )
    for path in ("/dashboard", "/dashboard/{file}"):
        app.add_api_route(path, _dashboard, methods=["GET"], include_in_schema=False)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return HotPath(app, api, ROUTES)  # type: ignore[arg-type]


def _endpoint(api: Api, route: Route) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        answer = await api.answer(route, request.path_params, request.scope, request.receive)
        return _response(answer)

    return endpoint


def _response(answer: Answer) -> Response:
    response = Response(answer.body, answer.status)
    response.raw_headers.append((b"content-type", answer.content_type))
    response.raw_headers.extend(answer.headers)
    return response


async def _dashboard(file: str = "dashboard.html") -> FileResponse:
    if file not in _STATIC_TYPES:
        raise HTTPException(404)
    return FileResponse(_STATIC / file, headers=_STATIC_HEADERS, media_type=_STATIC_TYPES[file])


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such path, wrong method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    path = request.url.path[:200]
    if status == 404:
        message = f"Not found: there is nothing at {path}: /docs lists every path"
    elif status == 405:
        message = f"Method not allowed: {request.method} {path}: /docs lists every path"
    else:
        message = f"Bad request: {request.method} {path}"
    headers = dict(getattr(error, "headers", None) or {})
    return Response(render_error(message, 0.0), status, headers, media_type="application/json")


# -- /openapi.json --------------------------------------------------------------------------------
_PARAMETERS: Mapping[str, dict[str, Any]] = {
    "wait": {"type": "boolean", "default": False},
    "ordering": {"enum": ["weak", "medium", "strong"]},
    "consistency": {
        "anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["majority", "quorum", "all"]}]
    },
    "timeout": {"type": "integer", "minimum": 1, "maximum": REQUEST_TIMEOUT_S_MAX},
}
_PARAMETER_TEXTS = {
    "wait": "Changes the status in the answer only: every write is durable before it is answered.",
    "ordering": "All of them hold: the writes of a shard go through its primary, one by one.",
    "consistency": "1, the default: all that this coordinator has seen, and the shoal-token of the "
    "request. More: every write that anybody was told of before. A number above the replication "
    "factor is refused.",
    "timeout": "Seconds; then 408.",
}


def _request_schema(route: Route) -> dict[str, Any]:
    names = [part[1:-1].partition(":")[0] for part in route.path.split("/") if part[:1] == "{"]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in names
    ]
    parameters += [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": _PARAMETER_TEXTS[name],
            "schema": _PARAMETERS[name],
        }
        for name in route.options
    ]
    extra: dict[str, Any] = {"parameters": parameters}
    if route.request is bytes:
        binary = {"schema": {"type": "string", "format": "binary"}}
        extra["requestBody"] = {"required": True, "content": {"application/x-protobuf": binary}}
    elif route.request is not None:
        references = [{"$ref": _reference(model)} for model in _models(route)]
        schema = references[0] if len(references) == 1 else {"anyOf": references}
        extra["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return extra


def _models(route: Route) -> list[type[BaseModel]]:
    if route.request is None or route.request is bytes:
        return []
    return (
        list(get_args(route.request)) if isinstance(route.request, UnionType) else [route.request]
    )


def _reference(model: type[BaseModel]) -> str:
    return f"#/components/schemas/{model.__name__}"


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        requests = {model: None for route in ROUTES for model in _models(route)}
        _, definitions = models_json_schema(
            [(model, "validation") for model in requests],
            ref_template="#/components/schemas/{model}",
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for name, schema in definitions.get("$defs", {}).items():
            schemas.setdefault(name, schema)
        document["components"]["securitySchemes"] = {
            "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
            "bearer": {"type": "http", "scheme": "bearer"},
        }
        app.openapi_schema = document
    return app.openapi_schema
