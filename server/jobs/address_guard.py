"""Guard for addresses that callers choose: webhooks must not reach the service's own network (SSRF).

The URL must be https. Its host is resolved once, every address must be public, and the connection goes to the checked
address. The operator can name hosts that are exempt, for tests and closed networks.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import SplitResult, urlsplit

from hyper_model.errors import HyperError

MAX_URL_CHARS = 2000
PORTS = {"http": 80, "https": 443}

NAT64 = (ip_network("64:ff9b::/96"), ip_network("64:ff9b:1::/48"))
"""Prefixes whose last 32 bits are an IPv4 address (RFC 6052, RFC 8215)."""

COMPATIBLE = ip_network("::/96")
"""The obsolete notation of IPv4 addresses in IPv6 (RFC 4291, section 2.5.5.1)."""


class ForbiddenAddressError(HyperError):
    """Error for a URL that the service must not call."""


@dataclass(frozen=True)
class Target:
    """A checked address.

    Attributes:
        host: Host name for TLS and the Host header.
        address: IP address to connect to.
        authority: Host and, unless it is the scheme's default, the port.
        path: Path and query.
    """

    scheme: str
    host: str
    address: str
    port: int
    authority: str
    path: str


def check_url(url: str, allowed_hosts: Collection[str]) -> SplitResult:
    """Check everything about a URL except the addresses of its host's name.

    Raises:
        ForbiddenAddressError: With the reason.
    """
    if len(url) > MAX_URL_CHARS:
        raise ForbiddenAddressError(f"The URL has {len(url)} characters; the limit is {MAX_URL_CHARS}.")
    if any(not "!" <= char <= "~" for char in url):
        raise ForbiddenAddressError("The URL has a character outside of printable ASCII.")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise ForbiddenAddressError("The URL cannot be parsed.") from None
    if not host:
        raise ForbiddenAddressError("The URL has no host.")
    if parts.username is not None or parts.password is not None:
        raise ForbiddenAddressError("The URL contains a user name or a password.")
    is_allowed = host in allowed_hosts
    if parts.scheme not in (("https", "http") if is_allowed else ("https",)):
        raise ForbiddenAddressError("The URL must begin with https://.")
    if not is_allowed and (address := literal(host)) is not None and not is_public(address):
        raise ForbiddenAddressError("The URL names an address that is not public.")
    return parts


async def resolve(url: str, allowed_hosts: Collection[str]) -> Target:
    """Resolve a URL's host once and check each of its addresses.

    Raises:
        ForbiddenAddressError: If the URL or one of the addresses is forbidden.
        OSError: If the host cannot be resolved.
    """
    parts = check_url(url, allowed_hosts)
    host = parts.hostname or ""
    port = parts.port or PORTS[parts.scheme]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if host not in allowed_hosts and not all(is_public(ip_address(address)) for address in addresses):
        # One public address among private ones is the sign of an attack, not of a usual receiver.
        raise ForbiddenAddressError("The host has an address that is not public.")
    path = parts.path or "/"
    return Target(
        scheme=parts.scheme,
        host=host,
        address=addresses[0],
        port=port,
        authority=parts.netloc,
        path=f"{path}?{parts.query}" if parts.query else path,
    )


def literal(host: str) -> IPv4Address | IPv6Address | None:
    """Return the address that a host is, in any notation that the system's resolver accepts, or None for a name."""
    try:
        return ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        # inet_aton accepts 127.1, 0x7f000001 and 2130706433, as the resolver does.
        return IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address is on the public internet, also if an IPv4 address is written inside it."""
    if not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified:
        return isinstance(address, IPv6Address) and is_public_nat64(address)
    if isinstance(address, IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in COMPATIBLE:
            inner.append(IPv4Address(int(address) & 0xFFFFFFFF))
        if any(address in prefix for prefix in NAT64):
            return is_public_nat64(address)
        return all(each is None or is_public(each) for each in inner)
    return True


def is_public_nat64(address: IPv6Address) -> bool:
    """Return whether an address is a public IPv4 address behind the well-known prefix of NAT64."""
    return address in NAT64[0] and is_public(IPv4Address(int(address) & 0xFFFFFFFF))
