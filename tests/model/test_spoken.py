"""Text in pieces: characters whole, stop strings cut exactly, nothing lost."""

import itertools
import random

import pytest

from components.model.spoken import Spoken


def pieces(texts: list[bytes], stops: list[str]) -> tuple[list[str], bool]:
    spoken = Spoken(lambda ids: b"".join(texts[i] for i in ids).decode(errors="replace"), stops)
    out = []
    for id in range(len(texts)):
        out.append(spoken.add(id))
        if spoken.stopped:
            break
    return [*out, spoken.end()], spoken.stopped


def test_a_character_waits_for_its_last_byte() -> None:
    said, _ = pieces([b"a", b"\xc3", b"\xb1", b"\xf0\x9f", b"\x94", b"\xa5!", b"\xe2"], [])
    assert said == ["a", "", "ñ", "", "", "🔥!", "", "�"]  # the last one never comes


def test_a_stop_string_over_tokens() -> None:
    assert pieces([b"one ", b"tw", b"o th", b"ree"], ["two three"]) == (["one ", "", "", "", ""], True)
    assert pieces([b"one ", b"tw", b"enty"], ["two"]) == (["one ", "", "twenty", ""], False)
    assert pieces([b"aab", b"x"], ["ab"]) == (["a", ""], True)
    assert pieces([b"a", b"a", b"b"], ["aab", "ab"]) == (["", "", "", ""], True)
    assert pieces([b"say", b" st", b"op"], ["st!", "op"])[0] == ["say", " ", "st", ""]
    with pytest.raises(ValueError, match="empty stop"):
        Spoken(lambda ids: "", [""])


def test_any_cut_of_any_text() -> None:
    """Against the plain definition: the text up to the first stop string to appear, and no earlier end."""
    random.seed(1)
    for _ in range(500):
        text = "".join(random.choices("abñ🔥", k=20))
        stops = ["".join(random.choices("abñ🔥", k=random.randint(1, 3))) for _ in range(random.randint(0, 2))]
        data = text.encode()
        cuts = sorted({0, len(data), *random.choices(range(len(data)), k=9)})
        tokens = [data[a:b] for a, b in itertools.pairwise(cuts)]
        said, stopped = pieces(tokens, stops)
        ends = [text[:n] for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stops)]
        assert stopped == bool(ends)
        if not ends:
            assert "".join(said) == text
            continue
        # The token that completes the first stop string may complete another that begins before it.
        got = "".join(said)
        assert text.startswith(got) and any(text[len(got) :].startswith(s) for s in stops)
        assert not any(s in got for s in stops)
        assert len(got) <= len(ends[0])
