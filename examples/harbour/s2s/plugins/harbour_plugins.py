"""The plug-ins that s2s finds: one instance of each class."""

from harbour import Dock, Tide

dock = Dock()
tide = Tide()
