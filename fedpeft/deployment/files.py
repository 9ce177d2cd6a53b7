"""Keys and certificates as files: who may read them, and what is in them."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization as coded
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.errors import SiteError


def load_certificate(path: Path) -> x509.Certificate:
    """Read a certificate in PEM. Raises ``SiteError`` where there is none."""
    try:
        return x509.load_pem_x509_certificate(read(path))
    except ValueError:
        raise SiteError(f"{path}: is no certificate (PEM)") from None


def names_in(certificate: x509.Certificate) -> list[str]:
    """Return the names and addresses that a certificate is for; none where it says none."""
    try:
        kind = x509.SubjectAlternativeName
        return [str(n.value) for n in certificate.extensions.get_extension_for_class(kind).value]
    except x509.ExtensionNotFound:
        return []


def read(path: Path, *, private: bool = False) -> bytes:
    """Read a file; one that is ``private`` nobody but its owner may be able to read.

    Raises ``SiteError`` where it is missing or cannot be read, or others can read it.
    """
    try:
        if private and (mode := path.stat().st_mode & 0o077):
            raise SiteError(
                f"{path}: others than its owner may use it (mode {path.stat().st_mode & 0o777:o}, "
                f"{'readable' if mode & 0o044 else 'writable'}); say chmod 600 {path}"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise SiteError(f"{path}: no such file; see fedpeft certs") from None
    except OSError as error:
        if isinstance(error, SiteError):
            raise
        raise SiteError(f"{path}: cannot be read ({error.strerror})") from None


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key of ours in PEM. Raises ``SiteError`` where there is none."""
    try:
        key = coded.load_pem_private_key(read(path, private=True), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise SiteError(f"{path}: is no key that fedpeft certs has made")
    return key
