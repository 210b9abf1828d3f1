"""Tests of deploy/: nginx with its file before a gunicorn started as the service file starts it, systemd, the command.

Where nginx or systemd-analyze is missing, its tests are skipped; where CI is set, they fail.
"""

import grp
import json
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
from contextlib import contextmanager
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import requests
from answers import Answer, is_problem
from databases import logged, nothing_changes, stored
from factories import message
from services import PATH, ROOT, From, Service, free_port, installed, start_service, stop_service
from slow import MESSAGES, POLICY, slow_rebind
from terminal import without_store
from waiting import until

from app import MAX_BODY
from queues import QueueRegistry

pytestmark = pytest.mark.slow  # each starts a program
DEPLOY = ROOT / "deploy"
SERVICE_FILE = DEPLOY / "rebind.service"
TRUSTED, UNTRUSTED = "127.0.0.2", "127.0.0.3"


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

    proxy: Service
    certificate: Path
    by_default: str
    """The URL of a server of the same nginx that has nothing but defaults."""

    @property
    def base(self) -> str:
        return self.proxy.base.replace("http:", "https:")

    def request(self, method: str, path: str, peer: str = TRUSTED, **options: Any) -> requests.Response:
        """A request by `requests`, from an address of loopback."""
        with requests.Session() as session:
            session.mount("https://", From(peer))
            return session.request(method, self.base + path, verify=str(self.certificate), timeout=60, **options)

    def rebind(self, peer: str = TRUSTED, auth: Any = None, headers: Any = None, **body: Any) -> requests.Response:
        """POST a rebind with `body`; `reason` and `data` have defaults."""
        body = {"reason": "a test", "data": {}} | body
        return self.request("POST", PATH, peer, json=body, auth=auth, headers=headers)

    def send(self, request: str) -> Answer:
        """Send these characters, which need not be a request."""
        context = ssl.create_default_context(cafile=self.certificate)
        plain = socket.create_connection(self.proxy.address, 60)
        with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            connection.sendall(request.encode())
            return Answer.read(connection)


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
        location / {{
            proxy_pass http://rebind;
            proxy_set_header X-Forwarded-For {trusted};
        }}
    }}
}}
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1; its key lies beside it."""
    folder = tmp_path_factory.mktemp("tls")
    command = "req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -days 2 -subj /CN=rebind"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "privkey.pem", "-out", "fullchain.pem"]
    subprocess.run([installed("openssl"), *command.split(), *names], cwd=folder, check=True, capture_output=True)
    return folder / "fullchain.pem"


@contextmanager
def nginx_before(upstream: str, certificate: Path, folder: Path) -> Iterator[Site]:
    """nginx with deploy/nginx.conf, before `upstream`, the configuration's line for it."""
    nginx, port, default_port = installed("nginx"), free_port(), free_port()
    site = (DEPLOY / "nginx.conf").read_text()
    for shipped, ours in {
        "server unix:/run/rebind/rebind.sock;": upstream,
        "/etc/ssl/rebind": str(certificate.parent),
        "listen 443": f"listen 127.0.0.1:{port}",
        "listen [::]:443 ssl so_keepalive=60s::;": "",  # not every host has IPv6
    }.items():
        assert shipped in site
        site = site.replace(shipped, ours)
    (folder / "site.conf").write_text(site)
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    here = {"folder": folder, "user": user, "group": group, "default_port": default_port, "trusted": TRUSTED}
    (folder / "nginx.conf").write_text(NGINX.format(**here))
    process = subprocess.Popen([nginx, "-p", folder, "-c", folder / "nginx.conf"])
    proxy = Service(f"http://127.0.0.1:{port}", process, folder / "nginx.log")
    try:
        until(proxy.listens_or_ended)
        yield Site(proxy, certificate, f"http://127.0.0.1:{default_port}{PATH}")
    finally:
        stop_service(proxy)


@pytest.fixture(scope="module")
def socket_of_service(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a gunicorn with the arguments and settings of deploy/rebind.service, and with a user.

    This is ada, whose password is `secret`.
    """
    folder = tmp_path_factory.mktemp("run")
    htpasswd = folder / "htpasswd"
    htpasswd.write_text(f"ada:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    settings = dict(line.split("=", 1) for line in directives("Environment"))
    settings |= {"REBIND_DATABASE_URL": url, "REBIND_POLICY": POLICY}
    settings |= {"REBIND_TRUSTED_HOSTS": TRUSTED, "REBIND_HTPASSWD": str(htpasswd)}
    (command,) = directives("ExecStart")
    arguments = shlex.split(command.replace("/run/rebind", str(folder)))[1:-1]
    service = start_service(folder, url, *arguments, **settings)
    until((folder / "rebind.sock").exists)
    yield folder / "rebind.sock"
    stop_service(service)


@pytest.fixture(scope="module")
def site(socket_of_service: Path, certificate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """That gunicorn behind nginx."""
    with nginx_before(f"server unix:{socket_of_service};", certificate, tmp_path_factory.mktemp("nginx")) as site:
        yield site


def problem(response: requests.Response | Answer) -> tuple[int, str]:
    """The status and the detail of a problem document."""
    assert is_problem(response, response.status_code, re.compile(".+"))
    return response.status_code, response.json()["detail"]


@pytest.mark.parametrize(
    ("peer", "auth", "actor"),
    [(TRUSTED, None, TRUSTED), (UNTRUSTED, None, None), (UNTRUSTED, ("ada", "secret"), "ada")],
    ids=["trusted", "untrusted", "untrusted with credentials"],
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


def test_a_load_balancer_asks_for_the_health_of_the_service(site: Site, url: str) -> None:
    with nothing_changes(url):
        answers = [site.request(method, f"/health{query}") for method in ("GET", "HEAD") for query in ("", "?limit=x")]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert answers[0].json() == {"moves": [], "more": 0}
        assert problem(site.request("GET", "/health", UNTRUSTED))[0] == 401


def test_only_the_service_and_its_group_may_open_the_socket(socket_of_service: Path) -> None:
    """Who opens it can name any address as the peer's."""
    assert stat.filemode(socket_of_service.stat().st_mode) == "srwxrwx---"


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
def test_a_body_of_1_mib_passes_nginx_and_a_larger_one_does_not(
    site: Site, queues: QueueRegistry, chunked: bool
) -> None:
    for size, status in ((MAX_BODY, 200), (MAX_BODY + 1, 413)):
        body = b'{"reason": "a test", "data": {}}'.ljust(size)
        data = iter([body]) if chunked else body
        assert site.request("POST", PATH, data=data, headers={"Content-Type": "application/json"}).status_code == status


@pytest.mark.parametrize(("status", "auth"), [(401, ("ada", "guess")), (415, None)])
def test_a_refusal_passes_nginx_however_large_the_body_is_that_was_not_read(site: Site, status: int, auth: Any) -> None:
    for size in range(100_000, 1_000_000, 100_000):
        assert site.request("POST", PATH, data=bytes(size), auth=auth).status_code == status, size


BY_NGINX = {
    "malformed": ("GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "no path": ("nonsense\r\n\r\n", 400),
    "internal path": ("GET /nginx-problem HTTP/1.1\r\nHost: a\r\n\r\n", 404),
    "method": ("TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    "line": (f"GET /{'x' * 4096} HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    "header": (f"GET / HTTP/1.1\r\nHost: a\r\nX: {'x' * 4096}\r\n\r\n", 431),
    "coding": ("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: x\r\n\r\n", 501),
    "version": ("GET / HTTP/9.9\r\nHost: a\r\n\r\n", 505),
}


@pytest.mark.parametrize(("request_", "status"), BY_NGINX.values(), ids=BY_NGINX)
def test_what_nginx_refuses_by_itself_is_a_problem_document(site: Site, request_: str, status: int) -> None:
    assert problem(site.send(request_))[0] == status


def test_plain_http_is_refused(site: Site) -> None:
    assert problem(requests.get(site.base.replace("https:", "http:"), timeout=60))[0] == 400


def test_a_service_that_does_not_run_is_a_problem_document(certificate: Path, tmp_path: Path) -> None:
    with nginx_before(f"server unix:{tmp_path}/nobody;", certificate, tmp_path) as site:
        status, detail = problem(site.rebind())
    assert (status, detail.partition(",")[0]) == (502, "the service does not run")


def test_a_request_is_sent_once_even_when_its_upstream_ends(certificate: Path, tmp_path: Path) -> None:
    upstreams = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    servers = "".join(f"server 127.0.0.1:{each.getsockname()[1]};" for each in upstreams)
    with nginx_before(servers, certificate, tmp_path) as site, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(site.rebind)
        (ready, _, _) = select.select(upstreams, [], [], 60)
        connection, _ = ready[0].accept()
        assert connection.recv(4) == b"POST"
        connection.close()
        assert problem(answer.result())[0] == 502
    assert select.select(upstreams, [], [], 0)[0] == []


def test_a_rebind_may_take_longer_than_nginx_waits_by_default(
    site: Site, queues: QueueRegistry, url: str, tmp_path: Path
) -> None:
    """That time has passed when one which came later, by an nginx with its defaults, has been given up."""
    with slow_rebind(site.rebind, queues, tmp_path) as slow:
        assert requests.post(site.by_default, json={"reason": "a test", "data": {}}, timeout=60).status_code == 504
        assert slow.let_go().status_code == 200
    assert [row["queue"] for row in stored(url)] == ["b"] * MESSAGES


def test_the_sandbox_is_strict() -> None:
    """systemd's score is 3.0 or lower."""
    command = "security --offline=yes --threshold=30 --no-pager"
    done = subprocess.run(
        [installed("systemd-analyze"), *command.split(), str(SERVICE_FILE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_systemd_understands_the_service_file(tmp_path: Path) -> None:
    shipped = SERVICE_FILE.read_text()
    gunicorn = Path(sys.executable).with_name("gunicorn")
    here = shipped.replace("/opt/rebind/.venv/bin/gunicorn", str(gunicorn))
    assert here != shipped
    (tmp_path / "rebind.service").write_text(here)
    command = [installed("systemd-analyze"), "verify", "--man=no", str(tmp_path / "rebind.service")]
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
        assert service.rebind().ok  # a worker that is told to stop before it has begun is waited for
        stop_service(service)


def test_the_service_writes_nothing_into_its_own_folder(url: str, tmp_path: Path) -> None:
    """The sandbox lets it read the code, and no more."""
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(file, tmp_path)
    before = set(tmp_path.iterdir())
    environment = os.environ | {"REBIND_DATABASE_URL": url, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", "import wsgi"], cwd=tmp_path, env=environment, check=True)
    assert set(tmp_path.iterdir()) == before


# The command

MESSAGE = '{"id": "a", "message": {"sender": "a@example.com", "recipient": "b@example.com"}}'


@pytest.fixture
def rebind(tmp_path: Path) -> Path:
    """The script, with the places of this checkout; without root it cannot become another user, and stays this one."""
    script = (DEPLOY / "rebind").read_text()
    for shipped, here in {
        "/etc/rebind/rebind.env": str(tmp_path / "rebind.env"),
        "/opt/rebind": str(ROOT),
        ".venv/bin/python": sys.executable,
        "runuser -u rebind --": f"runuser -u {getuser()} --" if os.geteuid() == 0 else "",
    }.items():
        assert shipped in script
        script = script.replace(shipped, here)
    file = tmp_path / "rebind"
    file.write_text(script)
    file.chmod(0o755)
    return file


def run(script: Path, *arguments: str, stdin: str = "", **environment: str) -> str:
    """What the script prints, with none of our settings except these."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("REBIND_")} | environment
    done = subprocess.run([script, *arguments], input=stdin, env=settings, capture_output=True, text=True, timeout=60)
    assert (done.returncode, without_store(done.stderr)) == (0, "")
    return done.stdout


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lines", "lines of Windows"])
@pytest.mark.parametrize("quote", ["", "'", '"'], ids=["bare", "single quotes", "double quotes"])
def test_it_has_the_settings_of_the_service_and_names_who_called_sudo(
    rebind: Path, tmp_path: Path, quote: str, end: str
) -> None:
    """The file is systemd's: no shell expands it."""
    store = tmp_path / "$HOME & `id`.db"
    lines = ["# The store:", ";REBIND_NOTHING=1", f"  REBIND_DATABASE_URL={quote}sqlite:///{store}{quote}", "PGUSER="]
    rebind.with_name("rebind.env").write_text(end.join([*lines, f"REBIND_BUSY_TIMEOUT={quote}5{quote}"]), newline="")
    assert run(rebind, "load", "-", stdin=MESSAGE) == "1 message loaded, 1 of them without content, 0 discarded\n"
    assert (store.exists(), store.stat().st_mode & 0o777) == (True, 0o600)
    run(rebind, "rebind", "--everything", "--reason", "all of it", SUDO_USER="ada")
    (row,) = run(rebind, "history", "--json").splitlines()
    assert (json.loads(row)["actor"], json.loads(row)["reason"]) == ("ada", "all of it")


def test_it_is_the_person_who_asks_and_not_the_user_of_the_service(rebind: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    script = rebind.read_text().replace(f"{sys.executable} wsgi.py", "printenv").replace(str(ROOT), "/")
    rebind.write_text(script.replace(f"runuser -u {getuser()}", "runuser -u nobody"))
    rebind.with_name("rebind.env").write_text("PGSSLMODE = require\n")
    assert run(rebind, "LOGNAME", "PGSSLMODE", SUDO_USER="ada") == "ada\nrequire\n"


def test_the_environment_of_the_caller_takes_precedence(rebind: Path, tmp_path: Path) -> None:
    rebind.with_name("rebind.env").write_text(f"REBIND_DATABASE_URL=sqlite:///{tmp_path / 'a.db'}\nREBIND_PROXIES=x\n")
    run(rebind, "load", "-", stdin=MESSAGE, REBIND_DATABASE_URL=f"sqlite:///{tmp_path / 'b.db'}", REBIND_PROXIES="0")
    assert [(tmp_path / name).exists() for name in ("a.db", "b.db")] == [False, True]


def test_by_itself_it_lists_our_commands_alone(rebind: Path) -> None:
    rebind.with_name("rebind.env").write_text("export PGSSLMODE=require\n")
    done = subprocess.run([rebind], capture_output=True, text=True)
    listed = re.findall(r"^  (\w+)  ", done.stdout + done.stderr, re.MULTILINE)
    assert "rebind.env is ignored: export PGSSLMODE=require\n" in done.stderr
    assert listed == ["history", "load", "log", "messages", "prune", "queues", "rebind"]
