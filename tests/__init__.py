"""The tests: a directory for each package of :mod:`s2s`."""

from hypothesis import HealthCheck, settings
from twisted.trial import util

# No deadline for an example: its duration depends on the load of the machine.
settings.register_profile("s2s", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("s2s")
#: Timeout of trial for a test, in seconds: so long that no test depends on the speed of the machine.
util.DEFAULT_TIMEOUT_DURATION = 600.0
