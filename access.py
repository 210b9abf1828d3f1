"""Who may ask: trusted networks, and HTTP Basic credentials from an htpasswd file. docs/contract.md, "Who may ask"."""

import re
import stat
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path

import bcrypt
from flask import Flask, current_app, g, request
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, ServiceUnavailable, Unauthorized

from schemas import SettingError

LOOPBACK = ip_address("127.0.0.1")
BCRYPT_MAX = 72  # bytes of a password that count
DEFAULT_COST = b"05"  # of a hash that htpasswd -B makes: checking it takes 2 ** 5 rounds

# One line of an htpasswd file. It is strict about the hash because bcrypt.checkpw raises ValueError for a bad one.
USER = re.compile(r"([^:]+):(\$2[aby]\$(?:0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31})")


def init_app(app: Flask) -> None:
    """Read the settings, and guard every path and method of `app`, unknown ones too. Raises SettingError."""
    trusted = map(str.strip, str(app.config["TRUSTED_HOSTS"]).split(","))
    try:
        app.config["TRUSTED_NETWORKS"] = [read_network(each) for each in trusted if each]
    except ValueError as error:
        raise SettingError(f"REBIND_TRUSTED_HOSTS is not a list of networks: {error}") from error
    app.config["TRUSTED_HOSTS"] = None  # In Flask, this setting lists the names that a Host header may have.
    if not re.fullmatch(r"[0-9]{1,2}", str(app.config["PROXIES"])):
        raise SettingError(f"REBIND_PROXIES must be a whole number from 0 to 99: {app.config['PROXIES']!r}")
    app.config["PROXIES"] = int(app.config["PROXIES"])
    if app.config["HTPASSWD"]:
        read_hashes(app.config["HTPASSWD"])
    app.before_request(guard)


def guard() -> None:
    """Let a request pass, or raise Unauthorized, Forbidden or ServiceUnavailable.

    `g.actor` says who asks, for logs and records: the user's name, or else the peer's address, "unix" or "unknown".
    Wrong credentials are refused even from a trusted host, so that no record names the wrong actor.
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
        # RFC 9110, section 11.5: a realm must be quoted. werkzeug does not quote parameters that are passed separately.
        www_authenticate=WWWAuthenticate("basic", None, 'realm="rebind", charset="UTF-8"'),
    )


def peer() -> tuple[str, IPv4Address | IPv6Address | None]:
    """The peer's name for the log, and its address, which is None if it is not known for sure."""
    forwarded = request.headers.get("X-Forwarded-For")
    if forwarded is None and not request.remote_addr:
        return "unix", LOOPBACK  # Only processes on this host can connect to a unix socket.
    text = request.remote_addr or ""
    if forwarded is not None:
        # Every proxy appends the address that connected to it. Before the Nth entry from the end, the client writes.
        entries, proxies = forwarded.split(","), current_app.config["PROXIES"]
        text = entries[-proxies].strip() if 0 < proxies <= len(entries) else ""
    try:
        given = ip_address(text)
    except ValueError:
        return "unknown", None  # never the text of a header: a client could write anything there
    address = getattr(given, "ipv4_mapped", None) or given  # ::ffff:192.0.2.1 is 192.0.2.1
    return str(address), address


def user() -> str:
    """The name of the user whose credentials the request carries. Raises Unauthorized and ServiceUnavailable."""
    given = request.authorization
    if given is None or given.type != "basic" or given.username is None or given.password is None:
        raise refusal()
    try:
        hashes = read_hashes(current_app.config["HTPASSWD"])
    except SettingError as error:
        current_app.logger.error("%s", error)
        raise ServiceUnavailable("credentials cannot be checked now") from error
    # To check takes as long for an unknown user, so that time does not tell who is one.
    cost = max((hashed.split(b"$")[2] for hashed in hashes.values()), default=DEFAULT_COST)
    hashed = hashes.get(given.username, b"$2y$%s$" % cost + b"." * 53)
    password = given.password.encode()[:BCRYPT_MAX]  # Apache ignores the rest too. bcrypt refuses longer ones.
    if not bcrypt.checkpw(password, hashed) or given.username not in hashes:
        raise refusal()
    return given.username


def read_hashes(path: str) -> dict[str, bytes]:
    """The bcrypt hash of each user in an htpasswd file. Raises SettingError, without what may be a password."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise OSError("it is not a regular file")  # to read a FIFO or a device may take for ever
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise SettingError(f"the htpasswd file {path} cannot be read: {error}") from error
    hashes: dict[str, bytes] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if not (entry := USER.fullmatch(line)):
            raise SettingError(f"the htpasswd file {path}, line {number}: expected NAME:HASH, as htpasswd -B writes it")
        hashes.setdefault(entry[1], entry[2].encode())  # as in Apache, a user's first line counts
    return hashes


def read_network(text: str) -> IPv4Network | IPv6Network:
    """The network in `text`; IPv4 in IPv6 becomes IPv4, as with a peer. Raises ValueError if no peer can be in it."""
    network = ip_network(text)
    if network.is_unspecified or network.is_multicast or "%" in text:
        raise ValueError(f"no peer matches {text}")
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return IPv4Network((mapped, network.prefixlen - 96)) if mapped and network.prefixlen >= 96 else network
