"""psycopg2 without a link, into our tables: one command in each transaction, or ``window`` of them by ``unnest``.

``links`` is the number of connections that work at once, each in a thread.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from contextlib import closing

import psycopg2

from benchmarks.kits import drive_loop
from benchmarks.load import Load, Meter, Place, keys, push

_ONE = (
    "with fresh as (insert into s2s.idempotency_keys (idem_key, fingerprint, cmd_id)"
    " values (%(key)s, %(fingerprint)s, nextval('s2s.commands_cmd_id_seq')) on conflict do nothing returning cmd_id)"
    " insert into s2s.commands (cmd_id, cmd_type, idem_key, payload)"
    " select cmd_id, %(type)s, %(key)s, %(payload)s from fresh returning cmd_id"
)
_MANY = (
    "with pushed as materialized (select * from unnest(%(keys)s::text[], %(fingerprints)s::bytea[], %(types)s::text[],"
    " %(payloads)s::text[]) as p (idem_key, fingerprint, type, payload)),"
    " fresh as (insert into s2s.idempotency_keys (idem_key, fingerprint, cmd_id)"
    " select idem_key, fingerprint, nextval('s2s.commands_cmd_id_seq') from pushed on conflict do nothing"
    " returning idem_key, cmd_id)"
    " insert into s2s.commands (cmd_id, cmd_type, idem_key, payload)"
    " select cmd_id, type, idem_key, payload::jsonb from fresh join pushed using (idem_key) returning cmd_id"
)


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Insert commands."""
    with closing(psycopg2.connect(place.url)) as first:
        if load.links == 1:
            drive_loop(_call(first, load), load, meter)
            return
        is_over = threading.Event()
        counts = [0] * load.links

        def work(number: int) -> None:
            with closing(psycopg2.connect(place.url)) as connection:
                call = _call(connection, load)
                while not is_over.is_set():
                    counts[number] += call()

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(load.links)]
        for thread in threads:
            thread.start()

        def wait() -> int:
            is_over.wait(0.01)
            return sum(counts) - meter.count

        drive_loop(wait, load, meter)
        is_over.set()
        for thread in threads:
            thread.join()


def _call(connection: psycopg2.extensions.connection, load: Load) -> object:
    made, filling = keys(f"rows-{id(connection)}"), load.filling

    def one() -> int:
        asked = push(next(made), filling)
        payload = json.dumps(asked["payload"])
        fingerprint = hashlib.sha256(payload.encode()).digest()
        with connection, connection.cursor() as txn:
            said = {"key": asked["idem_key"], "fingerprint": fingerprint, "type": asked["cmd_type"], "payload": payload}
            txn.execute(_ONE, said)
        return 1

    def many() -> int:
        asked = [push(key, filling) for key in itertools.islice(made, load.window)]
        payloads = [json.dumps(each["payload"]) for each in asked]
        with connection, connection.cursor() as txn:
            said = {
                "keys": [each["idem_key"] for each in asked],
                "fingerprints": [hashlib.sha256(payload.encode()).digest() for payload in payloads],
                "types": [each["cmd_type"] for each in asked],
                "payloads": payloads,
            }
            txn.execute(_MANY, said)
        return len(asked)

    return one if load.window == 1 else many
