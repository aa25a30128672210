"""JSON files: what is read, and how the rest is refused."""

import pytest

from llama_layers.errors import CheckpointError, ConfigError
from llama_layers.files.json_files import read_json, without_duplicates


def test_an_object(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_json(file, ConfigError) == {"a": [1, "é"]}
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # as some editors on Windows begin a file
    assert read_json(file, ConfigError) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a JSON object, got an empty file"),
        (b'{"a": ', "expected a JSON object: Expecting value"),
        (b"[1]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"a": "\xff"}', "expected UTF-8, got byte 255 at 7"),
        (b"[" * 100_000, "expected a JSON object, got one nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "expected a JSON object: Exceeds the limit"),
    ],
)
def test_what_is_refused(tmp_path, content, message):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    for error in (ConfigError, CheckpointError):
        with pytest.raises(error, match=rf"a\.json: {message}"):
            read_json(file, error)


def test_keys_that_come_twice():
    assert without_duplicates([("a", 1), ("b", 2)]) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="'b' appears twice"):
        without_duplicates([("a", 1), ("b", 2), ("b", 2)])


def test_keys_that_come_twice_are_found_in_a_few_looks_at_each():
    looks = 0

    class Key(str):
        __slots__ = ()

        def __hash__(self):
            nonlocal looks
            looks += 1
            return super().__hash__()

    keys = [Key(i) for i in range(1000)]
    with pytest.raises(ValueError, match="'999' appears twice"):
        without_duplicates([(key, None) for key in [*keys, keys[-1]]])
    assert looks < 20 * len(keys)
