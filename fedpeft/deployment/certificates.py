"""Keys and certificates of a federation: an authority, the server's certificate, a key per site.

::

    ca.key, ca.crt       the authority: stays here, best on a machine that is off
    server/              to the server: its certificate and key, and who may join
        ca.crt, server.crt, server.key, sites/<name>.pub
    sites/<name>/        to the site: its key, and whom to believe that it is the server
        ca.crt, site.key

The server is known by its certificate (TLS), a site by the key that it signs its requests with,
which Flower calls node authentication. What exists is never overwritten.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as coded
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeft.deployment.files import load_certificate, load_key, names_in, read
from fedpeft.deployment.names import check_hosts, check_sites
from fedpeft.durable import create_file, make_private_folder
from fedpeft.errors import SiteError

AUTHORITY_DAYS = 3650
"""Days for which an authority is good."""
_CURVE = ec.SECP384R1
_EARLIER = datetime.timedelta(days=1)
"""By how much a certificate is older than it is: clocks differ."""
_HERE = ("localhost", "127.0.0.1", "::1")
"""Names by which processes on the server's machine reach it."""


def make(folder: Path, hosts: Sequence[str], sites: Sequence[str], days: int) -> Iterator[str]:
    """Make what is missing in ``folder``, and yield what was made, a line each.

    Without an authority there, one is made; ``hosts`` are the names and addresses by which sites
    reach the server, whose certificate is good for ``days``. Raises ``SiteError`` before anything
    is written where something asked for exists, or cannot be made.
    """
    check_hosts(hosts)
    check_sites(sites)
    if not hosts and not sites:
        raise SiteError("nothing to make: say --server HOST, --sites NAME,NAME or --owner NAME")
    server = folder / "server"
    if not (folder / "ca.crt").exists() and not hosts:
        raise SiteError(f"{folder}: holds no authority (ca.crt); say --server HOST to begin one")
    if hosts and (folder / "ca.crt").exists():
        _signer(folder)
    if hosts and (server / "server.crt").exists():
        known = load_certificate(server / "server.crt")
        raise SiteError(
            f"{server}: has a certificate for {', '.join(names_in(known))}, good until "
            f"{_day(known)}; move the folder away to make another with the same authority"
        )
    for site in sites:
        if (server / "sites" / f"{site}.pub").exists() or (folder / "sites" / site).exists():
            raise SiteError(
                f"{folder}: site {site} has a key; delete sites/{site}/ and server/sites/"
                f"{site}.pub to make another, and every copy of the latter"
            )
    if sites and not hosts and not server.is_dir():
        raise SiteError(
            f"{server}: is not here; put it back, or say --server HOST to make another one"
        )
    if not 1 <= days < AUTHORITY_DAYS:
        raise SiteError(f"--days {days} must be at least 1 and below {AUTHORITY_DAYS}")
    make_private_folder(folder)
    yield from _make_authority(folder)
    if hosts:
        yield from _make_server(folder, hosts, days)
    for site in sites:
        yield from _make_site(folder, site)


def _make_authority(folder: Path) -> Iterator[str]:
    if (folder / "ca.crt").exists():
        return
    key, now = _key_in(folder / "ca.key"), _now()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpeft authority")])
    made = (
        _begun(name, name, key, AUTHORITY_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False)
        .sign(key, hashes.SHA384())
    )
    create_file(folder / "ca.crt", made.public_bytes(coded.Encoding.PEM))
    yield f"{folder / 'ca.key'}: a new authority, good until {_day(made)}; keep it to yourself"


def _make_server(folder: Path, hosts: Sequence[str], days: int) -> Iterator[str]:
    authority, signer = load_certificate(folder / "ca.crt"), _signer(folder)
    now, place = _now(), folder / "server"
    if now + datetime.timedelta(days=days) > authority.not_valid_after_utc:
        left = (authority.not_valid_after_utc - now).days
        raise SiteError(f"--days {days}: its authority is good for {left} days more")
    root = (folder / "ca.crt").read_bytes()
    if (place / "ca.crt").exists() and read(place / "ca.crt") != root:
        raise SiteError(f"{place / 'ca.crt'}: is another authority's; move it away")
    for each in (place, place / "sites"):
        make_private_folder(each)
    key = _key_in(place / "server.key")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpeft server")])
    known = [_general(host) for host in dict.fromkeys([*hosts, *_HERE])]
    made = (
        _begun(name, authority.subject, key, days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(known), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False
        )
        .sign(signer, hashes.SHA384())
    )
    if not (place / "ca.crt").exists():
        create_file(place / "ca.crt", root)
    create_file(place / "server.crt", made.public_bytes(coded.Encoding.PEM))
    yield f"{place}: the server's, for {', '.join(hosts)}, good until {_day(made)}"


def _make_site(folder: Path, site: str) -> Iterator[str]:
    key, place = ec.generate_private_key(_CURVE()), folder / "sites" / site
    for each in (place.parent, place):
        make_private_folder(each)
    public = key.public_key().public_bytes(coded.Encoding.OpenSSH, coded.PublicFormat.OpenSSH)
    secret = key.private_bytes(
        coded.Encoding.PEM, coded.PrivateFormat.OpenSSH, coded.NoEncryption()
    )
    create_file(place / "ca.crt", (folder / "ca.crt").read_bytes())
    create_file(place / "site.key", secret)
    create_file(folder / "server" / "sites" / f"{site}.pub", public + f" {site}\n".encode())
    yield f"{place}: the site's; its key does not expire, and is taken back at the server"


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: int,
    now: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    """Return what a key is for: an authority signs certificates, a server handshakes."""
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_in(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key that a making which was cut short has left, else a new one, written there.

    A certificate follows its key, never the other way round: no key is ever thrown away.
    """
    if path.exists():
        return load_key(path)
    key = ec.generate_private_key(_CURVE())
    create_file(path, _pem(key))
    return key


def _signer(folder: Path) -> ec.EllipticCurvePrivateKey:
    """Return an authority's key. Raises ``SiteError`` where it was put away, or is another's."""
    place = folder / "ca.key"
    if not place.exists():
        raise SiteError(f"{place}: is not here; put it back to sign with it")
    key = load_key(place)
    if key.public_key() != load_certificate(folder / "ca.crt").public_key():
        raise SiteError(f"{place}: is not the key of ca.crt; put back the one that is")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(coded.Encoding.PEM, coded.PrivateFormat.PKCS8, coded.NoEncryption())


def _day(certificate: x509.Certificate) -> str:
    return certificate.not_valid_after_utc.date().isoformat()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
