"""Checks PEM files of certificates and keys before a server or a channel gets them.

OpenSSL decides whether a file is valid. `cryptography`, which is stricter, only finds the wrong one
of two files and the reason.
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from img2img_server.setting_files import read_bytes
from img2img_server.setting_names import variable
from img2img_server.settings import Settings, SettingsError

_NO_CERTIFICATE = "has no certificate in PEM format"
_NO_KEY = "has no private key in PEM format"
# X509_V_ERR_… codes of OpenSSL: the host name or address differs; the certificate has expired, or
# is not valid yet.
_OTHER_NAME = (62, 64)
_OUT_OF_TIME = (9, 10)


def trusted_fault(content: bytes) -> str:
    """Returns the fault of trusted certificates as the end of a sentence, or "" without a fault."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
            cadata=content.decode("ascii", errors="ignore")
        )
    except (ssl.SSLError, ValueError):
        return _NO_CERTIFICATE
    return ""


def read_trusted(settings: Settings, name: str) -> bytes:
    """Returns the trusted certificates in the file that a setting names.

    Raises:
        SettingsError: the file cannot be read or has no certificate.
    """
    content = settings.read_file(name)
    if fault := trusted_fault(content):  # gRPC would take any content.
        raise SettingsError(f"{variable(name)}: {getattr(settings, name)} {fault}")
    return content


def refused_certificate(error: ssl.SSLCertVerificationError, ca_setting: str) -> str:
    """Returns the fault of a server's certificate, as the end of a sentence.

    Args:
        ca_setting: The name of the setting with the trusted authorities.
    """
    why = error.verify_message.rstrip(".")
    if error.verify_code in _OTHER_NAME:
        return f"has a certificate for another host ({why}): use a name that is in the certificate"
    if error.verify_code in _OUT_OF_TIME:
        return f"has a certificate that is not valid now ({why}): renew it, or set the clock here"
    return f"has a certificate that is not trusted ({why}): name its authority in {ca_setting}"


def pair_faults(certificate: Path, key: Path) -> tuple[str, str]:
    """Returns the faults of a server's certificate and key file, as the ends of sentences;
    empty if there are none."""
    asked = False

    def password() -> str:
        nonlocal asked
        asked = True
        return ""

    try:
        # Without this function, OpenSSL would ask for a passphrase at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", "") or error)
    else:
        if not asked:
            return "", ""
    contents = read_bytes(certificate), read_bytes(key)
    faults = _certificate_fault(contents[0]), _key_fault(contents[1], asked)
    if any(faults):
        return faults
    if reason != "KEY_VALUES_MISMATCH":
        return f"cannot be used with {key}: {reason}", ""
    public = load_pem_private_key(contents[1], None).public_key()
    if any(each.public_key() == public for each in x509.load_pem_x509_certificates(contents[0])):
        return f"has the certificate of {key}, but not first: those of its issuers follow it", ""
    return "", f"is not the key of {certificate}"


def read_pair(settings: Settings, certificate: str, key: str) -> tuple[bytes, bytes]:
    """Returns the contents of the key and of the certificate that two settings name, in gRPC's
    order.

    Raises:
        SettingsError: a file cannot be read or used.
    """
    # The key is read first: while both are replaced, a new key may come with the old certificate,
    # which is refused here.
    contents = settings.read_file(key), settings.read_file(certificate)
    paths = getattr(settings, certificate), getattr(settings, key)
    if mistakes := [
        f"{variable(name)}: {path} {fault}"
        for name, path, fault in zip((certificate, key), paths, pair_faults(*paths), strict=True)
        if fault
    ]:
        raise SettingsError(*mistakes)
    return contents


def validity_fault(content: bytes) -> str:
    """Returns why the first certificate of a PEM file is not valid now, as the end of a sentence.

    Returns an empty text if it is valid or `cryptography` cannot read it.
    """
    try:
        certificate = x509.load_pem_x509_certificate(content)
    except ValueError:
        return ""
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc < now:
        return f"expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if certificate.not_valid_before_utc > now:
        return f"is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on only"
    return ""


def _certificate_fault(content: bytes) -> str:
    try:
        for certificate in x509.load_pem_x509_certificates(content):
            certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return _NO_CERTIFICATE
    return ""


def _key_fault(content: bytes, is_encrypted: bool) -> str:
    if is_encrypted:
        return "is encrypted: a key without a passphrase is needed (`openssl pkey` removes it)"
    try:
        load_pem_private_key(content, None)
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return _NO_KEY
    return ""
