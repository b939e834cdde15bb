"""Templates of strangers: what honest ones print, and where the others are stopped."""

import threading

import pytest

from flashtensors.errors import TemplateError
from flashtensors.text.chat_template import MAX_TEMPLATE_SIZE, ChatTemplate

_MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Hé\n{{ 7 * 7 }}", "tags": ["x", "y"], "meta": {"b": 1, "a": [True, None]}},
]

_HONEST = [
    "{% for m in messages %}\n  {{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}",
    "{%- for m in messages if m.role != 'system' -%} {{ loop.index }}/{{ loop.length }} {{ loop.last }} {%- endfor %}",
    "{{ messages[1] | tojson }}|{{ messages | tojson(indent=2) }}|{{ messages[1].meta | tojson(sort_keys=true) }}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}{% endfor %}"
    "{{ ns.n }} {{ ns.found }}",
    "{% macro line(m, sep=': ') %}{{ m.role ~ sep ~ m.content }}{% endmacro %}{{ line(messages[0], sep=' = ') }}",
    "{% set text %}{{ messages[0].content }}!{% endset %}{{ text | length }} {{ text.upper() }} {{ text[::-1] }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('tags') | list | length }}",
    "{{ messages[0].content.split(' ') }} {{ '-'.join(['a', 'b']) }} {{ 'a.b'.replace('.', '!') | replace('a', 'z') }}",
    "{{ messages[0].content | indent(2) }}\n{{ 'a\nb\n\nc' | indent(4, true) }}\n{{ 'x\ny' | indent('> ') }}",
    "{% generation %}{% set x = 3 %}{{ x }}{% endgeneration %}{{ x is defined }}",
    "{{ '%s is %d' % ('a', 3) }} {{ '{} {b:>4}'.format(1, b=2) }} {{ 'a' * 3 }} {{ [1] + [2] }} {{ 2 ** 8 % 7 }}",
    "{% for k, v in messages[1].meta | dictsort %}{{ k }}={{ v }};{% endfor %}{% for k, v in messages[1].items() %}"
    "{{ k }}{% endfor %}",
    "{% for c in tree recursive %}{{ c.n }}{% if c.kids %}({{ loop(c.kids) }}){% endif %}{% endfor %}",
    "{{ none }} {{ missing }} {{ missing is defined }} {{ true }} {{ (1, 'a') }} {{ {'a': [1]} }} {{ 'é' | upper }}",
    "{% call(x) wrap() %}<{{ x }}>{% endcall %}{% macro wrap() %}{{ caller(1) }}{% endmacro %}",
    "{% filter upper %}abc {{ messages[0].role }}{% endfilter %}{# a comment #}\n\n{% raw %}{{ raw }}{% endraw %}\n",
    "{% if messages[0]['role'] in ('system', 'tool') and not messages[1].tags[5:] %}yes{% else %}no{% endif %}",
    "{{ strftime_now('%Y')[:2] }} {{ dict(a=1) }} {{ range(3) | list }} {{ messages | length > 1 }}",
    "{%- set a, b = 1, [2, 3] %}{{ a }}{{ b }}{{ b | first }}{{ b | last }}{{ b | max }}{{ b | reverse | list }}\n",
]


def render(source: str, *, cpu_time_s: float = 2.0, **variables: object) -> str:
    template = ChatTemplate(source, where="model", cpu_time_s=cpu_time_s)
    return template.render({"messages": _MESSAGES, "tree": [{"n": 1, "kids": [{"n": 2}]}], **variables})


@pytest.mark.parametrize("source", _HONEST)
def test_honest_templates_print_what_transformers_prints(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    if "wrap()" in source:  # a macro must be defined before it is called
        source = source[source.index("{% macro") :] + source[: source.index("{% macro")]
    variables = {"tree": [{"n": 1, "kids": [{"n": 2}]}]}
    rendered, _ = render_jinja_template([_MESSAGES], chat_template=source, **variables)
    assert render(source, tools=None, documents=None, add_generation_prompt=False) == rendered[0]


def test_what_users_write_is_never_a_template() -> None:
    text = "{{ 7 * 7 }}{% raise %}{# x #}{{ raise_exception('no') }}"
    messages = [{"role": "user", "content": text}]
    assert render("{{ messages[0].content }}{{ messages[0]['content'] ~ '' }}", messages=messages) == text * 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n\n{{ raise_exception('roles must alternate') }}", "line 3 of the chat template refused.*roles must"),
        ("\n{{ messages[0].nope.never }}", "line 2 of the chat template failed with UndefinedError.*no attribute"),
        ("{{ 1 / 0 }}", "line 1 .*ZeroDivisionError"),
        ("{{ messages[0] + 1 }}", "line 1 .*TypeError"),
        ("\n{% include 'secrets' %}", "line 2 .*no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", "RecursionError"),
    ],
)
def test_failure_names_the_line(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as failure:
        render(source)
    assert str(failure.value).startswith("model: ")
    assert failure.value.http_status == 400


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ok\n{% if %}", "line 2 of the chat template"),
        ("{{ x | center(9) }}", "No filter named 'center'"),
        ("{% for x in y %}", "line 1"),
        ("{{ " + "(" * 5000 + " }}", "nested too deeply"),
        ("x" * (MAX_TEMPLATE_SIZE + 1), "characters, but at most"),
    ],
)
def test_malformed_template_is_refused_when_it_is_read(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source, where="model")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] .x }}",
        "{{ (''|attr('__class__')).x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ joiner.__init__.__globals__.os }}",
        "{{ self._TemplateReference__context.environment.budget }}",
    ],
)
def test_ways_out_of_the_sandbox_are_shut(source: str) -> None:
    with pytest.raises(TemplateError, match="model: line 1 of the chat template"):
        render(source)


_ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set t = [{'k': []}] %}{% for i in range(99999) %}{% for j in range(99999) %}{{ t | length }}{% endfor %}"
    "{% endfor %}",
]


@pytest.mark.parametrize("source", _ENDLESS)
def test_template_that_never_ends_is_stopped(source: str) -> None:
    with pytest.raises(TemplateError, match=r"CPU time|in all"):
        render(source, cpu_time_s=0.1)


_SWELLING = [
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 9 * [1] }}",
    "{{ 10 ** (10 ** 9) }}",
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%(a)9999999d' % {'a': 1} }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ '{a:9999999}'.format_map({'a': 1}) }}",
    "{{ ('a' * 4000).replace('a', 'b' * 4000) }}",
    "{{ ('a' * 4000) | replace('a', 'b' * 4000) }}",
    "{{ ('\n' * 4000) | indent(4000, blank=true) }}",
    "{{ messages | tojson(indent=10 ** 6) }}",
    "{{ range(99999) | join('x' * 99) }}",
    "{{ ('x' * 99).join(range(99999) | map('string')) }}",
    "{% set ns = namespace(a='ab') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "{% set ns = namespace(a='ab') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a=(1,)) %}{% for i in range(99) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}",
    "{% set ns = namespace(a={}) %}{% for i in range(99) %}{% set ns.a = {1: ns.a, 2: ns.a} %}{% endfor %}",
    "{% set ns = namespace(a={}) %}{% for i in range(99) %}{% set ns.a = dict(x=ns.a, y=ns.a) %}{% endfor %}",
    "{% set ns = namespace(a='ab') %}{% for i in range(99) %}{% set b %}{{ ns.a }}{{ ns.a }}{% endset %}"
    "{% set ns.a = b %}{% endfor %}",
    "{% set big = 'a' * 4000000 %}{% set x %}{% for i in range(99) %}{{ big }}{% endfor %}{% endset %}",
    "{% set x %}{% for i in range(99999) %}" + "text " * 4000 + "{% endfor %}{% endset %}",
    "{% for i in range(99999) %}{{ 'word ' * 100 }}{% endfor %}",
    "{% macro m() %}{{ 'a' * 4000000 }}{% endmacro %}{% for i in range(99) %}{% set x = m() %}{% endfor %}",
]


@pytest.mark.parametrize("source", _SWELLING)
def test_template_that_swells_is_stopped(source: str) -> None:
    with pytest.raises(TemplateError, match=r"was refused|Range too big"):
        render(source)


def test_printed_text_is_bounded_by_what_users_wrote_too() -> None:
    with pytest.raises(TemplateError, match="more than"):
        render("{{ messages[0].content }}", messages=[{"role": "user", "content": "a" * (5 * 2**20)}])


def test_long_honest_conversation_is_rendered() -> None:
    messages = [{"role": "user", "content": f"{number} " * 200} for number in range(1000)]
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ '</' + m.role + '>' }}{% endfor %}"
    expected = "".join(f"<user>{m['content'].strip()}</user>" for m in messages)
    assert render(source, messages=messages) == expected


def test_threads_have_budgets_of_their_own() -> None:
    template = ChatTemplate("{% for i in range(200) %}{{ n }}{% endfor %}", where="model")
    results: dict[int, str] = {}
    threads = [threading.Thread(target=lambda n=n: results.update({n: template.render({"n": n})})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: str(n) * 200 for n in range(4)}
