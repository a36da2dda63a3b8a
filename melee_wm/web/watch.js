/** Watch mode: the model and the truth side by side, on one timeline with the distance between them. */
import {byId, isTyping, notice, say} from "./elements.js";
import {Lexicon, storedFrame} from "./frames.js";
import {Hud} from "./hud.js";
import {Scene} from "./draw.js";
import {Timeline, errorPainter} from "./timeline.js";
import {clock, seconds} from "./words.js";

const SCHEMA = "melee-wm-rollout/1", TRAIL = 28;

/** Distance between model and truth on every frame, one list a player; none where there is no truth. */
export function positionErrors(rollout) {
  if (!rollout.truth) return [];
  return [0, 1].map(player => {
    const model = rollout.frames.players[player], truth = rollout.truth.players[player];
    return model.x.map((x, i) => Math.hypot(x - truth.x[i], model.y[i] - truth.y[i]));
  });
}

/** The Watch tab. */
export class Watch {
  constructor(about, engine) {
    this.about = about;
    this.engine = engine;
    this.lexicon = new Lexicon(about);
    this.scenes = {frames: new Scene(byId("model-picture")), truth: new Scene(byId("truth-picture"))};
    this.huds = {frames: new Hud(byId("model-huds"), false), truth: new Hud(byId("truth-huds"), false)};
    for (const scene of Object.values(this.scenes)) scene.onresize = () => { this.stale = true; };
    this.errors = [];
    this.timeline = new Timeline(byId("watch-timeline"), "Place in the rollout", errorPainter(this), row => this.show(row, false));
    this.rollout = this.source = null;
    this.playing = this.overlay = this.stale = false;
    this.place = this.before = 0;
    this.ontakeover = () => {};
    this.wire();
    requestAnimationFrame(time => this.draw(time));
  }

  wire() {
    byId("watch-play").addEventListener("click", () => this.playOrPause());
    byId("watch-back").addEventListener("click", () => this.show(this.row - 1, false));
    byId("watch-step").addEventListener("click", () => this.show(this.row + 1, false));
    byId("overlay").addEventListener("click", () => { this.overlay = !this.overlay; byId("overlay").setAttribute("aria-pressed", String(this.overlay)); this.stale = true; });
    byId("again").addEventListener("submit", event => { event.preventDefault(); this.run(Number(byId("watch-from").value)); });
    byId("take-over").addEventListener("click", () => this.ontakeover(this.source, this.rollout.frames.frame[this.row]));
    addEventListener("keydown", event => this.shortcut(event));
  }

  get row() { return Math.floor(this.place); }
  get length() { return this.rollout.frames.frame.length; }

  /** Show an uploaded replay: the model from a frame on, under the players' own inputs. */
  async useReplay(info, name) {
    this.source = info;
    this.name = name;
    const last = info.first + info.frames - 1;
    Object.assign(byId("watch-from"), {min: info.first, max: last - 1});
    await this.run(Math.max(info.first, Math.min(240, last - 300)));
  }

  async run(frame) {
    const {token, first, frames} = this.source, most = first + frames - 1 - frame;
    notice("The model is running …", true);
    try {
      const rollout = await this.engine.watch({token, frame, frames: Math.max(1, Math.min(Number(byId("watch-length").value), most, this.about.limits?.frames ?? Infinity))});
      notice();
      this.open(rollout, this.name, this.source);
      byId("watch-from").value = frame;
    } catch (error) { notice(`Not run: ${error.message}`); }
  }

  /** Show a rollout; `source` is the upload it came from, if it did. */
  open(rollout, name, source = null) {
    if (rollout?.schema !== SCHEMA) throw new Error(`not a rollout of this schema; expected ${SCHEMA}; got ${rollout?.schema ?? "something else"}`);
    if (!this.lexicon.stages.has(rollout.stage)) throw new Error(`unknown stage ${rollout.stage}`);
    Object.assign(this, {rollout, source, errors: positionErrors(rollout)});
    this.stage = this.lexicon.stages.get(rollout.stage);
    this.characters = rollout.players.map(player => player.character);
    for (const scene of Object.values(this.scenes)) scene.camera.cut();
    byId("welcome").hidden = true;
    byId("theatre").hidden = false;
    byId("truth-figure").hidden = byId("overlay").hidden = !rollout.truth;
    byId("again").hidden = byId("take-over").hidden = source === null;
    say(byId("model-caption"), `${rollout.source?.model ?? ""} from frame ${rollout.source?.seed_frame ?? rollout.frames.frame[0] - 1}`);
    say(byId("truth-caption"), name ?? "");
    this.show(0, !matchMedia("(prefers-reduced-motion: reduce)").matches);
  }

  /** Go to a row; play on from there or stand still. */
  show(row, playing) {
    if (!this.rollout) return;
    this.place = Math.max(0, Math.min(this.length - 1, row));
    this.playing = playing;
    this.stale = true;
    say(byId("watch-play"), playing ? "Pause" : "Play");
  }

  playOrPause() {
    if (this.rollout) this.show(!this.playing && this.row >= this.length - 1 ? 0 : this.place, !this.playing);
  }

  shortcut(event) {
    const mine = {Space: () => this.playOrPause(), ArrowLeft: () => this.show(this.row - 1, false), ArrowRight: () => this.show(this.row + 1, false)}[event.code];
    if (!mine || !this.rollout || byId("watch-panel").hidden || isTyping(event) || event.target.closest("button, [role=tab]")) return;
    event.preventDefault();
    mine();
  }

  /** A row of the model's frames or the truth's, made once. */
  view(part, row) {
    const frames = this.rollout[part];
    frames.views ??= [];
    return frames.views[row] ??= storedFrame(this.lexicon, frames, row, this.characters);
  }

  /** Called by the browser before each repaint. */
  draw(time) {
    requestAnimationFrame(next => this.draw(next));
    const elapsed = Math.min(0.1, (time - this.before) / 1000);
    this.before = time;
    if (!this.rollout || byId("watch-panel").hidden || !this.playing && !this.stale) return;
    if (this.playing) this.place += elapsed * 60 * Number(byId("watch-speed").value);
    if (this.place >= this.length - 1) this.show(this.length - 1, false);
    this.stale = this.playing;
    this.render(time);
  }

  render(time) {
    const row = this.row, views = {frames: this.view("frames", row)}, frame = views.frames.frame;
    if (this.rollout.truth) views.truth = this.view("truth", row);
    const follow = Object.values(views).flatMap(view => view.players);
    for (const [part, view] of Object.entries(views)) {
      const rows = Array.from({length: Math.min(TRAIL, row + 1)}, (_, i) => Math.max(0, row - TRAIL + 1) + i);
      this.scenes[part].render(view, this.stage, {follow, trail: rows.map(one => this.view(part, one)), old: this.overlay && part === "frames" && views.truth,
        cut: !this.playing}, time);
      this.huds[part].show(view);
    }
    const {minutes, hundredths} = clock(frame), distance = this.errors.map((values, player) => `, player ${player + 1} is ${values[row].toFixed(1)} from the truth`).join("");
    say(byId("watch-clock"), `${minutes}.${hundredths}`);
    this.timeline.set(0, this.length - 1, row, `${seconds(row)} of ${seconds(this.length - 1)}${distance}`);
  }
}
