"""Chat templates: what they render, and what their sandbox keeps them from."""

import pytest
import tokenizers

from llama_layers.checkpoint import Tokenizer
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
    year = tokenizer("{{ strftime_now('%Y') }}").apply_chat_template([])
    assert len(year) == 4
    assert year.isdigit()


def test_a_template_refuses_a_conversation():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CheckpointError, match="chat_template: ValueError: roles must alternate"):
        tokenizer(template).apply_chat_template(MESSAGES)


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


def test_no_template():
    with pytest.raises(CheckpointError, match="this checkpoint has none"):
        tokenizer(None).apply_chat_template(MESSAGES)
