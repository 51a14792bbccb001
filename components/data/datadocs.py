"""The Data Docs: one page that shows what was read, kept and rejected, and what was expected and found.

Great Expectations' own pages load styles from the network and report home; this one is whole in itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from components.data.verdicts import category

EXAMPLES = 3
EXAMPLE_CHARS = 400

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>forja: data docs</title>
<style>
:root { color-scheme: light dark; --ink: light-dark(#1d2330, #e4e7ee); --soft: light-dark(#667085, #98a2b3);
  --paper: light-dark(#fafaf8, #14171d); --card: light-dark(#ffffff, #1c2029); --line: light-dark(#e4e4de, #2d333f);
  --good: light-dark(#1a7f4b, #4cc38a); --bad: light-dark(#b42318, #ff8a75); --mark: light-dark(#d9652b, #f0935f); }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; letter-spacing: -.02em; }
h2 { font-size: 1.25rem; margin: 0; }
h3 { font-size: .95rem; margin: 1.6rem 0 .5rem; color: var(--soft); font-weight: 600; }
p { margin: .25rem 0 1rem; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1.25rem 0 2rem; }
nav a { color: var(--ink); border: 1px solid var(--line); border-radius: 99px; padding: .15rem .8rem;
  text-decoration: none; background: var(--card); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.4rem 1.5rem;
  margin-bottom: 1.5rem; }
header { display: flex; justify-content: space-between; align-items: baseline; gap: 1rem; flex-wrap: wrap; }
.bar { display: flex; height: .7rem; border-radius: 99px; overflow: hidden; background: var(--line); margin: .9rem 0; }
.bar i { background: var(--good); } .bar b { background: var(--mark); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.yes { color: var(--good); } .no { color: var(--bad); }
code, pre { font: .82rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
td code { overflow-wrap: normal; white-space: nowrap; }
pre { white-space: pre-wrap; background: var(--paper); border-radius: 8px; padding: .6rem .8rem; margin: .4rem 0; }
details { border-bottom: 1px solid var(--line); padding: .45rem 0; } summary { cursor: pointer; }
small { color: var(--soft); }
</style>
</head>
<body>
<h1>Data docs</h1>
<p>{{ kept }} of {{ read }} rows kept. {{ passed }} of {{ wanted }} expectations hold.</p>
<nav>{% for name in funnel %}<a href="#{{ name }}">{{ name }}</a>{% endfor %}</nav>
{% for name, t in funnel.items() %}
<section id="{{ name }}">
<header><h2>{{ name }}</h2><span>{{ t.kept }} kept of {{ t.read }}</span></header>
<div class="bar" role="img" aria-label="{{ t.kept }} of {{ t.read }} rows kept">
<i style="flex: {{ t.kept }}"></i><b style="flex: {{ t.read - t.kept }}"></b></div>
<div class="scroll"><table>
{% for what, counts in (("Splits", t.splits), ("Sources", t.sources), ("Licences", t.licences)) %}
<tr><th>{{ what }}</th><td>{% for k, n in counts | dictsort %}{{ k }} <small>{{ n }}</small>{{ " · " if not loop.last }}
{% else %}none{% endfor %}</td></tr>
{% endfor %}
</table></div>
<h3>Expectations</h3>
<div class="scroll"><table>
<tr><th></th><th>Expectation</th><th>Column</th><th>With</th><th class="n">Rows</th><th class="n">Unexpected</th></tr>
{% for e in expectations[name] %}
<tr><td class="{{ 'yes' if e.success else 'no' }}">{{ "holds" if e.success else "fails" }}</td>
<td>{{ e.expectation | replace("expect_", "") | replace("_", " ") }}</td><td><code>{{ e.column }}</code></td>
<td><code>{% for k, v in e.kwargs | dictsort %}{{ k }} = {{ v }} {% endfor %}</code></td>
<td class="n">{{ e.rows }}</td><td class="n">{{ e.unexpected }}</td></tr>
{% for x in e.examples %}<tr><td></td><td colspan="5"><small>{{ x }}</small></td></tr>{% endfor %}
{% endfor %}
</table></div>
<h3>Rejected</h3>
{% for reason, n in t.rejected | dictsort %}
<details><summary>{{ reason }} <small>{{ n }}</small></summary>
{% for r in examples[name][reason] %}
<small>{{ r.file }}, line {{ r.line }}: {{ r.reason }}</small><pre>{{ r.row }}</pre>
{% endfor %}
</details>
{% else %}<p>Nothing.</p>{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""


def render(
    funnel: Mapping[str, Any],
    expectations: Mapping[str, Sequence[Mapping[str, Any]]],
    rejected: Sequence[Mapping[str, Any]],
) -> str:
    """The page as HTML. The three arguments are what validate writes: funnel, expectations and rejected rows."""
    from jinja2 import Environment, StrictUndefined

    examples: dict[str, dict[str, list[dict[str, Any]]]] = {table: {} for table in funnel}
    for r in rejected:
        shown = examples[r["table"]].setdefault(category(r["reason"]), [])
        if len(shown) < EXAMPLES:
            shown.append(dict(r) | {"row": r["row"][:EXAMPLE_CHARS]})
    results = [e for of_table in expectations.values() for e in of_table]
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE)
    return template.render(
        funnel=funnel,
        expectations=expectations,
        examples=examples,
        read=sum(t["read"] for t in funnel.values()),
        kept=sum(t["kept"] for t in funnel.values()),
        passed=sum(e["success"] for e in results),
        wanted=len(results),
    )
