"""Photos by their addresses, from hosts that were named beforehand and from nowhere else.

An annotation tool sends addresses that its users typed. Whoever may write one must not make this
program ask a router, a cloud's metadata service or a neighbour. So the host has to be on a list,
all of its addresses have to be public unless private ones are allowed, the connection goes to the
address that was checked, and each redirect is checked like the first address.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping

import httpx

__all__ = ["FetchError", "Fetcher", "Origin", "is_public", "origin"]

Origin = tuple[str, str, int]
"""Scheme, host and port."""

_SCHEMES = {"http": 80, "https": 443}

_MAX_REDIRECTS = 3


class FetchError(Exception):
    """The photo is not fetched; the message says why, and what to change."""


def origin(url: str) -> Origin:
    """Scheme, host and port of an address.

    Raises:
        FetchError: it is no address of a photo on the web.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise FetchError(f"The photo's address is malformed: {error}.") from error
    if parsed.scheme not in _SCHEMES or not parsed.host:
        raise FetchError(
            f"A photo is fetched by http or https, not by {parsed.scheme[:20] or 'no scheme'!r}."
        )
    if parsed.userinfo:
        raise FetchError("The photo's address has a user's name in it: leave it out.")
    return parsed.scheme, parsed.host, parsed.port or _SCHEMES[parsed.scheme]


class Fetcher:
    """Fetches photos within limits.

    Args:
        hosts: those that may be asked, as `name` for the usual ports, or `name:port`.
        private: whether their addresses may be private ones, such as 10.0.0.7 or 127.0.0.1.
        max_bytes: largest photo.
        timeout_s: seconds for a photo, redirects included.
        headers: for an origin what returns the headers to show it, such as an API key; no other
            sees them.
    """

    def __init__(
        self,
        hosts: Collection[str],
        *,
        private: bool = False,
        max_bytes: int = 64 << 20,
        timeout_s: float = 30,
        headers: Mapping[Origin, Callable[[], Awaitable[Mapping[str, str]]]] | None = None,
    ) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._private = private
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._headers = dict(headers or {})
        # Neither a proxy nor a password file of this machine: they would lead elsewhere.
        self._http = httpx.AsyncClient(trust_env=False, timeout=timeout_s)

    async def fetch(self, url: str) -> bytes:
        """The photo's bytes.

        Raises:
            FetchError: it is refused, not there, too large or too slow.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                for _ in range(1 + _MAX_REDIRECTS):
                    found = await self._get(url)
                    if isinstance(found, bytes):
                        return found
                    url = found
        except TimeoutError:
            raise FetchError(f"The photo did not come within {self._timeout_s:g} s.") from None
        except httpx.HTTPError as error:
            raise FetchError(
                f"The photo's host was not reached: {type(error).__name__}."
            ) from error
        raise FetchError(f"The photo's host redirects more than {_MAX_REDIRECTS} times.")

    async def _get(self, url: str) -> bytes | str:
        """The photo, or where the host says that it is."""
        scheme, host, port = source = origin(url)
        names = {f"{host}:{port}"} | ({host} if port == _SCHEMES[scheme] else set())
        if not names & self._hosts:
            raise FetchError(f"The photo's host {host}:{port} is not among those that are allowed.")
        shown = await self._headers[source]() if source in self._headers else {}
        parsed = httpx.URL(url)
        request = self._http.build_request(
            "GET",
            # To the very address that was checked, whatever the name server says next.
            parsed.copy_with(host=await self._address(host, port)),
            headers={"Host": parsed.netloc.decode(), **shown},
            extensions={"sni_hostname": host},
        )
        response = await self._http.send(request, stream=True)
        try:
            if response.is_redirect:
                return str(parsed.join(response.headers["location"]))
            if response.status_code != 200:
                raise FetchError(f"The photo's host answers {response.status_code}.")
            return await self._content(response)
        finally:
            await response.aclose()

    async def _content(self, response: httpx.Response) -> bytes:
        chunks: list[bytes] = []
        size = 0
        async for chunk in response.aiter_bytes(1 << 16):
            size += len(chunk)
            if size > self._max_bytes:
                raise FetchError(f"The photo has more than {self._max_bytes} bytes.")
            chunks.append(chunk)
        return b"".join(chunks)

    async def _address(self, host: str, port: int) -> str:
        """An address of the host.

        Raises:
            FetchError: it has none, or one of them is private.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise FetchError(f"The photo's host {host} is not known.") from error
        addresses = [str(entry[4][0]) for entry in found]
        if not self._private and not all(map(is_public, addresses)):
            raise FetchError(
                f"The photo's host {host} has a private address: --allow-private lets it be asked."
            )
        return addresses[0]

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, and so none of this machine or its network."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        # Addresses that lead to one of version 4.
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo and parsed.teredo[1])
        if parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFF_FFFF)
        if inner:
            return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
