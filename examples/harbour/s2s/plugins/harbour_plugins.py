"""What s2s finds: one instance of each."""

from harbour import Dock, Tide

dock = Dock()
tide = Tide()
