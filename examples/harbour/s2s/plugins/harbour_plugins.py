"""The plug-ins that s2s finds: instances, one a name."""

from harbour import Close, Dock, Docked, Tide

from s2s import Migrations, Report, Setting

migrations = Migrations(schema="harbour", package="harbour")
berths = Setting("harbour.berths", 40, "ships that may stay at the turn of the tide", least=0, most=1000)
dock = Dock()
tide = Tide()
close = Close()
docked = Report(
    name="harbour.docked",
    summary="Show the state of the harbour and count its ships",
    row=Docked,
    query="select state, (select count(*) from harbour.docked) from harbour.state",
)
