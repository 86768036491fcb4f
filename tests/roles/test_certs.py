"""``s2s certs``: the files that it creates and keeps, and the requests that it refuses."""

from __future__ import annotations

import os
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path

from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from twisted.internet.endpoints import clientFromString
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from s2s.cli.certs import group as command
from s2s.errors import OperatorError
from s2s.roles import certs
from s2s.roles.endpoints import server_endpoint

_NOW = datetime(2026, 7, 1, 12, 30, 15, 999, tzinfo=timezone.utc)


class CertsTestCase(SynchronousTestCase):
    """A directory for certificates, which does not exist yet."""

    def setUp(self) -> None:
        """Choose the directory."""
        self.directory = Path(self.mktemp())

    def make(self, *engines: str, servers: tuple[str, ...] = (), days: int = 30, renew: bool = False) -> list[Path]:
        """Issue certificates."""
        return certs.make(self.directory, servers, engines, days, _NOW, renew=renew)

    def read(self, name: str) -> x509.Certificate:
        """Read a certificate."""
        return x509.load_pem_x509_certificate((self.directory / name).read_bytes())

    def contents(self) -> dict[str, bytes]:
        """Read every file."""
        files = (path for path in self.directory.rglob("*") if path.is_file())
        return {str(path.relative_to(self.directory)): path.read_bytes() for path in files}

    def refused(self, why: str, *engines: str, servers: tuple[str, ...] = (), days: int = 30) -> None:
        """Assert that no file is written, and that one line has the reason."""
        before = self.contents()
        error = self.assertRaises(OperatorError, self.make, *engines, servers=servers, days=days)
        self.assertIn(why, str(error))
        self.assertNotIn("\n", str(error))
        self.assertEqual(self.contents(), before)


class MakingTests(CertsTestCase):
    """The certificates and their files."""

    def test_files(self) -> None:
        """Directory and keys are accessible to the owner only, and the root is alone in the directory of trustRoots."""
        made = self.make("a", "b", servers=("localhost",))
        self.assertEqual([path.name for path in made], ["server.pem", "engine-a.pem", "engine-b.pem"])
        pairs = {f"{name}.{kind}" for name in ("server", "engine-a", "engine-b") for kind in ("key", "pem")}
        self.assertEqual(set(self.contents()), {*pairs, "ca.key", "roots/ca.pem"})
        self.assertEqual(self.directory.stat().st_mode & 0o777, 0o700)
        for key in self.directory.glob("*.key"):
            self.assertEqual(key.stat().st_mode & 0o777, 0o600)

    def test_root(self) -> None:
        """The root signs itself, and may sign leaves and nothing else."""
        self.make("a")
        root = self.read("roots/ca.pem")
        root.verify_directly_issued_by(root)
        constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
        self.assertTrue(constraints.critical)
        self.assertEqual((constraints.value.ca, constraints.value.path_length), (True, 0))
        usage = root.extensions.get_extension_for_class(x509.KeyUsage)
        self.assertTrue(usage.critical and usage.value.key_cert_sign)
        self.assertFalse(usage.value.digital_signature)

    def test_leaves(self) -> None:
        """Server and engine are signed by the root, each for its own side of TLS, for the requested days."""
        self.make("a", servers=("localhost",), days=7)
        root = self.read("roots/ca.pem")
        for name, usage in (("server", ExtendedKeyUsageOID.SERVER_AUTH), ("engine-a", ExtendedKeyUsageOID.CLIENT_AUTH)):
            leaf = self.read(f"{name}.pem")
            leaf.verify_directly_issued_by(root)
            self.assertEqual(list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value), [usage])
            constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
            self.assertEqual((constraints.critical, constraints.value.ca), (True, False))
            self.assertEqual(
                leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier,
                root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest,
            )
            self.assertEqual(leaf.not_valid_after_utc, _NOW.replace(microsecond=0) + timedelta(days=7))
            self.assertLess(leaf.not_valid_before_utc, _NOW - timedelta(minutes=5))
            key = serialization.load_pem_private_key((self.directory / f"{name}.key").read_bytes(), None)
            self.assertEqual(key.public_key(), leaf.public_key())

    def test_names(self) -> None:
        """The server's certificate has the host names and addresses, each once."""
        self.make(servers=("server.example", "192.0.2.1", "::1", "server.example"))
        names = self.read("server.pem").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        self.assertEqual(
            list(names),
            [
                x509.DNSName("server.example"),
                x509.IPAddress(ip_address("192.0.2.1")),
                x509.IPAddress(ip_address("::1")),
            ],
        )

    def test_the_authority_stays(self) -> None:
        """Later certificates are signed by the same authority, and existing files do not change."""
        self.make("a")
        before = self.contents()
        self.make("b", days=3650)
        after = self.contents()
        self.assertEqual({name: after[name] for name in before}, before)
        self.read("engine-b.pem").verify_directly_issued_by(self.read("roots/ca.pem"))

    def test_renew(self) -> None:
        """An existing certificate is replaced on request, with its key, and no other is."""
        self.make("a", "b")
        before = self.contents()
        self.refused("engine-a already: --renew", "a", "c")
        self.make("a", renew=True)
        after = self.contents()
        changed = {name for name in before if after[name] != before[name]}
        self.assertEqual(changed, {"engine-a.key", "engine-a.pem"})
        self.assertEqual(set(after), set(before))

    def test_two_authorities(self) -> None:
        """Two authorities have different names."""
        self.make("a")
        first = self.read("roots/ca.pem").subject
        self.directory = self.directory / "another"
        self.make("a")
        self.assertNotEqual(self.read("roots/ca.pem").subject, first)

    def test_after_a_crash(self) -> None:
        """Partial files of a killed run do not disturb the next run."""
        self.directory.mkdir()
        (self.directory / ".engine-a.key.new").write_text("half")
        self.make("a")
        self.assertNotIn(".engine-a.key.new", self.contents())


class RefusalTests(CertsTestCase):
    """Mistakes of the operator."""

    def test_names(self) -> None:
        """An empty request and invalid names are refused."""
        self.refused("name a --server or an --engine")
        for name in ("", "two words", "-a.example", "a_b", "bücher.example", "a" * 64, "a..b"):
            self.refused("neither a host name", servers=(name,))
        for name in ("", "../a", "a b", "a" * 57):
            self.refused("cannot be a file's", name)
        self.assertFalse(self.directory.exists())

    def test_half_an_authority(self) -> None:
        """A key without its root, or a root without its key, must be restored and is not created anew."""
        self.make("a")
        for name in ("ca.key", "roots/ca.pem"):
            (self.directory / name).rename(self.directory / "away")
            self.refused(f"{name} is missing", "b")
            (self.directory / "away").rename(self.directory / name)

    def test_a_wrong_authority(self) -> None:
        """A key that does not match, or is no key, is reported and not quoted."""
        self.make("a")
        key = self.directory / "ca.key"
        key.write_bytes((self.directory / "engine-a.key").read_bytes())
        self.refused("ca.key is not the key of", "b")
        key.write_text("no key")
        self.refused("ca.key cannot be read as PEM", "b")

    def test_the_end_of_the_authority(self) -> None:
        """A certificate never outlives its authority."""
        certs.make(self.directory, (), ("a",), 30, _NOW - timedelta(days=3600))
        self.refused("ends on 2026-08-20", "b", days=51)
        self.make("b", days=50)

    def test_no_directory(self) -> None:
        """A file in the place of the directory is named."""
        self.directory.write_text("")
        error = self.assertRaises(OperatorError, self.make, "a")
        self.assertIn(f"{self.directory} cannot be used", str(error))


class CommandTests(CertsTestCase):
    """The command line."""

    def certs(self, *argv: str, expected: int = 0) -> Result:
        """Run the command."""
        result = CliRunner().invoke(command, ["make", str(self.directory), *argv])
        self.assertEqual(result.exit_code, expected, result.output)
        return result

    def test_endpoints(self) -> None:
        """The command prints endpoint strings that both sides can read, for any directory."""
        self.directory = Path(self.mktemp()) / "a:b\\c"
        said = self.certs("--server", "::1", "--server", "localhost", "--engine", "a").output
        listen, connect = (line.split("'")[1] for line in said.splitlines() if "twistd" in line)
        self.assertTrue(connect.startswith("tls:localhost:4321:"), connect)
        server_endpoint(MemoryReactorClock(), listen)
        clientFromString(MemoryReactorClock(), connect)
        self.assertNotIn("PRIVATE", said)

    def test_one_line(self) -> None:
        """A mistake causes one line and exit code 1."""
        self.certs("--engine", "a")
        output = self.certs("--engine", "a", expected=1).output
        self.assertIn("--renew", output)
        self.assertEqual(output.count("\n"), 1)
        self.certs("--engine", "b", "--days", "0", expected=2)

    def test_umask(self) -> None:
        """Keys are readable by their owner only, whatever the umask is."""
        self.addCleanup(os.umask, os.umask(0))
        self.certs("--engine", "a")
        self.assertEqual((self.directory / "engine-a.key").stat().st_mode & 0o777, 0o600)
        self.assertEqual((self.directory / "ca.key").stat().st_mode & 0o777, 0o600)
