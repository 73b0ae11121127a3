"""A square to draw boxes on, with the mouse or a finger: a component of HTML, whose value is the list of boxes."""

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

MAX_BOXES = 4
COLOURS = ("#4f46e5", "#be185d", "#0e7490", "#b45309")

HTML = """<div class="board" role="img" aria-label="the image's regions: drag to draw a box">
{{#unless value.length}}<p>Drag to draw a box</p>{{/unless}}
{{#each value}}<div class="box" style="left:{{this.left}}%; top:{{this.top}}%; width:{{this.width}}%;
height:{{this.height}}%; --colour:{{this.colour}}"><b>{{this.number}}</b></div>{{/each}}
</div>"""

STYLE = """
.board { position: relative; width: 100%; aspect-ratio: 1; border-radius: .6rem; touch-action: none; cursor: crosshair;
  user-select: none; background: var(--neutral-100); border: 1px solid var(--border-color-primary); overflow: hidden; }
.board p { position: absolute; inset: 45% 0 auto; margin: 0 !important; text-align: center; color: #64748b; }
.box, .band { position: absolute; box-sizing: border-box; border-radius: .4rem; pointer-events: none; }
.box { border: 3px solid var(--colour); background: color-mix(in srgb, var(--colour) 18%, transparent); }
.box b { position: absolute; left: .3rem; top: .2rem; color: #fff; background: var(--colour); border-radius: .3rem;
  padding: 0 .45rem; }
.band { border: 2px dashed #64748b; }
"""

SCRIPT = """
const colours = COLOURS, most = MOST, percent = (x) => Math.round(Math.min(1, Math.max(0, x)) * 100);
let start = null;
const point = (event) => {
  const frame = element.querySelector(".board").getBoundingClientRect();
  return [percent((event.clientX - frame.left) / frame.width), percent((event.clientY - frame.top) / frame.height)];
};
const between = (a, b) => ({ left: Math.min(a[0], b[0]), top: Math.min(a[1], b[1]),
  width: Math.abs(a[0] - b[0]), height: Math.abs(a[1] - b[1]) });
const band = (box) => {
  let mark = element.querySelector(".band");
  if (!box) { mark?.remove(); return; }
  if (!mark) { mark = document.createElement("div"); mark.className = "band"; }
  for (const side in box) mark.style[side] = box[side] + "%";
  element.querySelector(".board").append(mark);
};
element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".board") || (props.value || []).length >= most) return;
  start = point(event);
  event.preventDefault();
});
window.addEventListener("pointermove", (event) => { if (start) band(between(start, point(event))); });
window.addEventListener("pointerup", (event) => {
  if (!start) return;
  const box = between(start, point(event)), boxes = props.value || [];
  start = null;
  band(null);
  if (box.width < 8 || box.height < 8) return;
  props.value = [...boxes, { ...box, number: boxes.length + 1, colour: colours[boxes.length] }];
  trigger("input");
});
""".replace("COLOURS", json.dumps(COLOURS)).replace("MOST", str(MAX_BOXES))


def board() -> gr.HTML:
    """The component, empty."""
    return gr.HTML([], html_template=HTML, css_template=STYLE, js_on_load=SCRIPT, elem_id="board")


def box(number: int, left: float, top: float, width: float, height: float) -> dict[str, Any]:
    """A box of the board's value, counted from 0, in percent."""
    place = {"left": left, "top": top, "width": width, "height": height}
    return {**place, "number": number + 1, "colour": COLOURS[number]}


def fractions(boxes: Sequence[dict[str, Any]]) -> list[tuple[float, float, float, float]]:
    """Left, top, right, bottom of each box, from 0 to 1."""
    return [
        (b["left"] / 100, b["top"] / 100, (b["left"] + b["width"]) / 100, (b["top"] + b["height"]) / 100)
        for b in boxes[:MAX_BOXES]
    ]
