"""A private certificate authority for the links of one installation.

::

    DIR/                 created by this module; only its owner may enter
      roots/ca.pem       the root, alone in its directory: ``trustRoots`` of either side names this directory
      ca.key             the key of the root; no process needs it to run
      server.pem .key    for every name and address of the servers
      engine-NAME.pem .key
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from s2s.errors import OperatorError

T = TypeVar("T")

ROOTS: Final = "roots"
_CA_DAYS: Final = 3650
#: A certificate is valid from this long before its creation, because the clocks of two machines differ.
_BEFORE: Final = timedelta(hours=1)
#: A label has no underscore: Twisted does not connect to such a name over TLS.
_LABEL: Final = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
_HOST: Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
_ENGINE: Final = re.compile(r"[A-Za-z0-9_.-]{1,56}")


@dataclass(frozen=True)
class _Authority:
    """The certificate authority that signs."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


@dataclass(frozen=True)
class _Leaf:
    """A certificate to issue.

    :ivar file: the name of its files, without their suffixes.
    """

    file: str
    subject: str
    usage: ObjectIdentifier
    names: Sequence[x509.GeneralName] = ()


def make(
    directory: Path, servers: Sequence[str], engines: Sequence[str], days: int, now: datetime, *, renew: bool = False
) -> list[Path]:
    """Issue the requested certificates, and create the authority if there is none.

    :param servers: the host names and IP addresses under which engines reach the servers, all for one certificate.
    :param engines: the names of engines, each for a certificate of its own.
    :param days: the validity of the certificates in days.
    :param now: the time of the wall clock, with its time zone.
    :param renew: replace existing certificates; the authority stays.
    :returns: the files of the certificates.
    :raises OperatorError: the request cannot be granted, or a file cannot be used.
    """
    now = now.replace(microsecond=0)  # a certificate contains whole seconds only
    wanted = [_engine(name) for name in dict.fromkeys(engines)]
    if servers:
        wanted.insert(0, _server(servers))
    if not wanted:
        raise OperatorError("nothing is asked for: name a --server or an --engine")
    try:
        with _locked(directory):
            there = [
                leaf.file for leaf in wanted if _exists(directory / f"{leaf.file}.pem", directory / f"{leaf.file}.key")
            ]
            if there and not renew:
                raise OperatorError(f"{directory} has a certificate of {', '.join(there)} already: --renew replaces it")
            authority = _authority(directory, now)
            return [_issue(directory, leaf, authority, now, days) for leaf in wanted]
    except OSError as error:
        raise OperatorError(f"{error.filename or directory} cannot be used: {error.strerror}") from None


def _server(names: Sequence[str]) -> _Leaf:
    return _Leaf("server", "s2s server", ExtendedKeyUsageOID.SERVER_AUTH, [_general(n) for n in dict.fromkeys(names)])


def _engine(name: str) -> _Leaf:
    if not _ENGINE.fullmatch(name):
        raise OperatorError(f"the engine's name {name!r} cannot be a file's: take 1 to 56 of A-Z a-z 0-9 _ . -")
    return _Leaf(f"engine-{name}", f"engine {name}", ExtendedKeyUsageOID.CLIENT_AUTH)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        if not _HOST.fullmatch(name):
            raise OperatorError(
                f"{name!r} is neither a host name (ASCII letters, digits, - and .) nor an IP address"
            ) from None
        return x509.DNSName(name)


def _authority(directory: Path, now: datetime) -> _Authority:
    """Return the authority of a directory, and create it if there is none."""
    key_file, file = directory / "ca.key", directory / ROOTS / "ca.pem"
    if not _exists(key_file, file):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _root(key, now)
        _write_pair(key_file, key, file, certificate)
        return _Authority(key, certificate)
    for each, other in ((key_file, file), (file, key_file)):
        if not each.exists():
            raise OperatorError(f"{each} is missing, and {other} is worth nothing without it: bring it back")
    loaded = _load(key_file, lambda pem: serialization.load_pem_private_key(pem, None))
    certificate = _load(file, x509.load_pem_x509_certificate)
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != certificate.public_key():
        raise OperatorError(f"{key_file} is not the key of {file}: bring the right one back")
    return _Authority(loaded, certificate)


def _load(file: Path, load: Callable[[bytes], T]) -> T:
    try:
        return load(file.read_bytes())
    except (ValueError, TypeError):  # TypeError: the library needs a passphrase
        raise OperatorError(f"{file} cannot be read as PEM without a passphrase: bring the right one back") from None


def _root(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    # Each authority has a unique name, since OpenSSL would confuse two authorities with the same name.
    name = _name(f"s2s private CA {secrets.token_hex(4)}")
    builder = _builder(name, name, key, now, _CA_DAYS, ca=True)
    return builder.sign(key, hashes.SHA256())


def _issue(directory: Path, leaf: _Leaf, authority: _Authority, now: datetime, days: int) -> Path:
    """Sign one certificate with a new key, and write both."""
    end = authority.certificate.not_valid_after_utc
    if now + timedelta(days=days) > end:
        raise OperatorError(
            f"the authority in {directory} ends on {end:%Y-%m-%d}: take fewer --days, or make a new one elsewhere"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(_name(leaf.subject), issuer.subject, key, now, days, ca=False)
        .add_extension(x509.ExtendedKeyUsage([leaf.usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    )
    if leaf.names:
        builder = builder.add_extension(x509.SubjectAlternativeName(leaf.names), critical=False)
    file = directory / f"{leaf.file}.pem"
    _write_pair(directory / f"{leaf.file}.key", key, file, builder.sign(authority.key, hashes.SHA256()))
    return file


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, days: int, *, ca: bool
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


# --- files -----------------------------------------------------------------------------------------------------------


def _exists(*files: Path) -> bool:
    return any(os.path.lexists(file) for file in files)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Create the directory if it is missing, and lock it, so that two processes do not create two authorities."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (directory / ROOTS).mkdir(exist_ok=True)
        yield
    finally:
        os.close(handle)


def _write_pair(key_file: Path, key: ec.EllipticCurvePrivateKey, file: Path, certificate: x509.Certificate) -> None:
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(key_file, secret, 0o600)
    _write(file, certificate.public_bytes(pem), 0o644)


def _write(file: Path, content: bytes, mode: int) -> None:
    """Write a file completely or not at all. It has its final mode from the beginning."""
    # The temporary name does not end in .pem, since trustRoots would read such a file.
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    new.replace(file)
