"""What is wrong with a PEM certificate or key, before a server or a channel is given it."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)


def certificate_fault(content: bytes) -> str:
    """What is wrong with a file of PEM certificates, the end of a sentence; empty: nothing."""
    try:
        if x509.load_pem_x509_certificates(content):
            return ""
    except (ValueError, UnsupportedAlgorithm):
        pass
    return "has no certificate in PEM format"


def key_fault(content: bytes) -> str:
    """What is wrong with a file of a PEM key, the end of a sentence; empty: nothing."""
    try:
        load_pem_private_key(content, None)
    except TypeError:
        return "is encrypted: gRPC needs a key without a passphrase (`openssl pkey` removes it)"
    except (ValueError, UnsupportedAlgorithm):
        return "has no private key in PEM format"
    return ""


def fit(certificate: bytes, key: bytes) -> bool:
    """Whether the key is that of the first certificate. Both must be free of faults."""
    first = x509.load_pem_x509_certificates(certificate)[0]
    ours = load_pem_private_key(key, None).public_key()
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return first.public_key().public_bytes(*form) == ours.public_bytes(*form)
