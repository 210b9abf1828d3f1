"""A policy that is useful as it stands: each handler does its work only if `data` asks for it.

export REBIND_POLICY=examples/policy.py
flask rebind --everything --reason 'VIPs first' --set vips=initech --trigger-rebind-event
"""

import time

from event import rebind
from message import Message


@rebind.connect
def send_vips_first(message: Message, data: dict[str, str]) -> None:
    """vips=TENANT,TENANT: their messages go into the queue vip.example."""
    if message.meta.get("tenant") in data.get("vips", "").split(","):
        message.meta["queue"] = "vip.example"


@rebind.connect
def give_up_old_mail(message: Message, data: dict[str, str]) -> None:
    """discard_after=HOURS: messages that came longer ago go into the queue null, which discards them."""
    if "discard_after" in data and time.time() - message.created > 3600 * float(data["discard_after"]):
        message.meta["queue"] = "null"


@rebind.connect
def spread_over_pools(message: Message, data: dict[str, str]) -> None:
    """pools=POOL,POOL: each recipient's mail always goes by the same one of these routing domains."""
    if "pools" in data:
        pools = data["pools"].split(",")
        message.meta["routing_domain"] = pools[sum(str(message.recipient).encode()) % len(pools)]
