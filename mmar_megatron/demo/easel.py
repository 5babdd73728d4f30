"""The picture on the page, on whose tokens one draws with the mouse: HTML, styles and script of a component of gradio's.

Its value is the list of marked tokens, in raster order; its properties are `picture` (a data URL), `rows`, `columns` and `file`
(its name when it is saved). One draws in whole tokens, since whole tokens are drawn anew.
"""

from __future__ import annotations

HTML = """
<div class="easel">
  <div class="stack">
    <img class="picture" src="${picture}" alt="the picture" draggable="false">
    <canvas class="marks" width="960" height="960" tabindex="-1"></canvas>
  </div>
  <div class="tools">
    <label>brush <input class="brush" type="range" min="1" max="${Math.max(2, Math.ceil(rows / 2))}" value="1"></label>
    <button class="clear" type="button">Clear marks</button>
    <a class="save" href="${picture}" download="${file}">Save</a>
  </div>
</div>
"""

CSS = """
.easel { --side: min(100%, max(260px, 100vh - 300px)); display: grid; gap: 8px; justify-items: center; }
.stack { position: relative; width: var(--side); aspect-ratio: 1; border: 1px solid var(--border-color-primary); }
.picture, .marks { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; border-radius: 0; }
.picture { image-rendering: pixelated; }
.marks { cursor: crosshair; touch-action: none; }
.tools { display: flex; flex-wrap: wrap; gap: 16px; align-items: center; justify-content: center; font-size: var(--text-sm); }
.tools label { display: flex; gap: 6px; align-items: center; color: var(--body-text-color-subdued); }
.brush { width: 90px; }
.clear, .save { color: var(--link-text-color); text-decoration: underline; background: none; border: 0; cursor: pointer; }
"""

SCRIPT = """
const marked = new Set(props.value ?? []);
let brush = 1, at = null, adding = true, drawing = false;

// Light and dark, to be seen on pictures of any colour.
const hatching = paper => {
  const tile = document.createElement("canvas"), ink = tile.getContext("2d");
  tile.width = tile.height = 16;
  ink.fillStyle = "rgba(30, 30, 60, 0.55)";
  ink.fillRect(0, 0, 16, 16);
  ink.strokeStyle = "rgba(255, 255, 255, 0.65)";
  ink.lineWidth = 3;
  ink.beginPath();
  for (const x of [-16, 0, 16]) { ink.moveTo(x - 2, 18); ink.lineTo(x + 18, -2); }
  ink.stroke();
  return paper.createPattern(tile, "repeat");
};
const show = () => {
  const canvas = element.querySelector(".marks"), paper = canvas.getContext("2d");
  const width = canvas.width / props.columns, height = canvas.height / props.rows;
  const box = (token, inset) => [
    (token % props.columns) * width + inset, Math.floor(token / props.columns) * height + inset,
    width - 2 * inset, height - 2 * inset,
  ];
  const outline = (token, colour, inset) => {
    paper.strokeStyle = colour;
    paper.strokeRect(...box(token, inset));
  };
  paper.clearRect(0, 0, canvas.width, canvas.height);
  paper.lineWidth = 3;
  paper.fillStyle = hatching(paper);
  for (const token of marked) paper.fillRect(...box(token, 0));
  for (const token of marked) outline(token, "white", 2);
  for (const token of at === null ? [] : under(at)) {
    outline(token, "white", 2);
    outline(token, "black", 5);
  }
  element.dataset.marked = [...marked].sort((a, b) => a - b).join(" ");
};

const place = event => {
  const frame = element.querySelector(".marks").getBoundingClientRect();
  return [(event.clientX - frame.left) / frame.width * props.columns, (event.clientY - frame.top) / frame.height * props.rows];
};
// The tokens under a square brush of `brush` tokens around a place.
const under = ([x, y]) => {
  const left = Math.round(x - brush / 2), top = Math.round(y - brush / 2), found = [];
  for (let row = Math.max(0, top); row < Math.min(props.rows, top + brush); row++)
    for (let column = Math.max(0, left); column < Math.min(props.columns, left + brush); column++)
      found.push(row * props.columns + column);
  return found;
};
const draw = (from, to) => {
  const steps = Math.ceil(4 * Math.max(Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]), 0.25));
  for (let step = 0; step <= steps; step++)
    for (const token of under(from.map((value, axis) => value + (to[axis] - value) * step / steps)))
      adding ? marked.add(token) : marked.delete(token);
};
const give = () => { props.value = [...marked].sort((a, b) => a - b); show(); };

element.addEventListener("pointerdown", event => {
  if (!event.target.matches(".marks") || event.button !== 0) return;
  event.target.setPointerCapture(event.pointerId);
  at = place(event);
  adding = !under(at).every(token => marked.has(token));
  drawing = true;
  draw(at, at);
  show();
});
element.addEventListener("pointermove", event => {
  if (!event.target.matches(".marks")) return;
  const now = place(event);
  if (drawing) draw(at, now);
  at = now;
  show();
});
const end = () => { if (drawing) { drawing = false; give(); } };
element.addEventListener("pointerup", end);
element.addEventListener("pointercancel", end);
element.addEventListener("pointerout", event => { if (!drawing) { at = null; show(); } });
element.addEventListener("input", event => { brush = Number(event.target.value); });
element.addEventListener("click", event => { if (event.target.matches(".clear")) { marked.clear(); give(); } });

watch("value", () => {
  if (drawing) return;
  marked.clear();
  for (const token of props.value ?? []) marked.add(token);
  show();
});
watch("picture", show);
show();
"""
