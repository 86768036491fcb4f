"""Error text with the dates of a certificate and our clock, neither of which OpenSSL's errors contain."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final

from s2s.errors import harmless

_DATE: Final = "%Y-%m-%d %H:%MZ"


def why_invalid(certificates: Iterable[Any], now: datetime) -> str:
    """Return a text with the dates of the first certificate that is expired or not valid yet, or "" if there is none.

    :param certificates: certificates of the library ``cryptography``.
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
