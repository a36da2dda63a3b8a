/** Who holds what: each person's keyboard half or pad, read once a frame and sent when it changes. */
import {asTheGameReads, neutral, same} from "./grid.js";
import {Keyboard} from "./keyboard.js";
import {connectedPads, padName, readPad} from "./pads.js";

/** The two players' hands. */
export class Devices {
  constructor() {
    this.keyboard = new Keyboard(() => this.poll());
    this.choice = ["auto", "auto"];       // "auto", "keyboard" or a pad's index as text
    this.persons = [false, false];
    this.deadZone = 0.1;
    this.sent = [neutral(), neutral()];
    this.onchange = () => {};             // (player, controls, time)
  }

  /** Let persons play these sides, from now on. */
  use(persons, active) {
    this.persons = persons;
    this.keyboard.active = active && persons.some(Boolean);
    this.poll();
  }

  /** The devices to choose from: [value, name]. */
  options() {
    return [["auto", "keys + pad"], ["keyboard", "keys"], ...connectedPads().map(pad => [String(pad.index), padName(pad)])];
  }

  /** The pad a player holds: the chosen one, or the next that nobody chose. */
  padOf(player) {
    const pads = connectedPads(), chosen = this.choice[player];
    if (chosen === "keyboard") return undefined;
    if (chosen !== "auto") return pads.find(pad => String(pad.index) === chosen);
    const free = pads.filter(pad => !this.choice.includes(String(pad.index)));
    const before = this.choice.slice(0, player).filter((choice, other) => choice === "auto" && this.persons[other]).length;
    return free[before];
  }

  /** What a player holds down now, on the game's grids. */
  read(player) {
    const pad = this.padOf(player), raw = pad ? readPad(pad, this.deadZone) : neutral();
    if (!["auto", "keyboard"].includes(this.choice[player])) return asTheGameReads(raw);
    const keys = this.keyboard.controls(player);
    for (const stick of [["main_x", "main_y"], ["c_x", "c_y"]]) if (stick.some(name => keys[name])) for (const name of stick) raw[name] = keys[name];
    for (const name in keys) if (name.startsWith("button_") || name === "shoulder") raw[name] = Math.max(raw[name], keys[name]);
    return asTheGameReads(raw);
  }

  /** Read both players and report what changed. */
  poll(everything = false) {
    for (const player of [0, 1]) {
      const controls = this.persons[player] ? this.read(player) : neutral();
      if (!everything && same(controls, this.sent[player])) continue;
      this.sent[player] = controls;
      if (this.persons[player]) this.onchange(player, controls, performance.now());
    }
  }
}
