"""Reads events from a stream with nothing but redis-py: any language with a Redis client can.

    python3 examples/read_stream.py redis://localhost:6379 events:user my-group [seconds]

Prints each event as a line of JSON, acknowledges it, and ends when the group has read the whole stream
and nothing new has come for so many seconds (0).
"""

from __future__ import annotations

import json
import sys

import redis

# Each process of a group has a name of its own, which stays the same when it is started again.
NAME = "python"


def main(url: str, stream: str, group: str, seconds: str = "0") -> None:
    wait = float(seconds)
    # Longer than the wait for an entry: redis-py 8 gives a connection up after 5 s and asks again in
    # silence, and what the server then sends to the old connection is lost until the next start.
    client = redis.Redis.from_url(url, decode_responses=True, socket_timeout=wait + 5)
    try:
        client.xgroup_create(stream, group, id="0", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise
    # First what this consumer was given and has not acknowledged, when it ended before that.
    after = "0"
    while True:
        block = int(wait * 1000) if after == ">" and wait > 0 else None
        entries = read(client, stream, group, after, block)
        if not entries and after == ">":
            return
        for entry, fields in entries:
            # An entry with the field `group` is for that group alone; one without fields was deleted.
            if fields and fields.get("group", group) == group:
                handle(fields)
            client.xack(stream, group, entry)
        if after != ">":
            after = entries[-1][0] if entries else ">"


def read(client: redis.Redis, stream: str, group: str, after: str, block: int | None) -> list:
    answer = client.xreadgroup(group, NAME, {stream: after}, count=100, block=block)
    # A list of streams or, in the newer protocol, a dictionary of lists.
    if isinstance(answer, dict):
        return [entry for page in answer.get(stream, []) for entry in page]
    return answer[0][1] if answer else []


def handle(fields: dict) -> None:
    event = {
        "id": fields["id"],
        "type": fields["type"],
        "aggregate_type": fields["aggregate_type"],
        "aggregate_id": fields["aggregate_id"],
        "occurred_at": fields["occurred_at"],
        "payload": json.loads(fields["payload"]),
        "headers": json.loads(fields.get("headers", "{}")),
    }
    print(json.dumps(event, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
