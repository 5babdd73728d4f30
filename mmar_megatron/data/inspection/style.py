"""How the page looks: in light and in dark, from 400 pixels of width on. No script, and nothing is fetched."""

STYLE = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1c1e21; --soft: #565c64; --line: #d5d8dc; --bar: #2f6db5; --accent: #1b5aa6;
  --text: #d9e8fb; --special: #fbe6b4; --seen: #bfe5c6; --masked-a: #9aa1aa; --masked-b: #c3c8ce; --padding: transparent;
  --learned: #b3261e; --code: #f0f1f2; }
@media (prefers-color-scheme: dark) { :root {
  --page: #15171a; --card: #1d2024; --ink: #e8eaed; --soft: #a9b0b8; --line: #3a3f46; --bar: #6ea8ea; --accent: #8ab8f2;
  --text: #22406a; --special: #5c4510; --seen: #1f5a33; --masked-a: #555c65; --masked-b: #3b4149; --learned: #ff8a80;
  --code: #272b30; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, "Noto Sans", "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 1500px; margin: 0 auto; padding: 0 16px; }
h1 { font-size: 1.6rem; margin: 24px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 20px 0 6px; overflow-wrap: anywhere; }
p { margin: 6px 0 10px; max-width: 75ch; overflow-wrap: anywhere; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0; }
.soft { color: var(--soft); font-size: .875rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 16px 0; padding: 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.tiles dt { color: var(--soft); font-size: .875rem; }
.tiles dd { margin: 0; font-size: 1.4rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums; font-size: .9375rem; }
caption { text-align: left; color: var(--soft); font-size: .875rem; padding-bottom: 4px; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
.words { table-layout: fixed; width: 100%; max-width: 900px; }
.words th { width: 11em; }
.words td { overflow-wrap: anywhere; }
tr.chosen td, tr.chosen th { font-weight: 700; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 16px; }
figure { margin: 0; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; max-width: 560px; }
.chart figcaption { font-weight: 600; }
.chart svg { display: block; width: 100%; height: auto; color: var(--ink); }
.chart .bar { fill: var(--bar); }
.chart .axis { stroke: var(--line); }
.chart text { fill: var(--soft); font-size: 11px; }
details { margin-top: 4px; }
summary { cursor: pointer; color: var(--soft); font-size: .875rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 170px), 1fr)); gap: 14px; }
.sheet figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px; overflow: hidden; }
.sheet img { display: block; width: 100%; max-width: 256px; height: auto; margin: 0 auto 6px; }
.sheet p { margin: 0 0 4px; font-size: .875rem; line-height: 1.35; }
.sheet .several { display: grid; grid-template-columns: repeat(auto-fill, minmax(70px, 1fr)); gap: 4px; }
.pixels { image-rendering: pixelated; }
.tag { color: var(--soft); font-size: .8125rem; }
.row { margin: 20px 0 28px; }
.document { display: flex; flex-wrap: wrap; gap: 8px 16px; background: var(--card); border: 1px solid var(--line);
  border-left: 4px solid var(--accent); border-radius: 4px; padding: 8px; margin: 6px 0; }
.document.rest { border-left-style: dotted; }
.document > div { flex: 1 1 260px; min-width: 0; }
.document h4 { margin: 0 0 6px; font-size: .875rem; font-weight: 600; overflow-wrap: anywhere; }
.document figure { flex: 0 0 auto; }
.document figure img { display: block; width: 128px; height: 128px; outline: 1px solid var(--line); outline-offset: -1px; }
.document figcaption { max-width: 128px; }
.cells { display: flex; flex-wrap: wrap; gap: 2px; margin: 0; font-size: .875rem; line-height: 1.4; }
.cells i { font-style: normal; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 3px; padding: 0 3px; min-width: 8px;
  max-width: 100%; min-height: 20px; border-bottom: 3px solid transparent; }
.cells .text { background: var(--text); }
.cells .special { background: var(--special); }
.cells .seen, .cells .masked, .cells .padding { width: 12px; min-width: 12px; min-height: 12px; height: 12px; padding: 0;
  border: 0; align-self: center; }
.cells .seen { background: var(--seen); }
.cells .masked { background: repeating-linear-gradient(45deg, var(--masked-a) 0 3px, var(--masked-b) 3px 6px); }
.cells .padding { border: 1px dotted var(--soft); }
.cells .learned { border-bottom-color: var(--learned); }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; padding: 0; margin: 8px 0; list-style: none; font-size: .875rem; }
.legend li { display: flex; gap: 6px; align-items: center; }
.legend .cells i { min-width: 14px; }
.swatch { width: 14px; height: 14px; border: 1px solid var(--line); display: inline-block; }
.attention img { width: 100%; max-width: 640px; height: auto; display: block; border: 1px solid var(--line); }
code { background: var(--code); border-radius: 3px; padding: 0 4px; overflow-wrap: anywhere; }
footer { margin: 40px auto 24px; }
"""
