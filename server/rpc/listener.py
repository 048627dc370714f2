"""The port of gRPC: its limits, TLS and drain.

It is a port of its own, since uvicorn speaks HTTP/1.1 only, and gRPC's library brings its own
HTTP/2 and listens by itself.
"""

from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2_grpc

from server.rpc.bridge import Bridge
from server.rpc.service import NO_MESSAGE, OpenInference
from server.settings import Settings

__all__ = ["Listener"]

# The largest message; gRPC's own default. Messages are complete before they can be refused.
_MESSAGE_BYTES = 4 * 2**20


class _Parsing(grpc.aio.ServerInterceptor):
    """Refuses messages that do not parse: gRPC's library takes them for faults of the server."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler

        async def answer(message: bytes, context: Any) -> Any:
            try:
                request = handler.request_deserializer(message)
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, NO_MESSAGE)
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(
            answer, response_serializer=handler.response_serializer
        )


class Listener:
    """The gRPC server of this process.

    Args:
        settings: the server's settings; `grpc_port` is given.
        bridge: the way into the application.
    """

    def __init__(self, settings: Settings, bridge: Bridge) -> None:
        self._settings = settings
        self._bridge = bridge
        self._server: grpc.aio.Server | None = None
        self._changed: grpc.ServerCertificateConfiguration | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port is taken, or the certificate cannot be read.
        """
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.grpc_port}"
        # It belongs to the event loop that runs now.
        server = grpc.aio.server(
            interceptors=[_Parsing()],
            # As many calls as have room for a message of full size each.
            maximum_concurrent_rpcs=max(1, settings.max_bytes_in_flight // _MESSAGE_BYTES),
            options=[
                ("grpc.max_receive_message_length", _MESSAGE_BYTES),
                ("grpc.max_metadata_size", settings.max_header_bytes),
                ("grpc.max_connection_idle_ms", settings.keep_alive_s * 1000),
                # Workers share the port. One alone must not share it with a stranger.
                ("grpc.so_reuseport", int(settings.workers > 1)),
            ],
        )
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            OpenInference(self._bridge), server
        )
        try:
            if settings.tls_cert is None:
                server.add_insecure_port(address)
            else:
                server.add_secure_port(address, self._credentials(settings.tls_cert))
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {address}: is the port taken?") from error
        await server.start()
        self._server = server

    def reload(self) -> None:
        """Take the certificate from its files again; connections that are open keep theirs."""
        if self._settings.tls_cert is not None:
            self._changed = self._certificate(self._settings.tls_cert)

    async def stop(self, timeout_s: float) -> None:
        """Take no more calls, and cancel those that have come unless they end in time."""
        if self._server is not None:
            await self._server.stop(timeout_s)

    def _credentials(self, chain: Path) -> grpc.ServerCredentials:
        def fetch() -> grpc.ServerCertificateConfiguration | None:
            changed, self._changed = self._changed, None
            return changed

        # The stubs leave out that None keeps the certificate, as grpc's documentation has it.
        return grpc.dynamic_ssl_server_credentials(
            self._certificate(chain),
            fetch,  # type: ignore[arg-type]
            self._settings.tls_client_ca is not None,
        )

    def _certificate(self, chain: Path) -> grpc.ServerCertificateConfiguration:
        settings = self._settings
        client_ca = settings.tls_client_ca
        return grpc.ssl_server_certificate_configuration(
            [((settings.tls_key or chain).read_bytes(), chain.read_bytes())],
            client_ca.read_bytes() if client_ca else None,
        )
