/** A strip of time one can drag along: a drawing underneath, a range input (mouse, touch, keys) on top. */
import {PLAYER_COLORS} from "./cast.js";
import {element} from "./elements.js";
import {valueOf} from "./frames.js";
import {seconds} from "./words.js";

const QUIET = "#97a3b6", LINE = "#2a3342";

/** The strip itself. `paint(ctx, width, height, timeline)` draws it; `onseek(value)` hears of drags. */
export class Timeline {
  constructor(root, label, paint, onseek) {
    this.canvas = element("canvas", {ariaHidden: "true"});
    this.range = element("input", {type: "range", min: 0, max: 0, step: 1, ariaLabel: label, disabled: true});
    root.append(this.canvas, this.range);
    this.paint = paint;
    this.inset = {left: 0, right: 0};
    this.range.addEventListener("input", () => onseek(Number(this.range.value)));
    this.range.addEventListener("pointerdown", event => this.drag(event, onseek));
    new ResizeObserver(() => this.draw()).observe(root);
  }

  /** Where a value lies in the drawing, in CSS pixels. */
  x(value) {
    const {first, last} = this, width = this.canvas.clientWidth - this.inset.left - this.inset.right;
    return this.inset.left + (last > first ? (value - first) / (last - first) : 1) * width;
  }

  /** Drag by the drawing's own scale: a range's thumb runs in a narrower groove. */
  drag(event, onseek) {
    if (this.range.disabled) return;
    const move = ({clientX}) => {
      const box = this.canvas.getBoundingClientRect(), width = box.width - this.inset.left - this.inset.right;
      const share = Math.max(0, Math.min(1, (clientX - box.left - this.inset.left) / width));
      onseek(Math.round(this.first + share * (this.last - this.first)));
    };
    event.preventDefault();
    this.range.focus({preventScroll: true});
    this.range.setPointerCapture(event.pointerId);
    move(event);
    this.range.addEventListener("pointermove", move);
    const end = () => this.range.removeEventListener("pointermove", move);
    this.range.addEventListener("pointerup", end, {once: true});
    this.range.addEventListener("pointercancel", end, {once: true});
  }

  /** Show this stretch and this place in it; `text` is what a screen reader says. */
  set(first, last, value, text) {
    Object.assign(this, {first, last, value});
    Object.assign(this.range, {min: first, max: last, disabled: last <= first});
    this.range.value = value;
    this.range.setAttribute("aria-valuetext", text);
    this.draw();
  }

  draw() {
    const {canvas} = this, width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width || this.value === undefined) return;
    const wide = Math.round(width * devicePixelRatio), high = Math.round(height * devicePixelRatio);
    if (canvas.width !== wide || canvas.height !== high) Object.assign(canvas, {width: wide, height: high});
    const ctx = canvas.getContext("2d");
    ctx.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    ctx.clearRect(0, 0, width, height);
    ctx.font = "11px system-ui, sans-serif";
    this.paint(ctx, width, height, this);
    ctx.fillStyle = "#e8edf5";
    ctx.fillRect(Math.round(this.x(this.value)) - 1, 0, 2, height);
  }
}

function curve(ctx, points, color, width, dash = []) {
  ctx.strokeStyle = color; ctx.lineWidth = width; ctx.lineJoin = "round"; ctx.setLineDash(dash);
  ctx.beginPath();
  points.forEach(([x, y], i) => i ? ctx.lineTo(x, y) : ctx.moveTo(x, y));
  ctx.stroke();
  ctx.setLineDash([]);
}

/** A painter of a session's history: both percents over time, lost stocks, and the dropped branch in dashes. */
export function historyPainter(history, lexicon) {
  const series = (frames, player, height, timeline) => {
    const numbers = [...frames.keys()].sort((a, b) => a - b), stride = Math.max(1, Math.floor(numbers.length / 600));
    return numbers.filter((_, i) => i % stride === 0 || i === numbers.length - 1).map(frame => [timeline.x(frame),
      height - 6 - Math.min(1, valueOf(lexicon, frames.get(frame), player, "percent") / 150) * (height - 26)]);
  };
  return (ctx, width, height, timeline) => {
    ctx.fillStyle = QUIET;
    ctx.textAlign = "left";
    const branch = [...history.dropped.keys()], from = branch.length ? timeline.x(Math.min(...branch)) : Infinity, to = timeline.x(history.lastDropped);
    if (from > 60) ctx.fillText("percent", 8, 14);
    if (branch.length) {
      ctx.fillStyle = "rgb(143 224 192 / 0.08)"; ctx.fillRect(from, 0, to - from, height);
      ctx.fillStyle = "#8fe0c0"; ctx.fillRect(from, 0, 1.5, height); ctx.fillText("branch", Math.min(from + 6, width - 44), 14);
    }
    for (const player of [0, 1]) {
      curve(ctx, series(history.dropped, player, height, timeline), PLAYER_COLORS[player] + "88", 1.2, [3, 3]);
      curve(ctx, series(history.frames, player, height, timeline), PLAYER_COLORS[player], 1.8);
    }
    ctx.fillStyle = QUIET;
    ctx.textAlign = "right";
    ctx.fillText(`${seconds(timeline.value - timeline.first)} of ${seconds(timeline.last - timeline.first)}`, width - 8, 14);
  };
}

/** A round step that makes three to five ticks up to a value. */
function tickStep(highest) {
  const rough = highest / 4, power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map(factor => factor * power).find(step => step >= rough);
}

/** A painter of the distance between model and truth, one curve a player, in game units over seconds. */
export function errorPainter(watch) {
  return (ctx, width, height, timeline) => {
    const errors = watch.errors;
    Object.assign(timeline.inset, {left: 44, right: 18});
    const top = 24, bottom = height - 22, highest = Math.max(1, ...errors.flat().filter(Number.isFinite)), y = value => bottom - value / highest * (bottom - top);
    ctx.fillStyle = QUIET; ctx.strokeStyle = LINE; ctx.lineWidth = 1; ctx.textAlign = "right";
    for (let value = 0; errors.length && value <= highest; value += tickStep(highest)) {
      ctx.beginPath(); ctx.moveTo(44, Math.round(y(value)) + 0.5); ctx.lineTo(width - 18, Math.round(y(value)) + 0.5); ctx.stroke();
      ctx.fillText(String(Number(value.toPrecision(2))), 38, y(value) + 4);
    }
    ctx.textAlign = "center";
    const length = (timeline.last - timeline.first + 1) / 60, step = tickStep(Math.max(1, length * (width < 500 ? 1.6 : 0.8)));
    for (let second = 0; second <= length; second += step) ctx.fillText(`${Number(second.toFixed(2))} s`, timeline.x(timeline.first + second * 60), height - 6);
    ctx.textAlign = "left";
    ctx.fillText(!errors.length ? "no truth in this file" : width < 500 ? "error (game units)" : "distance from the truth (game units)", 44, 14);
    errors.forEach((values, player) => {
      const stride = Math.max(1, Math.floor(values.length / 800));
      curve(ctx, values.map((value, i) => [timeline.x(i), y(value)]).filter((_, i) => i % stride === 0), PLAYER_COLORS[player], 1.8);
      ctx.fillStyle = PLAYER_COLORS[player]; ctx.textAlign = "right";
      ctx.fillText(`P${player + 1} ${values[timeline.value].toFixed(1)}`, width - 18 - (1 - player) * 62, 14);
      ctx.textAlign = "left";
    });
  };
}
