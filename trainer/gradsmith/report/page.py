"""The report's frame: style and script, inside the page so that it needs nothing from outside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from typing import Any

VOID = {"br", "img", "meta"}
SHAPES = {"circle", "line", "path", "rect"}  # of SVG, where what holds nothing closes itself


class Html(str):
    """Markup, in which every text is escaped already."""

    __slots__ = ()


def el(tag: str, /, *children: Any, **attributes: Any) -> Html:
    """`el("p", "a < b", class_="note")` is `<p class="note">a &lt; b</p>`.

    Args:
        tag: the element.
        children: texts, which are escaped, `Html`, lists of either; None is nothing.
        attributes: `class_` is class, `aria_label` aria-label; None leaves one out, True has no
            value.
    """
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is not None and value is not False:
            name = name.rstrip("_").replace("_", "-")
            parts.append(f" {name}" if value is True else f' {name}="{escape(str(value))}"')
    inside = join(children)
    if tag in SHAPES and not inside:
        return Html("".join(parts) + "/>")
    return Html("".join(parts) + ">" + ("" if tag in VOID else f"{inside}</{tag}>"))


def join(children: Iterable[Any]) -> Html:
    """Children of an element, one behind the other."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, list | tuple):
            parts.append(join(child))
        elif child is not None:
            parts.append(escape(str(child)))
    return Html("".join(parts))


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #faf9f6; --card: #ffffff; --ink: #1d1c1a; --soft: #66625b; --rule: #e5e1d8;
  --grid: #eeebe4; --ember: #b8470f; --steel: #2f679c; --pale: #a9c3da; --grey: #9a948a;
  --good: #2c7a4b; --plum: #7d4f9e; --wash: #f6e9e0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161513; --card: #1e1d1a; --ink: #ece9e2; --soft: #a39e94; --rule: #34322d;
    --grid: #2a2824; --ember: #f0894a; --steel: #7db1e2; --pale: #3f5f7d; --grey: #7d786f;
    --good: #6cc08d; --plum: #bd93d8; --wash: #33241a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 44px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 6px; }
h2 {
  font-size: 22px; letter-spacing: -0.015em; margin: 40px 0 4px; padding-top: 20px;
  border-top: 2px solid var(--ink);
}
h3 { font-size: 15px; margin: 34px 0 10px; }
p { margin: 0 0 10px; max-width: 76ch; }
.soft, .note { color: var(--soft); }
.note { font-size: 13px; margin-top: 10px; }
.eyebrow {
  color: var(--ember); font-size: 12px; font-weight: 650; letter-spacing: 0.09em;
  text-transform: uppercase; margin: 0 0 8px;
}
nav { margin-top: 12px; font-size: 14px; }
nav a { color: var(--steel); text-decoration: none; margin-right: 18px; }
nav a:hover { text-decoration: underline; }
.lead { font-size: 17px; font-weight: 560; margin: 14px 0; max-width: none; }
.warning {
  background: var(--wash); border-left: 3px solid var(--ember); padding: 8px 14px; margin: 14px 0;
  border-radius: 0 6px 6px 0; max-width: none;
}
.tiles {
  display: grid; gap: 14px; margin: 22px 0 6px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 140px), 1fr));
}
.tile, .chart, .sample, .panel {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; min-width: 0;
}
.tile { padding: 14px 18px 13px; }
.tile b {
  display: block; font-size: 28px; line-height: 1.2; font-weight: 620; letter-spacing: -0.02em;
}
.tile span { display: block; color: var(--soft); font-size: 13px; line-height: 1.4; }
.tile span:first-child { color: var(--ink); margin-bottom: 2px; }
.tile.first { grid-column: span 2; }
.tile.first b { color: var(--ember); font-size: 40px; line-height: 1.1; }
.charts { display: grid; gap: 14px; margin-bottom: 14px; }
.charts.two { grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.charts.figures {
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); align-items: start;
}
.charts.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); }
.charts.many { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.chart { margin: 0; padding: 14px 14px 8px; position: relative; }
.chart figcaption { font-weight: 620; font-size: 14px; }
.chart figcaption span { color: var(--soft); font-weight: 400; margin-left: 6px; font-size: 13px; }
.chart svg { display: block; width: 100%; max-width: 700px; height: auto; margin-top: 6px; }
.charts.three svg { max-width: 430px; }
.chart text { fill: var(--soft); font-size: 11.5px; }
.chart text.y, .chart text.reference { text-anchor: end; }
.chart text.x { text-anchor: middle; }
.chart text.reference {
  font-size: 11px; fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 4px;
  stroke-linejoin: round;
}
.grid { stroke: var(--grid); }
.axis { stroke: var(--grey); }
line.reference { stroke: var(--grey); stroke-dasharray: 5 4; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.line.s0 { stroke: var(--steel); }
.line.s1 { stroke: var(--ember); }
.line.s2 { stroke: var(--good); }
.line.s3 { stroke: var(--plum); }
.line.s4 { stroke: var(--grey); }
.line.dashed { stroke-dasharray: 6 5; }
.band { stroke: none; opacity: 0.16; }
.line.faint { stroke: var(--pale); stroke-width: 1; }
:is(.dot, .band).s0 { fill: var(--steel); }
:is(.dot, .band).s1 { fill: var(--ember); }
:is(.dot, .band).s2 { fill: var(--good); }
:is(.dot, .band).s3 { fill: var(--plum); }
:is(.dot, .band).s4 { fill: var(--grey); }
.cursor { stroke: var(--grey); visibility: hidden; }
.legend {
  list-style: none; margin: 2px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 16px;
  font-size: 12.5px; color: var(--soft);
}
.legend i, .tip i {
  display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle;
}
i.s0 { background: var(--steel); }
i.s1 { background: var(--ember); }
i.s2 { background: var(--good); }
i.s3 { background: var(--plum); }
i.s4 { background: var(--grey); }
.tip {
  position: absolute; pointer-events: none; background: var(--ink); color: var(--paper);
  font-size: 12px; line-height: 1.45; padding: 5px 9px; border-radius: 6px; white-space: nowrap;
  visibility: hidden; z-index: 2;
}
.empty { color: var(--soft); padding: 40px 0; text-align: center; max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 14px 6px 0; vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; font-size: 12.5px; vertical-align: bottom; }
tbody tr, thead tr { border-bottom: 1px solid var(--rule); }
tbody th { font-weight: 600; min-width: 104px; }
.results tbody th { min-width: 160px; }
.results th.number { white-space: normal; min-width: 92px; }
.results th .unit { display: block; font-weight: 400; }
tr.ours td, tr.ours th { color: var(--ember); font-weight: 640; }
.number { text-align: right; white-space: nowrap; }
td:last-child:not(.number) { overflow-wrap: anywhere; min-width: 110px; }
th:last-child, td:last-child { padding-right: 0; }
.bar { width: 34%; min-width: 90px; }
.bar svg { display: block; width: 100%; height: 12px; margin-top: 5px; }
.bar rect { fill: var(--pale); }
.ours .bar rect, .out .bar rect { fill: var(--ember); }
.on .bar rect { fill: var(--steel); }
.bar .interval { fill: none; stroke: var(--ink); vector-effect: non-scaling-stroke; }
.matrix { width: auto; font-size: 12px; margin: 6px auto; }
.matrix :is(th, td) { padding: 0; min-width: 0; border: 0; }
.matrix tr { border: 0; }
.matrix th { color: var(--soft); font-weight: 500; }
.matrix tbody th { text-align: right; padding-right: 8px; vertical-align: middle; }
.matrix thead th { text-align: center; padding-bottom: 4px; }
.matrix thead tr:last-child th:first-child {
  text-align: right; padding-right: 8px; font-style: italic;
}
.matrix thead tr:first-child th { font-style: italic; }
.matrix thead span {
  writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; white-space: nowrap;
}
.matrix td {
  height: 34px; min-width: 42px; text-align: center; vertical-align: middle;
  border: 1px solid var(--card);
}
.matrix tbody td {
  background: color-mix(in srgb, var(--steel) calc(var(--share, 0) * 100%), var(--grid));
}
.matrix tbody td.wrong {
  background: color-mix(in srgb, var(--ember) calc(var(--share, 0) * 100%), var(--grid));
}
.matrix tbody td.strong { color: var(--card); }
@media (prefers-color-scheme: dark) {
  .matrix tbody td.half { color: var(--card); }
}
.matrix.dense { font-size: 9.5px; }
.matrix tbody tr td:last-child { min-width: 42px; overflow-wrap: normal; }
.matrix.dense tbody tr td { height: 18px; min-width: 19px; max-width: 19px; }
.images {
  display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(116px, 1fr));
}
.images figure { margin: 0; font-size: 12.5px; line-height: 1.35; min-width: 0; }
.images img {
  display: block; width: 100%; height: auto; border-radius: 6px; border: 1px solid var(--rule);
  background: var(--card); image-rendering: auto; margin-bottom: 5px;
}
.images figcaption, .images p { overflow-wrap: anywhere; margin: 0; }
.ledger tbody + tbody { border-top: 1px solid var(--grey); }
.ledger tbody tr { border-bottom-color: var(--grid); }
.panel { padding: 6px 18px 10px; }
.panel h3 { margin-top: 8px; }
.below { margin-top: 14px; }
.columns table { font-size: 13px; }
.columns :is(th, td) { padding-right: 10px; }
.columns :is(th, td):last-child { padding-right: 0; }
.columns {
  display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
  align-items: start;
}
.sample { padding: 12px 18px 14px; margin-bottom: 14px; }
.sample h4 { margin: 8px 0 3px; font-size: 12px; font-weight: 560; color: var(--soft); }
.sample h4.ours { color: var(--ember); }
.sample .columns { gap: 0 24px; }
pre {
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
}
.sample pre.prompt { color: var(--soft); max-height: 260px; overflow-y: auto; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: 10px; }
footer { color: var(--soft); font-size: 13px; padding-top: 46px; padding-bottom: 40px; }
@media (max-width: 960px) {
  .charts.three text { font-size: 14px; }
}
@media (max-width: 740px) {
  .charts.three text { font-size: 9px; }
  .charts.three .line { stroke-width: 1.3; }
}
@media (max-width: 560px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 26px; }
  .tile.first { grid-column: 1 / -1; }
  .bar { display: none; }
  td, th { padding-right: 10px; }
}
@media print {
  :root {
    --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #ccc; --grid: #e6e6e6;
    --ember: #a33d0a; --steel: #22557f; --pale: #a9c3da; --grey: #888; --wash: #f7efe9;
  }
  body { font-size: 12px; }
  main, header, footer { max-width: none; padding: 0; }
  .charts.two { grid-template-columns: 1fr 1fr; }
  .charts.three { grid-template-columns: 1fr 1fr 1fr; }
  .sample pre.prompt { max-height: none; }
  figure, .sample, .tile, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  nav { display: none; }
}
"""

SCRIPT = """
for (const figure of document.querySelectorAll("[data-chart]")) {
  const chart = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip";
  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle; else high = middle;
    }
    return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
  };
  const hide = () => { tip.style.visibility = cursor.style.visibility = "hidden"; };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const found = chart.series.map((s) => nearest(s.points, (event.clientX - box.left) * scale));
    const x = found[0][0];
    tip.replaceChildren(`${chart.x} ${found[0][2]}`);
    chart.series.forEach((series, i) => {
      if (found.length > 1 && Math.abs(found[i][0] - x) > 12) return;
      const line = tip.appendChild(document.createElement("div"));
      const key = line.appendChild(document.createElement("i"));
      key.className = series.style;
      line.append(`${series.name} ${found[i][3]}`);
    });
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    const around = figure.getBoundingClientRect();
    const at = x / scale + box.left - around.left;
    const left = at + 12 + tip.offsetWidth > around.width ? at - 12 - tip.offsetWidth : at + 12;
    tip.style.left = `${Math.max(left, 4)}px`;
    tip.style.top = `${box.top - around.top + 12}px`;
    tip.style.visibility = cursor.style.visibility = "visible";
  });
}
"""


def page(title: str, body: Html, style: str = "") -> str:
    """A whole document; `style` is CSS besides the common. Its content security policy lets nothing
    be loaded and no script but ours run, whatever a recipe's or a model's text may hold. Pictures
    are in the page itself."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        f"{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
