"""A harbour for s2s: ships that dock, and a tide that the players are told of."""

from s2s.handlers.commands import BatchCommandHandler
from s2s.handlers.jobs import Job


class Dock(BatchCommandHandler):
    """``harbour.dock``: a ship has docked. It becomes a row of a table of our own."""

    cmd_type = "harbour.dock"
    schema = {
        "type": "object",
        "properties": {
            "ship_id": {"type": "integer", "minimum": 1, "maximum": 2**53 - 1},
            "berth": {"type": "integer", "minimum": 1, "maximum": 99},
        },
        "required": ["ship_id", "berth"],
        "additionalProperties": False,
    }

    def run_batch(self, txn, commands):
        """Take many in one statement; they are marked as done in the same transaction, so each docks once."""
        # Two workers may both find it missing: the one that is too late is rolled back, and runs again.
        txn.execute("create table if not exists harbour_berths (cmd_id bigint unique, ship_id bigint, berth int)")
        txn.execute(
            "insert into harbour_berths select * from unnest(%s::bigint[], %s::bigint[], %s::int[])",
            (
                [command.cmd_id for command in commands],
                [command.payload["ship_id"] for command in commands],
                [command.payload["berth"] for command in commands],
            ),
        )


class Tide(Job):
    """``harbour.tide``: it turns every minute."""

    job_type = "harbour.tide"
    schedule = "every:60s"

    def run(self, txn, run):
        """Emit a notice; it is sent if this transaction is committed, and published once."""
        message = "The tide comes in" if run.due_at // 60 % 2 else "The tide goes out"
        notice = {"scope": "global", "message": message, "severity": "info", "ttl_s": 60}
        run.emit("notice.publish", run.key, notice)
