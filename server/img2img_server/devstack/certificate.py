"""A certificate for mutual TLS between the parts of a server on loopback.

The part that listens and the part that connects present the same certificate, which is its own
authority. A local user or a web page that lacks the key cannot complete a handshake.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from img2img_server.devstack.files import write_private

# Every start writes a new certificate. A server that runs longer fails at its own connections.
VALID_FOR: Final = timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class Certificate:
    """The files of a certificate and its key, in PEM, with mode 600."""

    certificate: Path
    key: Path


def new_certificate(folder: Path, host: str) -> Certificate:
    """Writes a new key and its certificate for an IP address into `folder`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "img2img local servers")])
    now = datetime.now(UTC)
    usages = {"digital_signature": True, "key_cert_sign": True}
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    usages |= dict.fromkeys((*others, "crl_sign", "encipher_only", "decipher_only"), False)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # The clock may be set back.
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usages), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA256())
    )
    files = Certificate(folder / "tls.crt", folder / "tls.key")
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_private(files.key, pem.decode())
    write_private(files.certificate, certificate.public_bytes(Encoding.PEM).decode())
    return files
