"""The page's frame: style rules, the few lines of script that sort tables, and the HTML around."""

from __future__ import annotations

from pathlib import Path

CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 var(--sans)}
main{max-width:1040px;margin:0 auto;padding:36px 24px 60px}
h1{font-size:26px;line-height:1.25;margin:0 0 2px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 2px}
.note,.facts{color:var(--muted);margin:0 0 14px;max-width:74ch;overflow-wrap:anywhere}
.facts{margin-bottom:22px}
section{background:var(--surface);border:1px solid var(--rule);border-radius:10px;
 padding:20px 22px;margin:18px 0}
figure{margin:0;overflow-x:auto}
figure svg{display:block;width:100%;height:auto}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:2px 18px;margin:0;
 font-size:14px}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:12px}
.tiles div{background:var(--surface);border:1px solid var(--rule);border-radius:10px;
 padding:12px 16px}
.tiles span,.tiles small{display:block;color:var(--muted);font-size:13px}
.tiles b{display:block;font-size:22px;line-height:1.3;font-variant-numeric:tabular-nums}
.beside .scroll{margin:0}
.beside{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:20px;
 align-items:center}
.scroll{overflow:auto;max-height:560px}
section figure + .scroll{margin-top:14px}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th{position:sticky;top:0;background:var(--surface);text-align:left;border-bottom:1px solid
 var(--rule);padding:0}
th button{all:unset;cursor:pointer;display:block;width:100%;box-sizing:border-box;
 padding:6px 10px;color:var(--muted);font-weight:600;white-space:nowrap}
th button:hover,th button:focus-visible{color:var(--ink);text-decoration:underline}
th button::after{content:" ↕";opacity:.45}
th[aria-sort] button::after{opacity:1}
th[aria-sort=ascending] button::after{content:" ↑"}
th[aria-sort=descending] button::after{content:" ↓"}
td{padding:5px 10px;border-bottom:1px solid var(--rule);vertical-align:top}
tbody tr:last-child td{border-bottom:0}
th.n button,td.n{text-align:right}
td.n{white-space:nowrap}
tr.marked td{font-weight:650;background:color-mix(in srgb,var(--planned) 12%,transparent)}
code{font:13px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}
td code{display:block;min-width:9em}
.ops{color:var(--muted)}
.kind{display:block;position:relative;padding-left:19px;min-width:130px}
.kind i{position:absolute;left:0;top:5px;width:11px;height:11px;border-radius:3px}
@media (max-width:760px){.beside .scroll{margin:0}
.beside{grid-template-columns:minmax(0,1fr)}main{padding:20px 12px}section{padding:16px 14px}
dl{grid-template-columns:minmax(0,1fr);gap:0}dd{margin-bottom:8px}}
@media print{section{break-inside:avoid}.scroll{max-height:none}}
"""

SCRIPT = """
document.querySelectorAll("th button").forEach(button => button.onclick = () => {
  const th = button.parentNode, body = th.closest("table").tBodies[0];
  const up = th.getAttribute("aria-sort") !== "ascending";
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const cell = row => row.cells[th.cellIndex];
  const order = (a, b) => "v" in cell(a).dataset ? cell(a).dataset.v - cell(b).dataset.v
    : cell(a).textContent.localeCompare(cell(b).textContent, undefined, {numeric: true});
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
});
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} – Packlight</title>
<style>
{css}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="facts">{facts}</p>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def write_page(page: str, directory: str | Path) -> Path:
    """Write a page as a folder's index.html, which it replaces only once it is whole.

    Raises:
        OSError: the directory cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "index.html"
    unfinished = directory / "index.html.part"
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)
    return path
