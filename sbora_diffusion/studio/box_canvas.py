"""A square on which boxes are drawn with the mouse or a finger: an HTML component whose value is the list of boxes."""

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

MAX_BOXES = 4
COLOURS = ("#4f46e5", "#be185d", "#0e7490", "#b45309")

HTML = """<div class="canvas" role="img" aria-label="regions of the image: drag to draw a box">
{{#unless value.length}}<p>Drag to draw a box</p>{{/unless}}
{{#each value}}<div class="box" style="left:{{this.left}}%; top:{{this.top}}%; width:{{this.width}}%;
height:{{this.height}}%; --colour:{{this.colour}}"><b>{{this.number}}</b></div>{{/each}}
</div>"""

STYLE = """
.canvas { position: relative; width: 100%; aspect-ratio: 1; border-radius: .6rem; touch-action: none; cursor: crosshair;
  user-select: none; background: var(--neutral-100); border: 1px solid var(--border-color-primary); overflow: hidden; }
.canvas p { position: absolute; inset: 45% 0 auto; margin: 0 !important; text-align: center; color: #64748b; }
.box, .selection { position: absolute; box-sizing: border-box; border-radius: .4rem; pointer-events: none; }
.box { border: 3px solid var(--colour); background: color-mix(in srgb, var(--colour) 18%, transparent); }
.box b { position: absolute; left: .3rem; top: .2rem; color: #fff; background: var(--colour); border-radius: .3rem;
  padding: 0 .45rem; }
.selection { border: 2px dashed #64748b; }
"""

SCRIPT = """
const colours = COLOURS, most = MOST, percent = (x) => Math.round(Math.min(1, Math.max(0, x)) * 100);
let start = null;
const point = (event) => {
  const frame = element.querySelector(".canvas").getBoundingClientRect();
  return [percent((event.clientX - frame.left) / frame.width), percent((event.clientY - frame.top) / frame.height)];
};
const between = (a, b) => ({ left: Math.min(a[0], b[0]), top: Math.min(a[1], b[1]),
  width: Math.abs(a[0] - b[0]), height: Math.abs(a[1] - b[1]) });
const select = (box) => {
  let mark = element.querySelector(".selection");
  if (!box) { mark?.remove(); return; }
  if (!mark) { mark = document.createElement("div"); mark.className = "selection"; }
  for (const side in box) mark.style[side] = box[side] + "%";
  element.querySelector(".canvas").append(mark);
};
element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".canvas") || (props.value || []).length >= most) return;
  start = point(event);
  event.preventDefault();
});
window.addEventListener("pointermove", (event) => { if (start) select(between(start, point(event))); });
window.addEventListener("pointerup", (event) => {
  if (!start) return;
  const box = between(start, point(event)), boxes = props.value || [];
  start = null;
  select(null);
  if (box.width < 8 || box.height < 8) return;
  props.value = [...boxes, { ...box, number: boxes.length + 1, colour: colours[boxes.length] }];
  trigger("input");
});
""".replace("COLOURS", json.dumps(COLOURS)).replace("MOST", str(MAX_BOXES))


def box_canvas() -> gr.HTML:
    """Return the component without boxes."""
    return gr.HTML([], html_template=HTML, css_template=STYLE, js_on_load=SCRIPT, elem_id="box-canvas")


def box(number: int, left: float, top: float, width: float, height: float) -> dict[str, Any]:
    """Return box `number`, counted from 0, of the component's value; sides are in percent."""
    sides = {"left": left, "top": top, "width": width, "height": height}
    return {**sides, "number": number + 1, "colour": COLOURS[number]}


def fractions(boxes: Sequence[dict[str, Any]]) -> list[tuple[float, float, float, float]]:
    """Return left, top, right, bottom of each box, from 0 to 1."""
    return [
        (b["left"] / 100, b["top"] / 100, (b["left"] + b["width"]) / 100, (b["top"] + b["height"]) / 100)
        for b in boxes[:MAX_BOXES]
    ]
