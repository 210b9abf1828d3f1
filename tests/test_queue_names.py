"""Tests of the names of queues: how they are built, how they are read back, and which of them a request matches."""

from dataclasses import asdict
from itertools import product
from typing import Any

import pytest
from factories import message
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from message import domain_of
from names import Criteria, QueueName, queue_name
from queues import QueueRegistry

settings.register_profile("names", derandomize=True, deadline=None, max_examples=200)
names = settings.get_profile("names")

# The table of docs/contract.md, "The name of a message's queue".
TABLE = {
    "camp:ten@example.com": QueueName("camp", "ten", "example.com", None),
    "camp:ten@example.com!route": QueueName("camp", "ten", "example.com", "route"),
    "ten@example.com": QueueName(None, "ten", "example.com", None),
    "ten@example.com!route": QueueName(None, "ten", "example.com", "route"),
    "camp:@example.com": QueueName("camp", "", "example.com", None),
    "camp:@example.com!route": QueueName("camp", "", "example.com", "route"),
    "example.com": QueueName(None, None, "example.com", None),
    "example.com!route": QueueName(None, None, "example.com", "route"),
}

# Names that need not come from the table: a pinned one may be anything.
ODD = {
    "": QueueName(None, None, "", None),
    "camp:ten@relay.example:2525!route": QueueName("camp", "ten", "relay.example:2525", "route"),
    "camp:ten@[IPv6:2001:db8::1]": QueueName("camp", "ten", "[IPv6:2001:db8::1]", None),
    "a@b:c@example.com": QueueName(None, "a", "b:c@example.com", None),
    "a@example.com!b!c": QueueName(None, "a", "example.com", "b!c"),
    "example.com!a@b": QueueName(None, "example.com!a", "b", None),
    "@example.com": QueueName(None, "", "example.com", None),
    ":@example.com": QueueName("", "", "example.com", None),
    "example.com!": QueueName(None, None, "example.com", ""),
    ":@!": QueueName("", "", "", ""),
    "café:größe@münchen.example!маршрут": QueueName("café", "größe", "münchen.example", "маршрут"),
    "a\n:b\n@c\n!d\n": QueueName("a\n", "b\n", "c\n", "d\n"),
}


@pytest.mark.parametrize(("name", "parts"), (TABLE | ODD).items(), ids=repr)
def test_a_name_is_read_as_its_parts_and_they_are_written_as_the_name(name: str, parts: QueueName) -> None:
    assert (QueueName.parse(name), written(parts)) == (parts, name)


def written(parts: QueueName) -> str:
    """The name of a message's queue whose metadata has these parts."""
    meta = {key: value for key, value in asdict(parts).items() if key != "domain" and value is not None}
    return queue_name(meta, parts.domain)


@names
@given(st.text() | st.lists(st.sampled_from([":", "@", "!", "a", "é"])).map("".join))
def test_every_string_is_a_name_and_is_written_as_it_was_read(name: str) -> None:
    assert written(QueueName.parse(name)) == name


@pytest.mark.parametrize(
    ("meta", "name"),
    [
        ({"queue": "pinned", "campaign": "c", "tenant": "t", "routing_domain": "r"}, "pinned"),
        ({"queue": ""}, ""),
        ({"queue": None, "campaign": None, "tenant": None, "routing_domain": None}, "example.com"),
        ({"queue": 1, "campaign": True, "tenant": ["t"], "routing_domain": {"r": "r"}}, "example.com"),
        ({"tenant": "a:b"}, "a:b@example.com"),
    ],
    ids=str,
)
def test_a_message_is_in_the_queue_that_its_metadata_names(meta: dict[str, Any], name: str) -> None:
    assert queue_name(meta, "example.com") == name


@pytest.mark.parametrize(
    "recipient",
    ["", "ada", "ada@", "@example.com", "[ada@example.com", [], ["ada@example.com", "bob"], "a\0@b", "a@\ud800"],
    ids=ascii,
)
def test_a_recipient_that_is_not_an_address_is_refused(recipient: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"is not an address|no recipient|a string must "):
        domain_of(recipient)


ALL = {"campaign": "camp", "tenant": "ten", "domain": "example.com", "routing_domain": "route"}


@pytest.mark.parametrize(
    ("criteria", "name"),
    [
        ({}, "camp:ten@example.com!route"),
        ({}, ""),
        *(({key: value}, "camp:ten@example.com!route") for key, value in ALL.items()),
        (ALL, "camp:ten@example.com!route"),
        ({"domain": "EXAMPLE.com"}, "example.com"),
        ({"domain": "example.com"}, "Example.COM"),
        ({"routing_domain": "ROUTE"}, "example.com!route"),
        ({"tenant": ""}, "camp:@example.com"),
        ({"campaign": ""}, ":ten@example.com"),
        ({"domain": ""}, "ten@"),
        ({"queue": ("other", "camp:ten@example.com"), "tenant": "ten"}, "camp:ten@example.com"),
    ],
    ids=str,
)
def test_a_request_matches_a_name_whose_parts_equal_its_criteria(criteria: dict[str, Any], name: str) -> None:
    assert Criteria(**criteria).match(name)


@pytest.mark.parametrize(
    ("criteria", "name"),
    [
        *((ALL | {key: "other"}, "camp:ten@example.com!route") for key in ALL),
        ({"campaign": "Camp"}, "camp:ten@example.com"),
        ({"tenant": "Ten"}, "camp:ten@example.com"),
        ({"campaign": "camp"}, "camp@example.com"),
        ({"campaign": ""}, "ten@example.com"),
        ({"tenant": ""}, "example.com"),
        ({"domain": "example.com"}, "sub.example.com"),
        ({"domain": "example.com"}, "example.com:25"),
        ({"domain": ""}, "example.com"),
        ({"domain": "camp:ten@example.com"}, "camp:ten@example.com"),
        ({"routing_domain": ""}, "example.com"),
        ({"queue": ("Example.com", "ten@example.com")}, "example.com"),
        ({"queue": ("camp:ten@example.com",), "tenant": "other"}, "camp:ten@example.com"),
    ],
    ids=str,
)
def test_a_request_matches_no_name_of_which_one_part_differs(criteria: dict[str, Any], name: str) -> None:
    assert not Criteria(**criteria).match(name)


def test_each_queue_is_found_once(queues: QueueRegistry, url: str) -> None:
    """All names of up to four of the characters that count, A being what follows the @ in the order of bytes.

    The one that comes first after `a`, if there is no NUL, has a character more, of the smallest code.
    """
    names = ["".join(letters) for length in range(5) for letters in product("a:@A!", repeat=length)] + ["a\1"]
    queues.load(message(meta={"queue": name}) for name in names)
    if url.startswith("sqlite"):
        names += nul_in_names(queues)
    found = [one.queue for one in queues.queues()]
    assert sorted(found) == sorted(names)
    matching = [one.queue for one in queues.queues(Criteria("", "a"))]
    assert matching == [name for name in found if name.startswith(":a@")]


def nul_in_names(queues: QueueRegistry) -> list[str]:
    """Let some names have a NUL, as a sender can write them in SQLite, whose functions of text end there or do not."""
    names = ["a\0", "\0a@a", "a\0@a", "a\0:a@A", "a:\0a@a", "a@\0a", "a:a@\0", "a:\0@"]
    queues.load(message(id=f"nul{number}") for number in range(len(names)))
    with queues.database.begin_write() as db:
        for number, name in enumerate(names):
            db.execute(text("UPDATE messages SET queue = :name WHERE id = :id"), {"name": name, "id": f"nul{number}"})
    return names
