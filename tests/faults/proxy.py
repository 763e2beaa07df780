"""The network between an intake member and the broker: a TCP proxy that can be cut, or made to hang."""

import asyncio
import socket
import struct
from typing import Final

_CHUNK_BYTES: Final = 1 << 16
_REFUSES_S: Final = 0.1
"""How long a connection lives behind which there is no broker; clients that connect anew at once flood their logs."""
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: closing sends RST, as a firewall that drops a connection does."""


class Link:
    """Forwards every connection to one port of this machine. For use from one event loop."""

    def __init__(self) -> None:
        self.port = 0
        """Where it listens, from `listen` on."""
        self.target = 0
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._ends: set[asyncio.StreamWriter] = set()

    async def listen(self) -> None:
        """Accept connections; again on the same port after `cut`."""
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Reset every connection and refuse new ones, until `heal`."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for end in self._ends:
            end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.transport.abort()

    def hang(self) -> None:
        """Keep every connection, and forward nothing, until `heal`; then what was sent meanwhile arrives."""
        self._flowing.clear()

    async def heal(self) -> None:
        """Forward again."""
        self._flowing.set()
        if self._server is None:
            await self.listen()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.add(writer)
        try:
            onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            await asyncio.sleep(_REFUSES_S)
            writer.transport.abort()
            self._ends.discard(writer)
            return
        self._ends.add(onward_writer)
        pumps = [
            asyncio.create_task(self._pump(reader, onward_writer)),
            asyncio.create_task(self._pump(onward_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for end in (writer, onward_writer):
                end.transport.abort()
                self._ends.discard(end)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_CHUNK_BYTES):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # whichever end it was, the other one is closed too
