"""The namespace in which other distributions put their plug-ins.

It works as :mod:`twisted.plugins` does.

Each ships a directory ``s2s/plugins/`` of its own, without an ``__init__.py``, and in it a module that is named after
itself and holds instances of its types; :mod:`s2s.handlers.discovery` finds them.
"""

from __future__ import annotations

from twisted.plugin import pluginPackagePaths

__path__.extend(pluginPackagePaths(__name__))
