"""Chat prompts are Transformers' own: the same files are read, and the same templates rendered."""

import json
import random

import pytest
from polydraft.checkpoints.special_tokens import read_special_tokens
from polydraft.errors import PolydraftError
from polydraft.text.hub_tokenizer import HubTokenizer
from polydraft_conformance.odd_checkpoints import ODD_CHECKPOINTS, make_checkpoint
from transformers import AutoTokenizer

pairs = pytest.importorskip("polydraft_builtin_pairs", reason="the built-in pairs are not installed")

TEMPLATES = {
    "own": None,
    "turns": "{% for m in messages %}<|turn>{{ m['role'] + '\n' + m.content }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}",
    "alternating": """{{ bos_token }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate.') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[' + (m.content | trim) + ']' }}
    {%- else %}
        {{- ' ' ~ m.content ~ eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "dated": """{%- if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif -%}
Today: {{ date }}
{% for tool in tools or [] %}
{{ tool | tojson(indent=4) }}
{% endfor %}
{% for m in messages %}
  {% if m.tool_calls %}
{{ m.tool_calls[0].function | tojson }}
  {% elif m.content is string %}
{{ m.role }}: {{ m.content }}
  {% else %}
{{ m.content | map(attribute='text') | join('+') }}
  {% endif %}
{% endfor %}
""",
    "thinking": """{%- set ns = namespace(last=-1) %}
{%- for m in messages[::-1] %}
    {%- if ns.last < 0 and m.role == 'user' %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
    {%- if not thought and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<' ~ m.role ~ '>' }}
    {%- if loop.index0 > ns.last and thought %}{{ '(' + thought + ')' }}{% endif %}
    {{- content }}
{%- endfor %}
{%- if enable_thinking is defined and not enable_thinking %}()\n{% endif %}""",
    "trained": """{% for m in messages %}
  {% if m.role == 'assistant' %}
{% generation %}{% set x = 1 %}{{ m.content }}{{ eos_token }}
  {% endgeneration %}
{% else %}{{ m.role ~ m.content }}{% endif %}{{ x is defined }}{% endfor %}""",
    "loops": "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}|{% endfor %}"
    "{{ dict(b=[2], a=1) | tojson(separators=(',', ':'), sort_keys=True) }}"
    "{{ pad_token }}{{ sep_token is defined }}{{ tools | tojson(ensure_ascii=True) }}{{ documents }}",
    "syntax": "{% for %}",
    "undefined": "{{ messages[9].content.x }}",
}
PIECES = ["Hi", " there\n", "  ", "<|turn>", "é☃", "<think>\na\n</think>\n\nb", "{{x}}", '"q" <b>&', ""]
TOOL = {"type": "function", "function": {"name": "é<", "parameters": {"z": 1, "a": {"b": [1.5, None]}}}}


def text(choose):
    return "".join(choose.choices(PIECES, k=choose.randint(0, 4)))


def message(choose):
    content = choose.choice([text(choose), text(choose), [{"type": "text", "text": text(choose)}], None])
    made = {"role": choose.choice(["user", "assistant", "system", "tool"]), "content": content}
    if choose.random() < 0.2:
        made[choose.choice(["reasoning_content", "thinking", "reasoning"])] = text(choose)
    if choose.random() < 0.2:
        made["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": {"é": [1, True]}}}]
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pairs.path("tiny-e2b"), local_files_only=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(tokenizer, name, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[name] or tokenizer.chat_template)
    ours, choose, compared = HubTokenizer(tokenizer), random.Random(name), 0
    for _ in range(60):
        messages = [message(choose) for _ in range(choose.randint(1, 4))]
        if choose.random() < 0.5:
            messages = [{"role": ("user", "assistant")[i % 2], "content": text(choose)} for i in range(len(messages))]
        tools, kwargs = choose.choice([None, [TOOL]]), choose.choice([{}, {"enable_thinking": False}])
        continued = choose.random() < 0.3
        options = {"add_generation_prompt": not continued, "continue_final_message": continued, **kwargs}
        try:
            wanted = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False, **options)
        except Exception:
            with pytest.raises(PolydraftError):
                ours.chat(messages, tools=tools, template_kwargs=kwargs, continue_final_message=continued)
            continue
        found = ours.chat(messages, tools=tools, template_kwargs=kwargs, continue_final_message=continued)
        assert found == wanted, (messages, options)
        compared += 1
    assert compared > 10 or name in {"syntax", "undefined"}


@pytest.mark.parametrize("case", ODD_CHECKPOINTS, ids=lambda case: case.name)
def test_files_are_read_as_transformers_reads_them(case, tmp_path):
    folder = make_checkpoint(case, pairs.path("tiny-llama"), tmp_path / case.name)
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    special = read_special_tokens(folder, json.loads((folder / "config.json").read_text()))
    assert special.names == theirs.special_tokens_map
    given = theirs.chat_template
    assert special.chat_templates == ({"default": given} if isinstance(given, str) else given)
