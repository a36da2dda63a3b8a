/** The keyboard as two controllers: which key does what, remembered between visits. */
import {isTyping} from "./elements.js";
import {BUTTONS, neutral} from "./grid.js";

/** What a key can do, in the order of the table people see. */
export const DEEDS = {
  up: "stick up", down: "stick down", left: "stick left", right: "stick right", soft: "half tilt (hold)",
  button_a: "A: attack", button_b: "B: special", button_x: "X: jump", button_y: "Y: jump", button_l: "L: shield",
  button_r: "R: shield", light: "light shield", button_z: "Z: grab",
  c_up: "C-stick up", c_down: "C-stick down", c_left: "C-stick left", c_right: "C-stick right", button_d_up: "taunt",
};

/** Both hands on one keyboard: the left half and the right half. */
export const DEFAULTS = [
  {up: "KeyW", down: "KeyS", left: "KeyA", right: "KeyD", soft: "ShiftLeft", button_a: "KeyF", button_b: "KeyG", button_x: "KeyT", button_y: "",
   button_l: "KeyR", button_r: "", light: "KeyQ", button_z: "KeyV", c_up: "Digit3", c_down: "Digit2", c_left: "Digit1", c_right: "Digit4", button_d_up: "KeyE"},
  {up: "ArrowUp", down: "ArrowDown", left: "ArrowLeft", right: "ArrowRight", soft: "ShiftRight", button_a: "KeyK", button_b: "KeyL", button_x: "KeyO", button_y: "",
   button_l: "KeyI", button_r: "", light: "KeyU", button_z: "KeyJ", c_up: "Digit9", c_down: "Digit8", c_left: "Digit7", c_right: "Digit0", button_d_up: "KeyM"},
];
const STORE = "melee-wm-keys";
const HALF_TILT = 0.5;

/** A key's name as it stands on the keyboard. */
export function keyName(code) {
  const arrows = {ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", ShiftLeft: "Shift", ShiftRight: "right Shift", Period: ".", Comma: ",", Slash: "/"};
  return arrows[code] ?? (code.replace(/^Key|^Digit/, "").replace(/([a-z])([A-Z0-9])/g, "$1 $2") || "–");
}

function stored() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE));
    return DEFAULTS.map((keys, player) => ({...keys, ...kept?.[player]}));
  } catch (error) {
    console.info("no stored keys:", error.message);
    return DEFAULTS.map(keys => ({...keys}));
  }
}

/** Keys held down, and what they mean for each player. */
export class Keyboard {
  constructor(changed) {
    this.changed = changed;
    this.bindings = stored();
    this.held = new Set();
    this.active = false;
    addEventListener("keydown", event => this.pressed(event));
    addEventListener("keyup", event => { if (this.held.delete(event.code)) this.changed(); });
    addEventListener("blur", () => this.release());
  }

  pressed(event) {
    if (isTyping(event) || event.ctrlKey || event.metaKey || event.altKey || !this.meaning(event.code)) return;
    if (this.active) event.preventDefault();
    if (this.held.has(event.code)) return;
    this.held.add(event.code);                             // before a match, too: whoever holds a key when it begins means it
    this.changed();
  }

  release() {
    this.held.clear();
    this.changed();
  }

  /** What a key does: {player, deed}, or undefined. */
  meaning(code) {
    for (const player of [0, 1]) for (const deed in this.bindings[player]) if (code && this.bindings[player][deed] === code) return {player, deed};
    return undefined;
  }

  /** Give a key to a deed; whoever had it before loses it. */
  bind(player, deed, code) {
    const before = this.meaning(code);
    if (before) this.bindings[before.player][before.deed] = "";
    this.bindings[player][deed] = code;
    this.keep();
  }

  /** Back to the keys of the first day. */
  reset() {
    this.bindings = DEFAULTS.map(keys => ({...keys}));
    this.keep();
  }

  keep() {
    try { localStorage.setItem(STORE, JSON.stringify(this.bindings)); } catch (error) { console.info("keys are not remembered:", error.message); }
  }

  /** A player's controls as the keys are held, before the game's grids. */
  controls(player) {
    const keys = this.bindings[player];
    const on = deed => keys[deed] && this.held.has(keys[deed]) ? 1 : 0;
    const tilt = on("soft") ? HALF_TILT : 1;
    const direction = (x, y, size) => { const length = Math.hypot(x, y) || 1; return [x / length * size, y / length * size]; };
    const [main_x, main_y] = direction(on("right") - on("left"), on("up") - on("down"), tilt);
    const [c_x, c_y] = direction(on("c_right") - on("c_left"), on("c_up") - on("c_down"), 1);
    const buttons = Object.fromEntries(BUTTONS.map(name => [name, on(name)]));
    return {...neutral(), ...buttons, main_x, main_y, c_x, c_y, shoulder: on("light") ? 0.5 : 0};
  }
}
