"""Tell whether the environment's proxies apply to an address, and name one that cannot be used.

`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` are read as other programs do. A proxy never applies to this
machine's own addresses, since no proxy could reach them.

Depends on the standard library only; callers open the connections.
"""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import Any, cast
from urllib import request
from urllib.parse import urlsplit

_USABLE_SCHEMES = ("http", "https")


def is_local(url: str) -> bool:
    """Return whether an address is on this machine: localhost, its own name, or a loopback address."""
    host = _host(url).rstrip(".")
    if host in ("localhost", socket.gethostname().lower()) or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def proxy_for(url: str) -> tuple[str, str] | None:
    """Return the variable and the address of the applicable proxy, without a password; None without one."""
    if is_local(url) or not _host(url):
        return None
    proxies = request.getproxies_environment()
    # Missing in the type stubs.
    if cast(Any, request).proxy_bypass_environment(_host(url), proxies):
        return None
    for name in (urlsplit(url).scheme, "all"):
        if proxy := proxies.get(name):
            return f"{name.upper()}_PROXY", _without_password(proxy)
    return None


def unusable_proxy(url: str) -> str | None:
    """Return the reason why an address's proxy cannot be used; None for a usable or no proxy."""
    if (found := proxy_for(url)) is None:
        return None
    variable, proxy = found
    advice = f"Set {variable} to an http:// proxy, or NO_PROXY={_host(url)} to connect without one."
    scheme = proxy.partition("://")[0].lower() if "://" in proxy else "http"
    if scheme not in _USABLE_SCHEMES:
        return f"the proxy {proxy} ({variable}) has the scheme {scheme}; only http and https are supported. {advice}"
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        is_address = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_address = False
    return None if is_address else f"the proxy {proxy} ({variable}) is not an address. {advice}"


def proxy_hint(url: str) -> str:
    """Return a sentence about the proxy of an address, for a failed connection; empty without a proxy."""
    if (found := proxy_for(url)) is None:
        return ""
    variable, proxy = found
    return f" The request went through the proxy {proxy} ({variable}); NO_PROXY={_host(url)} connects without it."


def _host(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _without_password(proxy: str) -> str:
    scheme, separator, rest = proxy.rpartition("://")
    return scheme + separator + rest.rpartition("@")[2]
