"""What is wrong with PEM files of certificates and keys, before a server or a channel gets them."""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key


def certificate_fault(content: bytes) -> str:
    """What is wrong with a file of PEM certificates, the end of a sentence; empty: nothing."""
    try:
        certificates = x509.load_pem_x509_certificates(content)
        for certificate in certificates:
            certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        certificates = []
    return "" if certificates else "has no certificate in PEM format"


def key_fault(content: bytes) -> str:
    """What is wrong with a file of a PEM key, the end of a sentence; empty: nothing."""
    try:
        load_pem_private_key(content, None)
    except TypeError:
        return "is encrypted: a key without a passphrase is needed (`openssl pkey` removes it)"
    except (ValueError, UnsupportedAlgorithm):
        return "has no private key in PEM format"
    return ""


def pair_fault(certificate: Path, key: Path) -> str:
    """What is wrong with a certificate and a key together, each of them without a fault; the end of
    a sentence about the key."""
    try:
        # Without a password OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"is not the key of {certificate}"
        return f"cannot be used with {certificate}: {error.reason or error}"
    except OSError as error:
        return f"or {certificate} cannot be read: {error.strerror}"
    return ""
