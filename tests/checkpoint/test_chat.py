"""Chat templates: what they render, and what their sandbox keeps them from."""

import json
import re
import tracemalloc

import pytest
import tokenizers

from llama_layers.checkpoint import Tokenizer, load_tokenizer
from llama_layers.errors import CheckpointError

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]


def tokenizer(template, **special):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    return Tokenizer(backend, chat_template=template, special_tokens=special)


def test_a_conversation():
    template = (
        "{{ bos_token }}\n"
        "{% for m in messages %}\n"
        "    {% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}{% endif %}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    chat = tokenizer(template, bos_token="<s>")
    assert chat.apply_chat_template(MESSAGES) == "<s>\n[Hi]Yes?>"
    assert chat.apply_chat_template(MESSAGES, add_generation_prompt=False) == "<s>\n[Hi]Yes?"


def test_what_templates_count_on():
    template = "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}"
    assert tokenizer(template).apply_chat_template([{"a": "é<"}]) == '{"a": "é<"}'
    year = tokenizer("{{ strftime_now('%Y') }}").apply_chat_template(MESSAGES)
    assert len(year) == 4
    assert year.isdigit()


def test_a_template_refuses_a_conversation():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CheckpointError, match="chat_template: line 1: ValueError: roles must alt"):
        tokenizer(template).apply_chat_template(MESSAGES)


WRONG = {
    "{{ 1 }}\n{# no end": "line 2: TemplateSyntaxError: Missing end of comment tag",
    "\n\n{% for m in messages %}": "line 3: TemplateSyntaxError: ",
    "\n{% if true %}\n\n{{ nothing.of.this }}{% endif %}\n": "line 4: UndefinedError: 'nothing' is",
    "{% macro m() %}\n{{ raise_exception('n') }}\n{% endmacro %}{{ m() }}": "line 2: ValueError: n",
}


@pytest.mark.parametrize(("template", "message"), WRONG.items())
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "rag.jinja"])
def test_errors_name_the_file_and_the_line(tmp_path, template, message, place):
    tokenizer(None)._backend.save(str(tmp_path / "tokenizer.json"))
    file = tmp_path / place
    if place == "tokenizer_config.json":
        file.write_text(json.dumps({"chat_template": [{"name": "rag", "template": template}]}))
    elif place == "rag.jinja":
        file = tmp_path / "additional_chat_templates" / place
        file.parent.mkdir()
        (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    if file.suffix == ".jinja":
        file.write_text(template)
    name = "default" if place == "chat_template.jinja" else "rag"
    chat = load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))}: chat_template: {message}"):
        chat.apply_chat_template(MESSAGES, chat_template=name)
    chat.chat_template = template + " "  # a user's own, of no file
    with pytest.raises(CheckpointError, match=f"^chat_template: {message}"):
        chat.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
    ],
)
def test_the_sandbox_holds(template):
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(CheckpointError, match="chat_template: "):
        tokenizer(template).apply_chat_template(messages)
    assert messages == MESSAGES


def test_no_message():
    with pytest.raises(ValueError, match="messages: expected one or more, got none"):
        tokenizer("Hi").apply_chat_template([])


@pytest.mark.parametrize("value", [True, 1, "pt"])
@pytest.mark.parametrize("name", ["continue_final_message", "tokenize", "return_tensors"])
def test_options_of_another_method_of_that_name(name, value):
    template = f"{{{{ {name} is defined and {name} }}}}"
    with pytest.raises(TypeError, match=f"^{name}: transformers' option is not supported"):
        tokenizer(template).apply_chat_template(MESSAGES, **{name: value})
    assert tokenizer(template).apply_chat_template(MESSAGES, **{name: False}) == "False"


def test_no_template():
    with pytest.raises(
        CheckpointError, match=r"this checkpoint has none; .* a text given without one"
    ):
        tokenizer(None).apply_chat_template(MESSAGES)


# What transformers 5.24 gives for the same template and messages; tests/peers compares the two
# on published templates.
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hi"),
        (
            "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
            "userassistant",
        ),
        ("{{ {'b': 1, 'a': 'é'} | tojson }}", '{"b": 1, "a": "é"}'),
        ("{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true) }}", '{"b": 1, "a": "\\u00e9"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':')) }}", '{"b":1,"a":2}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", '{"a": 2, "b": 1}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ '<&>' | tojson }}", '"<&>"'),
        (
            "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "13",
        ),
        ("{{ bos_token is defined }}{{ bos_token }}", "False"),
        ("{{ messages[0].nothing is defined }}", "False"),
        (
            "{{ 1 ~ none ~ 'x' }} {{ 2 ** 10 }} {{ 3 * 'ab' }} {{ 'a' + 'b' }} {{ '%s' % 7 }}",
            "1Nonex 1024 ababab ab 7",
        ),
    ],
)
def test_what_templates_see(template, text):
    assert tokenizer(template).apply_chat_template(MESSAGES) == text


def test_tools_documents_and_variables():
    template = "{{ tools | tojson }} {{ documents | tojson }} {{ enable_thinking }} {{ bos_token }}"
    chat = tokenizer(template, bos_token="<s>")
    options = {"tools": [{"name": "add"}], "documents": [{"title": "T"}], "enable_thinking": False}
    expected = '[{"name": "add"}] [{"title": "T"}] False <s>'
    assert chat.apply_chat_template(MESSAGES, **options) == expected
    # A variable goes before the special token of its name, as in transformers.
    assert chat.apply_chat_template(MESSAGES, **options, bos_token="<b>").endswith(" <b>")


def test_messages_as_templates_count_on_them():
    """Without nulls, and with what was thought under both names."""
    chat = tokenizer("{{ messages | tojson(sort_keys=true) }}")
    messages = [{"role": "tool", "content": None}, {"reasoning": "hm"}, {"thinking": "a"}]
    assert json.loads(chat.apply_chat_template(messages)) == [
        {"role": "tool"},
        {"reasoning": "hm", "thinking": "hm", "reasoning_content": "hm"},
        {"thinking": "a", "reasoning_content": "a"},
    ]
    # What is not of JSON's types is named, since a template may only look whether it is there.
    assert chat.apply_chat_template([{"image": object()}]) == '[{"image": "<object>"}]'


NAMED = {"default": "D", "tool_use": "T", "rag": "R"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "D"),
        ({"tools": []}, "T"),
        ({"tools": [{"name": "add"}]}, "T"),
        ({"chat_template": "rag"}, "R"),
        ({"chat_template": "default", "tools": [{"name": "add"}]}, "D"),
    ],
)
def test_named_templates(options, text):
    assert tokenizer(NAMED).apply_chat_template(MESSAGES, **options) == text


def test_a_template_of_another_name():
    with pytest.raises(ValueError, match="expected one of default, rag, tool_use, got 'x'"):
        tokenizer(NAMED).apply_chat_template(MESSAGES, chat_template="x")
    with pytest.raises(ValueError, match="chat_template: expected default, got 'rag'"):
        tokenizer("D").apply_chat_template(MESSAGES, chat_template="rag")
    with pytest.raises(CheckpointError, match="several and no default; name one of a, b"):
        tokenizer({"b": "B", "a": "A"}).apply_chat_template(MESSAGES)
    assert tokenizer({"b": "B"}).apply_chat_template(MESSAGES, chat_template="b") == "B"
    # Without tools there is only the template named default, and with them it serves too.
    assert tokenizer({"default": "D"}).apply_chat_template(MESSAGES, tools=[]) == "D"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hello", {}), "messages: expected a sequence of mappings, got str"),
        ((MESSAGES[0], {}), "messages: expected a sequence of mappings, got dict"),
        ((["hello"], {}), "messages: expected mappings, got str"),
        ((None, {}), "messages: expected a sequence of mappings, got NoneType"),
        ((MESSAGES, {"tools": "add"}), "tools: expected a sequence of mappings, got str"),
        ((MESSAGES, {"documents": [3]}), "documents: expected mappings, got int"),
    ],
)
def test_messages_of_another_type(arguments, message):
    messages, options = arguments
    with pytest.raises(TypeError, match=message):
        tokenizer("").apply_chat_template(messages, **options)


DOUBLE = "{% set n = namespace(x='ab') %}{% for i in range(22) %}{% set n.x = SUM %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(300) %}{% for j in range(300) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{{ m(n - 1) if n }}{{ m(n - 1) if n }}{% endmacro %}{{ m(16) }}",
        "{{ 10 ** 10000 }}",
        "{{ 10 ** 1000 * 10 ** 1000 }}",
        "{{ ('a' * 3000000) | length }}",
        "{{ (3000000 * [1]) | length }}",
        "{{ '%2000000d' % 1 }}",
        "{{ '%*d' % (2000000, 1) }}",
        "{{ lipsum(n=2) }}",
        DOUBLE.replace("SUM", "n.x + n.x"),
        DOUBLE.replace("SUM", "n.x ~ n.x"),
        "{% for i in range(99) %}{{ 'a' * 99999 }}{% endfor %}",
    ],
)
def test_time_and_memory_are_bounded(template, monkeypatch):
    monkeypatch.setattr("llama_layers.checkpoint.tokenizer.sandbox.MOST_CHARACTERS", 1_000_000)
    monkeypatch.setattr("llama_layers.checkpoint.tokenizer.sandbox.MOST_STEPS", 10_000)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="chat_template: "):
        tokenizer(template).apply_chat_template(MESSAGES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_a_template_that_is_not_one():
    for template in ("{% if %}", "{{ ", "(" * 100_000, "{{" + "(" * 100_000):
        try:
            text = tokenizer(template).apply_chat_template(MESSAGES)
        except CheckpointError:
            continue
        assert text == template  # without a tag it is text
