"""Who may ask: trusted networks, and HTTP Basic credentials from an htpasswd file. SPEC.md, "Who may ask".

It decides who asks, and whether they may, before anything else looks at a request; not what they may do.
"""

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import bcrypt
from flask import Flask, current_app, g, request
from passlib.apache import HtpasswdFile  # type: ignore[import-untyped]
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, ServiceUnavailable, Unauthorized
from werkzeug.middleware.proxy_fix import ProxyFix

LOOPBACK = ip_address("127.0.0.1")
BCRYPT_HASH = re.compile(rb"\$2[aby]\$(0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}")
BCRYPT_MAX = 72  # bytes of a password that count

Network = IPv4Network | IPv6Network


class AccessError(Exception):
    """A setting that says who may ask cannot be used."""


def init_app(app: Flask) -> None:
    """Guard every path and method of `app`, those that it does not have included.

    Its settings: TRUSTED_HOSTS, networks with commas between them; HTPASSWD, the path of an htpasswd file, or None;
    PROXIES, how many proxies stand before the service. To be called before anything else that looks at requests.
    Raises AccessError.
    """
    app.config["TRUSTED_NETWORKS"] = read_networks(app.config["TRUSTED_HOSTS"])
    app.config["TRUSTED_HOSTS"] = None  # Flask has a setting of this name: the names that a Host header may have
    app.config["PROXIES"] = read_proxies(app.config["PROXIES"])
    if app.config["HTPASSWD"]:
        read_hashes(app.config["HTPASSWD"])
    if app.config["PROXIES"]:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=app.config["PROXIES"], x_proto=0)  # type: ignore[method-assign]
    app.before_request(guard)


def actor() -> str:
    """Who asks, for the log and the records: the user's name, or the peer's address ("unix" for a unix socket's)."""
    return str(g.actor)


def guard() -> None:
    """Let a request pass, or not. SPEC.md, "Who may ask".

    Credentials go before the address: who gives them well is that user, from wherever; who gives them wrongly is
    refused, though the address alone would have been enough, since the records must not name another than was meant.
    Without an htpasswd file nobody can check them, and they count for nothing.

    Raises Unauthorized where credentials would help, Forbidden where there are none, and ServiceUnavailable for
    credentials while the htpasswd file cannot be read.
    """
    g.actor = peer_name()
    if "Authorization" in request.headers and current_app.config["HTPASSWD"]:
        g.actor = user()
    elif not trusted():
        raise refusal()


def refusal() -> Unauthorized | Forbidden:
    """The same for all who may not, whatever the reason is."""
    if not current_app.config["HTPASSWD"]:
        return Forbidden("only a trusted host may ask")
    return Unauthorized(
        "only a trusted host, or who gives valid credentials, may ask",
        # RFC 9110, 11.5: a realm must be in quotes, which werkzeug leaves away when it has the parameters apart.
        www_authenticate=WWWAuthenticate("basic", None, 'realm="rebind", charset="UTF-8"'),
    )


def peer() -> IPv4Address | IPv6Address | None:
    """The peer's address, as the proxies name it where some are configured; None if it is none."""
    if not request.remote_addr and "X-Forwarded-For" not in request.headers:
        return LOOPBACK  # of a unix socket, by which nobody comes who is not on this host
    try:
        address = ip_address(request.remote_addr or "")
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def peer_name() -> str:
    """The peer for the log: never the text of a header, where a client could write anything."""
    return str(peer() or "unknown") if request.remote_addr else "unix"


def trusted() -> bool:
    """Whether the peer may ask without credentials: its address is known for sure, and in a trusted network."""
    forwarded = request.headers.get("X-Forwarded-For")
    if forwarded is not None:
        # The proxy nearest to the client wrote the Nth entry from the end; before that a client may have written
        # anything. ProxyFix heeds quotes too, with which a client could hide that entry: it would leave the address
        # of the proxy itself, or take one that the client wrote.
        named = [entry.strip() for entry in forwarded.split(",")]
        proxies = current_app.config["PROXIES"]
        if not 0 < proxies <= len(named) or named[-proxies] != request.remote_addr:
            return False
    address = peer()
    return address is not None and any(address in network for network in current_app.config["TRUSTED_NETWORKS"])


def user() -> str:
    """The user whose credentials the request carries. Raises Unauthorized and ServiceUnavailable."""
    given = request.authorization
    if given is None or given.type != "basic" or given.username is None or given.password is None:
        raise refusal()
    try:
        hashes = read_hashes(current_app.config["HTPASSWD"])
    except AccessError as error:
        current_app.logger.error("%s", error)
        raise ServiceUnavailable("credentials cannot be checked now") from error
    if not matches(hashes, given.username, given.password):
        raise refusal()
    return given.username


def matches(hashes: dict[str, bytes], name: str, password: str) -> bool:
    """Whether `name` is a user with this password.

    Each failure costs as much as a check of the costliest hash, so that the time does not tell who is a user.
    """
    secret = password.encode()[:BCRYPT_MAX]  # as Apache does; bcrypt itself refuses longer ones
    costliest = max(map(cost, hashes.values()), default=5)
    hashed = hashes.get(name, nobodys_hash(costliest))
    if bcrypt.checkpw(secret, hashed):
        return name in hashes
    for missing in range(cost(hashed), costliest):  # each step doubles the work: these add up to the costliest
        bcrypt.checkpw(secret, nobodys_hash(missing))
    return False


def cost(hashed: bytes) -> int:
    """The logarithm, to base 2, of the work that it takes to check a password against this hash."""
    return int(hashed.split(b"$")[2])


def nobodys_hash(cost: int) -> bytes:
    """A hash of this cost that no known password has."""
    return b"$2y$%02d$" % cost + b"." * 53


def read_hashes(path: str) -> dict[str, bytes]:
    """The bcrypt hash of each user in the htpasswd file.

    It is read for every check, which takes less time than the check: so a change counts at once, in every worker, and
    threads share nothing. Raises AccessError, with the reason, and no hash in it.
    """
    try:
        file = HtpasswdFile(path)
        hashes: dict[str, Any] = {name: file.get_hash(name) for name in file.users()}
    except (OSError, ValueError) as error:
        raise AccessError(f"the htpasswd file {path} cannot be read: {error}") from error
    for name, hashed in hashes.items():
        if not BCRYPT_HASH.fullmatch(hashed):
            raise AccessError(f"the htpasswd file {path} has no bcrypt hash (htpasswd -B) for the user {name!r}")
    return hashes


def read_networks(setting: Any) -> list[Network]:
    """The networks that TRUSTED_HOSTS names. Raises AccessError."""
    try:
        return [ip_network(each.strip()) for each in str(setting).split(",") if each.strip()]
    except ValueError as error:
        raise AccessError(f"REBIND_TRUSTED_HOSTS is no list of networks: {error}") from error


def read_proxies(setting: Any) -> int:
    """The number that PROXIES gives. Raises AccessError."""
    if not re.fullmatch(r"[0-9]+", str(setting)):
        raise AccessError(f"REBIND_PROXIES is not how many proxies there are: {setting!r}")
    return int(setting)
