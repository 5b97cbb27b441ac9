"""The raw ASGI layer in front of FastAPI.

Routing, dependency resolution and response models of FastAPI cost more than a search over HTTP does
otherwise (223 µs of CPU a request against 45-60). The few operations that carry the load are matched
here on the bytes of the path and go straight to the same handlers.

Path segments are split before they are decoded, because newer clients percent-encode them: a
collection called `a/b` cannot exist, but must not be taken for a path of three parts either.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import unquote_to_bytes

from coordinator.http import Answer, Api, Receive, Route, Scope, Send

__all__ = ["HotPath", "send_answer"]

App = Callable[[Scope, Receive, Send], Awaitable[None]]


class HotPath:
    """Serves `hot` routes itself and passes everything else to `app`.

    A hot path is its fixed segments, with one `{collection_name}` among them.
    """

    def __init__(self, app: App, api: Api, routes: Iterable[Route]) -> None:
        self._app = app
        self._api = api
        self._routes: dict[tuple[str, bytes, bytes], Route] = {}
        for route in routes:
            if route.hot:
                before, after = route.path.encode().split(b"{collection_name}")
                self._routes[route.method, before, after] = route
        self._prefixes = sorted({before for _, before, _ in self._routes})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path: bytes | None = scope.get("raw_path")
            if path is not None:
                for before in self._prefixes:
                    if not path.startswith(before):
                        continue
                    name, slash, after = path[len(before) :].partition(b"/")
                    route = self._routes.get((scope["method"], before, slash + after))
                    if route is not None:
                        await self._serve(route, name, scope, receive, send)
                        return
        await self._app(scope, receive, send)

    async def _serve(
        self, route: Route, name: bytes, scope: Scope, receive: Receive, send: Send
    ) -> None:
        raw = unquote_to_bytes(name) if b"%" in name else name
        params = {"collection_name": raw.decode("utf-8", "replace")}
        await send_answer(await self._api.answer(route, params, scope, receive), send)


async def send_answer(answer: Answer, send: Send) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": answer.status,
            "headers": [
                (b"content-type", answer.content_type),
                (b"content-length", b"%d" % len(answer.body)),
                *answer.headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": answer.body})
