"""``twistd -ny tac/engine.tac``: the same as ``twistd -n s2s-engine``, with every option from the environment (S2S_…)."""

from twisted.application.service import Application

from s2s.roles.engine.tap import Options, makeService
from s2s.runtime import signals

signals.reset()
application = Application("s2s-engine")
makeService(Options.from_environment()).setServiceParent(application)
