"""Whether a server is there and is the one that its authority says, before anything is sent."""

from __future__ import annotations

import datetime
import socket
import ssl
from pathlib import Path

from cryptography import x509

from fedpeft.deployment.files import load_certificate
from fedpeft.errors import SiteError

_REASONS = {
    9: "is not good yet: set the clocks of both machines",
    10: "is over: have another one made (fedpeft certs)",
    62: "is for other names: use one of them, or have one made for this name",
    64: "is for other addresses: use one of them, or have one made for this one",
}
"""OpenSSL's number of what is wrong with a certificate to what a user can do."""


class Unreachable(SiteError):
    """Nobody answers; somebody may later."""


def probe(host: str, port: int, authority: Path, seconds: float = 10.0) -> datetime.datetime:
    """Shake hands with a server as a site does; return until when its certificate is good.

    ``authority`` is the ``ca.crt`` that came with a site's key. Raises ``Unreachable`` where nobody
    answers, and another ``SiteError`` where who answers is not the server.
    """
    load_certificate(authority)
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.load_verify_locations(authority)
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        with (
            socket.create_connection((host, port), seconds) as opened,
            trust.wrap_socket(opened, server_hostname=host) as secured,
        ):
            found = secured.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        reason = _REASONS.get(error.verify_code, f"is not of the authority in {authority}")
        raise SiteError(f"{place}: its certificate {reason} ({error.verify_message})") from None
    except ssl.SSLError as error:
        raise SiteError(f"{place}: answers without TLS ({error.reason or error})") from None
    except TimeoutError:
        raise Unreachable(f"{place}: nobody answers within {seconds:g} seconds") from None
    except OSError as error:
        raise Unreachable(f"{place}: cannot be reached ({error.strerror or error})") from None
    return x509.load_der_x509_certificate(found or b"").not_valid_after_utc
