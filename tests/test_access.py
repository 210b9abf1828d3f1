"""Tests of who may ask: peers, proxies and credentials, before a real gunicorn on TCP and on a unix socket.

All of 127.0.0.0/8 is this host's own, so that a client here can be two peers: HERE, which is trusted, and THERE.
"""

import http.client
import json
import shutil
import socket
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from conftest import PATH, Service, launch, logged, message, start_service, stop_service, stored, until

from access import AccessError
from app import create_app
from queues import QueueRegistry

HERE, THERE = "127.0.0.1", "127.0.0.2"
BODY = json.dumps({"reason": "a test", "data": {"queue": "elsewhere"}})
PASSWORD = "correct horse"


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


class UnixConnection(http.client.HTTPConnection):
    """To the unix socket that every gunicorn of these tests listens at, too."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self.path))


def ask(
    service: Service,
    peer: str = HERE,
    *headers: tuple[str, str],
    method: str = "POST",
    path: str = PATH,
    body: str = BODY,
) -> Answer:
    """A request from `peer`: an address, or "unix"; a rebind unless it is said otherwise."""
    connection = (
        UnixConnection(service.output.with_name("socket"))
        if peer == "unix"
        else http.client.HTTPConnection(*service.address, timeout=60, source_address=(peer, 0))
    )
    connection.putrequest(method, path)
    for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers):
        connection.putheader(name, value)
    connection.endheaders(body.encode())
    response = connection.getresponse()
    answer = Answer(response.status, response.headers, response.read())
    connection.close()
    return answer


def basic(credentials: str | bytes) -> tuple[str, str]:
    """The header that carries `name:password`."""
    given = credentials.encode() if isinstance(credentials, str) else credentials
    return "Authorization", f"Basic {b64encode(given).decode()}"


ADA = basic(f"ada:{PASSWORD}")


def forwarded(addresses: str) -> tuple[str, str]:
    return "X-Forwarded-For", addresses


def write_users(path: Path, /, **passwords: str) -> Path:
    """An htpasswd file with these users, which takes the place of what was there at once."""
    new = path.with_name("new")
    new.write_text("".join(f"{user}:{hashed(password)}\n" for user, password in passwords.items()))
    return new.replace(path)


def hashed(password: str, cost: int = 4) -> str:
    """A hash as Apache's htpasswd writes it."""
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost)).decode().replace("$2b$", "$2y$")


def is_problem(answer: Answer, status: int, detail: str) -> bool:
    """Assert that the answer is this problem document (RFC 9457), and nothing else."""
    problem = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    assert (answer.status, answer.headers["Content-Type"], json.loads(answer.body)) == (
        status,
        "application/problem+json",
        problem,
    )
    return True


def is_unauthorized(answer: Answer) -> bool:
    assert answer.headers.get_all("WWW-Authenticate") == ['Basic realm="rebind", charset="UTF-8"']
    return is_problem(answer, 401, "only a trusted host, or who gives valid credentials, may ask")


def is_forbidden(answer: Answer) -> bool:
    assert "WWW-Authenticate" not in answer.headers
    return is_problem(answer, 403, "only a trusted host may ask")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SQLite alone: who may ask is decided before the database is."""
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'queues.db'}"


Start = Callable[..., Service]


@pytest.fixture(scope="module")
def start(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Give the gunicorn with these settings, on TCP and on a unix socket; one for all tests that ask for the same."""
    running: dict[tuple[tuple[str, str], ...], Service] = {}

    def service(**settings: str) -> Service:
        key = tuple(settings.items())
        if key not in running:
            folder = tmp_path_factory.mktemp("gunicorn")
            running[key] = start_service(folder, url, "--bind", f"unix:{folder / 'socket'}", **settings)
            until((folder / "socket").exists)
        return running[key]

    yield service
    for each in running.values():
        stop_service(each)


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An htpasswd file in which ada is."""
    return write_users(tmp_path_factory.mktemp("users") / "htpasswd", ada=PASSWORD)


@pytest.fixture
def without_users(start: Start, queues: QueueRegistry) -> Service:
    """A service that trusts HERE, and nobody else."""
    queues.load([message()])
    return start(REBIND_TRUSTED_HOSTS=HERE)


@pytest.fixture
def with_users(start: Start, users: Path, queues: QueueRegistry) -> Service:
    """A service that trusts HERE, and ada."""
    queues.load([message()])
    return start(REBIND_TRUSTED_HOSTS=HERE, REBIND_HTPASSWD=str(users))


def actors(url: str) -> list[str]:
    """Who is in the records."""
    return [record["actor"] for record in logged(url)]


def log_lines(service: Service, request: str) -> list[str]:
    """Who asked for this, and what came of it, in the diagnostic log."""
    lines = [line for line in service.output.read_text().splitlines() if f" {request}" in line and '"' not in line]
    return [line.split(" INFO in app: ")[-1].split(": ")[-1].split(request)[0].strip() for line in lines]


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


def test_head_is_guarded(with_users: Service, without_users: Service) -> None:
    assert ask(with_users, THERE, method="HEAD", path="/elsewhere", body="").status == 401
    assert ask(without_users, THERE, method="HEAD", path="/elsewhere", body="").status == 403


@pytest.mark.parametrize("headers", [[], [ADA]], ids=["by address", "by credentials"])
def test_who_may_ask_learns_what_is_wrong_with_the_request(with_users: Service, headers: list[tuple[str, str]]) -> None:
    peer = THERE if headers else HERE
    statuses = [
        ask(with_users, peer, *headers, method="GET", path="/elsewhere").status,
        ask(with_users, peer, *headers, method="GET").status,
        ask(with_users, peer, *headers, body="{").status,
    ]
    assert statuses == [404, 405, 400]


def test_the_host_header_may_name_any_host(without_users: Service) -> None:
    """TRUSTED_HOSTS is a setting of Flask's, too, for what this header may be."""
    with socket.create_connection(without_users.address) as connection:
        connection.sendall(b"GET /elsewhere HTTP/1.1\r\nHost: rebind.example\r\nConnection: close\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 404 ")


# Trusted hosts


def test_loopback_is_trusted_by_default_and_is_the_actor(start: Start, queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    assert [ask(start(), peer).status for peer in (HERE, THERE, "unix")] == [200, 200, 200]
    assert actors(url) == [HERE, THERE, "unix"]


def test_a_unix_socket_is_trusted_where_loopback_is(without_users: Service, start: Start) -> None:
    assert ask(without_users, "unix").status == 200
    assert is_forbidden(ask(start(REBIND_TRUSTED_HOSTS="192.0.2.0/24,127.0.0.2"), "unix"))


def test_where_nobody_is_trusted_nobody_may_ask(start: Start) -> None:
    nobody = start(REBIND_TRUSTED_HOSTS="")
    assert all(is_forbidden(ask(nobody, peer)) for peer in (HERE, "unix"))


def test_without_an_htpasswd_file_credentials_count_for_nothing(without_users: Service, url: str) -> None:
    assert is_forbidden(ask(without_users, THERE, ADA))
    assert ask(without_users, HERE, ADA).status == 200
    assert actors(url) == [HERE]


# Each: how many proxies there are, the X-Forwarded-For headers, and the peer that a request from HERE or by the unix
# socket comes from; None where it is not trusted, which it is from 127.0.0.0/8 and ::1.
FORWARDED = {
    "no proxy": (0, ["127.0.0.1"], None),
    "no proxy, nothing named": (0, [""], None),
    "no proxy, no header": (0, [], HERE),
    "one proxy": (1, ["127.0.0.9"], "127.0.0.9"),
    "one proxy, IPv6": (1, ["::1"], "::1"),
    "one proxy, IPv4 in IPv6": (1, ["::ffff:127.0.0.9"], "127.0.0.9"),
    "one proxy, no header": (1, [], HERE),
    "one proxy, nothing named": (1, [""], None),
    "one proxy, no address": (1, ["localhost"], None),
    "one proxy, an outsider": (1, ["192.0.2.1"], None),
    "one proxy, an outsider who spoofs": (1, ["127.0.0.1, 192.0.2.1"], None),
    "one proxy, an outsider who spoofs in a header more": (1, ["127.0.0.1", "192.0.2.1"], None),
    "one proxy, an outsider who quotes": (1, ['"127.0.0.1, 192.0.2.1'], None),
    "one proxy, a trusted host who spoofs": (1, ["192.0.2.1, 127.0.0.9"], "127.0.0.9"),
    "two proxies": (2, ["127.0.0.9, 192.0.2.1"], "127.0.0.9"),
    "two proxies, two headers": (2, ["127.0.0.9", "192.0.2.1"], "127.0.0.9"),
    "two proxies, one passed": (2, ["127.0.0.9"], None),
    "two proxies, an outsider who spoofs": (2, ["127.0.0.1, 192.0.2.1, 127.0.0.9"], None),
    "two proxies, an outsider who quotes": (2, ['127.0.0.1, "a, 192.0.2.1, 127.0.0.9'], None),
    "two proxies, an outsider who names nobody": (2, ["127.0.0.1,, 192.0.2.1, 127.0.0.9"], None),
}


@pytest.mark.parametrize(("proxies", "headers", "peer"), FORWARDED.values(), ids=FORWARDED)
@pytest.mark.parametrize("connection", [HERE, "unix"])
def test_only_as_many_proxies_are_believed_as_are_configured(
    start: Start, queues: QueueRegistry, url: str, connection: str, proxies: int, headers: list[str], peer: str | None
) -> None:
    queues.load([message()])
    answer = ask(start(REBIND_PROXIES=str(proxies)), connection, *map(forwarded, headers))
    if peer is None:
        assert is_forbidden(answer)
        assert actors(url) == []
    else:
        assert answer.status == 200
        assert actors(url) == [connection if not headers else peer]


def test_behind_a_proxy_credentials_may_come_from_anywhere(
    start: Start, users: Path, queues: QueueRegistry, url: str
) -> None:
    queues.load([message()])
    service = start(REBIND_PROXIES="1", REBIND_HTPASSWD=str(users))
    assert is_unauthorized(ask(service, "unix", forwarded("192.0.2.1")))
    assert ask(service, "unix", forwarded("192.0.2.1"), ADA).status == 200
    assert actors(url) == ["ada"]


NETWORKS = {
    "an address": ("192.0.2.1", "192.0.2.1", 404),
    "another address": ("192.0.2.1", "192.0.2.2", 403),
    "a network": ("192.0.2.0/28", "192.0.2.15", 404),
    "outside of a network": ("192.0.2.0/28", "192.0.2.16", 403),
    "one of several": ("192.0.2.1, 198.51.100.0/24 ,2001:db8::/32", "198.51.100.7", 404),
    "IPv6": ("192.0.2.1,2001:db8::/32", "2001:db8::1", 404),
    "another IPv6": ("2001:db8::/32", "2001:db9::1", 403),
    "IPv4 in IPv6": ("192.0.2.0/28", "::ffff:192.0.2.1", 404),
    "not IPv4 in IPv6": ("192.0.2.0/28", "::192.0.2.1", 403),
    "everybody by IPv4": ("0.0.0.0/0", "2001:db8::1", 403),
    "a link": ("fe80::/10", "fe80::1%eth0", 404),
    "no address": ("0.0.0.0/0,::/0", "somewhere", 403),
}


@pytest.mark.parametrize(("trusted", "peer", "status"), NETWORKS.values(), ids=NETWORKS)
def test_a_host_in_a_trusted_network_may_ask(url: str, trusted: str, peer: str, status: int) -> None:
    client = create_app({"DATABASE_URL": url, "TRUSTED_HOSTS": trusted}).test_client()
    assert client.get("/elsewhere", environ_overrides={"REMOTE_ADDR": peer}).status_code == status


# Credentials


@pytest.mark.parametrize("peer", [HERE, THERE, "unix"])
def test_a_user_may_ask_from_anywhere_and_is_the_actor(with_users: Service, url: str, peer: str) -> None:
    assert ask(with_users, peer, ADA).status == 200
    assert actors(url) == ["ada"]


WRONG = {
    "a wrong password": basic("ada:wrong"),
    "no password": basic("ada:"),
    "no colon": basic("ada"),
    "a password with more after it": basic(f"ada:{PASSWORD}\n"),
    "a password with a NUL after it": basic(f"ada:{PASSWORD}\0"),
    "a long password": basic("ada:" + "x" * 2000),
    "an unknown user": basic(f"bob:{PASSWORD}"),
    "another case": basic(f"Ada:{PASSWORD}"),
    "no user": basic(f":{PASSWORD}"),
    "a user that no file can have": basic(f"a\nd\0a\t:{PASSWORD}"),
    "a long user": basic("x" * 2000 + f":{PASSWORD}"),
    "nothing": basic(""),
    "not UTF-8": basic(b"ada:\xff"),
    "not base64": ("Authorization", "Basic !"),
    "not even that": ("Authorization", "Basic"),
    "an empty header": ("Authorization", ""),
    "another scheme": ("Authorization", f"Bearer {PASSWORD}"),
    "parameters": ("Authorization", f'Digest username="ada", password="{PASSWORD}"'),
    "parameters of the scheme": ("Authorization", f'Basic username="ada", password="{PASSWORD}"'),
}


@pytest.mark.parametrize("header", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("peer", [HERE, THERE])
def test_wrong_credentials_are_refused_even_from_a_trusted_host(
    with_users: Service, url: str, peer: str, header: tuple[str, str]
) -> None:
    assert is_unauthorized(ask(with_users, peer, header))
    assert is_unauthorized(ask(with_users, peer, header, method="GET", path="/elsewhere"))
    assert logged(url) == []


def test_credentials_given_twice_are_refused(with_users: Service) -> None:
    assert is_unauthorized(ask(with_users, HERE, ADA, ADA))


PASSWORDS = {
    "a colon": "a:b::",
    "UTF-8": "pässwörd ключ",
    "72 bytes": "x" * 72,
    "more than bcrypt reads": "ключ" * 20,
}


@pytest.mark.skipif(not shutil.which("htpasswd"), reason="Apache's htpasswd is not installed")
@pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS)
def test_a_file_that_htpasswd_made_is_understood(url: str, tmp_path: Path, password: str) -> None:
    file = tmp_path / "htpasswd"
    for user in ("ada", "жук"):
        create = "" if file.exists() else "c"
        subprocess.run(["htpasswd", f"-{create}bB", str(file), user, password], check=True, capture_output=True)
    client = create_app({"DATABASE_URL": url, "HTPASSWD": str(file)}).test_client()
    given = [("ada", password), ("жук", password), ("ada", f"?{password}"), ("ada", password[:10] + "?")]
    expected = [404, 404, 401, 401]
    assert [client.get("/", headers=[basic(f"{user}:{secret}")]).status_code for user, secret in given] == expected


def test_comments_and_blank_lines_of_the_file_are_passed_over(url: str, tmp_path: Path) -> None:
    file = tmp_path / "htpasswd"
    file.write_text(f"# the users\n\nada:{hashed(PASSWORD)}\r\n  \n#bob:nothing")
    client = create_app({"DATABASE_URL": url, "HTPASSWD": str(file)}).test_client()
    assert client.get("/", headers=[ADA]).status_code == 404


@pytest.fixture
def changing(start: Start, tmp_path_factory: pytest.TempPathFactory, queues: QueueRegistry) -> tuple[Service, Path]:
    """A service that trusts HERE and ada, and its own htpasswd file."""
    file = tmp_path_factory.getbasetemp() / "changing"
    write_users(file, ada=PASSWORD)
    return start(REBIND_TRUSTED_HOSTS=HERE, REBIND_HTPASSWD=str(file)), file


def statuses(service: Service, *headers: tuple[str, str], peer: str = THERE) -> set[int]:
    """What comes of a request, often enough for each worker to have answered one."""
    return {ask(service, peer, *headers).status for _ in range(12)}


def test_a_change_of_the_file_counts_at_once(changing: tuple[Service, Path]) -> None:
    service, file = changing
    bob = basic("bob:new")
    assert (statuses(service, ADA), statuses(service, bob)) == ({200}, {401})
    write_users(file, ada=PASSWORD, bob="new")
    assert (statuses(service, ADA), statuses(service, bob)) == ({200}, {200})
    write_users(file, ada="changed", bob="new")
    assert (statuses(service, ADA), statuses(service, bob)) == ({401}, {200})
    write_users(file)
    assert (statuses(service, ADA), statuses(service, bob)) == ({401}, {401})


@pytest.mark.parametrize("content", [None, b"nonsense\n", b"ada:correct horse\n", b"\xff:x\n"])
def test_while_the_file_cannot_be_read_no_credentials_are_enough(
    changing: tuple[Service, Path], content: bytes | None
) -> None:
    service, file = changing
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    answer = ask(service, THERE, ADA)
    assert is_problem(answer, 503, "credentials cannot be checked now")
    assert answer.headers["Retry-After"] == "5"
    assert statuses(service, ADA, peer=HERE) == statuses(service, basic("bob:x")) == {503}
    assert (statuses(service), statuses(service, peer=HERE)) == ({401}, {200})
    assert f"the htpasswd file {file} " in service.output.read_text()
    write_users(file, ada=PASSWORD)
    assert statuses(service, ADA) == {200}


def test_a_user_who_stays_may_ask_while_others_come_and_go(changing: tuple[Service, Path]) -> None:
    service, file = changing

    def status(_: int) -> int:
        return ask(service, THERE, ADA, method="GET").status

    with ThreadPoolExecutor(8) as threads:
        answers = threads.map(status, range(100))
        for n in range(50):
            write_users(file, **{f"user{n}": "x"}, ada=PASSWORD)
        assert set(answers) == {405}


@pytest.mark.parametrize(
    ("credentials", "work"),
    [("cheap:wrong", 64), ("costly:wrong", 64), ("nobody:wrong", 64), (":", 64), ("nobody:\0", 64)],
)
def test_each_wrong_answer_costs_the_same_work(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credentials: str, work: int
) -> None:
    """Time is not measured: what takes it is the 2^cost rounds of each hash that a password is checked against."""
    file = tmp_path / "htpasswd"
    file.write_text(f"cheap:{hashed(PASSWORD)}\ncostly:{hashed(PASSWORD, 6)}\n")
    assert rounds(url, file, credentials, monkeypatch) == work


def test_a_file_without_users_costs_what_one_of_htpasswd_does(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rounds(url, write_users(tmp_path / "htpasswd"), "nobody:wrong", monkeypatch) == 32


def test_nobody_is_let_in_by_the_hash_that_stands_for_no_user(
    url: str, users: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("access.nobodys_hash", lambda cost: hashed("guessed", cost).encode())
    client = create_app({"DATABASE_URL": url, "HTPASSWD": str(users)}).test_client()
    assert client.get("/", headers=[basic("nobody:guessed")]).status_code == 401


def rounds(url: str, file: Path, credentials: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """How much work it was to refuse these credentials."""
    work = []
    checkpw = bcrypt.checkpw

    def counted(password: bytes, against: bytes) -> bool:
        work.append(2 ** int(against.split(b"$")[2]))
        return checkpw(password, against)

    monkeypatch.setattr(bcrypt, "checkpw", counted)
    client = create_app({"DATABASE_URL": url, "HTPASSWD": str(file)}).test_client()
    assert client.get("/", headers=[basic(credentials)]).status_code == 401
    return sum(work)


# The diagnostic log


def test_who_asked_is_in_the_one_line_of_each_request(with_users: Service) -> None:
    for n, (peer, headers) in enumerate(
        [(HERE, []), (THERE, []), ("unix", []), (THERE, [ADA]), (THERE, [basic("ada:wrong")]), (HERE, [forwarded("x")])]
    ):
        ask(with_users, peer, *headers, method="GET", path=f"/logged-{n}")
    said = [log_lines(with_users, f"GET '/logged-{n}") for n in range(6)]
    assert said == [[HERE], [THERE], ["unix"], ["ada"], [THERE], [HERE]]


def test_a_proxied_client_cannot_write_to_the_log(start: Start) -> None:
    service = start(REBIND_PROXIES="1")
    ask(service, HERE, forwarded("ada POST '/' 200"), method="GET", path="/forged")
    assert log_lines(service, "GET '/forged") == ["unknown"]


def test_no_password_is_ever_logged(changing: tuple[Service, Path]) -> None:
    service, file = changing
    secrets = ["s3cr3t-right", "s3cr3t-wrong", "s3cr3t-nobodys", "s3cr3t-\0", "s3cr3t-unchecked", "s3cr3t-bearer"]
    write_users(file, ada="s3cr3t-right")
    asked = [basic(f"{'nobody' if 'nobody' in secret else 'ada'}:{secret}") for secret in secrets[:4]]
    asked += [basic(b"ada:s3cr3t-\xff"), ("Authorization", "Bearer s3cr3t-bearer")]
    assert [ask(service, THERE, header).status for header in asked] == [200, 401, 401, 401, 401, 401]
    file.write_text("ada:s3cr3t-plain:s3cr3t\n")
    assert ask(service, THERE, basic("ada:s3cr3t-unchecked")).status == 503
    file.write_text("ada:s3cr3t-plain\n")
    assert ask(service, THERE, basic("ada:s3cr3t-unchecked")).status == 503
    output = service.output.read_text()
    assert "s3cr3t" not in output
    assert [header for _, header in asked if header.split()[1] in output] == []


# Starting

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a host name": (
        {"TRUSTED_HOSTS": "127.0.0.1,localhost"},
        "REBIND_TRUSTED_HOSTS is no list of networks: 'localhost' does not appear to be an IPv4 or IPv6 network",
    ),
    "host bits": (
        {"TRUSTED_HOSTS": "10.1.2.3/8"},
        "REBIND_TRUSTED_HOSTS is no list of networks: 10.1.2.3/8 has host bits set",
    ),
    "a number that is an address": (
        {"TRUSTED_HOSTS": 10},
        "REBIND_TRUSTED_HOSTS is no list of networks: '10' does not appear to be an IPv4 or IPv6 network",
    ),
    "less than no proxy": ({"PROXIES": -1}, "REBIND_PROXIES is not how many proxies there are: -1"),
    "half a proxy": ({"PROXIES": 1.5}, "REBIND_PROXIES is not how many proxies there are: 1.5"),
    "true": ({"PROXIES": True}, "REBIND_PROXIES is not how many proxies there are: True"),
    "an address of a proxy": ({"PROXIES": "10.0.0.1"}, "REBIND_PROXIES is not how many proxies there are: '10.0.0.1'"),
}


@pytest.mark.parametrize(("settings", "reason"), SETTINGS.values(), ids=SETTINGS)
def test_a_bad_setting_is_refused(url: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(AccessError) as refused:
        create_app({"DATABASE_URL": url} | settings)
    assert str(refused.value) == reason


GOOD = "a" * 22 + "b" * 31
FILES = {
    "missing": (None, "cannot be read: [Errno 2] No such file or directory: '{file}'"),
    "not an htpasswd file": ("nonsense\n", "cannot be read: malformed htpasswd file (error reading line 1)"),
    "a plain password": ("ada:secret\n", "has no bcrypt hash (htpasswd -B) for the user 'ada'"),
    "no password": ("ada:\n", "has no bcrypt hash (htpasswd -B) for the user 'ada'"),
    "md5": ("ada:$apr1$6yFYLLpK$ajXDNBQOYfjpvc9zMRIHt1\n", "has no bcrypt hash (htpasswd -B) for the user 'ada'"),
    "cut off": (f"ada:$2y$05${GOOD[:-1]}\n", "has no bcrypt hash (htpasswd -B) for the user 'ada'"),
    "a cost too low": (f"ada:$2y$03${GOOD}\n", "has no bcrypt hash (htpasswd -B) for the user 'ada'"),
    "a cost too high": (f"ada:$2y$32${GOOD}\n", "has no bcrypt hash (htpasswd -B) for the user 'ada'"),
    "a salt that is none": (f"ada:$2y$05${GOOD}\n", "has no bcrypt hash (htpasswd -B) for the user 'ada'"),
}


@pytest.mark.parametrize(("content", "reason"), FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_used_stops_the_start(url: str, tmp_path: Path, content: str | None, reason: str) -> None:
    file = tmp_path / "htpasswd"
    if content is not None:
        file.write_text(content)
    with pytest.raises(AccessError) as refused:
        create_app({"DATABASE_URL": url, "HTPASSWD": str(file)})
    assert str(refused.value) == f"the htpasswd file {file} " + reason.format(file=file)


def test_a_setting_that_cannot_be_used_stops_gunicorn(url: str, tmp_path: Path) -> None:
    service = launch(tmp_path, url, REBIND_PROXIES="many")
    until(lambda: service.process.poll() is not None)
    output = {line for line in service.output.read_text().splitlines() if not line.startswith("[")}
    assert output == {"rebind cannot start: REBIND_PROXIES is not how many proxies there are: 'many'"}
    assert service.process.returncode != 0
