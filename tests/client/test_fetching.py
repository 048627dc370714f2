"""Photos by their addresses: from hosts that are named, at addresses that were checked."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import pytest

from slsnet_client.fetching import Fetcher, FetchError, Origin, is_public, origin
from tests.support.studio import Answer, Studio

PHOTO = b"\xff\xd8\xff" + bytes(1000)


@pytest.fixture
def studio() -> Iterator[Studio]:
    def redirect(where: str) -> Callable[[dict[str, str]], Answer]:
        return lambda _: (302, {"Location": where}, b"")

    with Studio(
        {
            "/photo.jpg": lambda _: (200, {}, PHOTO),
            "/moved": redirect("/photo.jpg"),
            "/round": redirect("/round"),
            "/away": redirect("http://metadata.invalid/latest"),
            "/inwards": redirect("http://127.0.0.2/photo.jpg"),
            "/file": redirect("file:///etc/passwd"),
            "/gone": lambda _: (404, {}, b""),
        }
    ) as found:
        yield found


def fetch(
    url: str,
    hosts: list[str],
    headers: Mapping[Origin, Callable[[], Awaitable[Mapping[str, str]]]] | None = None,
    **limits: Any,
) -> bytes:
    async def ask() -> bytes:
        fetcher = Fetcher(hosts, headers=headers, **{"private": True, **limits})
        try:
            return await fetcher.fetch(url)
        finally:
            await fetcher.aclose()

    return asyncio.run(ask())


def test_a_photo_comes_from_a_named_host(studio: Studio) -> None:
    here = [f"127.0.0.1:{studio.port}"]
    assert fetch(f"{studio.url}/photo.jpg", here) == PHOTO
    assert fetch(f"{studio.url}/moved", here) == PHOTO


@pytest.mark.parametrize("hosts", [[], ["127.0.0.1"], ["localhost:80"], ["27.0.0.1"]])
def test_no_other_host_is_asked(studio: Studio, hosts: list[str]) -> None:
    with pytest.raises(FetchError, match="not among those that are allowed"):
        fetch(f"{studio.url}/photo.jpg", hosts)
    assert studio.asked == []


@pytest.mark.parametrize("path", ["away", "inwards", "file", "round"])
def test_redirects_lead_nowhere_else(studio: Studio, path: str) -> None:
    with pytest.raises(FetchError, match=r"allowed|by http|redirects more"):
        fetch(f"{studio.url}/{path}", [f"127.0.0.1:{studio.port}"])


def test_private_addresses_are_asked_only_if_allowed(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A minimal system has no name of its own.
    known = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: known(
            "127.0.0.1" if host == "inside.invalid" else host, *rest, **more
        ),
    )
    for host in ("127.0.0.1", "inside.invalid"):
        with pytest.raises(FetchError, match="private address: --allow-private"):
            fetch(
                f"http://{host}:{studio.port}/photo.jpg", [f"{host}:{studio.port}"], private=False
            )
    assert studio.asked == []


def test_one_private_address_of_several_is_enough_to_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = [(socket.AF_INET, 1, 6, "", (each, 80)) for each in ("93.184.216.34", "10.0.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(FetchError, match="private address"):
        fetch("http://photos.invalid/a.jpg", ["photos.invalid"], private=False)


def test_the_connection_goes_to_the_address_that_was_checked(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["127.0.0.1", "127.0.0.2", "127.0.0.3"])
    looked_up = []

    def lookup(host: str, port: int, *_: object, **__: object) -> list[Any]:
        looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    host = f"photos.invalid:{studio.port}"
    assert fetch(f"http://{host}/photo.jpg", [host]) == PHOTO
    # What is looked up after that is an address, not a name.
    assert [name for name in looked_up if name == "photos.invalid"] == ["photos.invalid"]
    assert studio.asked[0][1]["host"] == host


def test_a_key_is_shown_to_its_own_host_alone(studio: Studio) -> None:
    async def key() -> dict[str, str]:
        return {"Authorization": "Token secret"}

    with Studio({"/over": lambda _: (302, {"Location": f"{studio.url}/photo.jpg"}, b"")}) as other:
        hosts = [f"127.0.0.1:{each.port}" for each in (studio, other)]
        assert fetch(f"{other.url}/over", hosts, {origin(other.url): key}) == PHOTO
        assert other.asked[0][1]["authorization"] == "Token secret"
    assert "authorization" not in studio.asked[0][1]


@pytest.mark.parametrize(
    ("limits", "words"),
    [({"max_bytes": 1000}, "more than 1000 bytes"), ({"timeout_s": 0}, "did not come within")],
)
def test_large_and_slow_ones_are_given_up(
    studio: Studio, limits: dict[str, Any], words: str
) -> None:
    with pytest.raises(FetchError, match=words):
        fetch(f"{studio.url}/photo.jpg", [f"127.0.0.1:{studio.port}"], **limits)


def test_what_the_host_says_is_told(studio: Studio) -> None:
    here = [f"127.0.0.1:{studio.port}", "127.0.0.1:9"]
    with pytest.raises(FetchError, match="answers 404"):
        fetch(f"{studio.url}/gone", here)
    with pytest.raises(FetchError, match="not reached"):
        fetch("http://127.0.0.1:9/", here)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://photos.example/a.jpg",
        "gopher://photos.example/",
        "s3://bucket/key",
        "photos.example/a.jpg",
        "http://user:word@photos.example/a.jpg",
        "http://[::1/a.jpg",
        "http:///a.jpg",
        "",
    ],
)
def test_only_the_web_is_asked(url: str) -> None:
    with pytest.raises(FetchError):
        fetch(url, ["photos.example", ""])


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::10.0.0.1", False),
        ("2002:0a00:0001::1", False),
    ],
)
def test_what_is_public(address: str, public: bool) -> None:
    assert is_public(address) is public
