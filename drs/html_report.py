"""REPORT.md and the claims -> report.html: one file that needs no network, with the figures inside.

The claims stand on top, each with its evidence one click away; tables sort by a click on a column's head and scroll
sideways on a narrow screen. Without JavaScript everything is still there, but for the sorting.
"""

import base64
import html
import re
from pathlib import Path
from urllib.parse import unquote

import mistune
import pandas as pd

from drs.errors import UserError
from drs.files import atomic_write
from drs.markdown import group_name
from drs.report import read_tables
from drs.report_text import effect_text

OVERALL = "all"
_IMAGE = re.compile(r'<img src="(figures/[^"]+\.png)"')
_HEADING = re.compile(r"<h2>(.*?)</h2>", re.DOTALL)

STYLE = """
:root { --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #fff; --shade: #f6f8fa; --link: #0b5cad; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
h2, h3 { line-height: 1.3; scroll-margin-top: .5rem; } a { color: var(--link); }
img { max-width: 100%; height: auto; display: block; margin: 1rem auto .25rem; }
code { background: var(--shade); padding: 0 .2em; border-radius: 3px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { min-width: 4.5rem; } td.long { min-width: 20rem; }
tbody tr:last-child td { border-bottom: 0; } tbody tr:nth-child(even) { background: var(--shade); }
th { background: var(--shade); text-align: left; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid var(--link); }
th button::after { content: " \\2195"; color: var(--soft); font-weight: 400; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--ink); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--ink); }
.claim { border: 1px solid var(--line); border-left-width: 6px; border-radius: 6px; margin: .6rem 0; }
.claim > summary { padding: .6rem .8rem; cursor: pointer; display: grid; gap: .1rem .8rem;
  grid-template-columns: 2.2rem 1fr auto; align-items: baseline; list-style: none; }
.claim > summary::-webkit-details-marker { display: none; }
.claim .verdict { font-weight: 600; text-align: right; } .claim .effect { grid-column: 2; color: var(--soft); }
.claim .more { text-align: right; color: var(--link); font-size: .875rem; }
.claim .evidence { padding: 0 .8rem .4rem 3.8rem; } .claim .evidence h4 { margin: .8rem 0 .1rem; }
.claim .evidence p { margin: .2rem 0; }
.yes { border-left-color: #1a7f5a; } .weak { border-left-color: #b58900; } .no { border-left-color: #b3412c; }
.open { border-left-color: #8c959f; }
nav ul { columns: 18rem; padding-left: 1.2rem; }
@media (max-width: 40rem) {
  .claim > summary { grid-template-columns: 2.2rem 1fr; }
  .claim .verdict, .claim .effect, .claim .more { grid-column: 2; text-align: left; }
  .claim .evidence { padding-left: .8rem; } h1 { font-size: 1.3rem; } td.long { min-width: 18rem; }
}
@media print { nav, th button::after, .claim .more { display: none; } .scroll { overflow: visible; } }
"""

SCRIPT = """
const value = cell => {
  const text = cell.textContent.trim().replace(/\\u2212/g, "-").replace(/^\\u00d7\\s*/, "");
  const number = /^[+-]?\\d+(\\.\\d+)?/.exec(text);
  return [number ? parseFloat(number[0]) : null, text];
};
document.querySelectorAll("table").forEach(table => {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    while (head.firstChild) button.append(head.firstChild);
    head.append(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map(row => [value(row.cells[column]), row]);
      const numbers = rows.some(([[number]]) => number !== null);
      rows.sort(([[a, s]], [[b, t]]) => {
        if (!numbers) return rising ? s.localeCompare(t) : t.localeCompare(s);
        if (a === null || b === null) return (a === null) - (b === null);  // what has no number stays at the end
        return rising ? a - b : b - a;
      });
      rows.forEach(([, row]) => body.append(row));
    });
  });
});
"""


def write_html(study_dir: str | Path) -> Path:
    """Write ``<study_dir>/report.html`` from the study's REPORT.md, its figures and its table of claims.

    Returns:
        The path of the file.

    Raises:
        UserError: If there is no REPORT.md or no table of models, or a figure that the report shows is missing.
    """
    study_dir = Path(study_dir)
    source = study_dir / "REPORT.md"
    if not source.is_file():
        raise UserError(f"{source} is missing; evaluate the study first: scripts/evaluate.py study=NAME")
    path = study_dir / "report.html"
    page = html_page(source.read_text(encoding="utf-8"), read_tables(study_dir)["claims"], study_dir)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def html_page(report: str, claims: pd.DataFrame, study_dir: Path) -> str:
    """Return the page of a report in Markdown, its figures taken from ``study_dir``."""
    render = mistune.create_markdown(plugins=["table"])
    body = str(render(report))
    title = re.search(r"<h1>(.*?)</h1>", body, re.DOTALL)
    head = title.group(1) if title else "Report"
    body = body.replace(title.group(0), "", 1) if title else body
    entries: list[tuple[str, str]] = []

    def anchor(match: re.Match[str]) -> str:
        entries.append((f"section-{len(entries) + 1}", match.group(1)))
        return f'<h2 id="{entries[-1][0]}">{match.group(1)}</h2>'

    body = _HEADING.sub(anchor, body)
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    body = re.sub(r"<td([^>]*)>(?=[^<]{160})", r'<td\1 class="long">', body)
    body = _IMAGE.sub(lambda match: f'<img loading="lazy" src="{_inline(study_dir, match.group(1))}"', body)
    contents = "".join(f'<li><a href="#{name}">{text}</a></li>' for name, text in entries)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{re.sub('<[^>]+>', '', head)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{head}</h1>\n{_claims(claims)}\n<nav><h2>Contents</h2><ul>{contents}</ul></nav>\n<main>\n{body}</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _inline(study_dir: Path, name: str) -> str:
    path = study_dir / unquote(html.unescape(name))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; draw the figures again: make figures STUDY=NAME") from None
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _claims(claims: pd.DataFrame) -> str:
    """Return each claim with its verdict and effect, and its evidence folded away."""
    parts = []
    for _, overall in claims[claims["data"] == OVERALL].iterrows():
        groups = claims[(claims["claim"] == overall["claim"]) & (claims["data"] != OVERALL)]
        evidence = [f"<p>{_text(overall['evidence'])}</p>"] + [
            f"<h4>{_text(group_name(row['data'], row['model']))}: {_text(row['verdict'])}, {_text(effect_text(row))}, "
            f"n = {int(row['n'])}</h4><p>{_text(row['evidence'])}</p>"
            for _, row in groups.iterrows()
        ]
        parts.append(
            f'<details class="claim {_kind(str(overall["verdict"]))}"><summary><b>{_text(overall["claim"])}</b>'
            f'<span>{_text(overall["statement"])}</span><span class="verdict">{_text(overall["verdict"])}</span>'
            f'<span class="effect">{_text(effect_text(overall))}, n = {int(overall["n"])}</span>'
            f'<span class="more">evidence</span></summary><div class="evidence">{"".join(evidence)}</div></details>'
        )
    return f'<section aria-label="Claims">{"".join(parts)}</section>' if parts else ""


def _kind(verdict: str) -> str:
    if verdict == "supported":
        return "yes"
    if verdict.startswith("supported"):
        return "weak"
    return "no" if verdict.startswith("not") else "open"


def _text(value: object) -> str:
    return html.escape(" ".join(str(value).split()))
