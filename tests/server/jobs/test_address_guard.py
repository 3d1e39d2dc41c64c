"""Webhooks reach public addresses alone, in whatever notation a caller writes a private one."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address
from typing import Any

import pytest

from server.jobs.address_guard import ForbiddenAddressError, check_url, is_public, resolve

FORBIDDEN = (
    "http://example.com/hook",
    "ftp://example.com/hook",
    "https:///hook",
    "https://user:secret@example.com/",
    "https://169.254.169.254/latest/meta-data",
    "https://127.0.0.1/",
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0177.0.0.1/",
    "https://10.0.0.7/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://100.64.0.1/",
    "https://0.0.0.0/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://[::1]/",
    "https://[::]/",
    "https://[fe80::1]/",
    "https://[fe80::1%25eth0]/",
    "https://[fc00::1]/",
    "https://[ff02::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:169.254.169.254]/",
    "https://[::127.0.0.1]/",
    "https://[64:ff9b::127.0.0.1]/",
    "https://[64:ff9b:1::10.0.0.1]/",
    "https://[2002:7f00:1::]/",
    "https://[2001:db8::1]/",
    "https://example.com/\nx",
    "https://exämple.com/",
    "https://example.com:99999/",
    "https://[::1/",
    f"https://example.com/{'x' * 2000}",
)


@pytest.mark.parametrize("url", FORBIDDEN)
def test_a_forbidden_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ForbiddenAddressError):
        check_url(url, ())


@pytest.mark.parametrize("url", ["https://example.com/hook?a=1", "https://8.8.8.8:8443/", "https://[2606:4700::1111]/"])
def test_a_public_url_is_accepted(url: str) -> None:
    assert check_url(url, ()).hostname


def test_a_named_host_is_exempt() -> None:
    assert check_url("http://127.0.0.1:9000/", {"127.0.0.1"})
    assert check_url("http://receiver.internal/", {"receiver.internal"})
    with pytest.raises(ForbiddenAddressError):
        check_url("http://127.0.0.2:9000/", {"127.0.0.1"})


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["93.184.215.14", "127.0.0.1"], ["::ffff:10.0.0.1"], ["fe80::1"]])
def test_a_name_with_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    """The resolver is replaced, because no test can rely on such a name in the public DNS."""

    async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]

    async def check() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        with pytest.raises(ForbiddenAddressError):
            await resolve("https://rebinding.example/", ())
        target = await resolve("https://rebinding.example/hook?a=1", {"rebinding.example"})
        assert (target.address, target.host, target.path) == (addresses[0], "rebinding.example", "/hook?a=1")

    asyncio.run(check())


def test_addresses_of_the_internet_are_public() -> None:
    assert all(is_public(ip_address(each)) for each in ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"))
