"""What the files beside tokenizer.json say of its tokens and of the chat format.

Each expectation is what transformers 5.24 does with the same files, unless it says otherwise;
tests/peers compares the two.
"""

import json

import pytest
import tokenizers
from tokenizers import AddedToken

from llama_layers.checkpoint import load_tokenizer
from llama_layers.errors import CheckpointError

NAMES = ("bos", "eos", "unk", "pad", "image")
SHOW = " ".join(f"{{{{ {name}_token if {name}_token is defined else '-' }}}}" for name in NAMES)


def directory(tmp_path, *special, post=None, pad=None, unk=None, **files):
    """A directory with a tokenizer of letters, a to e with ids 0 to 4, and then special tokens."""
    vocabulary = {letter: i for i, letter in enumerate("abcde")}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token=unk))
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    if post is not None:
        ids = [(text, backend.token_to_id(text)) for text in special]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=post, special_tokens=ids
        )
    if pad is not None:
        backend.enable_padding(pad_token=pad, length=8)
        backend.enable_truncation(8)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(SHOW)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    return tmp_path


def shown(path):
    return load_tokenizer(path).apply_chat_template([{"role": "user", "content": "a"}])


OBJECT = {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}}, "<s> </s> - - -"),
        ({"tokenizer_config": {"bos_token": OBJECT | {"__type": "AddedToken"}}}, "<s> - - - -"),
        ({"special_tokens_map": {"bos_token": OBJECT, "eos_token": "</s>"}}, "<s> </s> - - -"),
        ({"tokenizer_config": {"bos_token": None, "pad_token": "</s>"}}, "- - - </s> -"),
        # The older file goes first, unless the newer has what replaced it.
        (
            {"tokenizer_config": {"bos_token": "<s>"}, "special_tokens_map": {"bos_token": "</s>"}},
            "</s> - - - -",
        ),
        (
            {
                "tokenizer_config": {"bos_token": "<s>", "added_tokens_decoder": {}},
                "special_tokens_map": {"bos_token": "</s>", "eos_token": "</s>"},
            },
            "<s> - - - -",
        ),
        # Names of one model.
        ({"tokenizer_config": {"image_token": "<i>", "add_bos_token": True}}, "- - - - <i>"),
        ({"special_tokens_map": {"image_token": {"content": "<i>"}}}, "- - - - <i>"),
        ({"tokenizer_config": {"extra_special_tokens": {"image_token": "<i>"}}}, "- - - - <i>"),
        # Where the files name some tokens, config.json names none.
        (
            {
                "tokenizer_config": {"bos_token": "<s>"},
                "config": {"bos_token_id": 6, "eos_token_id": 6},
            },
            "<s> - - - -",
        ),
        ({"tokenizer_config": {"bos_token": None}, "config": {"bos_token_id": 6}}, "- - - - -"),
        # The rest is our own: without any file that names one, the ids of config.json.
        ({"config": {"bos_token_id": 5, "eos_token_id": [6, 5]}}, "<s> </s> - - -"),
        ({"config": {"bos_token_id": 7, "eos_token_id": 10**20, "pad_token_id": -1}}, "- - - - -"),
        ({"config": {"bos_token_id": "5", "eos_token_id": [], "unk_token_id": 5}}, "- - <s> - -"),
    ],
)
def test_names(tmp_path, files, expected):
    assert shown(directory(tmp_path, "<s>", "</s>", **files)) == expected


def test_names_that_only_tokenizer_json_knows(tmp_path):
    path = directory(tmp_path, "<s>", "</s>", "<u>", post="<s> $A </s>", pad="<p>", unk="<u>")
    (path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": 7}')
    assert shown(path) == "<s> </s> <u> <p> -"
    tokenizer = load_tokenizer(path / "tokenizer.json")
    assert tokenizer.special_tokens["bos_token"] == "<s>"
    path = directory(tmp_path, "<s>", "</s>", "<u>", post="<s> $A")
    assert shown(path) == "<s> <u> - - -"  # the end is that of config.json


def test_padding_names_its_token(tmp_path):
    path = directory(tmp_path, "<s>", pad="<s>", tokenizer_config={"bos_token": "<s>"})
    assert shown(path) == "<s> - - <s> -"


@pytest.mark.parametrize("suffix", ["", "Fast"])
def test_what_a_class_of_transformers_names(tmp_path, suffix):
    config = {"tokenizer_class": "LlamaTokenizer" + suffix, "eos_token": "<e>"}
    assert shown(directory(tmp_path, "<s>", "<e>", tokenizer_config=config)) == "<s> <e> - - -"
    config = {"tokenizer_class": "Qwen2Tokenizer" + suffix, "unk_token": None}
    path = directory(tmp_path, "<|endoftext|>", tokenizer_config=config)
    assert shown(path) == "- <|endoftext|> - <|endoftext|> -"


END = "<|im_end|>"
FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {END: 6}},
        {"tokenizer_config": {"added_tokens_decoder": {"6": FLAGS | {"content": END}}}},
        {"tokenizer_config": {"eos_token": END}},
        {"special_tokens_map": {"eos_token": END}},
        {"tokenizer_config": {"additional_special_tokens": [END]}},
        {"tokenizer_config": {"extra_special_tokens": [FLAGS | {"content": END}]}},
    ],
)
def test_tokens_are_added(tmp_path, files):
    tokenizer = load_tokenizer(directory(tmp_path, "<s>", **files))
    assert tokenizer.encode(f"a{END}b") == [0, 6, 1]
    assert tokenizer.decode([0, 6]).replace(" ", "") == f"a{END}"


def test_tokens_are_added_in_the_order_of_their_ids(tmp_path):
    decoder = {"10": {"content": "<x>"}, "6": {"content": "<y>"}, "7": {"content": "<a>"}}
    decoder |= {"8": {"content": "<b>"}, "9": {"content": "<c>"}}
    config = {"added_tokens_decoder": decoder, "pad_token": "<p>", "bos_token": "<q>"}
    tokenizer = load_tokenizer(directory(tmp_path, "<s>", tokenizer_config=config))
    assert tokenizer.encode("<y><a><b><c><x><q><p>") == [6, 7, 8, 9, 10, 11, 12]


def test_flags_of_tokens(tmp_path):
    decoder = {
        "5": FLAGS | {"content": "<s>", "special": True, "rstrip": True},  # not so before
        "6": FLAGS | {"content": "<l>", "special": False, "lstrip": True},
        "7": FLAGS | {"content": "ab", "special": False, "single_word": True},
    }
    config = {"added_tokens_decoder": decoder, "bos_token": "<s>"}
    path = directory(tmp_path, "<s>", tokenizer_config=config, unk="e")
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("<s>  a") == [5, 0]
    assert tokenizer.encode("a  <l>a") == [0, 6, 0]
    assert tokenizer.encode("ab abc") == [7, 4, 0, 1, 2]
    assert tokenizer.decode([5, 6, 0], skip_special_tokens=True).split() == ["<l>", "a"]


def test_a_token_with_a_name_is_special(tmp_path):
    """Whatever its own flag says: the end of a turn is not part of the text."""
    decoder = {"6": FLAGS | {"content": END, "special": False}}
    config = {"added_tokens_decoder": decoder, "eos_token": END}
    tokenizer = load_tokenizer(directory(tmp_path, "<s>", tokenizer_config=config))
    assert "".join(tokenizer.stream([0, 6])) == "a"


def test_added_tokens_json_tells_special_tokens_from_others(tmp_path):
    files = {"added_tokens": {"<x>": 6, "<y>": 7}, "special_tokens_map": {"eos_token": "<y>"}}
    tokenizer = load_tokenizer(directory(tmp_path, "<s>", **files))
    assert tokenizer.decode([6, 7], skip_special_tokens=True) == "<x>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        # transformers would give these tokens other ids than the files say.
        ({"added_tokens": {"<x>": 8}}, "expected '<x>' to follow .* got id 8, where the next is 6"),
        ({"added_tokens": {"<x>": 3}}, "expected '<x>' to follow .* got id 3, where the next is 6"),
        ({"added_tokens": {"<x>": "6.5"}}, "added_tokens.json: expected a token id, got '6.5'"),
        ({"added_tokens": {"<x>": True}}, "added_tokens.json: expected a token id, got True"),
        ({"added_tokens": {"<x>": -1}}, "added_tokens.json: expected a token id, got -1"),
        ({"added_tokens": [1]}, "added_tokens.json: expected a JSON object, got list"),
        ({"tokenizer_config": {"bos_token": 3}}, "bos_token: expected a token, got 3"),
        ({"tokenizer_config": {"bos_token": {}}}, "bos_token: expected a token, got {}"),
        (
            {"tokenizer_config": {"bos_token": {"content": "<s>", "lstrip": 1}}},
            "bos_token: lstrip: expected true or false, got 1",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": []}},
            r"added_tokens_decoder: expected an object, got \[\]",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": OBJECT}}}, "a token id, got 'x'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": 1}}}, "decoder.5: expected a token"),
        ({"tokenizer_config": {"extra_special_tokens": 1}}, "expected a list or an object, got 1"),
        ({"special_tokens_map": "[" * 100_000}, "special_tokens_map.json: .* nested too deeply"),
        ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json: .* nested too deeply"),
        ({"tokenizer_config": "{'a': 1}"}, "tokenizer_config.json: expected a JSON object"),
        ({"added_tokens": {"\ud800": 6}}, "cannot add the tokens .* surrogates not allowed"),
        ({"tokenizer_config": {"bos_token": "\ud800"}}, "cannot add the tokens .* surrogates"),
        ({"config": "{"}, "config.json: expected a JSON object"),
    ],
)
def test_files_that_are_refused(tmp_path, files, message):
    path = directory(tmp_path, "<s>", **files)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(path)


def test_a_token_that_is_there_keeps_its_id(tmp_path):
    """As in transformers: tokenizer.json says which id a token has."""
    path = directory(tmp_path, "<s>", "<x>", added_tokens={"<x>": 9, "a": 4})
    assert load_tokenizer(path).encode("<x>a") == [6, 0]


class TestChatTemplates:
    """Which of the files gives the template."""

    def text(self, path, **options):
        talk = [{"role": "user", "content": "hi"}]
        return load_tokenizer(path).apply_chat_template(talk, **options)

    def test_files_go_before_the_config(self, tmp_path):
        path = directory(tmp_path, "<s>", tokenizer_config={"chat_template": "CONFIG"})
        (path / "chat_template.jinja").write_text("OWN")
        assert self.text(path) == "OWN"
        (path / "additional_chat_templates").mkdir()
        (path / "additional_chat_templates" / "rag.jinja").write_text("RAG")
        assert self.text(path) == "OWN"
        assert self.text(path, chat_template="rag") == "RAG"
        (path / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
        assert self.text(path, tools=[{"name": "add"}]) == "TOOLS"
        (path / "chat_template.jinja").unlink()
        with pytest.raises(CheckpointError, match="no default; name one of rag, tool_use"):
            self.text(path)

    def test_the_config_goes_before_that_of_a_processor(self, tmp_path):
        path = directory(tmp_path, "<s>", chat_template={"chat_template": "PROCESSOR"})
        (path / "chat_template.jinja").unlink()
        assert self.text(path) == "PROCESSOR"
        (path / "tokenizer_config.json").write_text('{"chat_template": "CONFIG"}')
        assert self.text(path) == "CONFIG"

    @pytest.mark.parametrize(
        "named",
        [
            [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
            {"default": "D", "tool_use": "T"},
        ],
    )
    def test_named(self, tmp_path, named):
        path = directory(tmp_path, "<s>", tokenizer_config={"chat_template": named})
        (path / "chat_template.jinja").unlink()
        assert (self.text(path), self.text(path, tools=[])) == ("D", "T")

    @pytest.mark.parametrize("none", [None, [], {}])
    def test_none(self, tmp_path, none):
        path = directory(tmp_path, "<s>", tokenizer_config={"chat_template": none})
        (path / "chat_template.jinja").unlink()
        with pytest.raises(CheckpointError, match="this checkpoint has none"):
            self.text(path)

    @pytest.mark.parametrize(
        "malformed",
        [
            3,
            True,
            [3],
            [{"name": "x"}],
            [{"name": 1, "template": "x"}],
            [{"name": [], "template": "x"}],
            [{"name": "x", "template": "a"}, {"name": "x", "template": "b"}],
            {"default": 1},
        ],
    )
    def test_malformed(self, tmp_path, malformed):
        path = directory(tmp_path, "<s>", tokenizer_config={"chat_template": malformed})
        (path / "chat_template.jinja").unlink()
        with pytest.raises(CheckpointError, match="chat_template: expected a text, or several"):
            load_tokenizer(path)

    def test_not_utf_8(self, tmp_path):
        path = directory(tmp_path, "<s>")
        (path / "chat_template.jinja").write_bytes(b"\xff")
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja: expected UTF-8"):
            load_tokenizer(path)
