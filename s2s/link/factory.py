"""Making links, and the server's links taken together (docs/protocol.rst, "Timers and bounds", "Identity")."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from s2s.errors import Forbidden, harmless
from s2s.link.connection import Link, LinkEvents
from s2s.link.dispatcher import Dispatcher, KeySource
from s2s.link.peer_lines import FRAMES, PeerLines
from s2s.link.strangers import Strangers
from s2s.protocol.limits import Bounds, Counters, Timing
from s2s.protocol.replay import ReplayCache
from s2s.protocol.session import Session
from s2s.protocol.signing import Keyring, Role
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import LineQuota
from s2s.runtime.status_log import LINK_UP, status_log

#: Links at once, without those that are closing.
MAX_LINKS: Final = 1000
#: Of them without a valid frame yet.
MAX_SILENT: Final = 100
#: Links that are closing, which may take some seconds each; of more the oldest is cut.
MAX_CLOSING: Final = 100
#: Seconds between two lines about links of one engine that replace each other, which may happen many times a second.
TELL_S: Final = 60.0
#: Engines of which the log says in one minute, each with a few lines, that they came up.
MOST_ENGINES_TOLD: Final = 100

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
    log = Logger()

    def __post_init__(self) -> None:
        self.replay = ReplayCache(self.clock.mono(), on_full=self._replay_is_full)
        self.strangers = Strangers(self.clock, self.counters)
        self.peer_lines = PeerLines(self.clock)

    def _replay_is_full(self, key_id: str) -> None:
        self.counters.meet("replay_cache")
        if self.peer_lines.may_tell(f"the key {key_id}", FRAMES, "the replay cache has no room"):
            self.log.warn(
                "requests signed by the key {key_id} are refused: it has sent so many that the replay cache has no room"
                " for more of it: see which process sends them, or s2s keys revoke",
                key_id=key_id,
            )

    def tell_rest(self) -> None:
        """Tell of peers and strangers what had no line yet."""
        self.strangers.stop()
        self.peer_lines.stop()

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
        link = Link(
            session,
            self.dispatcher,
            self.keys,
            self.clock,
            self.events,
            self.counters,
            self.strangers,
            self.peer_lines,
        )
        link.factory = self
        return link


@dataclass(frozen=True)
class _Up:
    """The newest proven link of an engine.

    :param at: when it was proven, in monotonic seconds.
    :param is_told: the log says that the engine came up by it.
    """

    link: Link
    at: float
    is_told: bool


class ServerLinks:
    """Every link of a server, and the engines behind the proven ones.

    :param engine_up: called with the link of an engine that was just proven.
    :param engine_down: called when such a link is gone.
    """

    log = Logger()

    def __init__(
        self,
        counters: Counters,
        clock: Clock,
        engine_up: Callable[[Link], object],
        engine_down: Callable[[], object] = lambda: None,
    ) -> None:
        self._counters = counters
        self._engine_up = engine_up
        self._engine_down = engine_down
        self._all: dict[Link, None] = {}
        self._engines: dict[_Identity, _Up] = {}
        self._clock = clock
        #: The lines about each engine that came up, the one that came up last at the end, and those about all.
        self._lines: dict[_Identity, LineQuota] = {}
        self._all_lines = LineQuota(clock.scheduler, self._tell_many, MOST_ENGINES_TOLD)
        #: When a replaced link of an engine was last told, and how many were replaced since; the oldest first.
        self._replaced: dict[_Identity, tuple[float, int]] = {}

    @property
    def engines(self) -> list[Link]:
        """One proven link for each engine, the newest last."""
        return [up.link for up in self._engines.values()]

    def __iter__(self) -> Iterator[Link]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def link_made(self, link: Link) -> None:
        """Keep the bounds: one link goes for a new one, so that neither silence nor one key can keep an engine out.

        Of the silent links it is the oldest one of the address that has the most: a flood from one address costs the
        others none. Without a silent one it is the newest of the key that has the most.
        """
        closing = [each for each in self._all if not each.session.is_open]
        if len(closing) >= MAX_CLOSING:
            self._counters.meet("links")
            self._cut(closing[0], closing[0].why)
        silent = [each for each in self._all if each.session.is_open and not each.session.has_been_heard]
        is_full = len(self._all) - len(closing) >= MAX_LINKS
        if len(silent) >= MAX_SILENT or (silent and is_full):
            [(crowd, _)] = Counter(each.network for each in silent).most_common(1)
            oldest = next(each for each in silent if each.network == crowd)
            self._counters.meet("silent_links")
            self._cut(oldest, f"{len(silent)} newer links are as silent")
        elif is_full:
            self._counters.meet("links")
            self._dismiss_of_most()
        self._all[link] = None

    def _cut(self, link: Link, why: str) -> None:
        """Cut a link at once, which takes no place from now on: over TLS its end could wait for the peer."""
        self._all.pop(link)
        link.abort(why)

    def _dismiss_of_most(self) -> None:
        """Close the newest link of the key that has the most of them."""
        by_key = Counter(each.session.peer_key_id for each in self._all if each.session.is_open)
        [(key_id, count)] = by_key.most_common(1)
        newest = next(
            each for each in reversed(self._all) if each.session.is_open and each.session.peer_key_id == key_id
        )
        why = f"of {MAX_LINKS} links the key {key_id} has the most: {count}; see which of its processes opens so many"
        if newest.may_tell(why):
            self.log.warn("{link}: closed: {why}", link=newest, why=why)
        newest.has_told = True
        newest.dismiss(Forbidden(why), why)

    def link_proven(self, link: Link) -> None:
        """Count the engine as up; its new link replaces its old one."""
        identity = _identity(link)
        # Taken out first: the newest stands last.
        old = self._engines.pop(identity, None)
        is_told = self._may_tell(identity) if old is None else self._replace(identity, old.link, link)
        self._engines[identity] = _Up(link, self._clock.mono(), is_told)
        if is_told:
            status_log.info("{line} {link} (key {key_id})", line=LINK_UP, link=link, key_id=link.session.peer_key_id)
        self._engine_up(link)

    def _may_tell(self, identity: _Identity) -> bool:
        """Return whether the log may have a line about an engine that came up; a few times in a minute, it may."""
        lines = self._lines.pop(identity, None) or LineQuota(
            self._clock.scheduler, lambda untold: self._tell_often(identity, sum(untold.values()))
        )
        if len(self._lines) >= MAX_LINKS:
            self._lines.pop(next(iter(self._lines))).stop()
        self._lines[identity] = lines
        return lines.may_tell("up") and self._all_lines.may_tell("up")

    def _tell_often(self, identity: _Identity, count: int) -> None:
        key_id, name = identity
        if not self._all_lines.may_tell("up", count):
            return
        self.log.warn(
            "engine {name} (key {key_id}) came up {count} more times, and is {state} now: it may close each link right"
            " after it was proven: see its log",
            name=harmless(str(name)),
            key_id=key_id,
            count=count,
            state="up" if identity in self._engines else "down",
        )

    def _tell_many(self, untold: Mapping[str, int]) -> None:
        self.log.warn(
            "engines came up {count} more times: s2s engine list shows those that are up", count=sum(untold.values())
        )

    def _replace(self, identity: _Identity, old: Link, link: Link) -> bool:
        """Close the old link of an engine, and return whether it is time for a line about that."""
        told_at, count = self._replaced.pop(identity, (-TELL_S, 0))
        is_told = self._clock.mono() >= told_at + TELL_S and self._all_lines.may_tell("up")
        if len(self._replaced) >= MAX_LINKS:
            del self._replaced[next(iter(self._replaced))]
        self._replaced[identity] = (self._clock.mono(), 0) if is_told else (told_at, count + 1)
        old.has_told |= not is_told
        boot_ids = {each.peer.get("boot_id") for each in (old, link)}
        # Without a boot_id nothing tells a restart from another process but a link over which frames still come.
        is_same = old.session.is_checking if boot_ids == {None} else len(boot_ids) == 1
        if is_same:
            old.close("the same engine has a newer link")
            return is_told
        foreign = "give each a name of its own, and a boot_id, in its health ack"
        cure = foreign if boot_ids == {None} else "give each a --name of its own"
        if is_told and old.session.is_open:
            self.log.warn(
                "{link}: replaces the link of another process, as {count} others did since it was last told; "
                "if both run, {cure}",
                link=link,
                count=count,
                cure=cure,
            )
        name = link.peer.get("name")
        who = "without a name" if name is None else f"as {harmless(str(name))}"
        taken = f"another process has linked {who} with this key: {cure}"
        old.dismiss(Forbidden(taken), "another process of the same name has a newer link")
        return is_told

    def link_lost(self, link: Link) -> None:
        """Forget the link."""
        self._all.pop(link, None)
        for identity, up in list(self._engines.items()):
            if up.link is link:
                del self._engines[identity]
                if up.is_told or self._clock.mono() >= up.at + TELL_S:
                    status_log.warn("engine down: {link}: {why}", link=link, why=link.why)
                self._engine_down()
                return
        if not link.has_told and link.may_tell(link.why):
            self.log.info("{link}: closed: {why}", link=link, why=link.why)

    def close_all(self, why: str) -> None:
        """Close every link, and tell what had no line yet."""
        for lines in (*self._lines.values(), self._all_lines):
            lines.stop()
        for link in list(self._all):
            link.close(why)


def _identity(link: Link) -> _Identity:
    name = link.peer.get("name")
    return link.session.peer_key_id, name if isinstance(name, str) else None
