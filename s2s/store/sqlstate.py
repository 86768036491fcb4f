"""The meaning of each SQLSTATE: one table for the whole package (PostgreSQL manual, appendix A).

The longest prefix that matches a code decides. ``docs/faults.rst`` shows the same table to operators.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

import psycopg2

from s2s.errors import DatabaseUnavailable

#: The component at fault: the statement (and so the handler that sent it), the connection, or the whole database.
Fault = Literal["statement", "connection", "database"]


class Meaning(NamedTuple):
    """The meaning of one class of errors.

    :param fault: the component at fault. An attempt is charged to a handler only if its statement is at fault.
    :param drops: close the connection, even if it still works.
    :param passes: the same statement may succeed later, unchanged.
    :param unavailable: reply ``db_unavailable`` to a push; otherwise ``internal_error`` for the one row at fault.
    :param cure: the action for an operator, for the log; empty: the error does not concern operators.
    """

    fault: Fault = "statement"
    drops: bool = False
    passes: bool = False
    unavailable: bool = True
    cure: str = ""


_REFUSED: Final = Meaning(unavailable=False)
_GRANT: Final = "run: s2s db status, which lists the missing privileges"
_MISSING: Final = (
    "run: s2s db status; a trigger of yours on a table of s2s must qualify each name with its schema,"
    " or set its search_path"
)
_FOREIGN_FUNCTION: Final = (
    "mend the function {function}, which s2s has not made; s2s db status names its trigger, and how to remove that"
)
_SHARED_SESSION: Final = Meaning(
    drops=True, passes=True, cure="connect to PostgreSQL itself, or to a pooler in session mode"
)
_LOCKED: Final = "the view pg_locks shows the session that holds the lock"
_WAITED: Final = (
    "it took too long: see wait_event in the view pg_stat_activity: sessions wait for a lock, or for a standby"
    " (SyncRep)"
)

#: Meanings by prefix of the SQLSTATE. The empty prefix matches every code.
MEANINGS: Final[dict[str, Meaning]] = {
    "": _REFUSED,
    "08": Meaning("connection", drops=True, passes=True),
    # "cached plan must not change result type": a new connection has no cached plans.
    "0A000": Meaning(drops=True),
    # A rule rewrites a statement of s2s into a form that PostgreSQL does not support.
    "0A000 RewriteQuery": Meaning(cure="remove the rule: drop rule NAME on TABLE; s2s db status names both"),
    # Not a SQLSTATE of PostgreSQL: see s2s.store.kept_rows.
    "09000 kept": Meaning(
        unavailable=False, cure="a trigger has to return its row: mend it, or remove the named object"
    ),
    "2200H": Meaning(cure="raise the limit of the sequence: alter sequence NAME as bigint no maxvalue"),
    "25006": Meaning("database", drops=True, passes=True, cure="connect to the primary, or end its read-only mode"),
    "25P03": Meaning("connection", drops=True, passes=True),
    "25P04": Meaning("connection", drops=True, passes=True),
    # A prepared statement is missing, or another client has prepared it: clients share this session.
    **dict.fromkeys(("26", "42P05"), _SHARED_SESSION),
    "28": Meaning("database", drops=True, passes=True, cure="see the user and the password of the database URL"),
    # This code and the next two are recognised by the text of the error at connect time.
    "28000 pg_hba.conf": Meaning(
        "database",
        drops=True,
        passes=True,
        cure="pg_hba.conf has to allow this host, user, database and encryption: add a line to it and run select"
        " pg_reload_conf(), or see sslmode in the database URL",
    ),
    "28000 InitializeSessionUserId": Meaning(
        "database", drops=True, passes=True, cure="run as a superuser: alter role USER login"
    ),
    "42501 CheckMyDatabase": Meaning(
        "database",
        drops=True,
        passes=True,
        cure="run as the owner of the database: grant connect on database NAME to USER",
    ),
    "3D": Meaning("database", drops=True, passes=True, cure="see the database of the database URL"),
    "3F": Meaning(cure="run: s2s db status"),
    "40": Meaning(passes=True),
    "42501": Meaning(cure=_GRANT),
    # No statement raises it: s2s.store.connection finds the setting.
    "42501 setting": Meaning("database", drops=True, passes=True, cure="as a superuser"),
    # A table, a column or a function of s2s is missing.
    **dict.fromkeys(("42P01", "42703", "42883"), Meaning(cure=_MISSING)),
    # The unique index of an ON CONFLICT is missing.
    "42P10": Meaning(cure="run: s2s db status, which names a missing unique index"),
    # The same errors inside a foreign function, such as that of a foreign trigger on a table of s2s: see code().
    **dict.fromkeys(("3F000 in", "42501 in", "42P01 in", "42703 in", "42883 in"), Meaning(cure=_FOREIGN_FUNCTION)),
    "53": Meaning(passes=True, cure="see the memory and the limits of the database"),
    "53100": Meaning("database", passes=True, cure="free some space on the disk of the database"),
    # The parallel workers of a statement use shared memory, which is allocated in a file system: see code().
    **dict.fromkeys(
        ("53100 dsm_impl_posix", "53100 dsm_impl_sysv"),
        Meaning(
            passes=True,
            cure="give PostgreSQL more shared memory, as by docker run --shm-size=1g, or run as a superuser:"
            " alter system set max_parallel_workers_per_gather = 0; select pg_reload_conf()",
        ),
    ),
    "53300": Meaning(
        "database",
        drops=True,
        passes=True,
        cure="raise max_connections or the connection limit of the role or database, or stop another client",
    ),
    # A limit that the data exceed.
    "54": Meaning(unavailable=False, cure="see the log of the database"),
    # PostgreSQL uses code 54000 for limits of the data and for limits of the database: see code().
    "54000 PreCommit_Notify": Meaning(
        "database",
        passes=True,
        cure="end the session that listens in a long transaction; s2s db status names the oldest one",
    ),
    **dict.fromkeys(
        ("54000 GetNewTransactionId", "54000 GetNewMultiXactId"),
        Meaning("database", passes=True, cure="VACUUM the database as a superuser"),
    ),
    # Recognised by the text of the error at connect time. For any other error of this code, the statement is at fault.
    "55000 CheckMyDatabase": Meaning(
        "database",
        drops=True,
        passes=True,
        cure="run in another database: alter database NAME allow_connections true",
    ),
    # A publication of the database's owner: no row of the table can be changed.
    **dict.fromkeys(
        ("42P10 CheckCmdReplicaIdentity", "55000 CheckCmdReplicaIdentity"),
        Meaning(
            cure="run as the owner of the table: alter table NAME replica identity default, or take the table out of"
            " its publication; s2s db status names both"
        ),
    ),
    "55P03": Meaning(passes=True, cure=_LOCKED),
    "57": Meaning("connection", drops=True, passes=True),
    "57014": Meaning(passes=True, cure=_WAITED),
    # Recognised by its text.
    "57014 user request": Meaning(
        passes=True,
        cure="another session has cancelled it, as by pg_cancel_backend: the log of the database may name the session",
    ),
    "58": Meaning("database", drops=True, passes=True, cure="see the log of the database"),
    # Code raised it in a statement of a handler, or a foreign trigger in a statement of s2s, with a SQLSTATE of another
    # database or of its own choice: see code().
    "raised": _REFUSED,
    "raised 40": Meaning(passes=True),
    # A session with another server failed within a statement. If our own session ends, the severity is FATAL.
    **dict.fromkeys(
        ("ERROR 08", "ERROR 57P", "raised 08", "raised 57P"),
        Meaning(passes=True, cure="see the server to which the statement connects, as by postgres_fdw or dblink"),
    ),
    "XX": Meaning(unavailable=False, cure="see the log of the database"),
    "XX001": Meaning("database", cure="restore the damaged table from a backup"),
    "XX002": Meaning("database", cure="rebuild the damaged index with REINDEX"),
}
#: Tables whose ids come from a sequence. If rows are restored into a running system, the sequence is behind the rows.
_NUMBERED: Final = ("audit", "batch_notes", "broadcasts", "commands", "notices", "outbox", "steering")
MEANINGS.update(
    dict.fromkeys(
        (f"23505 {table}_pkey" for table in _NUMBERED), Meaning(passes=True, cure="run: s2s db fix-sequences")
    )
)
#: A timestamp outside these check constraints shows that the clock of the database is wrong.
MEANINGS.update(
    dict.fromkeys(
        ("23514 orders_created_at_check", "23514 api_tokens_expires_at_check"),
        Meaning(passes=True, cure="correct the clock of the database"),
    )
)
_LONGEST_CODE: Final = max(map(len, MEANINGS))

#: Texts of errors at connect time, and their SQLSTATEs: libpq reports the text, but not the SQLSTATE. A server with
#: another ``lc_messages`` reports other texts, so its errors get no SQLSTATE.
_AT_CONNECT: Final = (
    (re.compile("too many (clients|connections)|connection slots are reserved|no more connections allowed"), "53300"),
    (
        re.compile("authentication failed|no password supplied|role .* does not exist"),
        "28000",
    ),
    (re.compile("no pg_hba.conf entry|pg_hba.conf rejects"), "28000 pg_hba.conf"),
    (re.compile("not permitted to log in"), "28000 InitializeSessionUserId"),
    (re.compile("permission denied for database"), "42501 CheckMyDatabase"),
    (re.compile("database .* does not exist"), "3D000"),
    (re.compile("is not currently accepting connections"), "55000 CheckMyDatabase"),
)


#: The functions of PostgreSQL that raise an error for code: ``raise`` of PL/pgSQL, and errors of other databases, which
#: postgres_fdw and dblink pass on. Such an error says nothing about our database, whatever its SQLSTATE is.
_RAISES_FOR_CODE: Final = re.compile("exec_stmt_raise|pgfdw_report_.*|dblink_res_error|PLy_elog_impl")

#: The text of a cancellation. A statement timeout has the same SQLSTATE and the same source function in PostgreSQL.
_BY_REQUEST: Final = re.compile("due to user request")


#: Finds the function that the context of an error names. PL/pgSQL functions are found in every language of the server:
#: the context names their arguments, and their schema if the search_path of our sessions does not contain it. Functions
#: in other languages are found only in English, without arguments and schema.
_FUNCTION: Final = re.compile(
    r'^PL/pgSQL\W[^\n(]*?((?:(?:"[^"\n]+"|[\w$]+)\.)?(?:"[^"\n]+"|[\w$]+)\([^)\n]*\))'
    r'|^(?:SQL|PL/\w+) function "([^"\n]+)"',
    re.ASCII | re.MULTILINE,
)
#: The SQL functions of s2s: the context of an error does not name their schema. The list is a literal because
#: s2s.store.migrations imports this module.
_OURS_IN_SQL: Final = ("action", "actor", "changed")


def meaning(state: str) -> Meaning:
    """Return the meaning of a SQLSTATE."""
    found = next(MEANINGS[state[:length]] for length in range(_LONGEST_CODE, -1, -1) if state[:length] in MEANINGS)
    _, _, function = state.partition(" in ")
    if not function:
        return found
    cure = found.cure if found.cure == _FOREIGN_FUNCTION else "; ".join(filter(None, (found.cure, _FOREIGN_FUNCTION)))
    return found._replace(cure=cure.format(function=function))


def at_connect(text: str) -> str:
    """Return the SQLSTATE of an error at connect time by its text; empty: the text is not known."""
    return next((state for pattern, state in _AT_CONNECT if pattern.search(text)), "")


def with_cure(error: BaseException, otherwise: str = "") -> str:
    """Return the text of an error of s2s with the action for an operator.

    :param otherwise: the cure for a failed connect whose error has no cure of its own.
    """
    state = getattr(error, "state", "")
    # Not for a lost COMMIT or a thread that could not start: the texts of these errors need no cure.
    is_connect = type(error) is DatabaseUnavailable and not state
    cure = meaning(state).cure or (otherwise if is_connect else "")
    return f"{error}: {cure}" if cure else str(error)


def code(error: BaseException) -> str:
    """Return the SQLSTATE of an exception; empty: it has none.

    An error that code raises in a statement of a handler has the prefix "raised", and so has one that a foreign
    function raises in a statement of s2s. If one code has several meanings, a suffix tells them apart: the constraint
    that a statement of s2s violates, the function of PostgreSQL that raised the error, or the foreign function in which
    a statement of s2s fails. For some codes, the severity is the prefix. These are the same in every language of the
    server. A cancellation is told from a timeout by its English text.
    """
    if not isinstance(error, psycopg2.Error) or not error.pgcode:
        return ""
    is_ours = getattr(error.cursor, "is_ours", False)
    function = _foreign_function(error.diag.context or "") if is_ours else ""
    if _RAISES_FOR_CODE.fullmatch(error.diag.source_function or "") and (function or not is_ours):
        return f"raised {error.pgcode} in {function}" if function else f"raised {error.pgcode}"
    # A table of foreign code may have a constraint of the same name.
    constraint = error.diag.constraint_name if is_ours else None
    if error.pgcode == "57014" and _BY_REQUEST.search(str(error.diag.message_primary)):
        return "57014 user request"
    severe = f"{error.diag.severity_nonlocalized} {error.pgcode}"
    if meaning(severe) is not _REFUSED:
        return severe
    told = (f"{error.pgcode} {name}" for name in (constraint, error.diag.source_function))
    is_named = function and (f"{error.pgcode} in" in MEANINGS or meaning(error.pgcode) is _REFUSED)
    otherwise = f"{error.pgcode} in {function}" if is_named else error.pgcode
    return next((each for each in told if each in MEANINGS), otherwise)


def _foreign_function(context: str) -> str:
    """Return the innermost function that an error's context names; empty: there is none, or it belongs to s2s."""
    found = _FUNCTION.search(context)
    name = (found[1] or found[2]) if found else ""
    return "" if name.startswith("s2s.") or name in _OURS_IN_SQL else name


def of(error: BaseException) -> Meaning:
    """Return the meaning of an exception. For an exception without a SQLSTATE, the statement is at fault."""
    return meaning(code(error))
