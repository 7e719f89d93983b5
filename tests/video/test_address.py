"""Secrets in addresses are never shown."""

from __future__ import annotations

import pytest

from ttt_adapt.video.address import redacted


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://user:pw@10.0.0.5:554/h264?channel=1&token=abc", "rtsp://***@10.0.0.5:554/h264?channel=***&token=***"),
        ("rtsp://user@h/x", "rtsp://***@h/x"),
        ("HTTP://U:P@H/", "HTTP://***@H/"),
        ("http://u:p@[::1]:80/a", "http://***@[::1]:80/a"),
        ("http://h/x?abcdef", "http://h/x?***"),
        ("http://h/x#access_token=5&b=7", "http://h/x#access_token=***&b=***"),
        ("https://h/a;session=abc/x.m3u8", "https://h/a;session=***"),
        ("srt://h:9?passphrase=abc&streamid=x", "srt://h:9?passphrase=***&streamid=***"),
        ("rtmp://h/live2/KEY-1", "rtmp://h/live2/***"),
        ("http://h/p?mail=a@b", "http://h/p?mail=***"),
        ("http://h/user=admin_password=tlJwpbo6_channel=1_stream=0.sdp", "http://h/user=***"),
        ("rtsp://h:554/user=admin&password=x&channel=1", "rtsp://h:554/user=***&password=***&channel=***"),
        ("http://h/token=ab_cd/ef==?x=y", "http://h/token=***?x=***"),
        ("rtsp://h/x?token=k v", "rtsp://h/x?token=***"),
        ("rtsp://h/x?token=a b&c=d e", "rtsp://h/x?token=***&c=***"),
        ("user:se cret@127.0.0.1/x", "***@127.0.0.1/x"),
        ("async:rtsp://u:p@h/x", "async:rtsp://***@h/x"),
    ],
)
def test_the_login_and_the_values_of_a_query_are_hidden(address, shown):
    assert redacted(address) == shown


@pytest.mark.parametrize("password", ["p@ss", "p/s", "p?s#", "p w", "12/34", "p:w", "p%40w", "a@b/c@d", ""])
@pytest.mark.parametrize("scheme", ["rtsp://", "http://", "rtsp:/", "srt://", ""])
def test_a_password_that_should_have_been_encoded_is_hidden_too_and_so_is_one_without_a_scheme(scheme, password):
    assert redacted(f"{scheme}admin:{password}@cam.local/x") == f"{scheme}***@cam.local/x"


@pytest.mark.parametrize(
    "text",
    [
        "clip.mp4", "a@b.mp4", "cam:1.mp4", "0", "/data/2024:01 a@b.mp4", "rtsp://10.0.0.5:554/a", "http://h/a@b.mp4",
        "http://[::1]/a@b.mp4", "[b] c:d.mkv", "error: lr is 5; expected less, see x = 5",
    ],
)  # fmt: skip
def test_what_has_no_secret_stays_as_it_is(text):
    assert redacted(text) == text


def test_addresses_inside_of_a_message_lose_their_secrets():
    text = "cannot open 'rtsp://u:p@h/x?a=b' nor (http://u:p@h:8/y)"
    assert redacted(text).count("***") == 3
    assert "u:p" not in redacted(text)
    assert "a=b" not in redacted(text)


@pytest.mark.parametrize("around", ["cannot open '{}': nope", 'in "{}", line 1', "{}", "see {} now"])
@pytest.mark.parametrize("address", ["rtsp://u:pa ss@h/x", "http://h/user=u_password=pa ss", "user:pa ss@h", "u:pa@h"])
def test_a_known_source_is_hidden_wherever_a_message_has_it(around, address):
    text = redacted(around.format(address), [address, "x", ""])
    assert text == around.format(redacted(address))
    assert "pa" not in text.replace("password", "")


@pytest.mark.parametrize("text", ["open rtsp://u:pa ss@h/x now", "open 'rtsp://u:pa ss@h/x' now", "see u:pa@h now"])
def test_a_password_with_a_space_is_hidden_inside_of_a_message(text):
    assert "pa" not in redacted(text)
    assert redacted(text).endswith(" now")


@pytest.mark.parametrize("address", ["rtsp://u:p@h/x?a=b", "http://h/x?k=v", "http://h/a=b", "rtmp://h/app/key"])
def test_what_a_message_says_behind_a_hidden_address_stays(address):
    text = f"{redacted(address)} broke at frame 3: no answer"
    assert redacted(text) == text


def test_what_is_hidden_stays_hidden():
    once = redacted("rtsp://u:p@h/x?a=b")
    assert redacted(once) == once
