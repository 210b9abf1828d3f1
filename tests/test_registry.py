"""Tests of the registry: what a rebind does to messages and to the delivery log."""

from conftest import message, stored

from queues import QueueRegistry, RebindRequest


def test_a_message_that_moves_into_another_matched_queue_is_handled_once(queues: QueueRegistry, url: str) -> None:
    queues.load([message(meta={"campaign": name}) for name in ("a", "b", "c")])
    result = queues.rebind(RebindRequest("r", {"campaign": "b"}), actor="me")
    assert (result.matched, result.moved) == (3, 2)
    assert [row["queue"] for row in stored(url)] == ["b:@example.com"] * 3
    assert sorted(record["old_queue"] for record in queues.records()) == [f"{name}:@example.com" for name in "abc"]
