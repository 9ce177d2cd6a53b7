"""Who may submit runs: a run's owner signs plan and app, sites pin the owners' keys.

The key is Ed25519, in OpenSSH's format, as ``ssh-keygen -t ed25519`` has it. What is signed is a
canonical form of the run-config as nodes see it (the app's defaults under the run's own lines) and
the SHA-256 of the app bundle. A signature says what may run, not how often, nor until when.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as coded
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedpeft.deployment.files import read
from fedpeft.deployment.names import check_owner
from fedpeft.durable import create_file, make_private_folder
from fedpeft.errors import SiteError, printable
from fedpeft.types import Scalar

OWN = ("signature", "signer")
"""Keys of the run-config that hold the signature itself."""
FREE = ("out", "resume")
"""Keys that the server may change, as where it takes up a run that was cut short: in which of its
folders a run is kept and whether it goes on there. No node reads either."""
_DOMAIN = b"fedpeft run 1\n"
"""What begins the signed bytes: a signature made for anything else is none of a run."""
_Known: TypeAlias = "Mapping[str, tuple[Ed25519PublicKey, str]]"
_HASH = re.compile(r"[0-9a-f]{64}")


def make_owner(folder: Path, name: str) -> str:
    """Make an owner's key in ``folder/owners/name``; return a line about it.

    A key without its public half, as a full disk leaves one, is given it. Raises ``SiteError``
    where there is a key already, which stays as it is.
    """
    check_owner(name)
    place = folder / "owners" / name
    secret, public = place / "owner.key", place / "owner.pub"
    if public.exists():
        raise SiteError(
            f"{place}: {name} has a key; choose another name, or delete the folder and every copy "
            "of owner.pub that sites have"
        )
    for each in (folder, place.parent, place):
        make_private_folder(each)
    if secret.exists():
        key = _load_private(secret)
    else:
        key = Ed25519PrivateKey.generate()
        kept = key.private_bytes(
            coded.Encoding.PEM, coded.PrivateFormat.OpenSSH, coded.NoEncryption()
        )
        create_file(secret, kept)
    create_file(public, _in_openssh(key.public_key()) + f" {name}\n".encode())
    return f"{place}: {name}'s; owner.pub goes to sites, which name it in client.yaml (owners)"


def sign(key_path: Path, config: Mapping[str, Scalar], app_hash: str) -> tuple[str, str]:
    """Return ``signer`` and ``signature``, two values of the run-config.

    ``config`` is the whole run-config that nodes will see, with or without the two; ``app_hash``
    the SHA-256 of the app bundle, in hexadecimal. Raises ``SiteError`` for a file that holds no
    owner's key, or that others can read.
    """
    key = _load_private(key_path)
    made = key.sign(_canonical(config, app_hash))
    return _fingerprint(key.public_key()), f"{app_hash}:{base64.b64encode(made).decode()}"


def verify(config: Mapping[str, Scalar], app_hash: str | None, owners: Sequence[Path]) -> None:
    """Check that one of ``owners``, files of public keys, signed this run.

    ``app_hash`` is that of the bundle at hand; ``None`` where there is none at hand, as whoever
    unpacked it has checked it. Raises ``SiteError`` with the reason where nobody signed, or a
    stranger did, or plan or app are others than those that were signed.
    """
    _verify(config, app_hash, dict(map(_known, map(_load_public, owners))))


def verify_by(public: str, config: Mapping[str, Scalar], app_hash: str) -> None:
    """Check that who has the key of ``public``, a line of OpenSSH, signed this run.

    Raises ``SiteError`` as :func:`verify` does.
    """
    _verify(config, app_hash, dict([_known(_public_in(public.encode(), "its public key"))]))


def public_of(key_path: Path) -> str:
    """Return the public half of an owner's key as a line of OpenSSH. Raises ``SiteError``."""
    return _in_openssh(_load_private(key_path).public_key()).decode()


def _verify(config: Mapping[str, Scalar], app_hash: str | None, known: _Known) -> None:
    names = ", ".join(name for _, name in known.values())
    signer, signature = (str(config.get(key, "")) for key in ("signer", "signature"))
    if not signer or not signature:
        raise SiteError(
            f"the run is not signed, and this site takes only what its owners sign ({names}); "
            "submit it with --key"
        )
    if signer not in known:
        raise SiteError(
            f"the run is signed by {printable(signer[:60])}, none of this site's owners ({names})"
        )
    key, name = known[signer]
    signed, made = _parts(signature)
    if app_hash is not None and app_hash != signed:
        raise SiteError(
            f"the app (SHA-256 {app_hash[:12]}...) is not the one that {name} signed "
            f"({signed[:12]}...); submit it again with --key"
        )
    try:
        key.verify(made, _canonical(config, signed))
    except InvalidSignature:
        raise SiteError(
            f"the plan is not the one that {name} signed: a line was changed afterwards; submit it "
            "again with --key"
        ) from None


def hash_of(app: bytes) -> str:
    """Return the SHA-256 of an app bundle, in hexadecimal."""
    return hashlib.sha256(app).hexdigest()


def owner_of(path: Path) -> str:
    """Return an owner's name and fingerprint. Raises ``SiteError`` where the file holds no key."""
    key, name = _load_public(path)
    return f"{name} ({_fingerprint(key)})"


def _canonical(config: Mapping[str, Scalar], app_hash: str) -> bytes:
    """Return what is signed: numbers keep their kind, so that 1, 1.0 and true differ."""
    if not _HASH.fullmatch(app_hash):
        raise SiteError(f"{app_hash[:80]!r} is no SHA-256 of an app bundle")
    lines = {k: v for k, v in config.items() if k not in (*OWN, *FREE)}
    for name, value in lines.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float):
            raise SiteError(f"{name}: {value!r} is no text, number or truth value to sign")
    try:
        text = json.dumps({"app": app_hash, "run": lines}, sort_keys=True, allow_nan=False)
    except ValueError:
        raise SiteError("a run with a number that is none (nan, inf) cannot be signed") from None
    return _DOMAIN + text.encode()


def _parts(signature: str) -> tuple[str, bytes]:
    """Return which app was signed, and the signature proper."""
    app_hash, _, coded_form = signature.partition(":")
    try:
        made = base64.b64decode(coded_form, validate=True)
    except (binascii.Error, ValueError):
        made = b""
    whole = coded_form == base64.b64encode(made).decode()  # some other texts decode to the same
    if not whole or not _HASH.fullmatch(app_hash) or len(made) != 64:
        raise SiteError("the run's signature is damaged; submit it again with --key")
    return app_hash, made


def _load_private(path: Path) -> Ed25519PrivateKey:
    data = read(path, private=True)
    try:
        key = coded.load_ssh_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SiteError(
            f"{path}: is no owner's key (Ed25519, no passphrase); make one with fedpeft certs "
            "--owner NAME"
        )
    return key


def _known(found: tuple[Ed25519PublicKey, str]) -> tuple[str, tuple[Ed25519PublicKey, str]]:
    return _fingerprint(found[0]), found


def _load_public(path: Path) -> tuple[Ed25519PublicKey, str]:
    return _public_in(read(path), path)


def _public_in(data: bytes, path: Path | str) -> tuple[Ed25519PublicKey, str]:
    try:
        key = coded.load_ssh_public_key(data.strip())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SiteError(f"{path}: is no owner's public key (Ed25519), as owner.pub is")
    words = data.decode(errors="replace").split(maxsplit=2)
    return key, words[2].strip()[:60] if len(words) > 2 else Path(path).name


def _in_openssh(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(coded.Encoding.OpenSSH, coded.PublicFormat.OpenSSH)


def _fingerprint(key: Ed25519PublicKey) -> str:
    """Return a key's fingerprint as ``ssh-keygen -l`` shows it."""
    blob = base64.b64decode(_in_openssh(key).split()[1])
    return f"SHA256:{base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip('=')}"
