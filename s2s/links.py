"""Making links, and the server's links taken together (docs/protocol.rst, "Timers and bounds", "Identity")."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from s2s.clock import Clock
from s2s.dispatch import Dispatcher, KeySource
from s2s.errors import Forbidden, harmless
from s2s.limits import Bounds, Counters, Timing
from s2s.news import LINK_UP, news
from s2s.protocol import Link, LinkEvents
from s2s.replay import ReplayCache
from s2s.session import Session
from s2s.signing import Keyring, Role
from s2s.strangers import Strangers

MAX_LINKS: Final = 1000
#: Of them without a valid frame yet.
MAX_SILENT: Final = 100
#: Seconds between two lines about links of one engine that replace each other, which may happen many times a second.
TELL_S: Final = 60.0


_Identity = tuple[str | None, str | None]


@dataclass
class LinkFactory(Factory):
    """Makes the links of one process; they share its replay cache and counters.

    :param role: ours.
    """

    role: Role
    dispatcher: Dispatcher
    keys: KeySource
    clock: Clock
    events: LinkEvents
    bounds: Bounds = field(default_factory=Bounds)
    timing: Timing = field(default_factory=Timing)
    counters: Counters = field(default_factory=Counters)

    noisy = False

    def __post_init__(self) -> None:
        self.replay = ReplayCache(self.clock.mono(), on_full=lambda: self.counters.meet("replay_cache"))
        self.strangers = Strangers(self.clock, self.counters)

    def configure(self, setting: Callable[[str], int]) -> None:
        """Take the settings in force, for every link that there is and will be.

        :param setting: gives an integer setting's value.
        """
        timing, bounds = self.timing, self.bounds
        timing.idle, timing.check, timing.misses = map(setting, ("link.idle_s", "link.check_s", "link.misses"))
        timing.call = setting("link.call_s")
        bounds.window_frames, bounds.window_bytes = setting("link.window"), setting("link.window_kib") << 10
        self.replay.resize(setting("link.fresh_s"), self.clock.mono())

    def drop_revoked(self, links: Iterable[Link], keyring: Keyring) -> None:
        """Close the links whose peer signed last with a key that does not verify now (protocol, "Keys")."""
        for link in list(links):
            key_id = link.session.peer_key_id
            if key_id is not None and (why := keyring.why_inactive(key_id, self.clock.now())) is not None:
                link.close(f"the key {key_id} {why}")

    def buildProtocol(self, addr: IAddress | None) -> Link:
        """Make a link for one connection."""
        session = Session(self.role, self.replay, self.timing, self.bounds, self.clock.mono())
        link = Link(session, self.dispatcher, self.keys, self.clock, self.events, self.counters, self.strangers)
        link.factory = self
        return link


class ServerLinks:
    """Every link of a server, and the engines behind the proven ones.

    :param engine_up: called with the link of an engine that was just proven.
    :param engine_down: called when such a link is gone.
    :param mono: returns monotonic seconds.
    """

    log = Logger()

    def __init__(
        self,
        counters: Counters,
        engine_up: Callable[[Link], object],
        engine_down: Callable[[], object] = lambda: None,
        mono: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters = counters
        self._engine_up = engine_up
        self._engine_down = engine_down
        self._all: dict[Link, None] = {}
        self._engines: dict[_Identity, Link] = {}
        self._mono = mono
        #: When a replaced link of an engine was last told, and how many were replaced since; the oldest first.
        self._replaced: dict[_Identity, tuple[float, int]] = {}

    @property
    def engines(self) -> list[Link]:
        """One proven link for each engine, the newest last."""
        return list(self._engines.values())

    def __iter__(self) -> Iterator[Link]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def link_made(self, link: Link) -> None:
        """Keep both bounds; of the silent links one goes, so that silence cannot keep an engine out.

        It is the oldest one of the address that has the most: a flood from one address costs the others none.
        """
        if len(self._all) >= MAX_LINKS:
            self._counters.meet("links")
            link.close(f"there are {MAX_LINKS} links already")
            return
        silent = [each for each in self._all if each.session.is_open and not each.session.has_been_heard]
        if len(silent) >= MAX_SILENT:
            self._counters.meet("silent_links")
            [(crowd, _)] = Counter(each.network for each in silent).most_common(1)
            oldest = next(each for each in silent if each.network == crowd)
            oldest.close(f"{MAX_SILENT} newer links are as silent")
        self._all[link] = None

    def link_proven(self, link: Link) -> None:
        """Count the engine as up; its new link replaces its old one."""
        identity = _identity(link)
        # Taken out first: the newest stands last.
        old = self._engines.pop(identity, None)
        self._engines[identity] = link
        if old is None or self._replace(identity, old, link):
            news.info("{line} {link} (key {key_id})", line=LINK_UP, link=link, key_id=link.session.peer_key_id)
        self._engine_up(link)

    def _replace(self, identity: _Identity, old: Link, link: Link) -> bool:
        """Close the old link of an engine, and return whether it is time for a line about that."""
        told_at, count = self._replaced.pop(identity, (-TELL_S, 0))
        is_told = self._mono() >= told_at + TELL_S
        if len(self._replaced) >= MAX_LINKS:
            del self._replaced[next(iter(self._replaced))]
        self._replaced[identity] = (self._mono(), 0) if is_told else (told_at, count + 1)
        old.has_told |= not is_told
        if old.peer.get("boot_id") == link.peer.get("boot_id"):
            old.close("the same engine has a newer link")
            return is_told
        if is_told and old.session.is_open:
            self.log.warn(
                "{link}: replaces the link of another process, as {count} others did since it was last told; "
                "if both run, give each a --name",
                link=link,
                count=count,
            )
        name = harmless(str(link.peer.get("name")))
        taken = f"another process has linked as {name} with this key: give each a --name of its own"
        old.dismiss(Forbidden(taken), "another process of the same name has a newer link")
        return is_told

    def link_lost(self, link: Link) -> None:
        """Forget the link."""
        self._all.pop(link, None)
        for identity, each in list(self._engines.items()):
            if each is link:
                del self._engines[identity]
                news.warn("engine down: {link}: {why}", link=link, why=link.why)
                self._engine_down()
                return
        if not link.has_told and link.may_tell(link.why):
            self.log.info("{link}: closed: {why}", link=link, why=link.why)

    def close_all(self, why: str) -> None:
        """Close every link."""
        for link in list(self._all):
            link.close(why)


def _identity(link: Link) -> _Identity:
    name = link.peer.get("name")
    return link.session.peer_key_id, name if isinstance(name, str) else None
