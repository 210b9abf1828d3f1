"""Tests of the `rebind` event: which handlers are called, what they may do, and what comes of their failures."""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from databases import logged, metas, nothing_changes, run_sql, stored
from factories import ask, connected_to, counts, message

import event
from event import HandlerFailed, NoHandler, rebind
from message import Message
from moving import BATCH
from queues import QueueRegistry
from rebinding import RebindResult
from schemas import SettingError
from store import StoreRefused

Handler = Callable[..., object]


@pytest.fixture(autouse=True)
def _no_handler_is_left() -> Iterator[None]:
    yield
    rebind.handlers.clear()


def trigger(queues: QueueRegistry, /, **data: str) -> RebindResult:
    """Ask for the event, with `data`."""
    return ask(queues, data, trigger_rebind_event=True)


def do(statement: str) -> Handler:
    """A handler that runs `statement`, with `message` and `data`."""
    code = compile(statement, "a handler", "exec")

    def handler(message: Message, data: dict[str, str]) -> None:
        exec(code, {"message": message, "data": data})

    return handler


def test_without_a_handler_the_event_is_refused(queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    with nothing_changes(url), pytest.raises(NoHandler, match="no handler is connected"):
        trigger(queues)


@pytest.mark.sqlite
def test_handlers_are_called_in_the_order_in_which_they_were_connected(queues: QueueRegistry) -> None:
    called: list[int] = []

    def numbered(number: int) -> Handler:
        return lambda message, data: called.append(number)

    for number in range(30):
        rebind.connect(numbered(number))
    queues.load([message()])
    trigger(queues)
    assert called == list(range(30))


def test_a_handler_gets_the_message_and_the_data(queues: QueueRegistry, url: str) -> None:
    got: list[Any] = []

    @rebind.connect
    def handler(message: Message, data: dict[str, str]) -> None:
        got.extend((message, data))

    new = message(["ada@One.example", "bob@two.example"], meta={"tenant": "t", "n": [1, None]}, num_attempts=3)
    queues.load([new])
    trigger(queues, key="value")
    assert got == [
        Message(
            sender=new.sender,
            recipient=["ada@One.example", "bob@two.example"],
            meta={"tenant": "t", "n": [1, None]},
            id=new.id,
            queue="t@one.example",
            size=5,
            created=stored(url)[0]["created"],
            due=1e9,
            num_attempts=3,
        ),
        {"key": "value"},
    ]


def test_a_handler_may_change_meta_and_the_envelope(queues: QueueRegistry, url: str) -> None:
    rebind.connect(do("message.sender, message.meta = '', {'é': [1]}"))
    rebind.connect(do("message.recipient = ['bob@Two.example', 'cyd@three.example']"))
    queues.load([message(meta={"tenant": "t"})])
    (before,) = stored(url)
    assert counts(trigger(queues)) == (1, 1, 1)
    (row,) = stored(url)
    assert row == before | {
        "sender": "",
        "recipient": ["bob@two.example", "cyd@three.example"],
        "domain": "two.example",
        "queue": "two.example",
        "meta": {"é": [1]},
        "due": row["due"],
    }
    assert row["due"] > before["due"]


def test_what_a_handler_may_only_read_stays(queues: QueueRegistry, url: str) -> None:
    change = "message.id, message.queue, message.size = 'x', 'x', 9; message.created = message.due = 9"
    rebind.connect(do(f"{change}; message.num_attempts = 9"))
    queues.load([message()])
    before = stored(url)
    trigger(queues)
    assert stored(url) == before


def test_data_that_a_handler_changes_is_not_seen_by_another_or_with_the_next_message(
    queues: QueueRegistry, url: str
) -> None:
    rebind.connect(do("message.meta['first'] = dict(data); data.clear(); data['mine'] = '1'"))
    rebind.connect(do("message.meta['second'] = data"))
    queues.load([message(), message()])
    trigger(queues, a="b")
    assert metas(url) == [{"first": {"a": "b"}, "second": {"a": "b"}}] * 2


@pytest.mark.parametrize(
    ("before", "after"), [({"a": 1, "b": [1]}, {"a": True, "b": [True]}), ({}, {"a": None})], ids=["true", "null"]
)
def test_what_python_takes_for_the_same_may_be_a_change(
    queues: QueueRegistry, url: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """There 1 equals True, and `get` says the same of a null and of a key that is not there."""
    queues.load([message(meta=before)])
    with connected_to(do(f"message.meta |= {after}")):
        trigger(queues)
    assert str(metas(url)) == str([after])


def test_a_handler_may_change_what_is_inside_the_metadata(queues: QueueRegistry, url: str) -> None:
    queues.load([message(meta={"list": [1]}), message(meta={"object": {"n": 1}})])
    with connected_to(do("message.meta.get('list', []).append(2); message.meta.get('object', {}).update(n=2)")):
        trigger(queues)
    assert metas(url) == [{"list": [1, 2]}, {"object": {"n": 2}}]


class Pool(str, Enum):  # noqa: UP042
    """Strings with names, as a site may keep them."""

    VIP = "vip.example"


def test_a_handler_may_set_a_string_of_a_class_of_its_own(queues: QueueRegistry, url: str) -> None:
    def move(message: Message, data: dict[str, str]) -> None:
        message.meta["campaign"] = message.sender = Pool.VIP

    rebind.connect(move)
    queues.load([message()])
    trigger(queues)
    ((row,), (record,)) = stored(url), logged(url)
    became = {"queue": "vip.example:@example.com", "meta": {"campaign": "vip.example"}, "sender": "vip.example"}
    for found in (row, record):
        assert found == found | became


def test_a_handler_that_raises_is_named_and_changes_nothing(queues: QueueRegistry, url: str) -> None:
    new = [message() for _ in range(2 * BATCH + 2)]
    queues.load(new)
    before = stored(url)
    failing = new[-2].id

    def unlucky(message: Message, data: dict[str, str]) -> None:
        message.meta["queue"] = "elsewhere"
        if message.id == failing:
            raise RuntimeError("no luck")

    name = "test_a_handler_that_raises_is_named_and_changes_nothing.<locals>.unlucky"
    failures = []
    for dry_run in (True, False):
        with connected_to(do("pass"), unlucky), pytest.raises(HandlerFailed) as failure:
            ask(queues, trigger_rebind_event=True, dry_run=dry_run)
        failures.append(failure)  # their tracebacks hold whatever was open, which must not hinder the next rebind
        assert str(failure.value) == f"the handler {name} failed for message {failing}: RuntimeError: no luck"
        assert (stored(url), logged(url)) == (before, [])
    assert ask(queues, {"queue": "q"}).moved == len(new)


def test_what_the_tables_refuse_of_the_first_batch_is_refused(queues: QueueRegistry, url: str) -> None:
    queues.load(message(id=f"{number:04}") for number in range(2 * BATCH))
    once = do("message.meta['queue'] = 'q' * (2001 if message.id == '0000' else 1)")
    with connected_to(once), nothing_changes(url), pytest.raises(StoreRefused, match="longer than 2000 bytes"):
        trigger(queues)


@pytest.mark.sqlite
def test_a_handler_without_a_name_is_shown_as_it_is(queues: QueueRegistry) -> None:
    queues.load([message()])
    rebind.connect(partial(do("raise RuntimeError('no luck')")))
    with pytest.raises(HandlerFailed, match=r"functools\.partial.* failed for message .*: RuntimeError: no luck"):
        trigger(queues)


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "statement",
    [
        "message.meta['a'] = (1, 2)",
        "message.meta['a'] = float('nan')",
        "message.meta['a'] = 'a\\0b'",
        "message.meta['a\\0'] = 'b'",
        "message.meta['a'] = 'a\\ud800b'",
        "message.meta[1] = 'b'",
        "message.meta['a'] = {1: 'b'}",
        "message.meta['a'] = message.meta",
        "message.meta['a'] = 10 ** 5000",
        "message.meta = None",
        "message.recipient = 'ada'",
        "message.recipient = []",
        "message.recipient = ['ada@example.com', None]",
        "message.recipient = ('ada@example.com',)",
        "message.sender = None",
        "message.sender = 'a\\0b'",
        "del message.sender",
        "message.id = 'x'\nraise RuntimeError",
        "raise RecursionError",
        "raise SystemExit",
    ],
)
def test_a_message_that_cannot_be_kept_is_the_handlers_failure(queues: QueueRegistry, url: str, statement: str) -> None:
    rebind.connect(do("message.meta['queue'] = 'q'"))
    rebind.connect(do(statement))
    rebind.connect(do("raise RuntimeError('this one must not be called')"))
    new = message()
    queues.load([new])
    failed = f"^the handler do.<locals>.handler failed for message {new.id}: (?!.*must not be called)"
    with nothing_changes(url), pytest.raises(HandlerFailed, match=failed):
        trigger(queues)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, GeneratorExit, BaseException])
def test_whatever_a_handler_raises_in_a_thread_of_the_server_is_its_failure(
    queues: QueueRegistry, url: str, raised: type[BaseException]
) -> None:
    """gunicorn would end its worker, and with it the requests of the other threads."""

    def handler(message: Message, data: dict[str, str]) -> None:
        raise raised("no luck")

    queues.load([message()])
    rebind.connect(handler)
    with nothing_changes(url), ThreadPoolExecutor(1) as thread:
        error = thread.submit(trigger, queues).exception()
    assert (type(error), str(error).endswith(f": {raised.__name__}: no luck")) == (HandlerFailed, True)


@pytest.mark.sqlite
def test_ctrl_c_ends_a_command_while_its_handler_runs(queues: QueueRegistry, url: str) -> None:
    queues.load([message()])
    handler = rebind.connect(do("message.meta['queue'] = 'q'; raise KeyboardInterrupt"))
    with nothing_changes(url), pytest.raises(KeyboardInterrupt):
        trigger(queues)
    assert rebind.handlers == [handler]


def test_a_policy_is_named_by_any_path_and_its_handlers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("site.py").write_text("from event import rebind\n\n@rebind.connect\ndef handler(message, data):\n    pass\n")
    event.load_policy("site.py")
    gc.collect()
    assert [(handler.__module__, handler.__qualname__) for handler in rebind.handlers] == [("rebind_policy", "handler")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "FileNotFoundError: "),
        ("def handler(message data):\n", "SyntaxError: "),
        ("raise RuntimeError('not today')\n", "RuntimeError: not today"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "SyntaxError: |ValueError: "),
    ],
    ids=["missing", "syntax", "raising", "no UTF-8"],
)
def test_a_policy_that_cannot_be_loaded_is_named_with_the_reason(tmp_path: Path, text: str | None, reason: str) -> None:
    file = tmp_path / "site.py"
    if text is not None:
        file.write_text(text, encoding="latin-1")
    with pytest.raises(SettingError, match=rf"the policy {file} cannot be loaded: (?:{reason})"):
        event.load_policy(str(file))


def test_a_change_that_another_handler_takes_back_is_not_a_change(queues: QueueRegistry, url: str) -> None:
    queues.load([message("ada@a.example")])
    run_sql(url, "UPDATE messages SET domain = 'relay.example:2525', queue = 'relay.example:2525'")
    rebind.connect(do("message.recipient = message.recipient.replace('a.example', 'sink.example')"))
    rebind.connect(do("message.recipient = message.recipient.replace('sink.example', 'a.example')"))
    before = stored(url)
    assert counts(trigger(queues)) == (1, 0, 0)
    assert stored(url) == before
