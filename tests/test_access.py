"""Who may ask: peers, proxies and credentials, in front of a real gunicorn on TCP and on a unix socket.

All of 127.0.0.0/8 belongs to this host, so a client here can be two peers: HERE, which is trusted, and THERE.
"""

import http.client
import json
import os
import re
import socket
import subprocess
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from answers import Answer, is_problem
from databases import logged, stored
from factories import message
from flask.testing import FlaskClient
from services import PATH, Service, Start, installed

from app import create_app
from queues import QueueRegistry
from schemas import SettingError

pytestmark = pytest.mark.sqlite  # who may ask is decided before the database is used
HERE, THERE = "127.0.0.1", "127.0.0.2"
BODY = json.dumps({"reason": "a test", "data": {"queue": "elsewhere"}})
PASSWORD = "correct horse"


def ask(
    service: Service, peer: str, *headers: tuple[str, str], method: str = "POST", path: str = PATH, body: str = BODY
) -> Answer:
    """Send a request, by default a rebind, from `peer`: an address, or "unix"."""
    connection = http.client.HTTPConnection(*service.address, timeout=60, source_address=(peer, 0))
    if peer == "unix":
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(service.output.with_name("socket")))
    connection.putrequest(method, path)
    for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers):
        connection.putheader(name, value)
    connection.endheaders(body.encode())
    response = connection.getresponse()
    answer = Answer(response.status, response.headers, response.read())
    connection.close()
    return answer


def basic(credentials: str) -> tuple[str, str]:
    """The header that carries `name:password`."""
    return "Authorization", f"Basic {b64encode(os.fsencode(credentials)).decode()}"


ADA = basic(f"ada:{PASSWORD}")


def forwarded(addresses: str) -> tuple[str, str]:
    return "X-Forwarded-For", addresses


def hashed(password: str, cost: int = 4) -> str:
    """A hash as Apache's htpasswd writes it."""
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost)).decode().replace("$2b$", "$2y$")


def write_users(path: Path, /, **passwords: str) -> Path:
    """Replace the htpasswd file, atomically, by one with these users."""
    new = path.with_name("new")
    new.write_text("".join(f"{user}:{hashed(password)}\n" for user, password in passwords.items()))
    return new.replace(path)


def is_unauthorized(answer: Answer) -> bool:
    assert answer.headers.get_all("WWW-Authenticate") == ['Basic realm="rebind", charset="UTF-8"']
    return is_problem(answer, 401, "valid credentials or a trusted host are required")


def is_forbidden(answer: Answer) -> bool:
    assert "WWW-Authenticate" not in answer.headers
    return is_problem(answer, 403, "a trusted host is required")


@pytest.fixture(scope="module")
def htpasswd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the htpasswd file that the services share."""
    return tmp_path_factory.mktemp("users") / "htpasswd"


@pytest.fixture
def users(htpasswd: Path) -> Path:
    """That file, with the user ada. A test may change it."""
    return write_users(htpasswd, ada=PASSWORD)


@pytest.fixture
def without_users(shared: Start, queues: QueueRegistry) -> Service:
    """A service that trusts HERE and nobody else."""
    queues.load([message()])
    return shared(REBIND_TRUSTED_HOSTS=HERE)


@pytest.fixture
def with_users(shared: Start, users: Path, queues: QueueRegistry) -> Service:
    """A service that trusts HERE, and the users of the htpasswd file."""
    queues.load([message()])
    return shared(REBIND_TRUSTED_HOSTS=HERE, REBIND_HTPASSWD=str(users))


@pytest.fixture
def behind(shared: Start, users: Path, queues: QueueRegistry) -> Callable[[int], Service]:
    """Give a service behind that many proxies. It trusts loopback, the default, and the users."""
    queues.load([message()])
    return lambda proxies: shared(REBIND_PROXIES=str(proxies), REBIND_HTPASSWD=str(users))


def client(url: str, **settings: Any) -> FlaskClient:
    """A client of the application in this process, for tables of settings and files."""
    return create_app({"DATABASE_URL": url} | settings).test_client()


def actors(url: str) -> list[str]:
    """The actors in the delivery log."""
    return [record["actor"] for record in logged(url)]


def actors_said(service: Service, path: str) -> list[str]:
    """The actor in each line of the diagnostic log about a GET of this path."""
    return re.findall(rf"INFO in app: (.*) GET {path} ", service.output.read_text())


# Every path and method

REQUESTS = [
    *((method, PATH) for method in ("POST", "GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "ANYTHING")),
    *(("GET", path) for path in ("/", "/elsewhere", f"{PATH}/", f"/{PATH}", "/static/x", "/%00", f"{PATH}?unknown=1")),
]


@pytest.mark.parametrize(("method", "path"), REQUESTS)
def test_every_path_and_method_is_guarded(
    with_users: Service, without_users: Service, url: str, method: str, path: str
) -> None:
    before = stored(url)
    assert is_unauthorized(ask(with_users, THERE, method=method, path=path))
    assert is_forbidden(ask(without_users, THERE, method=method, path=path))
    assert (stored(url), logged(url)) == (before, [])


@pytest.mark.parametrize(("peer", "headers"), [(HERE, []), (THERE, [ADA])], ids=["by address", "by credentials"])
def test_whoever_may_ask_learns_what_is_wrong_with_the_request(
    with_users: Service, peer: str, headers: list[tuple[str, str]]
) -> None:
    assert ask(with_users, peer, *headers, method="GET", path="/elsewhere").status_code == 404
    assert ask(with_users, peer, *headers, method="GET").status_code == 405
    assert ask(with_users, peer, *headers, body="{").status_code == 400


def test_the_host_header_may_name_any_host(without_users: Service) -> None:
    """Flask has a setting TRUSTED_HOSTS too, which limits this header."""
    with socket.create_connection(without_users.address) as connection:
        connection.sendall(b"GET /elsewhere HTTP/1.1\r\nHost: rebind.example\r\nConnection: close\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 404 ")


# Trusted hosts

DEFAULT = "127.0.0.0/8,::1"
NETWORKS = {
    "loopback": (DEFAULT, "127.0.0.2", 404),
    "loopback, IPv6": (DEFAULT, "::1", 404),
    "loopback by a unix socket": (DEFAULT, "", 404),
    "not loopback": (DEFAULT, "192.0.2.1", 403),
    "a network": ("192.0.2.0/28", "192.0.2.15", 404),
    "outside of a network": ("192.0.2.0/28", "192.0.2.16", 403),
    "one of several": ("192.0.2.1, 198.51.100.0/24 ,2001:db8::/32", "198.51.100.7", 404),
    "IPv6": ("192.0.2.1,2001:db8::/32", "2001:db8::1", 404),
    "IPv4 in IPv6": ("192.0.2.0/28", "::ffff:192.0.2.1", 404),
    "not IPv4 in IPv6": ("192.0.2.0/28", "::192.0.2.1", 403),
    "a network of IPv4 in IPv6": ("::ffff:192.0.2.0/120", "192.0.2.255", 404),
    "outside of a network of IPv4 in IPv6": ("::ffff:192.0.2.0/120", "192.0.3.0", 403),
    "all of IPv4 in IPv6": ("::ffff:0.0.0.0/96", "192.0.2.1", 404),
    "every IPv6 address": ("::/0", "192.0.2.1", 403),
    "a link": ("fe80::/10", "fe80::1%eth0", 404),
    "not an address": ("0.0.0.0/0,::/0", "somewhere", 403),
    "a unix socket, if 127.0.0.1 is not trusted": ("192.0.2.0/24,127.0.0.2", "", 403),
    "nobody": ("", "127.0.0.1", 403),
}


@pytest.mark.parametrize(("trusted", "peer", "status"), NETWORKS.values(), ids=NETWORKS)
def test_a_peer_in_a_trusted_network_may_ask(url: str, trusted: str, peer: str, status: int) -> None:
    settings = {} if trusted == DEFAULT else {"TRUSTED_HOSTS": trusted}
    answer = client(url, **settings).get("/elsewhere", environ_overrides={"REMOTE_ADDR": peer})
    assert answer.status_code == status


def test_without_an_htpasswd_file_credentials_are_ignored(without_users: Service, url: str) -> None:
    assert is_forbidden(ask(without_users, THERE, ADA))
    assert ask(without_users, HERE, ADA).status_code == 200
    assert actors(url) == [HERE]


# Each case: the number of proxies, the X-Forwarded-For headers, and the peer that a request from HERE or by the unix
# socket comes from, or None if it is not trusted.
FORWARDED = {
    "no proxy": (0, ["127.0.0.1"], None),
    "no proxy, no header": (0, [], HERE),
    "one proxy": (1, ["127.0.0.9"], "127.0.0.9"),
    "one proxy, IPv4 in IPv6": (1, ["::ffff:127.0.0.9"], "127.0.0.9"),
    "one proxy, no header": (1, [], HERE),
    "one proxy, nothing named": (1, [""], None),
    "one proxy, not an address": (1, ["localhost"], None),
    "one proxy, an outsider": (1, ["192.0.2.1"], None),
    "one proxy, an outsider who spoofs": (1, ["127.0.0.1, 192.0.2.1"], None),
    "one proxy, an outsider who spoofs in another header": (1, ["127.0.0.1", "192.0.2.1"], None),
    "one proxy, an outsider who quotes": (1, ['"127.0.0.1, 192.0.2.1'], None),
    "one proxy, a trusted host who quotes": (1, ['"192.0.2.1, 127.0.0.9'], "127.0.0.9"),
    "two proxies, two headers": (2, ["127.0.0.9", "192.0.2.1"], "127.0.0.9"),
    "two proxies, one entry": (2, ["127.0.0.9"], None),
    "two proxies, an outsider who spoofs": (2, ["127.0.0.1, 192.0.2.1, 127.0.0.9"], None),
    "two proxies, an outsider who names nobody": (2, ["127.0.0.1,, 192.0.2.1, 127.0.0.9"], None),
}


@pytest.mark.parametrize(("proxies", "headers", "peer"), FORWARDED.values(), ids=FORWARDED)
@pytest.mark.parametrize("connection", [HERE, "unix"])
def test_only_as_many_proxies_are_believed_as_are_configured(
    behind: Callable[[int], Service], url: str, connection: str, proxies: int, headers: list[str], peer: str | None
) -> None:
    answer = ask(behind(proxies), connection, *map(forwarded, headers))
    if peer is None:
        assert is_unauthorized(answer)
        assert actors(url) == []
    else:
        assert answer.status_code == 200
        assert actors(url) == [peer if headers else connection]


# Credentials


@pytest.mark.parametrize("peer", [HERE, THERE, "unix"])
def test_a_user_may_ask_from_anywhere_and_is_the_actor(with_users: Service, url: str, peer: str) -> None:
    assert ask(with_users, peer, ADA).status_code == 200
    assert actors(url) == ["ada"]


WRONG = {
    "a wrong password": basic("ada:wrong"),
    "no colon": basic("ada"),
    "a line break after the password": basic(f"ada:{PASSWORD}\n"),
    "a NUL after the password": basic(f"ada:{PASSWORD}\0"),
    "a long password": basic("ada:" + "x" * 2000),
    "an unknown user": basic(f"bob:{PASSWORD}"),
    "a user that no file can have": basic(f"a\nd\0a\t:{PASSWORD}"),
    "nothing": basic(""),
    "not UTF-8": basic("ada:\udcff"),
    "not base64": ("Authorization", "Basic !"),
    "an empty header": ("Authorization", ""),
    "another scheme": ("Authorization", f"Bearer {PASSWORD}"),
    "parameters of the scheme": ("Authorization", f'Basic username="ada", password="{PASSWORD}"'),
}


@pytest.mark.parametrize("header", WRONG.values(), ids=WRONG)
def test_wrong_credentials_are_refused_even_from_a_trusted_host(
    with_users: Service, url: str, header: tuple[str, str]
) -> None:
    assert is_unauthorized(ask(with_users, HERE, header))
    assert is_unauthorized(ask(with_users, HERE, header, method="GET", path="/elsewhere"))
    assert logged(url) == []


def test_credentials_given_twice_are_refused(with_users: Service) -> None:
    assert is_unauthorized(ask(with_users, HERE, ADA, ADA))


# The htpasswd file

PASSWORDS = {"a colon": "a:b::", "UTF-8": "pässwörd ключ", "72 bytes": "x" * 72, "too long for bcrypt": "ключ" * 20}


@pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS)
def test_a_file_that_htpasswd_wrote_is_understood(url: str, tmp_path: Path, password: str) -> None:
    file = tmp_path / "htpasswd"
    file.touch()
    for user in ("ada", "жук"):
        command = [installed("htpasswd"), "-bB", str(file), user, password]
        subprocess.run(command, check=True, capture_output=True)
    given = [("ada", password), ("жук", password), ("ada", f"?{password}"), ("ada", password[:10] + "?")]
    asking = client(url, HTPASSWD=str(file))
    statuses = [asking.get("/", headers=[basic(f"{user}:{secret}")]).status_code for user, secret in given]
    assert statuses == [404, 404, 401, 401]


def test_the_file_is_read_as_apache_reads_it(url: str, tmp_path: Path) -> None:
    """Comments, blank lines and white space around a line are ignored; of two lines for a user the first counts.

    So is what Apache does not ignore, a byte order mark.
    """
    file = tmp_path / "htpasswd"
    lines = ["\ufeff# the users", "", f" ada:{hashed(PASSWORD)}\r", "  ", f"ada:{hashed('second')}", " #bob:nothing"]
    file.write_text("\n".join(lines))
    asking = client(url, HTPASSWD=str(file))
    assert asking.get("/", headers=[ADA]).status_code == 404
    assert asking.get("/", headers=[basic("ada:second")]).status_code == 401


def statuses(service: Service, *headers: tuple[str, str], peer: str = THERE) -> set[int]:
    """The statuses of a request that is sent often enough for each worker to answer one."""
    return {ask(service, peer, *headers).status_code for _ in range(12)}


def test_changes_of_the_file_take_effect_immediately(with_users: Service, users: Path) -> None:
    bob = basic("bob:new")
    assert (statuses(with_users, ADA), statuses(with_users, bob)) == ({200}, {401})
    write_users(users, ada=PASSWORD, bob="new")
    assert (statuses(with_users, ADA), statuses(with_users, bob)) == ({200}, {200})
    write_users(users, ada="changed", bob="new")
    assert (statuses(with_users, ADA), statuses(with_users, bob)) == ({401}, {200})
    write_users(users)
    assert (statuses(with_users, ADA), statuses(with_users, bob)) == ({401}, {401})


@pytest.mark.parametrize("content", [None, b"nonsense\n", b"ada:correct horse\n", b"\xff:x\n"])
def test_while_the_file_cannot_be_read_no_credentials_are_valid(
    with_users: Service, users: Path, content: bytes | None
) -> None:
    users.unlink()
    if content is not None:
        users.write_bytes(content)
    answer = ask(with_users, THERE, ADA)
    assert is_problem(answer, 503, "credentials cannot be checked now")
    assert answer.headers["Retry-After"] == "5"
    assert statuses(with_users, ADA, peer=HERE) == statuses(with_users, basic("bob:x")) == {503}
    assert (statuses(with_users), statuses(with_users, peer=HERE)) == ({401}, {200})
    assert f"the htpasswd file {users}" in with_users.output.read_text()
    write_users(users, ada=PASSWORD)
    assert statuses(with_users, ADA) == {200}


@pytest.mark.parametrize("credentials", ["nobody:wrong", ":", "nobody:\0"])
@pytest.mark.parametrize(("costs", "expected"), [([4, 6, 5], 6), ([], 5)], ids=["the highest", "htpasswd's own"])
def test_refusing_an_unknown_user_costs_one_check(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, costs: list[int], expected: int, credentials: str
) -> None:
    """Time is not measured: a check takes 2 ** cost rounds."""
    file = tmp_path / "htpasswd"
    file.write_text("".join(f"user{cost}:{hashed(PASSWORD, cost)}\n" for cost in costs))
    checked = []
    checkpw = bcrypt.checkpw

    def counted(password: bytes, against: bytes) -> bool:
        checked.append(int(against.split(b"$")[2]))
        return checkpw(password, against)

    monkeypatch.setattr(bcrypt, "checkpw", counted)
    assert client(url, HTPASSWD=str(file)).get("/", headers=[basic(credentials)]).status_code == 401
    assert checked == [expected]


def test_the_hash_that_stands_for_an_unknown_user_lets_nobody_in(
    url: str, users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if somebody guessed its password."""
    monkeypatch.setattr(bcrypt, "checkpw", lambda password, hashed: True)
    assert client(url, HTPASSWD=str(users)).get("/", headers=[basic("nobody:guessed")]).status_code == 401


# The diagnostic log


def test_the_line_of_each_refusal_names_the_actor(with_users: Service) -> None:
    wrong = basic("ada:wrong")
    cases = [(HERE, []), (THERE, []), ("unix", []), (THERE, [ADA]), (THERE, [wrong]), (HERE, [forwarded(THERE)])]
    for n, (peer, headers) in enumerate(cases):
        ask(with_users, peer, *headers, method="GET", path=f"/logged-{n}")
    said = [actors_said(with_users, f"/logged-{n}") for n in range(len(cases))]
    assert said == [[HERE], [THERE], ["unix"], ["ada"], [THERE], ["unknown"]]


def test_a_proxied_client_cannot_write_to_the_log(behind: Callable[[int], Service]) -> None:
    ask(behind(1), HERE, forwarded("ada POST '/' 200"), method="GET", path="/forged")
    assert actors_said(behind(1), "/forged") == ["unknown"]


def test_no_password_is_ever_logged(with_users: Service, users: Path) -> None:
    secrets = ["s3cr3t-right", "s3cr3t-wrong", "s3cr3t-nobodys", "s3cr3t-\0", "s3cr3t-unchecked", "s3cr3t-bearer"]
    write_users(users, ada="s3cr3t-right")
    asked = [basic(f"{'nobody' if 'nobody' in secret else 'ada'}:{secret}") for secret in secrets[:4]]
    asked += [basic("ada:s3cr3t-\udcff"), ("Authorization", "Bearer s3cr3t-bearer")]
    assert [ask(with_users, THERE, header).status_code for header in asked] == [200, 401, 401, 401, 401, 401]
    for line in ("ada:s3cr3t-plain:s3cr3t", "ada:s3cr3t-plain", "s3cr3t-plain"):
        users.write_text(line + "\n")
        assert ask(with_users, THERE, basic("ada:s3cr3t-unchecked")).status_code == 503
    output = with_users.output.read_text()
    assert "s3cr3t" not in output
    assert [header for _, header in asked if header.split()[1] in output] == []


# Settings

NO_NETWORK = "does not appear to be an IPv4 or IPv6 network"
NO_NETWORKS = {
    "127.0.0.1,localhost": f"'localhost' {NO_NETWORK}",
    10: f"'10' {NO_NETWORK}",
    "10.1.2.3/8": "10.1.2.3/8 has host bits set",
    "::ffff:192.0.2.1/120": "::ffff:c000:201/120 has host bits set",
    "127.0.0.1,0.0.0.0": "no peer matches 0.0.0.0",
    "224.0.0.0/4": "no peer matches 224.0.0.0/4",
    "ff02::1": "no peer matches ff02::1",
    "fe80::1%eth0": "no peer matches fe80::1%eth0",
}


@pytest.mark.parametrize(("setting", "reason"), NO_NETWORKS.items())
def test_trusted_hosts_are_networks_in_which_a_peer_can_be(url: str, setting: Any, reason: str) -> None:
    with pytest.raises(SettingError, match=rf"^REBIND_TRUSTED_HOSTS is not a list of networks: {re.escape(reason)}\Z"):
        client(url, TRUSTED_HOSTS=setting)


@pytest.mark.parametrize("setting", [100, "9" * 5000, "٣", "", -1, 1.5, True, "10.0.0.1"], ids=lambda it: ascii(it)[:9])
def test_proxies_are_a_number_up_to_99(url: str, setting: Any) -> None:
    said = f"REBIND_PROXIES must be a whole number from 0 to 99: {setting!r}"
    with pytest.raises(SettingError, match=rf"^{re.escape(said)}\Z"):
        client(url, PROXIES=setting)


GOOD = hashed(PASSWORD)
BAD_LINES = {
    "no colon": "nonsense",
    "no name": f":{GOOD}",
    "another field": f"ada:{GOOD}:Ada",
    "md5": "ada:$apr1$6yFYLLpK$ajXDNBQOYfjpvc9zMRIHt1",
    "a cost too low": f"ada:{GOOD.replace('$04$', '$03$')}",
    "a cost too high": f"ada:{GOOD.replace('$04$', '$32$')}",
    "an impossible salt": f"ada:{GOOD[:28]}a{GOOD[29:]}",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_htpasswd_would_not_write_is_refused(url: str, tmp_path: Path, line: str) -> None:
    file = tmp_path / "htpasswd"
    file.write_text(f"# the users\n{line}\n")
    said = f"the htpasswd file {file}, line 2: expected NAME:HASH, as htpasswd -B writes it"
    with pytest.raises(SettingError, match=rf"^{re.escape(said)}\Z"):
        client(url, HTPASSWD=str(file))


NO_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (Path.exists, "[Errno 2] No such file or directory: "),
    "a directory": (Path.mkdir, "it is not a regular file"),
    "a FIFO": (os.mkfifo, "it is not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/null"), "it is not a regular file"),
}


@pytest.mark.parametrize(("make", "reason"), NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_is_refused_and_later_holds_up_nobody(
    url: str, tmp_path: Path, make: Callable[[Path], Any], reason: str
) -> None:
    path = write_users(tmp_path / "htpasswd", ada=PASSWORD)
    asking = client(url, HTPASSWD=str(path))
    path.unlink()
    make(path)
    assert asking.get("/", headers=[ADA]).status_code == 503
    with pytest.raises(SettingError, match=f"^the htpasswd file {path} cannot be read: {re.escape(reason)}"):
        client(url, HTPASSWD=str(path))
