"""How many files and sockets this process may have open."""

from __future__ import annotations

import resource

from s2s.links import MAX_LINKS
from s2s.web.site import MOST_CONNECTIONS

#: What else is open: the database, logs, pipes, what is just being closed.
_OTHERS = 500


def allow() -> None:
    """Raise the soft limit, often 1024, to what our own bounds need, as far as the hard one lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_LINKS + MOST_CONNECTIONS + _OTHERS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
