"""Our whole way: rows of an engine's outbox are pushed, accepted, executed and done. Both roles are real processes."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing

import psycopg2

from benchmarks.contestants.s2s_push import become
from benchmarks.load import Load, Meter, Place

#: Keys are unique, also when this database was filled before: they contain the highest ``cmd_id`` so far.
_FILL = (
    "insert into s2s.outbox (cmd_type, idem_key, payload) select 'notice.publish', concat('whole-', %s, '-', n),"
    " jsonb_build_object('scope', 'global', 'severity', 'info', 'message', %s) from generate_series(1, %s) n"
)


def serve(place: Place) -> None:
    """Replace this process by the server, with its executor on."""
    become("s2s-server", place, "--listen", f"tcp:{place.port}:interface=127.0.0.1", "--http", "off")


def drive(place: Place, load: Load, meter: Meter) -> None:
    """Fill the outbox, start an engine, and measure the time until the last command is done."""
    with closing(psycopg2.connect(place.url)) as connection, connection.cursor() as txn:
        connection.autocommit = True
        txn.execute("select coalesce(max(cmd_id), 0) from s2s.commands")
        before = txn.fetchall()[0][0]
        txn.execute(_FILL, (before, load.filling, load.items))
        program = "import sys; from benchmarks.contestants import s2s_whole; s2s_whole.engine(*sys.argv[1:])"
        with subprocess.Popen(
            [sys.executable, "-c", program, str(place.port), place.url], stdin=subprocess.PIPE
        ) as engine:
            try:
                while _left(txn, before):
                    time.sleep(0.2)
            finally:
                engine.communicate()
        txn.execute(
            "select count(*), extract(epoch from max(finished_at) - min(created_at))::float8 from s2s.commands"
            " where status = 'done' and cmd_id > %s",
            (before,),
        )
        meter.took_all(*txn.fetchall()[0])


def engine(port: str, url: str) -> None:
    """Replace this process by the engine."""
    become("s2s-engine", Place(int(port), url), "--connect", f"tcp:127.0.0.1:{port}")


def _left(txn: psycopg2.extensions.cursor, before: int) -> bool:
    """Whether an outbox row waits to be sent, or a command with a ``cmd_id`` above ``before`` waits to be run."""
    txn.execute(
        "select exists (select from s2s.outbox where state = 'waiting')"
        " or exists (select from s2s.commands where status = 'ready' and cmd_id > %s)",
        (before,),
    )
    return bool(txn.fetchall()[0][0])
