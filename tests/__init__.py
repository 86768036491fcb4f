"""The tests: a directory for each package of :mod:`s2s`."""

from hypothesis import HealthCheck, settings
from twisted.trial import util

# How long an example takes says how busy the machine is.
settings.register_profile("s2s", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("s2s")
#: Seconds until trial ends a test: none depends on the speed of the machine.
util.DEFAULT_TIMEOUT_DURATION = 600.0
