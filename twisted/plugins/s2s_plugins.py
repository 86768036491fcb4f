"""What ``twistd`` finds: the two roles."""

import signal
import sys

from twisted.application.service import ServiceMaker

server = ServiceMaker("s2s server", "s2s.roles.server.tap", "The player-facing end of an s2s link.", "s2s-server")
engine = ServiceMaker("s2s engine", "s2s.roles.engine.tap", "The simulation's end of an s2s link.", "s2s-engine")

if {server.tapname, engine.tapname} & set(sys.argv):
    # Importing a role takes a second, in which these would kill it. s2s.roles.shutdown takes them when the options
    # are read.
    for _number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(_number, signal.SIG_IGN)
    from s2s.runtime import signals

    signals.reset()
