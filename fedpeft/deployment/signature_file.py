"""A run signed where its owner's key is, in a file that is carried to the server's machine.

The file holds all that was signed: the run-config as nodes will see it, without where the server
keeps the run, and the SHA-256 of the app. It is no secret, and good for one run.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import fedpeft
from fedpeft.deployment.signing import FREE, OWN, hash_of, public_of, sign, verify_by
from fedpeft.durable import create_file
from fedpeft.errors import SiteError
from fedpeft.flower.config import Settings, check_settings, run_config
from fedpeft.json_lines import mapping
from fedpeft.plan import Plan
from fedpeft.types import Scalar


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """What an owner signed: ``config`` and the app of that SHA-256, of that version of fedpeft.

    ``public`` is the owner's public key, a line of OpenSSH, by which damage is noticed; it is no
    reason to trust the file.
    """

    fedpeft: str
    app: str
    config: Mapping[str, Scalar]
    signer: str
    signature: str
    public: str


def write_signed(path: Path, plan: Plan, settings: Settings, key: Path) -> Signed:
    """Sign a run of ``plan`` with an owner's key, and write it to ``path``.

    Paths in the plan are those of the server's machine, and stay as they are written. Raises
    ``FedPeftError`` where the file exists, which stays as it is, or the key cannot be used.
    """
    from fedpeft.flower.bundle import as_seen, bundle

    if path.exists():
        raise SiteError(f"{path}: exists, and is not overwritten; choose another --out")
    check_settings(plan, settings)
    app, settings = bundle(), replace(settings, run=secrets.token_hex(16))
    whole = run_config(plan, rooted=False) | asdict(settings)
    config = {k: v for k, v in whole.items() if k not in (*FREE, *OWN)}
    signer, signature = sign(key, as_seen(app, config), hash_of(app))
    made = Signed(
        fedpeft=fedpeft.__version__,
        app=hash_of(app),
        config=config,
        signer=signer,
        signature=signature,
        public=public_of(key),
    )
    create_file(path, (json.dumps(asdict(made), indent=1) + "\n").encode())
    return made


def load_signed(path: Path, app: bytes) -> Signed:
    """Read what :func:`write_signed` wrote, for a run with the bundle ``app``.

    Raises ``SiteError`` where it is none or was changed, or is for another app.
    """
    from fedpeft.flower.bundle import as_seen

    try:
        given: Mapping[str, Any] | None = mapping(path.read_bytes())
    except OSError as error:
        raise SiteError(f"{path}: cannot be read ({error.strerror})") from None
    names = {field.name for field in fields(Signed)}
    texts = names - {"config"}
    if (
        not given
        or set(given) != names
        or not isinstance(given["config"], dict)
        or not all(isinstance(given[name], str) for name in texts)
    ):
        raise SiteError(f"{path}: is no signature of a run; make one with fedpeft sign")
    found = Signed(**given)
    if found.app != hash_of(app):
        raise SiteError(
            f"{path}: is for the app of fedpeft {found.fedpeft[:40]} (SHA-256 {found.app[:12]}...) "
            f"and here is that of {fedpeft.__version__} ({hash_of(app)[:12]}...); install the same "
            "on both machines and sign again"
        )
    told = {"signer": found.signer, "signature": found.signature}
    try:
        verify_by(found.public, as_seen(app, {**found.config, **told}), found.app)
    except SiteError as error:
        raise SiteError(f"{path}: was changed since it was signed ({error})") from None
    return found


def check_same(path: Path, signed: Signed, plan: Plan, given: Mapping[str, Scalar]) -> None:
    """Raise ``SiteError`` where a file's signature is for another plan, or other settings.

    ``given`` are the settings that were asked for now. A path that means something only on this
    machine, because it is relative, is told, too: it would not be what was signed.
    """
    here = {**run_config(plan, rooted=False), **given}
    for name, value in here.items():
        if (was := signed.config.get(name)) != value or type(was) is not type(value):
            raise SiteError(
                f"{path}: is for another run: {name} was {was!r} where it was signed, and is "
                f"{value!r}; submit what was signed, or sign again (fedpeft sign)"
            )
    for name, value in run_config(plan).items():
        if here[name] != value:
            raise SiteError(
                f"{name}: {here[name]} has a path that is relative to this folder; write it as "
                f"{value}, and sign again (fedpeft sign)"
            )
