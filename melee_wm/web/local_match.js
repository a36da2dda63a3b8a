/** One match in the browser with all its past: who holds the controllers, going back, branches, and how it ends. */

export const FPS = 60, EIGHT_MINUTES = 8 * 60 * 60, CLOCK = 10, PAD = 13;   // clock: five numbers of each player
const [SHOULDER, BUTTON_A] = [4, 5], DEAD = 23 / 80;

/** A mistake in what was asked for; `parts` are the lines of a refusal. */
export class Refusal extends Error {
  constructor(what, parts = {}) { super(what); this.parts = {what, ...parts}; }
}

/** Random inputs that look like inputs, from those of the frame before: held for some frames, on the game's grids; nobody taunts. */
function randomPad(held) {
  const pad = Float32Array.from(held), down = pad.subarray(BUTTON_A);
  for (const [stick, anew, far] of [[0, 1 / 12, .7], [2, 1 / 20, .2]]) {
    if (Math.random() >= anew) continue;
    const angle = 2 * Math.PI * Math.random(), there = Math.random() < far;
    pad.set([Math.cos(angle), Math.sin(angle)].map(value => there && Math.abs(value) >= DEAD ? Math.round(80 * value) / 80 : 0), stick);
  }
  down.forEach((value, i) => { down[i] = Number(i < down.length - 1 && (value > .5 ? Math.random() > 1 / 8 : Math.random() < 1 / 120)); });
  pad[SHOULDER] = Math.max(down[5], down[6]);
  return pad;
}

/** A match: a row of numbers for every frame, from the first known one to the newest. */
export class Match {
  constructor(model, {stage, characters, controllers}) {
    const {local} = model, spawn = local.spawn[stage];
    if (!spawn) throw new Refusal("no starting places known on this stage", {expected: `one of ${Object.keys(local.spawn).join(", ")}`, got: stage});
    if (!Array.isArray(characters) || characters.length !== 2 || !characters.every(id => id in local.internal)) throw new Refusal("unknown characters", {expected: "two external ids", got: JSON.stringify(characters)});
    Object.assign(this, {model, stage, characters, pads: [new Float32Array(PAD), new Float32Array(PAD)], dropped: null, branches: 0});
    this.hold(controllers);
    this.span = model.width + CLOCK;                                  // of a row: both players' fields, and the clock
    this.known = model.context;
    this.rows = new Float32Array((this.known + EIGHT_MINUTES) * this.span);
    for (let row = 0; row < this.known; row++) {
      this.rows.set(spawn.slice(row * model.width, (row + 1) * model.width), row * this.span);
      characters.forEach((id, player) => { this.rows[row * this.span + player * model.fields.length + model.place.character] = local.internal[id]; });
    }
    this.rows.set(local.clock.map(value => value ?? NaN), (this.known - 1) * this.span + model.width);
    this.first = this.last = this.at = this.known - 1;
    this.ended = null;
  }

  /** Frame 0 is the first that is played. */
  number(row) { return row - this.known; }

  /** Who holds the controllers from now on. */
  hold(controllers) {
    const {fighters} = this.model, names = Object.keys(fighters);
    const word = given => given === "policy" && names.length ? `policy:${names[0]}` : given;
    const words = Array.isArray(controllers) && controllers.length === 2 ? controllers.map(word) : [null];
    const known = ["person", "neutral", "random", ...names.map(name => `policy:${name}`)];
    if (!words.every(given => known.includes(given))) throw new Refusal("nobody of that name to hold a controller", {expected: known.join(", "), got: JSON.stringify(controllers).slice(0, 60)});
    this.controllers = words;
  }

  /** The last frames up to the present, oldest first; where there are not so many the oldest is repeated. */
  window(count) {
    const frames = new Float32Array(count * this.model.width);
    for (let i = 0; i < count; i++) {
      const row = Math.max(0, this.at - count + 1 + i) * this.span;
      frames.set(this.rows.subarray(row, row + this.model.width), i * this.model.width);
    }
    return frames;
  }

  get clock() { return this.rows.slice(this.at * this.span + this.model.width, (this.at + 1) * this.span); }
  get fields() { return this.rows.subarray(this.at * this.span, this.at * this.span + this.model.width); }

  /** What a fighter's sides do in the coming frame, (sides * copies, 13); one that plays both is asked once. */
  async asked(name, players, window, copies) {
    const frames = window(this.model.fighters[name].frames), all = new Float32Array(players.length * frames.length);
    players.forEach((_, i) => all.set(frames, i * frames.length));
    return this.model.act(name, all, this.stage, players.flatMap(player => Array(copies).fill(player)));
  }

  /** What both players' hands do in the coming frame, (copies, 2, 13), of matches like this one whose last frames are `window(how many)`. */
  async hands(window, copies = 1) {
    const controls = new Float32Array(copies * 2 * PAD), [one, other] = this.controllers;
    for (const [word, players] of one === other ? [[one, [0, 1]]] : [[one, [0]], [other, [1]]]) {
      const pads = word.startsWith("policy:") ? await this.asked(word.slice(7), players, window, copies) : null;
      players.forEach((player, i) => {
        const own = word === "person" ? this.pads[player] : word === "random" ? randomPad(this.pressed(player)) : new Float32Array(PAD);
        for (let copy = 0; copy < copies; copy++) controls.set(pads ? pads.subarray((i * copies + copy) * PAD).subarray(0, PAD) : own, (2 * copy + player) * PAD);
      });
    }
    return controls;
  }

  /** The controls of a player in the present frame. */
  pressed(player) {
    const start = player * this.model.fields.length + this.model.place.main_x;
    return this.fields.subarray(start, start + PAD);
  }

  /** One frame on; what came after, if one had gone back, is set aside. */
  async step() {
    const began = performance.now(), controls = await this.hands(count => this.window(count));
    const {frame, clock} = await this.model.step(this.window(this.known), this.clock, this.stage, controls);
    this.ms = performance.now() - began;
    if (this.at < this.last) this.setAside();
    this.last = ++this.at;
    this.rows.set(frame, this.at * this.span);
    this.rows.set(clock, this.at * this.span + this.model.width);
    this.ended = this.ending();
  }

  setAside() {
    this.dropped = {at: this.at, rows: this.rows.slice((this.at + 1) * this.span, (this.last + 1) * this.span)};
    this.branches++;
  }

  ending() {
    const {place, fields} = this.model, now = this.fields;
    if ([0, 1].some(player => now[player * fields.length + place.stocks] < .5)) return "four stocks";
    return this.number(this.at) >= EIGHT_MINUTES - 1 ? "eight minutes" : null;
  }

  seek(frame) {
    const row = frame + this.known;
    if (!Number.isInteger(row) || row < this.first || row > this.last) throw new Refusal("no such frame to go to", {expected: `${this.number(this.first)} to ${this.number(this.last)}`, got: frame});
    this.at = row;
    this.ended = this.ending();
  }

  /** Exchange what was played since the last branch for what it dropped. */
  swap() {
    if (!this.dropped) throw new Refusal("no other stretch to go back to", {do: "go back and play on: that makes one"});
    const {at, rows} = this.dropped;
    if (this.last > at) this.dropped = {at, rows: this.rows.slice((at + 1) * this.span, (this.last + 1) * this.span)};
    this.rows.set(rows, (at + 1) * this.span);
    this.last = at + rows.length / this.span;
    this.seek(this.number(at));
  }

  told() {
    const {dropped} = this;
    return {frame: this.number(this.at), first: this.number(this.first), last: this.number(this.last), controllers: this.controllers, ended: this.ended, branched: this.branches,
      branches: dropped ? [{frame: this.number(dropped.at), last: this.number(dropped.at + dropped.rows.length / this.span)}] : []};
  }

  /** Sampled futures, a frame of all of them at a time: yields after each, and returns their paths. */
  async *futures(count, frames) {
    const {model, stage} = this, {width, context, fields, place} = model, back = Math.max(context, ...Object.values(model.fighters).map(fighter => fighter.frames));
    const repeated = values => Float32Array.from({length: count * values.length}, (_, i) => values[i % values.length]);
    const answer = {say: "ghosts", frame: this.number(this.at), x: Array.from({length: count}, () => []), y: Array.from({length: count}, () => [])};
    let past = repeated(this.window(back)), clocks = repeated(this.clock);
    const window = seen => Float32Array.from({length: count * seen * width}, (_, i) => past[Math.floor(i / (seen * width)) * back * width + (back - seen) * width + i % (seen * width)]);
    for (let step = 0; step < frames; step++) {
      const controls = await this.hands(window, count);
      const {frame, clock} = await model.step(window(context), clocks, stage, controls, model.noise(count));
      clocks = clock;
      for (let copy = 0; copy < count; copy++) {
        const start = copy * back * width;
        past.copyWithin(start, start + width, start + back * width);
        past.set(frame.subarray(copy * width, (copy + 1) * width), start + (back - 1) * width);
        for (const axis of ["x", "y"]) answer[axis][copy].push([0, 1].map(player => frame[copy * width + player * fields.length + place[axis]]));
      }
      yield;
    }
    return answer;
  }
}
