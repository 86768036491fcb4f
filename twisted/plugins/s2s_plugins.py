"""What ``twistd`` finds: the two roles."""

from twisted.application.service import ServiceMaker

server = ServiceMaker("s2s server", "s2s.server_tap", "The player-facing end of an s2s link.", "s2s-server")
engine = ServiceMaker("s2s engine", "s2s.engine_tap", "The simulation's end of an s2s link.", "s2s-engine")
