"""Fetches images from http(s) URLs: only from hosts in the settings, and never from addresses inside the network.

A host name is resolved once. All its addresses must be public, and the connection goes to one of the checked addresses.
So a name server that changes its answer afterwards (DNS rebinding) has no effect. Redirects are not followed.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final
from urllib.parse import urlsplit

import httpcore

from services.gateway.body_memory import MemoryLease
from services.gateway.problems import HttpProblem

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
ResolveFn = Callable[[str, int], Awaitable[list[str]]]

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_CONNECT_S: Final = 5.0
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
"""The only IPv6 addresses that IANA has allocated for the public Internet."""
_SPECIAL_NETWORKS: Final = (
    ipaddress.ip_network("192.0.0.0/24"),  # protocol assignments
    ipaddress.ip_network("192.88.99.0/24"),  # relays of 6to4, which no longer exist
    ipaddress.ip_network("3fff::/20"),  # documentation
)
"""Networks that the table of Python 3.11 takes for public, although nobody serves pictures there."""


class ImageDownloader:
    """Fetches images from the allowed hosts."""

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        limit_bytes: int,
        deadline_s: float,
        resolve: ResolveFn | None = None,
        may_connect: Callable[[Address], bool] | None = None,
    ) -> None:
        """`hosts`: `host` for the default ports, or `host:port`. If there are none, nothing is fetched."""
        self._hosts = frozenset(host.lower() for host in hosts)
        self._limit_bytes = limit_bytes
        self._deadline_s = deadline_s
        self._backend = _CheckedBackend(resolve or _resolve, may_connect or is_public)

    async def fetch(self, url: str, lease: MemoryLease) -> bytes:
        """Fetch the bytes at a URL. `lease` reserves memory for them.

        Raises:
            HttpProblem: the URL is not allowed, the host does not deliver, or the image is too large.
        """
        host = self._check_url(url)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._download(url, host, lease)
        except TimeoutError:
            raise _build_refusal(f"{host} did not deliver the image within {self._deadline_s:g} s") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, ssl.SSLError) as error:
            raise _build_refusal(f"{host} did not deliver the image: {type(error).__name__}") from None

    def _check_url(self, url: str) -> str:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
        except ValueError:
            raise _build_refusal("the URL is invalid") from None
        if parts.scheme not in _DEFAULT_PORTS or not host or not url.isascii() or not url.isprintable() or " " in url:
            raise _build_refusal("the URL must be https://host/path")
        if parts.username is not None or parts.password is not None:
            raise _build_refusal("the URL must not have a user name or a password")
        is_default_port = port == _DEFAULT_PORTS[parts.scheme]
        if not (f"{host}:{port}" in self._hosts or (is_default_port and host in self._hosts)):
            raise _build_refusal(
                f"the gateway does not fetch URLs of {host}; send the image as a data: URL or as s3://"
            )
        return host

    async def _download(self, url: str, host: str, lease: MemoryLease) -> bytes:
        headers: dict[bytes | str, bytes | str] = {
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
            "User-Agent": "sluice",
        }
        # Each request opens a new connection: a connection that is kept alive would skip the check of its address.
        async with (
            httpcore.AsyncConnectionPool(network_backend=self._backend, retries=0) as pool,
            pool.stream("GET", url, headers=headers) as response,
        ):
            if response.status != 200:
                redirects = ", and redirects are not followed" if 300 <= response.status < 400 else ""
                raise _build_refusal(f"{host} answers with status {response.status}{redirects}")
            names = {name.lower(): value for name, value in response.headers}
            if names.get(b"content-encoding", b"identity").lower() != b"identity":
                raise _build_refusal(
                    f"{host} sends the image with a Content-Encoding, which the gateway does not accept"
                )
            content = bytearray()
            async for chunk in response.aiter_stream():
                content += chunk
                if len(content) > self._limit_bytes:
                    raise HttpProblem("image-too-large", f"the image has more than {self._limit_bytes} bytes")
                lease.reserve(len(chunk))
            return bytes(content)


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to checked addresses."""

    def __init__(self, resolve: ResolveFn, may_connect: Callable[[Address], bool]) -> None:
        self._resolve = resolve
        self._may_connect = may_connect
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._resolve(host, port)
        if not addresses:
            raise _build_refusal(f"the host {host} has no address")
        if not all(self._may_connect(ipaddress.ip_address(address.partition("%")[0])) for address in addresses):
            raise _build_refusal(f"{host} has an address that is not public")
        return await self._inner.connect_tcp(
            addresses[0], port, timeout=_CONNECT_S, local_address=local_address, socket_options=socket_options
        )

    async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        raise _build_refusal("Unix sockets are not fetched")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def is_public(address: Address) -> bool:
    """Return whether an address is on the public Internet. For an address that embeds another, both must be."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is not None and not is_public(inner):
            return False
        if address.ipv4_mapped is not None:
            return True
        if address not in _GLOBAL_UNICAST:
            return False
    if any(address in network for network in _SPECIAL_NETWORKS):
        return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified or address.is_private
    )


async def _resolve(host: str, port: int) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[0]) for *_, address in found]


def _build_refusal(why: str) -> HttpProblem:
    return HttpProblem("url-refused", why)
