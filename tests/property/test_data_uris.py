"""Data URIs by the grammar of RFC 2397, against the handler of the standard library."""

from __future__ import annotations

import base64
import string
import tracemalloc
from urllib.parse import quote_from_bytes, unquote_to_bytes
from urllib.request import DataHandler, Request

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img2img_server.domain.data_uris import decode_base64, decode_data_uri, is_data_uri

TOKEN = st.text(string.ascii_letters + string.digits + "!$&'*+-.^_`|~", min_size=1, max_size=9)
QUOTED = st.text(string.ascii_letters + " ,;=/:", max_size=9).map(
    lambda text: f"%22{text.replace(' ', '%20')}%22"
)
PARAMETERS = st.lists(st.builds(";{}={}".format, TOKEN, TOKEN)).map("".join)
MEDIA_TYPES = st.one_of(st.just(""), st.builds("{}/{}".format, TOKEN, TOKEN))
SCHEMES = st.sampled_from(["data:", "DATA:", "Data:"])
FLAGS = st.sampled_from([";base64", ";BASE64", ";Base64", "; base64"])
SPACES = st.sampled_from(["", " ", "\n", "\r\n", "\t", "%0A", "%0d%0a", "%20"])


@given(MEDIA_TYPES, PARAMETERS, st.binary())
def test_percent_encoded_bytes_are_read_as_the_standard_library_reads_them(
    media_type: str, parameters: str, data: bytes
) -> None:
    text = f"data:{media_type}{parameters},{quote_from_bytes(data, safe='+;,/')}"
    assert decode_data_uri(text) == DataHandler().data_open(Request(text)).read() == data


@given(MEDIA_TYPES, PARAMETERS, st.binary())
def test_base64_is_read_as_the_standard_library_reads_it(
    media_type: str, parameters: str, data: bytes
) -> None:
    text = f"data:{media_type}{parameters};base64,{base64.b64encode(data).decode()}"
    assert decode_data_uri(text) == DataHandler().data_open(Request(text)).read() == data


@given(st.data(), st.binary())
def test_every_spelling_of_base64_gives_the_same_bytes(more: st.DataObject, data: bytes) -> None:
    quoted = more.draw(st.lists(QUOTED.map(";name={}".format)).map("".join))
    head = more.draw(SCHEMES) + more.draw(MEDIA_TYPES) + quoted + more.draw(FLAGS)
    encode = more.draw(st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]))
    text = encode(data).decode()
    if more.draw(st.booleans()):
        text = text.rstrip("=")
    for character in more.draw(st.sampled_from(["", "+/=", "+", "=-_"])):
        text = text.replace(character, f"%{ord(character):02{more.draw(st.sampled_from('xX'))}}")
    # The text is cut only between encoded characters.
    middle = 0 if "%" in text else len(text) // 2
    space = more.draw(SPACES)
    text = text[:middle] + space + text[middle:] + more.draw(SPACES)
    assert is_data_uri(head)
    assert decode_data_uri(f" {head},{text}#fragment") == data


@given(st.text())
def test_any_text_is_decoded_or_refused(text: str) -> None:
    for sent in (text, f"data:{text}", f"data:;base64,{text}", f"data:,{text}"):
        try:
            assert isinstance(decode_data_uri(sent), bytes)
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("data:,", b""),
        ("data:,A%20b", b"A b"),
        ("data:,a+b", b"a+b"),
        ("data:,a,b", b"a,b"),
        ("data:,%zz%4", b"%zz%4"),
        ("data:,ü", "ü".encode()),
        ("data:text/plain,AAAA", b"AAAA"),
        ("data:;base64,+/+/", b"\xfb\xff\xbf"),
        ("data:;base64,%2B%2F%2b%2f", b"\xfb\xff\xbf"),
        ("data:base64,AAAA", b"\0\0\0"),
        ("data:image/png;name=base64,AAAA", b"AAAA"),
        ("data:image/png;base64x,AAAA", b"AAAA"),
        ('data:image/png;name="a,b;base64,c";base64,AAAA', b"\0\0\0"),
        ("data:image/png;name=%22a,b%22,AAAA", b"AAAA"),
        ('data:image/png;name="a,AAAA', b"AAAA"),
        ("data:image/png;base64,AA AA", b"\0\0\0"),
    ],
)
def test_a_data_uri_is_split_by_its_grammar(text: str, data: bytes) -> None:
    assert decode_data_uri(text) == data


@pytest.mark.parametrize(
    "text", ["data:", "data:image/png;base64", "date:,", "data:;base64,A", "data:;base64,*"]
)
def test_what_is_no_data_uri_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"data URI|not base64"):
        decode_data_uri(text)


@pytest.mark.parametrize(
    "text", ["AAA=", "AAA", "AAA%3D", "AAA%3d%0A", " AA\nA=\t", "%41%41%41%3D"]
)
def test_base64_without_a_data_uri_is_read_in_every_spelling(text: str) -> None:
    assert decode_base64(text) == b"\0\0"


@pytest.mark.parametrize("text", ["A", "AA=A", "A*AA", "AAAAé", "AAAA\x00", "AAA%", "AAAA%00"])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not base64"):
        decode_base64(text)


@given(
    st.lists(st.sampled_from(["%", "%4", "%41", "%3D", "%0a", "=", "4", "\r", "\n", " ", "z", "ü"]))
)
def test_percent_signs_are_read_as_the_standard_library_reads_them(parts: list[str]) -> None:
    text = "z" + "".join(parts) + "z"  # White space around the data is dropped.
    assert decode_data_uri(f"data:,{text}") == unquote_to_bytes(text)


@pytest.mark.parametrize("text", ["%", "%4"])
def test_percent_signs_that_encode_nothing_take_no_time(text: str) -> None:
    assert decode_data_uri("data:," + text * 1000) == text.encode() * 1000
    with pytest.raises(ValueError, match="too many percent signs"):
        decode_data_uri("data:," + text * 10_000_000)


def test_percent_encoded_bytes_take_little_time_and_memory() -> None:
    tracemalloc.start()
    try:
        assert decode_data_uri("data:," + "%41" * 1_000_000) == b"A" * 1_000_000
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


def test_quotes_without_end_take_no_time() -> None:
    with pytest.raises(ValueError, match="without a comma"):
        decode_data_uri("data:" + '"%22' * 10_000_000)
