/** The match: what the server says and sends, drawn; what the person does, sent. */
import {byId, isTyping, notice, save, say} from "./elements.js";
import {History, Lexicon, liveFrame} from "./frames.js";
import {Hud} from "./hud.js";
import {Readout} from "./readout.js";
import {Scene} from "./draw.js";
import {Timeline, historyPainter} from "./timeline.js";
import {clock, seconds} from "./words.js";

const BACK = 180, TRAIL = 28, GHOSTS = {count: 8, frames: 30}, SETTLED = 1500, ALIVE = 60_000;   // frames; ms after which a still picture is left alone, and after which one says a word

/** The Play tab. */
export class Play {
  constructor(about, engine, devices, setup) {
    Object.assign(this, {about, engine, devices, setup});
    this.lexicon = new Lexicon(about);
    this.history = new History();
    this.views = new WeakMap();
    this.scene = new Scene(byId("picture"));
    this.scene.onresize = () => { this.changedAt = performance.now(); };
    this.hud = new Hud(byId("huds"));
    this.readout = new Readout(byId("readout"));
    this.timeline = new Timeline(byId("timeline"), "Place in the match", historyPainter(this.history, this.lexicon), frame => this.seek(frame));
    this.match = this.state = this.ghostsSaid = this.wanted = null;
    this.toggles = {ghosts: false, whole: false};
    this.changedAt = this.strippedAt = this.askedAt = 0;
    engine.onframe = numbers => this.received(numbers);
    engine.onsay = message => this.heard(message);
    engine.onlost = () => { this.match = null; this.devices.use([false, false], false); this.buttons(); notice("The connection to the model is gone. Reload the page to begin anew (and start the server again, if it has ended)."); };
    devices.onchange = (player, controls, time) => { if (this.match) { engine.pad(player, controls); this.readout.pressed(player, controls, this.state?.paused ? null : time); } };
    setup.onbegin = command => this.begin(command);
    setup.oncontrollers = controllers => { if (this.match) this.send({do: "controllers", controllers}); };
    setup.onpreview = () => { this.changedAt = performance.now(); };
    this.wire();
    requestAnimationFrame(time => this.draw(time));
  }

  wire() {
    byId("pause").addEventListener("click", () => this.pauseOrResume());
    byId("step").addEventListener("click", () => this.send({do: "step"}));
    byId("back").addEventListener("click", () => this.back());
    byId("speed").addEventListener("change", () => { if (this.match) this.send({do: "speed", value: Number(byId("speed").value)}); });
    byId("swap").addEventListener("click", () => this.swap());
    for (const name of ["ghosts", "whole"]) byId(name).addEventListener("click", () => this.toggle(name));
    for (const kind of ["slp", "json"]) byId(`download-${kind}`).addEventListener("click", () => this.download(kind));
    addEventListener("keydown", event => this.shortcut(event));
    let pointed = false;                                     // a list chosen from with the mouse gives the keys back to the match
    for (const kind of ["pointerdown", "keydown"]) addEventListener(kind, () => { pointed = kind === "pointerdown"; }, true);
    addEventListener("change", ({target}) => { if (pointed && this.match && target.matches("select")) byId("picture").focus({preventScroll: true}); });
    setInterval(() => { if (this.match && !this.state?.paused) this.engine.pad(0, this.devices.sent[0]); }, ALIVE);
    document.addEventListener("visibilitychange", () => { if (document.hidden && this.match && !this.state?.paused) this.send({do: "pause"}); });
  }

  send(command) { this.engine.send(command); }

  /** Begin a match; what ran before is forgotten. */
  begin(command) {
    notice();
    this.send(command);
    this.send({do: "speed", value: Number(byId("speed").value)});
    byId("picture").focus({preventScroll: true});
  }

  heard(message) {
    if (message.say === "began") this.began(message);
    else if (message.say === "state") this.changed(message);
    else if (message.say === "ghosts") { this.ghostsSaid = message; this.changedAt = performance.now(); }
    else if (message.say === "refused") notice([message.what, message.expected && `expected ${message.expected}`, message.got !== undefined && message.got !== null && `got ${message.got}`, message.do].filter(Boolean).join("; "));
  }

  began(message) {
    this.match = {...message, stage: this.lexicon.stages.get(message.stage)};
    this.state = null;
    this.history.clear();
    this.ghostsSaid = null;
    this.scene.camera.cut();
    say(byId("begin"), "Start again");
    byId("first-begin").hidden = true;
    byId("picture").setAttribute("aria-label", `${message.characters.map(id => this.lexicon.fighter(id)).join(" against ")} on ${this.match.stage.name}`);
    this.buttons();
  }

  changed(state) {
    const before = this.state;
    this.state = state;
    if (this.swapping && state.paused && state.branches?.[0]?.frame === state.frame) { this.history.swap(); this.swapping = false; }
    else this.history.endsAt(state.last);
    if (!before || String(before.controllers) !== String(state.controllers)) {
      this.setup.setControllers(state.controllers);
      this.devices.use(state.controllers.map(name => name === "person"), true);
      this.devices.poll(true);
    }
    if (state.speed && document.activeElement !== byId("speed")) byId("speed").value = String(state.speed);
    this.askForGhosts();
    this.buttons();
    this.banner();
  }

  received(numbers) {
    if (!this.match) return;
    const dropped = this.history.dropped;
    this.history.add(numbers);
    if (this.history.dropped !== dropped) this.buttons();
    this.changedAt = performance.now();
    const view = this.view(numbers);
    this.readout.received(view);
    if (view.frame % 60 === 0 && !this.state?.paused) this.askForGhosts();
    else if (this.state?.paused && this.ghostsSaid?.frame !== view.frame) this.askForGhosts();
  }

  /** The frame as the picture needs it, made once. */
  view(numbers) {
    if (!this.views.has(numbers)) this.views.set(numbers, liveFrame(this.lexicon, numbers, this.match.characters));
    return this.views.get(numbers);
  }

  pauseOrResume() {
    if (!this.match) return;
    this.send({do: this.state?.paused ? "resume" : "pause"});
    byId("picture").focus({preventScroll: true});
  }

  /** Stop and go three seconds back: whatever is done from there is another branch. */
  back() {
    if (!this.state?.paused) this.send({do: "pause"});
    this.send({do: "rewind", frames: BACK});
  }

  /** Take the dropped stretch again, and drop what replaced it. */
  swap() {
    if (!this.state?.paused) this.send({do: "pause"});
    this.send({do: "swap"});
    this.swapping = true;
  }

  /** Go to a frame, at the next repaint: of a drag only the newest place counts. */
  seek(frame) { this.wanted = Math.max(this.state?.first ?? frame, Math.min(frame, this.history.newest)); }

  /** Send the place that was dragged to. */
  go() {
    if (!this.match || this.wanted === null) return;
    if (!this.state?.paused) this.send({do: "pause"});
    this.send({do: "seek", frame: this.wanted});
    this.wanted = null;
  }

  toggle(name) {
    this.toggles[name] = !this.toggles[name];
    byId(name).setAttribute("aria-pressed", String(this.toggles[name]));
    this.changedAt = performance.now();
    if (name === "ghosts") { this.ghostsSaid = null; this.askForGhosts(); }
  }

  /** The sampled futures, while they are still to come. */
  futureOf(frame) {
    const said = this.ghostsSaid;
    return said && said.frame <= frame && frame < said.frame + GHOSTS.frames ? said : null;
  }

  askForGhosts() {
    const now = performance.now();
    if (!this.toggles.ghosts || !this.match || now - this.askedAt < (this.state?.paused ? 60 : 900)) return;
    this.askedAt = now;
    this.send({do: "ghosts", ...GHOSTS});
  }

  async download(kind) {
    try { save(await this.engine.download(kind), `melee_wm-match.${kind}`); } catch (error) { notice(`Not saved: ${error.message}`); }
  }

  shortcut(event) {
    const mine = {KeyP: () => this.pauseOrResume(), Period: () => this.send({do: "step"}), Backspace: () => this.back()}[event.code];
    if (!mine || !this.match || byId("play-panel").hidden || isTyping(event) || event.repeat && event.code !== "Period" || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    mine();
  }

  buttons() {
    for (const id of ["pause", "step", "back", "download-slp", "download-json"]) byId(id).disabled = !this.match;
    byId("swap").hidden = !this.history.dropped.size;
    say(byId("pause"), this.state?.paused ? "Resume" : "Pause");
  }

  banner() {
    const {state} = this, line = byId("banner"), left = state.last - state.frame;
    const text = state.ended ? `Over: ${state.ended}` : !state.paused ? "" : left > 0 ? `Paused ${seconds(left)} back · going on makes a new branch` : "Paused";
    say(line, text);
    line.hidden = !text;
  }

  /** Both fighters at their starting places, before anything has begun. */
  preview() {
    const stage = this.lexicon.stages.get(this.setup.stage), height = x => Math.max(0, ...stage.segments.filter(([x0, , x1]) => x0 <= x && x <= x1).map(segment => segment[1]));
    const fighters = this.setup.characters.map((id, player) => {
      const [x, y] = stage.spawns[player];
      return {x, y: Math.min(y, height(x)), percent: 0, stocks: 4, facing: x < 0 ? 1 : -1, action: {id: 14, name: "Wait", category: "idle"}, name: this.lexicon.fighter(id), grounded: true, state_age: 0, controls: this.devices.sent[player]};
    });
    return {stage, view: {frame: 0, players: fighters, items: []}};
  }

  /** Called by the browser before each repaint. */
  draw(time) {
    requestAnimationFrame(next => this.draw(next));
    this.readout.drawn(time, Boolean(this.match) && !this.state?.paused);
    this.devices.poll();
    this.go();
    if (byId("play-panel").hidden || performance.now() - this.changedAt > SETTLED) return;
    const newest = this.match && this.history.frames.get(this.history.present);
    const {stage, view} = newest ? {stage: this.match.stage, view: this.view(newest)} : this.preview();
    const old = newest && this.history.dropped.get(view.frame);
    this.scene.render(view, stage, {whole: this.toggles.whole, ghosts: this.toggles.ghosts && this.futureOf(view.frame),
      trail: newest && this.history.recent(TRAIL).map(numbers => this.view(numbers)), old: old && this.view(old)}, time);
    this.hud.show(view);
    this.showTime(view.frame, time, Boolean(newest));
  }

  showTime(frame, time, live) {
    const {minutes, hundredths} = clock(frame);
    say(byId("clock"), `${minutes}.${hundredths}`);
    if (!live || !this.state?.paused && time - this.strippedAt < 100) return;
    this.strippedAt = time;
    const first = this.state?.first ?? frame, last = this.history.end;
    this.timeline.set(first, last, frame, `${seconds(frame - first)} of ${seconds(last - first)}`);
  }
}
