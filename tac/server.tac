"""``twistd -ny tac/server.tac``: the same as ``twistd -n s2s-server``, with every option from the environment (S2S_…)."""

from twisted.application.service import Application

from s2s.roles.server.tap import Options, makeService
from s2s.runtime import signals

signals.reset()
application = Application("s2s-server")
makeService(Options.from_environment()).setServiceParent(application)
