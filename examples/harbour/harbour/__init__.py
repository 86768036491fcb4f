"""A plug-in for s2s: a command that docks a ship, a job of the tide, and an order that closes the harbour."""

from dataclasses import dataclass

from s2s import BadPayload, BatchCommandHandler, Job, OrderHandler


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
        txn.execute(
            "insert into harbour.docked (cmd_id, ship_id, berth)"
            " select * from unnest(%s::bigint[], %s::bigint[], %s::int[])",
            (
                [command.cmd_id for command in commands],
                [command.payload["ship_id"] for command in commands],
                [command.payload["berth"] for command in commands],
            ),
        )


class Tide(Job):
    """``harbour.tide``: the tide turns every minute. The first ships leave, if more are docked than may stay."""

    job_type = "harbour.tide"
    schedule = "every:60s"

    def run(self, txn, run):
        """Remove the ships, and emit a notice. It is sent if this transaction commits, and it is published once."""
        txn.execute(
            "delete from harbour.docked where cmd_id in"
            " (select cmd_id from harbour.docked order by cmd_id desc offset %s)",
            (run.setting("harbour.berths"),),
        )
        left = txn.rowcount
        message = f"The tide turns, and {left} ships leave"
        run.emit("notice.publish", run.key, {"scope": "global", "message": message, "severity": "info", "ttl_s": 60})
        return {"left": left}


class Close(OrderHandler):
    """``harbour.close.v1``: close the harbour, or open it again."""

    rpc = "harbour.close.v1"
    access = "operator"
    schema = {
        "description": "Closes or opens the harbour.",
        "type": "object",
        "properties": {
            "state": {"description": "The new state.", "enum": ["open", "closed"]},
            "reason": {"description": "Why, for the audit.", "type": "string", "minLength": 1, "maxLength": 200},
        },
        "required": ["state", "reason"],
        "additionalProperties": False,
    }

    def run(self, txn, order):
        """Change the state. The same transaction marks the order as done."""
        state = order.params["state"]
        txn.execute("update harbour.state set state = %s where state <> %s", (state, state))
        if not txn.rowcount:
            raise BadPayload(f"the harbour is {state} already", path="/payload/state")
        return {"state": state}


@dataclass(frozen=True)
class Docked:
    """The row of our report."""

    state: str
    ships: int
