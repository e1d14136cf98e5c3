"""Session cookies: genuine, in time, and each with its own token for forms."""

from __future__ import annotations

import pytest

from monitoring.prediction_log import patient_hmac
from serve.sessions import Sessions

NOW = 1_800_000_000.0
SESSIONS = Sessions(b"a secret", lifetime_s=60)


def test_a_session_says_who_signed_in_until_its_time_is_over():
    begun = SESSIONS.begin("key-1", NOW)
    assert SESSIONS.read(begun.cookie, NOW + 59) == begun and begun.key_id == "key-1"
    assert SESSIONS.read(begun.cookie, NOW + 60) is None
    assert SESSIONS.read(SESSIONS.begin(None, NOW).cookie, NOW).key_id is None


def test_a_cookie_that_was_changed_in_any_place_is_no_session():
    cookie = SESSIONS.begin("key-1", NOW).cookie
    for place in range(len(cookie)):
        other = "A" if cookie[place] != "A" else "B"
        assert SESSIONS.read(cookie[:place] + other + cookie[place + 1 :], NOW) is None
    later = cookie.replace(str(int(NOW) + 60), str(int(NOW) + 6000))
    assert later != cookie and SESSIONS.read(later, NOW) is None


@pytest.mark.parametrize("cookie", [None, "", ".", "....", "é.1.2.3", "-.1.a.", "x" * 10_000])
def test_what_is_no_cookie_of_ours_is_no_session(cookie):
    assert SESSIONS.read(cookie, NOW) is None


def test_no_pseudonym_of_a_patient_is_a_key_of_ours():
    """Callers choose patient ids and read the pseudonyms, which are made with the same secret."""
    secret = b"a secret"
    keys = {Sessions(secret)._signing.hex(), Sessions(secret)._forms.hex()}
    for name in ("dermray page session", "dermray page sessions", "\0dermray page sessions", ""):
        assert patient_hmac(name, secret) not in keys
    with pytest.raises(ValueError, match="secret behind sessions is empty"):
        Sessions(b"")


def test_another_service_s_cookie_is_no_session_and_every_session_has_a_token_of_its_own():
    begun, other = SESSIONS.begin("key-1", NOW), SESSIONS.begin("key-1", NOW)
    assert Sessions(b"another secret").read(begun.cookie, NOW) is None
    assert begun.cookie != other.cookie and begun.csrf_token != other.csrf_token
    assert begun.csrf_token not in begun.cookie
