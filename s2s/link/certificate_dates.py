"""The dates of certificates, against our clock: OpenSSL says neither."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final

from s2s.errors import harmless

_DATE: Final = "%Y-%m-%d %H:%MZ"


def why_invalid(certificates: Iterable[Any], now: datetime) -> str:
    """Say of the first certificate that is not valid now by its dates when it is; nothing where all are.

    :param certificates: as ``cryptography`` has them.
    :param now: the wall clock, with its time zone.
    """
    for each in certificates:
        begin, end = each.not_valid_before_utc, each.not_valid_after_utc
        if not begin <= now <= end:
            return (
                f"the certificate {harmless(each.subject.rfc4514_string())} is valid from {begin:{_DATE}} to"
                f" {end:{_DATE}}, and the clock of this machine says {now:{_DATE}}"
            )
    return ""
