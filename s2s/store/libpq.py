"""The environment variables of libpq, as they were when this process started.

libpq reads them at every connect. A plug-in may set some for its own use, such as for a ``pg_dump``, and our later
connections would then use them too. Every parameter that has a variable is therefore passed explicitly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

import psycopg2
from psycopg2.extensions import libpq_version, parse_dsn


def _password_file() -> str:
    """Return libpq's password file; empty if the path is not UTF-8 and fits no parameter: libpq finds it itself."""
    path = os.path.expanduser("~/.pgpass")
    try:
        path.encode()
    except UnicodeEncodeError:
        return ""
    return path


#: libpq's default for each parameter if its variable is not set. An empty text here means the same as no value.
_DEFAULTS: Final = {
    **dict.fromkeys(("host", "hostaddr", "port", "dbname", "user", "password", "options"), ""),
    **dict.fromkeys(("sslcert", "sslkey", "sslrootcert", "sslcrl", "sslcrldir", "ssl_max_protocol_version"), ""),
    **dict.fromkeys(("requirepeer", "gsslib"), ""),
    # All methods, because an empty text allows none.
    "require_auth": f"password,md5,gss,sspi,scram-sha-256,none{',oauth' if libpq_version() >= 180_000 else ''}",
    "passfile": _password_file(),
    "sslmode": "prefer",
    "sslnegotiation": "postgres",
    "sslcompression": "0",
    "sslcertmode": "allow",
    "sslsni": "1",
    "ssl_min_protocol_version": "TLSv1.2",
    "gssencmode": "prefer",
    "gssdelegation": "0",
    "krbsrvname": "postgres",
    "channel_binding": "prefer",
    "target_session_attrs": "any",
    "load_balance_hosts": "disable",
    # From libpq 18 on.
    "min_protocol_version": "3.0",
    "max_protocol_version": "3.0",
}
#: Defaults that depend on another parameter: the parameter, the other parameter, its value, and the default in that
#: case.
_DEPENDENT: Final = (
    ("sslmode", "sslrootcert", "system", "verify-full"),
    ("max_protocol_version", "min_protocol_version", "3.2", "latest"),
    ("max_protocol_version", "min_protocol_version", "latest", "latest"),
)


def _is_known(name: str) -> bool:
    """Whether the installed version of libpq has a parameter."""
    try:
        parse_dsn(f"{name}=''")
    except psycopg2.ProgrammingError:
        return False
    return True


_KNOWN: Final = {name: default for name, default in _DEFAULTS.items() if _is_known(name)}


class Environment:
    """The connection parameters set by environment variables.

    :param variables: the environment; the variables of libpq are copied.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._has_service = "PGSERVICE" in variables
        named = {name: f"PG{name.replace('_', '').upper()}" for name in _KNOWN} | {"dbname": "PGDATABASE"}
        self._set = {name: variables[variable] for name, variable in named.items() if variable in variables}
        if variables.get("PGREQUIRESSL", "").startswith("1"):
            self._set.setdefault("sslmode", "require")

    def parameters(self, given: Mapping[str, str]) -> dict[str, str]:
        """Return the values of the variables, and libpq's default for each parameter whose variable is not set.

        :param given: the parameters of a URL, on which some defaults depend.
        :returns: empty if a service of libpq is named, because the service then sets the parameters.
        """
        if self._has_service or "service" in given:
            return {}
        said = {**self._set, **given}
        changed = {name: then for name, other, value, then in _DEPENDENT if name in _KNOWN and said.get(other) == value}
        return {**_KNOWN, **changed, **self._set}


AT_START: Final = Environment(os.environ)
