"""A gRPC (grpcio aio) server that only echoes a reply of a given size. Run by `bench.router`; ends with its standard input."""

from __future__ import annotations

import asyncio
import sys

import grpc

METHOD = "/bench.Echo/Search"


class Echo(grpc.GenericRpcHandler):
    def __init__(self, reply: bytes) -> None:
        async def search(request: bytes, context: object) -> bytes:
            return reply

        # Without serializers bytes pass as they are: protobuf's own work is left out, in gRPC's favour.
        self._handler = grpc.unary_unary_rpc_method_handler(search)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handler if details.method == METHOD else None


async def main(size: int) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(b"r" * size),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
