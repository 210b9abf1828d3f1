"""Tests of deploy/: the real nginx with its file before a gunicorn started as the service file starts it, and systemd.

Where nginx or systemd-analyze is missing, its tests are skipped; where CI is set, they fail.
"""

import grp
import os
import pwd
import re
import runpy
import select
import shlex
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import requests
from databases import logged, stored
from factories import message
from services import PATH, ROOT, From, Service, free_port, start_service, stop_service
from slow import MESSAGES, POLICY, slow_rebind
from waiting import until

from app import MAX_BODY
from queues import QueueRegistry

pytestmark = pytest.mark.slow  # each starts a program
DEPLOY = ROOT / "deploy"
SERVICE_FILE = DEPLOY / "rebind.service"
TRUSTED, UNTRUSTED = "127.0.0.2", "127.0.0.3"


def program(name: str) -> str:
    """The path of a program; without it, skip the test or, in CI, fail it."""
    found = shutil.which(name, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    if found is None and os.environ.get("CI"):
        pytest.fail(f"{name} is not installed")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def directives(name: str) -> list[str]:
    """The values of a directive of the service file, in order."""
    return re.findall(rf"^{name}=(.*)$", SERVICE_FILE.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SQLite alone: what stands before the service has nothing to do with what stands behind it."""
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'queues.db'}"


@dataclass
class Site:
    """nginx and the service behind it, and how to ask them from TRUSTED or from UNTRUSTED."""

    base: str
    certificate: Path
    service: Service
    upstream: Path
    """The unix socket between the two."""

    def request(self, method: str, path: str, peer: str = TRUSTED, **options: Any) -> requests.Response:
        """A request by `requests`, from an address of loopback."""
        with requests.Session() as session:
            session.mount("https://", From(peer))
            return session.request(method, self.base + path, verify=str(self.certificate), timeout=60, **options)

    def rebind(self, peer: str = TRUSTED, auth: Any = None, headers: Any = None, **body: Any) -> requests.Response:
        """POST a rebind with `body`; `reason` and `data` have defaults."""
        body = {"reason": "a test", "data": {}} | body
        return self.request("POST", PATH, peer, json=body, auth=auth, headers=headers)

    def send(self, request: str) -> requests.Response:
        """Send these characters, which need not be a request."""
        host, port = self.base.removeprefix("https://").split(":")
        context = ssl.create_default_context(cafile=self.certificate)
        plain = socket.create_connection((host, int(port)), 60)
        with context.wrap_socket(plain, server_hostname=host) as connection:
            connection.sendall(request.encode())
            answer = HTTPResponse(connection)
            answer.begin()
            response = requests.Response()
            response.status_code, response.raw = answer.status, answer
            response.headers.update(answer.getheaders())
            assert response.content
            return response


NGINX = """
daemon off;
user {user} {group};
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    # nginx's defaults, of 60 s, scaled down: they hold wherever the file sets nothing else.
    proxy_connect_timeout 1s;
    proxy_read_timeout 1s;
    proxy_send_timeout 1s;
    send_timeout 1s;
    keepalive_timeout 1s;
    include {folder}/site.conf;
    server {{  # as it is by default
        listen 127.0.0.1:{default_port};
        location / {{ proxy_pass http://127.0.0.1:{silent_port}; }}
    }}
}}
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1; its key lies beside it."""
    folder = tmp_path_factory.mktemp("tls")
    command = "req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -days 2 -subj /CN=rebind"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "privkey.pem", "-out", "fullchain.pem"]
    subprocess.run([program("openssl"), *command.split(), *names], cwd=folder, check=True, capture_output=True)
    return folder / "fullchain.pem"


@pytest.fixture(scope="module")
def silent_port() -> Iterator[int]:
    """A port where connections are taken, and never answered."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield int(silent.getsockname()[1])


@pytest.fixture(scope="module")
def default_port() -> int:
    """The port of an nginx with nothing but defaults, before the silent port."""
    return free_port()


def start_nginx(folder: Path, tls: Path, upstream: str, **ports: int) -> Service:
    """nginx with deploy/nginx.conf, before `upstream`, the configuration's line for it. Stop it with `stop_service`."""
    nginx, port = program("nginx"), free_port()
    site = (DEPLOY / "nginx.conf").read_text()
    for shipped, here in {
        "server unix:/run/rebind/rebind.sock;": upstream,
        "/etc/ssl/rebind": str(tls.parent),
        "listen 443": f"listen 127.0.0.1:{port}",
        "listen [::]:443 ssl so_keepalive=60s::;": "",  # not every host has IPv6
    }.items():
        assert shipped in site
        site = site.replace(shipped, here)
    (folder / "site.conf").write_text(site)
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, user=user, group=group, **ports))
    process = subprocess.Popen([nginx, "-p", folder, "-c", folder / "nginx.conf"])
    proxy = Service(f"http://127.0.0.1:{port}", process, folder / "nginx.log")
    until(proxy.listens_or_ended)
    return proxy


@pytest.fixture(scope="module")
def htpasswd(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An htpasswd file with the user ada, whose password is `secret`."""
    file = tmp_path_factory.mktemp("etc") / "htpasswd"
    file.write_text(f"ada:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    return str(file)


@pytest.fixture(scope="module")
def service(url: str, htpasswd: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A gunicorn with the arguments and settings of deploy/rebind.service."""
    folder = tmp_path_factory.mktemp("run")
    settings = dict(line.split("=", 1) for line in directives("Environment"))
    settings |= {
        "REBIND_DATABASE_URL": url,
        "REBIND_POLICY": POLICY,
        "REBIND_TRUSTED_HOSTS": TRUSTED,
        "REBIND_HTPASSWD": htpasswd,
    }
    (command,) = directives("ExecStart")
    arguments = shlex.split(command.replace("/run/rebind", str(folder)))[1:-1]
    service = start_service(folder, url, *arguments, **settings)
    until((folder / "rebind.sock").exists)
    yield service
    stop_service(service)


@pytest.fixture(scope="module")
def site(
    service: Service, certificate: Path, silent_port: int, default_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """That gunicorn behind nginx."""
    upstream = service.output.with_name("rebind.sock")
    folder = tmp_path_factory.mktemp("nginx")
    ports = {"default_port": default_port, "silent_port": silent_port}
    proxy = start_nginx(folder, certificate, f"server unix:{upstream};", **ports)
    yield Site(proxy.base.replace("http:", "https:"), certificate, service, upstream)
    stop_service(proxy)


def problem(response: requests.Response) -> tuple[int, str]:
    """The status and the detail of a problem document."""
    assert response.headers["Content-Type"] == "application/problem+json", response.text
    document = response.json()
    assert set(document) == {"type", "title", "status", "detail"}
    assert document["status"] == response.status_code
    return response.status_code, document["detail"]


@pytest.mark.parametrize(
    ("peer", "auth", "actor"),
    [
        pytest.param(TRUSTED, None, TRUSTED, id="trusted"),
        pytest.param(UNTRUSTED, None, None, id="untrusted"),
        pytest.param(UNTRUSTED, ("ada", "secret"), "ada", id="untrusted with credentials"),
        pytest.param(UNTRUSTED, ("ada", "guess"), None, id="untrusted with a wrong password"),
    ],
)
def test_who_may_ask_is_named_in_the_records(
    site: Site, queues: QueueRegistry, url: str, peer: str, auth: Any, actor: str | None
) -> None:
    queues.load([message()])
    answer = site.rebind(peer, auth=auth)
    assert answer.status_code == 200 if actor else problem(answer)[0] == 401
    assert [record["actor"] for record in logged(url)] == ([actor] if actor else [])


@pytest.mark.parametrize("spoofed", [TRUSTED, f"{UNTRUSTED}, {TRUSTED}", f"{TRUSTED}, {UNTRUSTED}", "127.0.0.1"])
@pytest.mark.parametrize("header", ["X-Forwarded-For", "x_forwarded_for"])
def test_nobody_is_what_they_say_that_they_are(
    site: Site, queues: QueueRegistry, url: str, header: str, spoofed: str
) -> None:
    queues.load([message()])
    assert problem(site.rebind(UNTRUSTED, headers={header: spoofed}))[0] == 401
    assert site.rebind(TRUSTED, headers={header: UNTRUSTED}).status_code == 200
    assert [record["actor"] for record in logged(url)] == [TRUSTED]


def test_only_the_service_and_its_group_may_open_the_socket(site: Site) -> None:
    """Who opens it can name any address as the peer's."""
    assert stat.filemode(site.upstream.stat().st_mode) == "srwxrwx---"


def test_a_body_of_1_mib_passes_nginx(site: Site, queues: QueueRegistry) -> None:
    body = b'{"reason": "a test", "data": {}}'.ljust(MAX_BODY)
    headers = {"Content-Type": "application/json"}
    assert site.request("POST", PATH, data=body, headers=headers).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_larger_body_is_refused_by_nginx_and_by_the_service(site: Site, queues: QueueRegistry, chunked: bool) -> None:
    body = b'{"reason": "a test", "data": {}}'.ljust(MAX_BODY + 1)
    headers = {"Content-Type": "application/json", "X-Forwarded-For": TRUSTED}
    for base in (site.base, site.service.base):
        data = iter([body]) if chunked else body
        response = requests.post(base + PATH, data, headers=headers, verify=str(site.certificate), timeout=60)
        assert problem(response)[0] == 413, base


@pytest.mark.parametrize(
    ("status", "path", "content_type", "auth"),
    [
        pytest.param(401, PATH, "application/json", ("ada", "guess"), id="a wrong password"),
        pytest.param(404, "/", "application/json", None, id="another path"),
        pytest.param(400, f"{PATH}?limit=0", "application/json", None, id="a bad query"),
        pytest.param(415, PATH, "text/plain", None, id="another content type"),
    ],
)
def test_a_refusal_passes_nginx_however_large_the_body_is_that_was_not_read(
    site: Site, status: int, path: str, content_type: str, auth: Any
) -> None:
    for size in range(100_000, 1_000_000, 100_000):
        answer = site.request("POST", path, data=bytes(size), headers={"Content-Type": content_type}, auth=auth)
        assert answer.status_code == status, size


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param("GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", 400, id="malformed"),
        pytest.param("nonsense\r\n\r\n", 400, id="no path"),
        pytest.param("GET /nginx-problem HTTP/1.1\r\nHost: a\r\n\r\n", 404, id="internal path"),
        pytest.param("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405, id="method"),
        pytest.param(f"GET /{'x' * 4096} HTTP/1.1\r\nHost: a\r\n\r\n", 414, id="line"),
        pytest.param(f"GET / HTTP/1.1\r\nHost: a\r\nX: {'x' * 4096}\r\n\r\n", 431, id="header"),
        pytest.param("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: x\r\n\r\n", 501, id="coding"),
        pytest.param("GET / HTTP/9.9\r\nHost: a\r\n\r\n", 505, id="version"),
    ],
)
def test_what_nginx_refuses_by_itself_is_a_problem_document(site: Site, request_: str, status: int) -> None:
    assert problem(site.send(request_))[0] == status


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        pytest.param("GET /", [f"X-{n}: a" for n in range(60)], 431, id="many headers"),
        pytest.param("GET /", ["X-Forwarded-Proto: https", "X-Forwarded-Ssl: off"], 400, id="http and https"),
        pytest.param("A /", [], 400, id="a method of one letter"),
    ],
)
def test_what_gunicorn_refuses_by_itself_is_a_problem_document(
    site: Site, line: str, headers: list[str], status: int
) -> None:
    request = "\r\n".join([f"{line} HTTP/1.1", "Host: a", *headers, "", ""])
    assert problem(site.send(request))[0] == status


def test_plain_http_is_refused(site: Site) -> None:
    assert problem(requests.get(site.base.replace("https:", "http:"), timeout=60))[0] == 400


def test_a_service_that_does_not_run_is_a_problem_document(site: Site) -> None:
    away = site.upstream.rename(site.upstream.with_suffix(".away"))
    try:
        status, detail = problem(site.rebind())
    finally:
        away.rename(site.upstream)
    assert (status, detail.partition(",")[0]) == (502, "the service does not run")


@pytest.fixture
def doubled(certificate: Path, silent_port: int, tmp_path: Path) -> Iterator[tuple[Site, list[socket.socket]]]:
    """nginx before two upstreams, and those."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        upstream = "".join(f"server 127.0.0.1:{server.getsockname()[1]};" for server in (one, other))
        proxy = start_nginx(tmp_path, certificate, upstream, default_port=free_port(), silent_port=silent_port)
        yield Site(proxy.base.replace("http:", "https:"), certificate, proxy, tmp_path), [one, other]
        stop_service(proxy)


def test_a_request_is_sent_once_even_when_its_upstream_ends(doubled: tuple[Site, list[socket.socket]]) -> None:
    site, upstreams = doubled
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(site.rebind)
        (ready, _, _) = select.select(upstreams, [], [], 60)
        connection, _ = ready[0].accept()
        assert connection.recv(4) == b"POST"
        connection.close()
        assert problem(answer.result())[0] == 502
    assert select.select(upstreams, [], [], 0)[0] == []


def test_a_rebind_may_take_longer_than_nginx_waits_by_default(
    site: Site, default_port: int, queues: QueueRegistry, url: str, tmp_path: Path
) -> None:
    """That time has passed when a request which came later, to an nginx with its defaults, has been given up."""
    with slow_rebind(site.rebind, queues, tmp_path) as slow:
        assert requests.get(f"http://127.0.0.1:{default_port}", timeout=60).status_code == 504
        assert slow.let_go().status_code == 200
    assert [row["queue"] for row in stored(url)] == ["b"] * MESSAGES


def test_the_sandbox_is_strict() -> None:
    """systemd's score is 3.0 or lower."""
    command = [
        program("systemd-analyze"),
        "security",
        "--offline=yes",
        "--threshold=30",
        "--no-pager",
        str(SERVICE_FILE),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_systemd_understands_the_service_file(tmp_path: Path) -> None:
    shipped = SERVICE_FILE.read_text()
    gunicorn = Path(sys.executable).with_name("gunicorn")
    here = shipped.replace("/opt/rebind/.venv/bin/gunicorn", str(gunicorn))
    assert here != shipped
    (tmp_path / "rebind.service").write_text(here)
    command = [program("systemd-analyze"), "verify", "--man=no", str(tmp_path / "rebind.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_gives_a_rebind_longer_than_gunicorn_does() -> None:
    (stop,) = directives("TimeoutStopSec")
    assert int(stop) > runpy.run_path(str(ROOT / "gunicorn.conf.py"))["graceful_timeout"]


def test_gunicorn_tells_systemd_that_it_has_started(url: str, tmp_path: Path) -> None:
    """As Type=notify asks for."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        service = start_service(tmp_path, url, "--workers", "1", NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert systemd.recv(100).startswith(b"READY=1")
        stop_service(service)


def test_the_service_writes_nothing_into_its_own_folder(url: str, tmp_path: Path) -> None:
    """The sandbox lets it read the code, and no more."""
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(file, tmp_path)
    before = set(tmp_path.iterdir())
    environment = os.environ | {"REBIND_DATABASE_URL": url, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", "import wsgi"], cwd=tmp_path, env=environment, check=True)
    assert set(tmp_path.iterdir()) == before
