"""The console script and the operating system: variables, streams, signals and lost terminals."""

from __future__ import annotations

from tests.test_cli import CliTestCase


class EmptyTests(CliTestCase):
    """Options and variables that are there but empty: a deployment that failed to fill them in."""

    def refused(self, source: str, *argv: str, **variables: str) -> None:
        """See that a command is refused in one line that names the source."""
        said = self.s2s(*argv, expected=1, env=dict(variables)).output
        self.assertEqual(said.count("\n"), 1)
        self.assertIn(f"{source} is empty", said)

    def test_options(self) -> None:
        """An empty option is not taken for an absent one."""
        for option in ("--database", "--url", "--token-file", "--state-dir"):
            self.refused(option, "keys", "list", option, "")

    def test_variables(self) -> None:
        """Nor is an empty variable, of which the embedded database would be the consequence."""
        for variable in ("S2S_DATABASE_URL", "S2S_URL", "S2S_TOKEN_FILE", "S2S_STATE_DIR"):
            self.refused(variable, "keys", "list", **{variable: ""})
        self.refused("S2S_DATABASE_URL", "db", "status", S2S_DATABASE_URL=" ")

    def test_what_is_typed_goes_first(self) -> None:
        """A variable that is not needed may be empty."""
        self.s2s("keys", "list", "--database", self.url, env={"S2S_DATABASE_URL": ""})
