"""The frame of report.html: style for light, dark and phone, and the few lines of script that a touch screen needs.

Nothing is loaded from anywhere. Without scripts everything is still there; hover titles are then the browser's own.
"""

from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --page:#f7f7f5; --card:#fff; --ink:#0b0b0b; --soft:#52514e; --mute:#757470;
  --grid:#e8e7e2; --axis:#c3c2b7; --edge:#e3e2dc; --good:#006a2b; --good-fill:#e4f4e8; --bad:#b3261e; --bad-fill:#fbe6e4;
  --c0:#2a78d6; --c1:#149367; --c2:#d98d00; --c3:#6a4fc4; --tint:42,120,214; }
@media (prefers-color-scheme: dark) { :root { --page:#0e0e0d; --card:#1a1a19; --ink:#fff; --soft:#c3c2b7; --mute:#9a988f;
  --grid:#2b2b29; --axis:#45443f; --edge:#2e2e2b; --good:#5fd38a; --good-fill:#12301d; --bad:#ff8a80; --bad-fill:#3a1715;
  --c0:#4b95ec; --c1:#25ac7d; --c2:#d79a20; --c3:#9a8bee; --tint:75,149,236; } }
* { box-sizing: border-box }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif }
main { max-width:1260px; margin:0 auto; padding:28px 18px 60px }
h1 { font-size:26px; line-height:1.25; margin:0 0 4px; letter-spacing:-.01em } h2 { font-size:18px; margin:36px 0 12px }
p { margin:6px 0 } small, .note, .soft { color:var(--soft) } .note { font-size:13px; margin:4px 0 0 }
code, .mono { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; font-size:.88em }
.verdict { border-radius:10px; padding:14px 18px; margin:18px 0; font-size:17px; font-weight:600 }
.verdict span { display:block; font-size:14px; font-weight:400; color:var(--ink) }
.verdict.good { background:var(--good-fill); color:var(--good) } .verdict.bad { background:var(--bad-fill); color:var(--bad) }
.verdict.none { background:var(--card); border:1px solid var(--edge) }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(200px,1fr)); gap:12px }
.tile, .card { background:var(--card); border:1px solid var(--edge); border-radius:10px; padding:12px 14px; margin:0 }
.tile small { display:block; font-size:13px } .tile b { font-size:20px; font-weight:600; white-space:nowrap }
.tile.wide { grid-column:1/-1 } .tile.wide b { font-size:15px; white-space:normal; overflow-wrap:anywhere }
.grid { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr)); gap:12px }
figcaption { display:flex; flex-wrap:wrap; gap:0 8px; align-items:baseline }
.pair { display:grid; grid-template-columns:minmax(0,1fr) minmax(0,2fr); gap:12px; margin-top:12px; align-items:start }
.readout { display:block; min-height:17px; font-size:11.5px; color:var(--soft); font-variant-numeric:tabular-nums }
.legend { display:flex; flex-wrap:wrap; gap:0 14px; min-height:20px; font-size:13px; color:var(--soft) }
.legend i { display:inline-block; width:12px; height:3px; border-radius:2px; margin-right:6px; vertical-align:middle }
svg { display:block; width:100%; height:auto; margin-top:4px; overflow:visible }
svg .grid { stroke:var(--grid) } svg .axis { stroke:var(--axis) }
svg text { font:11px system-ui,sans-serif; fill:var(--mute); font-variant-numeric:tabular-nums }
svg text.value { font-size:12px; font-weight:600; fill:var(--ink) }
svg text.result { font-size:12.5px; font-weight:600; fill:var(--good) }
svg .line { fill:none; stroke-width:2; stroke-linejoin:round; stroke-linecap:round }
svg .line.dense { stroke-width:1.2 } svg .line.faint { stroke-width:1; opacity:.45 }
svg .line.zero { stroke-width:3.5; stroke:var(--good) !important }
svg .dot { stroke:var(--card); stroke-width:2 } svg .bad { stroke:var(--bad); stroke-width:2.2 }
svg .hit { fill:transparent } svg .cursor { stroke:var(--mute); opacity:0; pointer-events:none }
svg .column:hover .cursor { opacity:.7 } svg .column:hover rect:not(.hit) { opacity:.8 }
.nothing { color:var(--mute); padding:70px 0; text-align:center }
.scroll { overflow-x:auto; -webkit-overflow-scrolling:touch } .scroll table { min-width:640px }
.tall { max-height:26rem; overflow:auto }
table { border-collapse:collapse; width:100%; font-size:14px } td.n, th.n { text-align:right; white-space:nowrap }
th { text-align:left; font-weight:600; color:var(--soft); font-size:13px } td, th { padding:5px 14px 5px 0; vertical-align:top }
tbody tr { border-top:1px solid var(--edge) } td.n { font-variant-numeric:tabular-nums }
.tall thead th { position:sticky; top:0; background:var(--card) }
.ok { color:var(--good) } .critical { color:var(--bad); font-weight:600 }
.tokens { display:flex; flex-wrap:wrap; gap:5px; margin:10px 0 }
.tok { border-radius:6px; padding:3px 7px; line-height:1.25; border:1px solid transparent; max-width:100% }
.tok b { font-weight:500; overflow-wrap:anywhere } .tok small { display:block; font-size:11px; color:var(--ink); opacity:.8 }
.tok.diff { border-color:var(--bad); border-width:2px }
.p0 { background:rgba(var(--tint),.06) } .p1 { background:rgba(var(--tint),.16) } .p2 { background:rgba(var(--tint),.28) }
.p3 { background:rgba(var(--tint),.42) } .p4 { background:rgba(var(--tint),.58) }
.scale { display:flex; flex-wrap:wrap; gap:4px; font-size:12px; color:var(--soft); align-items:center }
.scale span { border-radius:5px; padding:1px 7px; color:var(--ink) }
pre { white-space:pre-wrap; overflow-wrap:anywhere; margin:4px 0; font-size:13px } .label { color:var(--mute); font-size:12px }
.reward { float:right; border-radius:20px; padding:1px 10px; font-size:13px; font-weight:600; background:var(--page) }
.reward.high { background:var(--good-fill); color:var(--good) }
details { background:var(--card); border:1px solid var(--edge); border-radius:10px; padding:10px 14px; margin-top:12px }
summary { cursor:pointer; font-weight:600 }
@media (max-width:860px) { .pair { grid-template-columns:minmax(0,1fr) } }
@media (max-width:560px) { main { padding:18px 12px 40px } h1 { font-size:22px } .tiles { grid-template-columns:1fr 1fr }
  .tile b { font-size:17px } }
"""

# shows the title under the finger or the pointer in the card's corner: touch screens have no hover titles
SCRIPT = """
for (const kind of ["pointerover", "pointerdown"]) addEventListener(kind, (event) => {
  const column = event.target.closest && event.target.closest(".column"); if (!column) return;
  const out = column.closest("figure").querySelector(".readout");
  out.textContent = column.querySelector("title").textContent.split("\\n").join(" · ");
});
"""


def page(title: str, body: str) -> str:
    """A complete HTML document; `body` is HTML, `title` is text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def labelled(label: str, value: Any) -> str:
    """A small label and text below it as it is, line breaks included; nothing where the value is None."""
    if value is None:
        return ""
    return f'<div class="label">{label}</div><pre>{escape(str(value))}</pre>'
