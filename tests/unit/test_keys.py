"""API keys: hashed, with tenants and permissions, and read again when the file changes."""

import hashlib
import json
import os
import tempfile
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from img2img_server import clock
from img2img_server.__main__ import main
from img2img_server.api import keys
from img2img_server.api.keys import PERMISSIONS, KeyRing, Principal, new_key
from img2img_server.settings import SettingsError


def held(key: str, tenant: str, *permissions: str, rate_limit: int | None = None) -> Principal:
    """Returns the principal of a key with these permissions in a keys file."""
    if "manage" in permissions:
        permissions += ("operate", "storage")
    key_id = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Principal(tenant, frozenset(permissions), rate_limit, key_id)


def entry(key: str, tenant: str, permissions: str = "[]") -> str:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return f'[[keys]]\nsha256 = "{digest}"\ntenant = "{tenant}"\npermissions = {permissions}\n'


def test_a_key_opens_its_tenant_with_its_permissions(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry("k1", "shop", '["manage"]') + entry("k2", "lab"))
    ring = KeyRing(file, dev_key=False)
    assert ring.authenticate("k1") == held("k1", "shop", "manage")
    assert ring.authenticate("k2") == held("k2", "lab")
    assert ring.authenticate("k3") is None
    assert ring.authenticate("") is None


def test_a_made_key_works_with_its_entry_and_the_entry_does_not_hold_it(tmp_path: Path) -> None:
    key, line = new_key("shop", ["unsafe"])
    file = tmp_path / "keys.toml"
    file.write_text(line)
    assert key not in line
    assert KeyRing(file, dev_key=False).authenticate(key) == held(key, "shop", "unsafe")


def test_a_file_as_windows_tools_write_it_is_read(tmp_path: Path) -> None:
    """The file has a byte order mark, CRLF and digests in upper case."""
    digest = hashlib.sha256(b"k1").hexdigest().upper()
    file = tmp_path / "keys.toml"
    file.write_bytes(f'\ufeff[[keys]]\r\nsha256 = "{digest}"\r\ntenant = "shop"\r\n'.encode())
    assert KeyRing(file, dev_key=False).authenticate("k1") == held("k1", "shop")


@pytest.mark.parametrize("per_minute", [0, 60])
def test_a_key_may_have_a_rate_limit_of_its_own(per_minute: int, tmp_path: Path) -> None:
    key, line = new_key("shop", [], per_minute)
    file = tmp_path / "keys.toml"
    file.write_text(line)
    assert KeyRing(file, dev_key=False).authenticate(key) == held(
        key, "shop", rate_limit=per_minute
    )


def test_a_key_may_have_an_id_a_label_and_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = datetime(2027, 6, 30, 12, tzinfo=timezone(timedelta(hours=2)))
    key, line = new_key("shop", [], key_id="web-2", label='the "web" shop, ä', expire_time=end)
    file = tmp_path / "keys.toml"
    file.write_text(line)
    assert "expire_time = 2027-06-30T10:00:00Z" in line
    found = KeyRing(file, dev_key=False).authenticate(key)
    assert found is not None
    assert (found.key_id, found.label) == ("web-2", 'the "web" shop, ä')
    now = end.timestamp()
    monkeypatch.setattr(clock, "now", lambda: now)
    for seconds, expired in ((-1, False), (0, True), (1, True)):
        now = end.timestamp() + seconds
        assert found.has_expired is expired


@given(label=st.text(max_size=220), key_id=st.text(max_size=70), seconds=st.integers(0, 2**33))
def test_every_entry_that_is_made_can_be_read(label: str, key_id: str, seconds: int) -> None:
    end = datetime.fromtimestamp(seconds, UTC)
    try:
        key, line = new_key("shop", [], key_id=key_id, label=label, expire_time=end)
    except SettingsError:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "keys.toml")
        file.write_text(line)
        found = KeyRing(file, dev_key=False).authenticate(key)
    assert found is not None
    assert (found.label, found.expire_time) == (label, seconds)
    assert found.key_id == key_id or not key_id


def test_the_development_key_works_only_where_it_is_on() -> None:
    ring = KeyRing(None, dev_key=True)
    assert ring.authenticate("dev-key") == held("dev-key", "dev", *PERMISSIONS)
    off = KeyRing(None, dev_key=False)
    assert off.is_empty
    assert off.authenticate("dev-key") is None


def test_a_changed_file_is_read_again_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry("old", "shop"))
    ring = KeyRing(file, dev_key=False)
    file.write_text(entry("newer", "shop"))
    os.utime(file, ns=(1, 1))
    assert ring.authenticate("old") is None
    assert ring.authenticate("newer") == held("newer", "shop")


def test_a_file_that_becomes_readable_later_is_read_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> str:
        if path.stat().st_mode & 0o044 == 0:
            raise PermissionError(13, "Permission denied", str(path))
        return path.read_text()

    monkeypatch.setattr(keys, "read_text", read)  # The tests may run as root.
    file = tmp_path / "keys.toml"
    file.write_text(entry("old", "shop"))
    file.chmod(0o644)
    ring = KeyRing(file, dev_key=False)
    file.write_text(entry("newer", "shop"))
    file.chmod(0o600)
    assert ring.authenticate("old") is not None
    file.chmod(0o644)
    assert ring.authenticate("old") is None
    assert ring.authenticate("newer") is not None


TABLES = r"keys must be \[\[keys\]\] tables"
STRINGS = r"keys\[0\].permissions must be a list of any of manage, operate, storage, unsafe"
BROKEN = [
    (b"this is [no toml", "Expected"),
    (b'[keys]\ntenant = "shop"', TABLES),
    (b'keys = "shop"', TABLES),
    (b'keys = ["shop"]', TABLES),
    (b'[[keys]]\npermissions = "manage"', STRINGS),
    (b"[[keys]]\npermissions = [[]]", STRINGS),
    (b"[[keys]]\npermissions = 1", STRINGS),
    (b'[[keys]]\ntenant = "\xff"', r"no text in UTF-8 \(invalid start byte at byte 19\)"),
    (b"[[key]]", "key: there is no such name"),
    (b"[[keys]]\nid = 'A b'", r"keys\[0\].id must be a letter or digit .*; it is 'A b'"),
    (b"[[keys]]\nlabel = 'a\tb'", r"keys\[0\].label must be a text of at most 200"),
    (b"[[keys]]\nexpire_time = 2027-06-30", r"keys\[0\].expire_time must be a date and time"),
    (b"[[keys]]\nexpire_time = 2027-06-30T00:00:00", r"keys\[0\].expire_time must be a date and"),
    (
        (entry("a", "shop") + 'id = "x"\n' + entry("b", "lab") + 'id = "x"\n').encode(),
        r"keys\[1\].id is that of keys\[0\] too",
    ),
    (
        (entry("a", "shop") + entry("b", "lab") + entry("a", "x")).encode(),
        r"keys\[2\].sha256 is that of keys\[0\] too",
    ),
]


@pytest.mark.parametrize(("content", "said"), BROKEN)
def test_a_file_of_another_shape_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=said):
        KeyRing(file, dev_key=False)


@pytest.mark.parametrize("content", [content for content, _ in BROKEN])
def test_a_file_that_breaks_later_keeps_the_keys_that_worked(
    content: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry("k1", "shop"))
    ring = KeyRing(file, dev_key=False)
    file.write_bytes(content)
    assert ring.authenticate("k1") == held("k1", "shop")
    file.unlink()
    assert ring.authenticate("k1") == held("k1", "shop")


def test_a_wrong_file_is_refused_with_every_mistake(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        '[[keys]]\nsha256 = "short"\ntenant = "No Spaces"\npermissions = ["fly"]\n'
        "rate_limit = true\nrate = 5\n"
    )
    with pytest.raises(SettingsError) as caught:
        KeyRing(file, dev_key=False)
    text = str(caught.value)
    assert "keys[0].sha256 must be 64 hexadecimal digits" in text
    assert "keys[0].tenant must have 1 to 63" in text
    assert "it is 'No Spaces'" in text
    assert "keys[0].permissions must be a list" in text
    assert "it is 'fly'" in text
    assert "keys[0].rate: there is no such name" in text
    assert "keys[0].rate_limit must be an integer of at least 0" in text


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        KeyRing(tmp_path / "none.toml", dev_key=False)


def test_the_command_makes_a_key_with_its_rate_limit(tmp_path: Path) -> None:
    words = ["keys", "--tenant", "shop", "--permission", "storage", "--rate-limit", "60"]
    made = CliRunner().invoke(main, words)
    file = tmp_path / "keys.toml"
    file.write_text(made.stdout)
    key = made.stderr.split()[-1]
    assert KeyRing(file, dev_key=False).authenticate(key) == held(
        key, "shop", "storage", rate_limit=60
    )


TENANTS = st.one_of(
    st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
    st.text(max_size=70),
    st.sampled_from(["a b/c", "Shop_1", "", "-a", "a\n", 'a"b', "a" * 64, "ä", "a.b", "\u0661"]),
)


@given(
    tenant=TENANTS,
    permissions=st.lists(st.sampled_from([*sorted(PERMISSIONS), "fly", "Manage"]), max_size=2),
    rate_limit=st.none() | st.integers(-1, 2**70),
)
def test_a_key_is_made_exactly_where_an_api_takes_its_entry(
    tenant: str, permissions: list[str], rate_limit: int | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.toml"
        try:
            key, line = new_key(tenant, permissions, rate_limit)
        except SettingsError:
            digest = hashlib.sha256(b"k").hexdigest()
            limit = "" if rate_limit is None else f"\nrate_limit = {rate_limit}"
            line = f"[[keys]]\nsha256 = {json.dumps(digest)}\ntenant = {_toml(tenant)}\n"
            file.write_text(f"{line}permissions = {json.dumps(permissions)}{limit}", "utf-8")
            with pytest.raises(SettingsError):
                KeyRing(file, dev_key=False)
        else:
            file.write_text(line, "utf-8")
            ring = KeyRing(file, dev_key=False)
            assert ring.authenticate(key) == held(key, tenant, *permissions, rate_limit=rate_limit)


def _toml(text: str) -> str:
    """Returns the text in TOML: as in JSON, but without surrogates or an unescaped DEL."""
    return json.dumps(text).replace("\x7f", "\\u007f")


@pytest.mark.parametrize("tenant", ["a b/c", "Shop_1", "-shop", "", "ä"])
def test_the_command_refuses_a_tenant_that_an_api_refuses(tenant: str) -> None:
    found = CliRunner().invoke(main, ["keys", f"--tenant={tenant}"])
    assert (found.exit_code, found.stdout) == (2, "")
    rule = "tenant must have 1 to 63 of the characters a-z, 0-9 and -, and must not begin with -"
    assert f"{rule}; it is {tenant!r}" in found.stderr


def test_a_file_that_breaks_later_is_logged_once_with_the_entry_that_is_wrong(
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry("k1", "shop"))
    ring = KeyRing(file, dev_key=False)
    with capture_logs() as logs:
        file.write_text(entry("k1", "shop") + entry("k2", "Shop_1"))
        for _ in range(3):
            assert ring.authenticate("k1") == held("k1", "shop")
        assert ring.authenticate("k2") is None
        file.write_text("this is [no toml")
        ring.authenticate("k1")
        file.unlink()
        for _ in range(2):
            assert ring.authenticate("k1") == held("k1", "shop")
        file.write_text(entry("k3", "shop"))
        assert ring.authenticate("k3") == held("k3", "shop")
        assert ring.authenticate("k1") is None
    found = [(line["log_level"], line.get("error", "")) for line in logs]
    assert [level for level, _ in found] == ["error", "error", "error", "info"]
    for (_, error), part in zip(
        found, ["keys[1].tenant must have 1 to 63", "line 1", "No such file"], strict=False
    ):
        assert part in error
        assert str(file) in error
