"""The HTTP port of a node: its paths, and what each needs of the node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from node.httpapi import Api
from node.httpconn import HttpBounds
from node.httpserver import HttpServer
from node.httpwire import Response, WireBounds
from node.meters import Meters
from node.metrics import CONTENT_TYPE, MetricsPage
from node.openapi import document
from node.readiness import Readiness
from node.status import Parts
from router.requests import Limits, Request
from router.wire import Reply

ALIVE = Response(200, b'{"status":"alive"}')


def make_http_server(
    parts: Callable[[], Parts],
    ask: Callable[[Request], Awaitable[Reply] | Reply],
    limits: Limits,
    meters: Meters,
    stopping: Callable[[], bool],
) -> HttpServer:
    """parts: read at each request, so may be filled later. ask: what the WebSocket asks, too."""
    config = parts().config
    readiness = Readiness(parts, stopping)
    metrics = MetricsPage(parts, meters)
    schema = Response(200, msgspec.json.encode(document(limits)))

    def ready() -> Response:
        reasons = readiness.reasons()
        body = msgspec.json.encode({"status": "not ready" if reasons else "ready", "reasons": reasons})
        return Response(503 if reasons else 200, body)

    api = Api(
        ask,
        limits,
        {
            "/healthz": lambda: ALIVE,
            "/readyz": ready,
            "/metrics": lambda: Response(200, metrics.text(), CONTENT_TYPE),
            "/openapi.json": lambda: schema,
        },
        frozenset(config.http.origins),
    )
    bounds = HttpBounds(
        wire=WireBounds(body_bytes_max=config.limits.http_body_bytes),
        connections_max=config.limits.http_connections,
        idle_s=config.http.idle_s,
    )
    listen = config.listen
    return HttpServer(api, bounds, count=meters.http_answered, host=listen.host, port=listen.http_port)
