"""Who may ask: trusted networks, and HTTP Basic credentials from an htpasswd file. docs/contract.md, "Who may ask".

This runs before anything else looks at a request. Whoever may ask may do everything: there are no roles.
"""

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any

import bcrypt
from flask import Flask, current_app, g, request
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, ServiceUnavailable, Unauthorized

LOOPBACK = ip_address("127.0.0.1")
BCRYPT_MAX = 72  # bytes of a password that count
DEFAULT_COST = 5  # of a hash that htpasswd -B makes

# One line of an htpasswd file. It is strict about the hash because bcrypt.checkpw raises ValueError for a bad one.
USER = re.compile(r"([^:]+):(\$2[aby]\$(?:0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31})")

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class AccessError(Exception):
    """A setting that says who may ask cannot be used."""


def init_app(app: Flask) -> None:
    """Guard every path and method of `app`, unknown ones too. Call it before adding other before_request functions.

    Settings: TRUSTED_HOSTS, networks separated by commas; HTPASSWD, the path of an htpasswd file or None; PROXIES, the
    number of proxies in front of the service. Raises AccessError.
    """
    app.config["TRUSTED_NETWORKS"] = read_networks(app.config["TRUSTED_HOSTS"])
    app.config["TRUSTED_HOSTS"] = None  # In Flask, this setting lists the names that a Host header may have.
    app.config["PROXIES"] = read_proxies(app.config["PROXIES"])
    if app.config["HTPASSWD"]:
        read_hashes(app.config["HTPASSWD"])
    app.before_request(guard)


def actor() -> str:
    """Who asks, for logs and records: the user's name, or else the peer's address, "unix" or "unknown"."""
    return str(g.actor)


def guard() -> None:
    """Let a request pass if its credentials are valid or its peer is trusted. docs/contract.md, "Who may ask".

    Valid credentials identify the user from any address. Wrong ones are refused even from a trusted host, so that no
    record names the wrong actor. Without an htpasswd file, credentials are ignored.

    Raises Unauthorized if credentials would help, Forbidden if none are configured, and ServiceUnavailable if the
    htpasswd file cannot be read.
    """
    g.actor, address = peer()
    if "Authorization" in request.headers and current_app.config["HTPASSWD"]:
        g.actor = user()
    elif address is None or not any(address in network for network in current_app.config["TRUSTED_NETWORKS"]):
        raise refusal()


def refusal() -> Unauthorized | Forbidden:
    """The same answer for everyone who may not ask, so that it does not tell why."""
    if not current_app.config["HTPASSWD"]:
        return Forbidden("a trusted host is required")
    return Unauthorized(
        "valid credentials or a trusted host are required",
        # RFC 9110, section 11.5: a realm must be quoted. werkzeug omits the quotes if the parameters are passed
        # separately.
        www_authenticate=WWWAuthenticate("basic", None, 'realm="rebind", charset="UTF-8"'),
    )


def peer() -> tuple[str, Address | None]:
    """The peer's name for the log, and its address, which is None if it is not known for sure."""
    forwarded = request.headers.get("X-Forwarded-For")
    if forwarded is None and not request.remote_addr:
        return "unix", LOOPBACK  # Only processes on this host can connect to a unix socket.
    address = parse_address(request.remote_addr if forwarded is None else client(forwarded))
    # Never the text of a header: a client could write anything there.
    return str(address or "unknown"), address


def client(forwarded: str) -> str | None:
    """The client that the outermost proxy names in X-Forwarded-For; None if there are fewer entries than proxies.

    Every proxy appends the address that connected to it. So the outermost of N proxies wrote the Nth entry from the
    end, and the client may have written everything before it.
    """
    entries = forwarded.split(",")
    proxies: int = current_app.config["PROXIES"]
    return entries[-proxies].strip() if 0 < proxies <= len(entries) else None


def parse_address(text: str | None) -> Address | None:
    """The IP address in `text`, with an IPv4 address in IPv6 (::ffff:192.0.2.1) as IPv4. None if it is not one."""
    try:
        address = ip_address(text or "")
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def user() -> str:
    """The name of the user whose credentials the request carries. Raises Unauthorized and ServiceUnavailable."""
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

    For an unknown user a hash of the highest cost in the file is checked, so that the time does not tell who is a user.
    That needs hashes of one cost, as htpasswd makes them.
    """
    secret = password.encode()[:BCRYPT_MAX]  # Apache ignores the rest too. bcrypt refuses longer passwords.
    hashed = hashes.get(name) or unmatched_hash(max(map(cost, hashes.values()), default=DEFAULT_COST))
    return bcrypt.checkpw(secret, hashed) and name in hashes


def cost(hashed: bytes) -> int:
    """The cost in a bcrypt hash: checking a password takes 2 ** cost rounds."""
    return int(hashed.split(b"$")[2])


def unmatched_hash(cost: int) -> bytes:
    """A bcrypt hash of this cost that no known password has."""
    return b"$2y$%02d$" % cost + b"." * 53


def read_hashes(path: str) -> dict[str, bytes]:
    """The bcrypt hash of each user in an htpasswd file. As in Apache, a user's first line counts.

    The file is read for every check, which takes longer than the reading: so changes take effect immediately, in every
    worker. Raises AccessError, in one line and without what the bad line says: it may be a password.
    """
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise AccessError(f"the htpasswd file {path} cannot be read: {error}") from error
    hashes: dict[str, bytes] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        entry = USER.fullmatch(line)
        if not entry:
            raise AccessError(f"the htpasswd file {path}, line {number}: expected NAME:HASH, as htpasswd -B writes it")
        hashes.setdefault(entry[1], entry[2].encode())
    return hashes


def read_networks(setting: Any) -> list[Network]:
    """The networks in TRUSTED_HOSTS. Raises AccessError."""
    try:
        return [ip_network(each.strip()) for each in str(setting).split(",") if each.strip()]
    except ValueError as error:
        raise AccessError(f"REBIND_TRUSTED_HOSTS is not a list of networks: {error}") from error


def read_proxies(setting: Any) -> int:
    """The number of proxies in PROXIES. Raises AccessError."""
    if not re.fullmatch(r"[0-9]+", str(setting)):
        raise AccessError(f"REBIND_PROXIES must be a whole number: {setting!r}")
    return int(setting)
