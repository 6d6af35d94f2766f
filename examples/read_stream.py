"""Reads events from a stream with nothing but redis-py: any language with a Redis client can.

    python3 examples/read_stream.py redis://localhost:6379 events:user my-group

Prints each event as a line of JSON, acknowledges it, and ends when the group has read the whole stream.
"""

import json
import sys

import redis


def main(url: str, stream: str, group: str) -> None:
    client = redis.Redis.from_url(url, decode_responses=True)
    try:
        client.xgroup_create(stream, group, id="0", mkstream=True)
    except redis.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise
    while True:
        answer = client.xreadgroup(group, "python", {stream: ">"}, count=100)
        if not answer:
            return
        for entry, fields in answer[0][1]:
            event = {
                "id": fields["id"],
                "type": fields["type"],
                "aggregate_type": fields["aggregate_type"],
                "aggregate_id": fields["aggregate_id"],
                "occurred_at": fields["occurred_at"],
                "payload": json.loads(fields["payload"]),
                "headers": json.loads(fields.get("headers", "{}")),
            }
            print(json.dumps(event, ensure_ascii=False))
            client.xack(stream, group, entry)


if __name__ == "__main__":
    main(*sys.argv[1:])
