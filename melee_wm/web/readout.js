/** Times and rates: the model's step, its lateness, frames that arrive, the browser's own rate, and from press to picture. */
import {element, say} from "./elements.js";
import {same} from "./grid.js";

const WINDOW = 1000, KEPT = 15;

/** How many of the times lie in the last second. */
function rate(times, now) {
  while (times.length && times[0] < now - WINDOW) times.shift();
  return times.length;
}

const median = values => [...values].sort((one, other) => one - other)[values.length >> 1];

/** The line of figures under the match. */
export class Readout {
  constructor(root) {
    this.arrivals = [];
    this.repaints = [];
    this.waits = [];
    this.pending = [null, null];
    this.shownAt = 0;
    this.figures = {};
    for (const [name, title, meaning] of [["step", "model step", "What the model takes for one frame, of what a frame has"], ["late", "late", "How late the server began the frame"],
      ["frames", "frames", "Frames that arrive in a second"], ["browser", "browser", "Repaints of this page in a second"], ["press", "press to frame", "From a press to the frame that knows of it; the screen adds its own"]]) {
      this.figures[name] = element("dd", {textContent: "–"});
      root.append(element("div", {title: meaning}, element("dt", {textContent: title}), this.figures[name]));
    }
  }

  /** A controller changed; `time` is null while the match stands still. */
  pressed(player, controls, time) { this.pending[player] = time === null ? null : {controls, time}; }

  received(view) {
    this.arrivals.push(performance.now());
    this.last = view;
    for (const player of [0, 1]) {
      const waiting = this.pending[player];
      if (!waiting || !same(waiting.controls, view.players[player].controls)) continue;
      this.waits = [...this.waits, performance.now() - waiting.time].slice(-KEPT);
      this.pending[player] = null;
    }
  }

  /** Called at each repaint; the figures change four times a second. */
  drawn(time, running) {
    this.repaints.push(time);
    if (time - this.shownAt < 250) return;
    this.shownAt = time;
    say(this.figures.browser, `${rate(this.repaints, time)} /s`);
    say(this.figures.frames, running ? `${rate(this.arrivals, performance.now())} /s` : "–");
    if (!this.last) return;
    say(this.figures.step, `${this.last.stepMs.toFixed(1)} of ${this.last.budgetMs.toFixed(1)} ms`);
    this.figures.step.classList.toggle("over", this.last.stepMs > this.last.budgetMs);
    say(this.figures.late, `${this.last.lateMs.toFixed(1)} ms`);
    if (this.waits.length) say(this.figures.press, `${median(this.waits).toFixed(0)} ms`);
  }
}
