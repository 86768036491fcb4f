"""A client of the HTTP API, with treq (docs/api.rst, "The client").

::

    client = AdminClient("http://127.0.0.1:8321", token)
    page = await client.list_commands(status="dead")
    order = await client.give_order("admin.engine.force_tick.v1", {"job_type": "decay"}, wait_s=30)

Every method returns a Deferred of its operation's result. It fails with :class:`~s2s.errors.Refused` (the server's
code, message and details), :class:`~s2s.errors.Unreachable` (nothing was sent), :class:`~s2s.errors.UnknownOutcome`
(the request may or may not have taken effect) or :class:`~s2s.errors.BadReply` (the answer does not come from an s2s
server).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twisted.internet.defer import Deferred

from s2s.admin.operations import catalogue, commands, config, engines, lists, notices, orders, outbox, reports
from s2s.admin.operations.config import SettingChange
from s2s.admin.operations.engines import Engine
from s2s.admin.operations.notices import Broadcast
from s2s.admin.operations.orders import OrderView
from s2s.admin.operations.pages import Page
from s2s.admin.operations.rows import BulkOutcome, RowOutcomes
from s2s.admin.transport import Transport
from s2s.handlers.discovery import Found
from s2s.handlers.report import Report
from s2s.protocol.settings import Value
from s2s.store.tables.actions import RowOutcome
from s2s.store.tables.audit import Entry
from s2s.store.tables.commands_admin import CommandRow
from s2s.store.tables.config import Change, ConfigRow
from s2s.store.tables.jobs import JobRow
from s2s.store.tables.keys import PublicKeyRow
from s2s.store.tables.notices import NoticeRow
from s2s.store.tables.outbox_admin import OutboxEntry


class AdminClient(Transport):
    """A client of one server: a method for each operation, see :class:`~s2s.admin.transport.Transport` for the rest."""

    # --- engines -----------------------------------------------------------------------------------------------------

    def list_engines(self, *, limit: int | None = None, cursor: str | None = None) -> Deferred[Page[Engine]]:
        """List the engines, each with its current state."""
        return self.call(engines.LIST, query={"limit": limit, "cursor": cursor})

    def show_engine(self, name: str) -> Deferred[Engine]:
        """Show one engine."""
        return self.call(engines.SHOW, path_params={"name": name})

    def health_engine(self, name: str) -> Deferred[dict[str, Any]]:
        """Ask an engine for its health."""
        return self.call(engines.HEALTH, path_params={"name": name})

    def pause_engine(self, name: str, *, reason: str) -> Deferred[dict[str, Any]]:
        """Pause an engine: it begins no job until it is resumed."""
        return self.call(engines.PAUSE_ENGINE, path_params={"name": name}, body={"reason": reason})

    def resume_engine(self, name: str, *, reason: str) -> Deferred[dict[str, Any]]:
        """Resume a paused engine."""
        return self.call(engines.RESUME_ENGINE, path_params={"name": name}, body={"reason": reason})

    def shutdown_engine(self, name: str, *, reason: str, grace_ms: int | None = None) -> Deferred[dict[str, Any]]:
        """Make an engine finish its work in progress, and end for good."""
        body = {"reason": reason, "grace_ms": grace_ms}
        return self.call(engines.SHUT_DOWN_ENGINE, path_params={"name": name}, body=body)

    def sweep_engine(self, name: str, *, since_ts: int = 0) -> Deferred[dict[str, Any]]:
        """Make an engine move the pending broadcasts into its outbox."""
        return self.call(engines.SWEEP_ENGINE, path_params={"name": name}, body={"since_ts": since_ts})

    # --- orders ------------------------------------------------------------------------------------------------------

    def give_order(
        self, rpc: str, params: Mapping[str, Any], *, idem_key: str | None = None, wait_s: float = 0
    ) -> Deferred[OrderView]:
        """Give an order.

        :param rpc: the RPC of an order that the server has installed.
        :param idem_key: the same key is the same order: with a key, an order can be repeated if its outcome is unknown.
        :param wait_s: seconds to wait for its end, 60 at most.
        """
        return self.call(orders.giving(rpc), query={"wait": wait_s}, body=params, idem_key=idem_key)

    def show_order(self, order_id: str, *, wait_s: float = 0) -> Deferred[OrderView]:
        """Show one order, once it is over or ``wait_s`` have passed."""
        return self.call(orders.SHOW, path_params={"order_id": order_id}, query={"wait": wait_s})

    def list_orders(
        self,
        *,
        status: str | None = None,
        rpc: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Deferred[Page[OrderView]]:
        """List orders, the newest first."""
        return self.call(orders.LIST, query={"status": status, "rpc": rpc, "limit": limit, "cursor": cursor})

    # --- commands ----------------------------------------------------------------------------------------------------

    def list_commands(
        self,
        *,
        status: str | None = None,
        cmd_type: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Deferred[Page[CommandRow]]:
        """List commands, the newest first."""
        query = {"status": status, "cmd_type": cmd_type, "limit": limit, "cursor": cursor}
        return self.call(commands.LIST, query=query)

    def show_command(self, cmd_id: int) -> Deferred[CommandRow]:
        """Show all of one command."""
        return self.call(commands.SHOW, path_params={"cmd_id": cmd_id})

    def retry_commands(self, ids: Sequence[int]) -> Deferred[RowOutcomes]:
        """Run commands again."""
        return self.call(commands.RETRY.some, body={"ids": list(ids)})

    def retry_command(self, cmd_id: int) -> Deferred[RowOutcome]:
        """Run one command again; refused if its status does not allow that."""
        return self.call(commands.RETRY.one, path_params={"cmd_id": cmd_id})

    def retry_dead_commands(self, *, cmd_type: str | None = None) -> Deferred[BulkOutcome]:
        """Run all dead commands again."""
        return self.call(commands.RETRY_DEAD, body={"cmd_type": cmd_type})

    def cancel_commands(self, ids: Sequence[int]) -> Deferred[RowOutcomes]:
        """Cancel commands that have not run."""
        return self.call(commands.CANCEL.some, body={"ids": list(ids)})

    def cancel_command(self, cmd_id: int) -> Deferred[RowOutcome]:
        """Cancel one command that has not run; refused if its status does not allow that."""
        return self.call(commands.CANCEL.one, path_params={"cmd_id": cmd_id})

    def discard_commands(self, ids: Sequence[int]) -> Deferred[RowOutcomes]:
        """Remove commands."""
        return self.call(commands.DISCARD.some, body={"ids": list(ids)})

    def discard_command(self, cmd_id: int) -> Deferred[RowOutcome]:
        """Remove one command; refused if its status does not allow that."""
        return self.call(commands.DISCARD.one, path_params={"cmd_id": cmd_id})

    def discard_dead_commands(self, *, cmd_type: str | None = None) -> Deferred[BulkOutcome]:
        """Remove all dead commands."""
        return self.call(commands.DISCARD_DEAD, body={"cmd_type": cmd_type})

    # --- the outbox --------------------------------------------------------------------------------------------------

    def list_outbox(
        self,
        *,
        state: str | None = None,
        cmd_type: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Deferred[Page[OutboxEntry]]:
        """List the rows of the outbox, the newest first."""
        query = {"state": state, "cmd_type": cmd_type, "limit": limit, "cursor": cursor}
        return self.call(outbox.LIST, query=query)

    def show_outbox_row(self, outbox_id: int) -> Deferred[OutboxEntry]:
        """Show all of one row."""
        return self.call(outbox.SHOW, path_params={"outbox_id": outbox_id})

    def retry_outbox_rows(self, ids: Sequence[int]) -> Deferred[RowOutcomes]:
        """Send rows again."""
        return self.call(outbox.RETRY.some, body={"ids": list(ids)})

    def retry_outbox_row(self, outbox_id: int) -> Deferred[RowOutcome]:
        """Send one row again; refused if its state does not allow that."""
        return self.call(outbox.RETRY.one, path_params={"outbox_id": outbox_id})

    def retry_dead_outbox_rows(self, *, cmd_type: str | None = None) -> Deferred[BulkOutcome]:
        """Send all dead rows again."""
        return self.call(outbox.RETRY_DEAD, body={"cmd_type": cmd_type})

    def cancel_outbox_rows(self, ids: Sequence[int]) -> Deferred[RowOutcomes]:
        """Stop rows from being sent."""
        return self.call(outbox.CANCEL.some, body={"ids": list(ids)})

    def cancel_outbox_row(self, outbox_id: int) -> Deferred[RowOutcome]:
        """Stop one row from being sent; refused if its state does not allow that."""
        return self.call(outbox.CANCEL.one, path_params={"outbox_id": outbox_id})

    def discard_outbox_rows(self, ids: Sequence[int]) -> Deferred[RowOutcomes]:
        """Remove rows."""
        return self.call(outbox.DISCARD.some, body={"ids": list(ids)})

    def discard_outbox_row(self, outbox_id: int) -> Deferred[RowOutcome]:
        """Remove one row; refused if its state does not allow that."""
        return self.call(outbox.DISCARD.one, path_params={"outbox_id": outbox_id})

    def discard_dead_outbox_rows(self, *, cmd_type: str | None = None) -> Deferred[BulkOutcome]:
        """Remove all dead rows."""
        return self.call(outbox.DISCARD_DEAD, body={"cmd_type": cmd_type})

    # --- notices, settings and read-only rows ------------------------------------------------------------------------

    def add_broadcast(
        self,
        message: str,
        *,
        scope: str = "global",
        sector_id: int | None = None,
        corp_id: int | None = None,
        player_id: int | None = None,
        severity: str = "info",
        ttl_s: int | None = None,
    ) -> Deferred[Broadcast]:
        """Publish a notice to the players."""
        body = {
            "message": message,
            "scope": scope,
            "sector_id": sector_id,
            "corp_id": corp_id,
            "player_id": player_id,
            "severity": severity,
            "ttl_s": ttl_s,
        }
        return self.call(notices.BROADCAST, body=body)

    def list_notices(self, *, limit: int | None = None, cursor: str | None = None) -> Deferred[Page[NoticeRow]]:
        """List notices, the newest first."""
        return self.call(notices.LIST, query={"limit": limit, "cursor": cursor})

    def list_config(self, *, limit: int | None = None, cursor: str | None = None) -> Deferred[Page[ConfigRow]]:
        """List the settings with their bounds."""
        return self.call(config.LIST, query={"limit": limit, "cursor": cursor})

    def show_config(self, key: str) -> Deferred[ConfigRow]:
        """Show one setting."""
        return self.call(config.SHOW, path_params={"key": key})

    def set_config(self, key: str, value: Value) -> Deferred[SettingChange]:
        """Set a setting to a value."""
        return self.call(config.SET, path_params={"key": key}, body={"value": value})

    def list_config_history(
        self, *, key: str | None = None, limit: int | None = None, cursor: str | None = None
    ) -> Deferred[Page[Change]]:
        """List the changes of settings, the newest first."""
        return self.call(config.HISTORY, query={"key": key, "limit": limit, "cursor": cursor})

    def list_keys(self, *, limit: int | None = None, cursor: str | None = None) -> Deferred[Page[PublicKeyRow]]:
        """List the keys, without their secrets."""
        return self.call(lists.KEYS, query={"limit": limit, "cursor": cursor})

    def list_audit(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        subject: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Deferred[Page[Entry]]:
        """List the actions and their actors, the newest first."""
        query = {"actor": actor, "action": action, "subject": subject, "limit": limit, "cursor": cursor}
        return self.call(lists.AUDIT, query=query)

    def list_jobs(self, *, limit: int | None = None, cursor: str | None = None) -> Deferred[Page[JobRow]]:
        """List the jobs."""
        return self.call(lists.JOBS, query={"limit": limit, "cursor": cursor})

    def show_report(self, report: Report) -> Deferred[Any]:
        """Read the report of a plug-in."""
        return self.call(reports.operation(report))

    def show_catalogue(self) -> Deferred[dict[str, Any]]:
        """Show all schemas."""
        return self.call(catalogue.operation(Found()))
