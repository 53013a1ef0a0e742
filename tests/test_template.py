"""Chat templates: those of strangers are stopped in time, those of real models render as transformers renders them."""

import json
import time

import pytest

from tritkit import chat, template
from tritkit.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Who sings? <b> 'é' \n"},
    {"role": "assistant", "content": "Two owls."},
    {"role": "user", "content": "Why?"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
GIVEN = {"messages": TALK, "add_generation_prompt": True, "tools": None, "documents": None, **SPECIAL}
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

STOPPED = "takes more than 1 s or 512 MiB"
MEMORY = "needs more than 512 MiB"
HOSTILE = {
    "a loop": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "loops in loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set k = j %}{% endfor %}{% endfor %}",
        STOPPED,
    ),
    "a product": ("{{ 'a' * 10**9 }}", MEMORY),
    "a product beyond any memory": ("{{ 'a' * 10**18 }}", MEMORY),
    "a power": ("{{ 10 ** (10**9) }}", STOPPED),
    "a width": ("{{ 'a'|center(10**9) }}", MEMORY),
    "a width in %": ("{{ '%1000000000d' % 3 }}", MEMORY),
    "a width in format": ("{{ '{:>1000000000}'.format('a') }}", MEMORY),
    "an indent": ("{{ messages|tojson(indent=10**9) }}", MEMORY),
    "a batch": ("{{ [1]|batch(10**9, 'x')|list|length }}", MEMORY),
    "a replacement": ("{{ ('a' * 10**5)|replace('', 'b' * 10**5)|length }}", MEMORY),
    "doubled": (
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        MEMORY,
    ),
    "much text": ("{% for i in range(99999) %}{{ 'a' * 100 }}{% endfor %}", "makes more than"),
    "a macro of itself": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "calls itself without end"),
    "a tree of macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        STOPPED,
    ),
    "a recursive loop": ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "calls itself without end"),
    "nonsense text": ("{{ lipsum(n=10**7) }}", STOPPED),
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "calls itself without end"),
    "internals": ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
    "the system": ("{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe"),
    "a change": ("{{ messages.append(1) }}", "unsafe"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "syntax": ("{% for %}", "is no Jinja template"),
    "a refusal": ("{{ raise_exception('roles\nmust alternate') }}", "refuses this conversation: roles must alternate"),
    "a division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "what is not there": ("{{ foo.bar }}", "'foo' is undefined"),
    "half a character": ("{{ '\\ud800' }}", "surrogates"),
    "a long template": ("x" * (1 << 21), "more than any model needs"),
}


@pytest.mark.parametrize(("text", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates_are_stopped(text, message):
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        template.render(text, GIVEN)
    said = str(caught.value)
    # which of the two limits is met first depends on the machine
    assert message in said or (message in (STOPPED, MEMORY) and (STOPPED in said or MEMORY in said)), said
    assert "\n" not in said and len(said) < 500
    assert time.monotonic() - start < template.CLOCK_SECONDS
    assert template.render(PLAIN, GIVEN).startswith("<s>system: Be brief.\n")  # and the next one is rendered


def test_internals_do_not_come_out():
    for text in ("{{ raise_exception.__globals__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ ''.__class__ }}"):
        assert template.render(text, GIVEN) == ""


def test_rendering_is_fast():
    template.render(PLAIN, GIVEN)
    start = time.monotonic()
    for _ in range(20):
        template.render(PLAIN, GIVEN)
    assert time.monotonic() - start < 5  # 30 ms or so


def test_a_child_that_was_ended_is_replaced():
    template.render(PLAIN, GIVEN)
    template._child.kill()
    template._child.wait()
    assert template.render(PLAIN, GIVEN)


def test_a_clock_that_runs_out(monkeypatch):
    monkeypatch.setattr(template, "CLOCK_SECONDS", 0.3)
    monkeypatch.setattr(template, "CPU_SECONDS", 100.0)
    with pytest.raises(ValueError, match="it was stopped"):
        template.render(HOSTILE["a power"][0], GIVEN)


def test_a_child_that_does_not_start(monkeypatch, tmp_path):
    template.close()
    (tmp_path / "child.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(template, "CHILD", tmp_path / "child.py")
    with pytest.raises(OSError, match="exit code 3"):
        template.render(PLAIN, GIVEN)


def test_a_model_may_have_several_templates(tokenizer):
    texts = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": PLAIN}]
    several = Tokenizer(tokenizer.inner, {**tokenizer.config, "chat_template": texts})
    assert chat.render(several, TALK).startswith(tokenizer.config["bos_token"] + "system: Be brief.")
    for odd in (3, {"a": 1}, [3], texts[:1]):
        with pytest.raises(ValueError, match="no text"):
            chat.render(Tokenizer(tokenizer.inner, {"chat_template": odd}), TALK)


CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REAL = {
    "plain": PLAIN,
    "chatml": CHATML,
    "qwen2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        + CHATML[len("{% for message in messages %}") :]
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}\n"
        "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
        "{{- bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n{%- if tools is not none %}\n"
        "    {{- 'Environment: ipython\\n' }}\n{%- endif %}\n{{- 'Today Date: ' + date_string + '\\n\\n' }}\n"
        "{{- system_message }}{{- '<|eot_id|>' }}\n{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}"
        "{{- '<|eot_id|>' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
    ),
    "namespace and loop controls": (
        "{%- set ns = namespace(last=-1, found=false) %}{%- for m in messages[::-1] %}{%- if m.role == 'user' %}"
        "{%- set ns.last = loop.index0 %}{%- break %}{%- else %}{%- continue %}{%- endif %}{%- endfor %}"
        "{{ ns.last }}{{ messages|tojson }}{{ messages[1]|tojson(indent=2) }}{{ messages|length }}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    ),
    "filters": (
        "{% macro show(m, n=2) %}{{ m.role|upper }}{{ m.content|replace('<', '&')|trim }}{{ n }}{% endmacro %}"
        "{% for m in messages if m.role in ['user'] %}{{ show(m, loop.index) }}{{ m.get('x', 'none') }}"
        "{{ m.content.split(' ')|join('-') }}{{ m.items()|list }}{% endfor %}{{ messages|map(attribute='role')|list }}"
        "{{ (messages|selectattr('role', 'equalto', 'user')|list)[0].content }}"
    ),
}


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REAL)
def test_real_templates_render_as_in_transformers(tokenizer, tmp_path, name):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": REAL[name]}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    wanted = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert chat.render(Tokenizer.load(tmp_path), TALK) == wanted and len(wanted) > 20
