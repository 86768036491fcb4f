"""The factory of links, and the set of a server's links (docs/protocol.rst, "Timers and bounds", "Identity")."""

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
from s2s.protocol.catalogue import BY_NAME, Catalogue
from s2s.protocol.limits import Bounds, Counters, Timing
from s2s.protocol.replay import ReplayCache
from s2s.protocol.session import Session
from s2s.protocol.signing import Keyring, Role
from s2s.runtime.clock import Clock
from s2s.runtime.line_quota import LineQuota
from s2s.runtime.status_log import LINK_UP, status_log

#: Maximum number of links at once, not counting those that are closing.
MAX_LINKS: Final = 1000
#: Maximum number of those links that have not received a valid frame yet.
MAX_SILENT: Final = 100
#: Maximum number of closing links, each of which may take some seconds. Above it, the oldest is cut.
MAX_CLOSING: Final = 100
#: Seconds between two lines about links of one engine that replace each other, which may happen many times a second.
TELL_S: Final = 60.0
#: Maximum lines in one minute about engines that came up, over all engines.
MOST_ENGINES_TOLD: Final = 100

_Identity = tuple[str | None, str | None]


@dataclass
class LinkFactory(Factory):
    """The factory of the links of one process, which share its replay cache and counters.

    :param role: our role.
    :param catalogue: the message types that we know.
    """

    role: Role
    dispatcher: Dispatcher
    keys: KeySource
    clock: Clock
    events: LinkEvents
    bounds: Bounds = field(default_factory=Bounds)
    timing: Timing = field(default_factory=Timing)
    counters: Counters = field(default_factory=Counters)
    catalogue: Catalogue = field(default_factory=lambda: BY_NAME)

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
                "requests signed by the key {key_id} are refused: the replay cache has no room for more of them:"
                " see which process sends them, or s2s keys revoke",
                key_id=key_id,
            )

    def tell_rest(self) -> None:
        """Log the counts of events of peers and strangers that had no line."""
        self.strangers.stop()
        self.peer_lines.stop()

    def configure(self, setting: Callable[[str], int]) -> None:
        """Apply the current settings to all existing and future links.

        :param setting: returns an integer setting's value.
        """
        timing, bounds = self.timing, self.bounds
        timing.idle, timing.check, timing.misses = map(setting, ("link.idle_s", "link.check_s", "link.misses"))
        timing.call = setting("link.call_s")
        bounds.window_frames, bounds.window_bytes = setting("link.window"), setting("link.window_kib") << 10
        self.replay.resize(setting("link.fresh_s"), self.clock.mono())

    def drop_revoked(self, links: Iterable[Link], keyring: Keyring) -> None:
        """Close the links whose peer last signed with a key that is not valid now (protocol, "Keys")."""
        for link in list(links):
            key_id = link.session.peer_key_id
            if key_id is not None and (why := keyring.why_inactive(key_id, self.clock.now())) is not None:
                link.close(f"the key {key_id} {why}")

    def buildProtocol(self, addr: IAddress | None) -> Link:
        """Return a link for one connection."""
        session = Session(self.role, self.replay, self.timing, self.bounds, self.clock.mono(), self.catalogue)
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

    :param at: when the link was proven, in monotonic seconds.
    :param is_told: whether the log has a line that the engine came up with this link.
    """

    link: Link
    at: float
    is_told: bool


class ServerLinks:
    """All links of a server, and the engines of the proven links.

    :param engine_up: called with the link of an engine that was just proven.
    :param engine_down: called when such a link has ended and no newer link has replaced it.
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
        #: The quota of lines for each engine that came up, the most recent engine last, and the quota for all engines.
        self._lines: dict[_Identity, LineQuota] = {}
        self._all_lines = LineQuota(clock.scheduler, self._tell_many, MOST_ENGINES_TOLD)
        #: The quota of lines about names that stand under several keys.
        self._twin_lines = LineQuota(clock.scheduler, self._tell_twins)
        #: By engine: the time of the last line about a replaced link, and the number of links replaced since. The
        #: engine whose link was replaced most recently is last.
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
        """Add a link; if a bound is reached, close another one, so that silent links or one key cannot block engines.

        The link to close is the oldest silent link of the network with the most silent links, so that a flood from one
        network closes no links of others. If no link is silent, it is the newest link of the key with the most links.
        """
        closing = [each for each in self._all if not each.session.is_open]
        if len(closing) >= MAX_CLOSING:
            self._counters.meet("links")
            self._cut(closing[0], closing[0].close_reason.text)
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
        """Cut a link and remove it at once, because over TLS its end could wait for the peer."""
        self._all.pop(link)
        link.abort(why)

    def _dismiss_of_most(self) -> None:
        """Close the newest link of the key that has the most links."""
        by_key = Counter(each.session.peer_key_id for each in self._all if each.session.is_open)
        [(key_id, count)] = by_key.most_common(1)
        newest = next(
            each for each in reversed(self._all) if each.session.is_open and each.session.peer_key_id == key_id
        )
        why = f"of {MAX_LINKS} links the key {key_id} has the most: {count}: find the process that opens them"
        if newest.may_tell(why):
            self.log.warn("{link}: closed: {why}", link=newest, why=why)
        newest.close_reason.is_logged = True
        newest.dismiss(Forbidden(why), why)

    def link_proven(self, link: Link) -> None:
        """Record the engine as up; its new link replaces its old one."""
        identity = _identity(link)
        # Remove the old entry first, so that the newest entry is last.
        old = self._engines.pop(identity, None)
        is_told = self._may_tell(identity) if old is None else self._replace(identity, old.link, link)
        self._engines[identity] = _Up(link, self._clock.mono(), is_told)
        if is_told:
            status_log.info("{line} {link} (key {key_id})", line=LINK_UP, link=link, key_id=link.session.peer_key_id)
        self._check_name(link)
        self._engine_up(link)

    def _check_name(self, link: Link) -> None:
        """Log an engine with the name of another process that is up under another key."""
        key_id, name = _identity(link)
        boot_id = link.peer.get("boot_id")
        others = [
            (key, up.link)
            for (key, other_name), up in self._engines.items()
            if other_name == name and key != key_id and (boot_id is None or up.link.peer.get("boot_id") != boot_id)
        ]
        if name and others and self._twin_lines.may_tell(harmless(name)):
            self.log.warn(
                "{link}: has the key {key_id} and the name of an engine that is up with the key {other}: if both run,"
                " each request to this name, such as pause or shutdown, goes to both: give each a --name of its own",
                link=link,
                key_id=harmless(str(key_id)),
                other=harmless(str(others[-1][0])),
            )

    def _tell_twins(self, untold: Mapping[str, int]) -> None:
        self.log.warn(
            "engines with the name of another engine that is up under another key: {told}: give each a --name of its"
            " own",
            told=", ".join(f"{count} as {name}" for name, count in untold.items()),
        )

    def _may_tell(self, identity: _Identity) -> bool:
        """Whether the log may have a line that an engine came up; an engine has a few such lines a minute."""
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
        """Close the old link of an engine, and return whether the log may have a line about that."""
        told_at, count = self._replaced.pop(identity, (-TELL_S, 0))
        is_told = self._clock.mono() >= told_at + TELL_S and self._all_lines.may_tell("up")
        if len(self._replaced) >= MAX_LINKS:
            del self._replaced[next(iter(self._replaced))]
        self._replaced[identity] = (self._clock.mono(), 0) if is_told else (told_at, count + 1)
        old.close_reason.is_logged |= not is_told
        boot_ids = {each.peer.get("boot_id") for each in (old, link)}
        # If neither link has a boot_id, only frames that still arrive on the old link distinguish another process from
        # a restart.
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
        named = "without a name" if name is None else f"as {harmless(str(name))}"
        taken = f"another process has linked {named} with this key: {cure}"
        old.dismiss(Forbidden(taken), "another process of the same name has a newer link")
        return is_told

    def link_lost(self, link: Link) -> None:
        """Remove the link, and log its end unless the log has a line about it."""
        self._all.pop(link, None)
        for identity, up in list(self._engines.items()):
            if up.link is link:
                del self._engines[identity]
                if up.is_told or self._clock.mono() >= up.at + TELL_S:
                    status_log.warn("engine down: {link}: {why}", link=link, why=link.close_reason.text)
                self._engine_down()
                return
        if not link.close_reason.is_logged and link.may_tell(link.close_reason.text):
            self.log.info("{link}: closed: {why}", link=link, why=link.close_reason.text)

    def close_all(self, why: str) -> None:
        """Close every link, and log the counts of events that had no line."""
        for lines in (*self._lines.values(), self._all_lines, self._twin_lines):
            lines.stop()
        for link in list(self._all):
            link.close(why)


def _identity(link: Link) -> _Identity:
    name = link.peer.get("name")
    return link.session.peer_key_id, name if isinstance(name, str) else None
