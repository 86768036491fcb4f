"""A plug-in for s2s: a command that docks a ship, and a job that publishes a notice of the tide."""

from s2s.handlers.commands import BatchCommandHandler
from s2s.handlers.jobs import Job


class Dock(BatchCommandHandler):
    """``harbour.dock``: a ship has docked. Each command inserts a row into our own table."""

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
        """Insert many commands by one statement. The same transaction marks them as done, so each ship docks once."""
        # Two workers may both find the table missing: the transaction of the later one is rolled back and runs again.
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
    """``harbour.tide``: the tide turns every minute."""

    job_type = "harbour.tide"
    schedule = "every:60s"

    def run(self, txn, run):
        """Emit a notice. The notice is sent if this transaction commits, and it is published once."""
        message = "The tide comes in" if run.due_at // 60 % 2 else "The tide goes out"
        notice = {"scope": "global", "message": message, "severity": "info", "ttl_s": 60}
        run.emit("notice.publish", run.key, notice)
