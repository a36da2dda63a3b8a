/** The table of keys, where each can be set anew, and the pads' dead zone. */
import {PLAYER_COLORS} from "./cast.js";
import {byId, element, say} from "./elements.js";
import {connectedPads, padName} from "./pads.js";
import {DEEDS, keyName} from "./keyboard.js";

/** The panel of keys and pads inside `root`. */
export class KeysPanel {
  constructor(root, devices, setup) {
    this.devices = devices;
    this.persons = () => setup.controllers().map(name => name === "person");
    setup.onhands = () => this.hint(this.persons());
    this.buttons = [];
    this.listening = null;
    this.pads = element("p");
    const value = element("output", {textContent: devices.deadZone.toFixed(2)});
    const dead = element("input", {type: "range", min: 0, max: 0.4, step: 0.01, value: devices.deadZone, id: "dead-zone"});
    dead.addEventListener("input", () => { devices.deadZone = Number(dead.value); say(value, devices.deadZone.toFixed(2)); });
    const reset = element("button", {type: "button", textContent: "Default keys"});
    reset.addEventListener("click", () => { devices.keyboard.reset(); this.refresh(); });
    root.append(element("p", {textContent: "Click a key to set another; Escape leaves it, Delete clears it. In a match P pauses, the full stop steps one frame, Backspace goes three seconds back."}),
      this.table(), reset, element("p", {}, element("label", {}, "Dead zone of pads ", value, dead)), this.pads);
    addEventListener("keydown", event => this.heard(event), true);
    for (const name of ["gamepadconnected", "gamepaddisconnected"]) addEventListener(name, () => this.refresh());
    this.refresh();
  }

  table() {
    const head = element("tr", {}, element("th", {textContent: "", scope: "col"}), ...[0, 1].map(player => {
      const cell = element("th", {textContent: `P${player + 1}`, scope: "col"});
      cell.style.color = PLAYER_COLORS[player];
      return cell;
    }));
    const rows = Object.entries(DEEDS).map(([deed, name]) => element("tr", {}, element("th", {textContent: name, scope: "row"}), ...[0, 1].map(player => {
      const button = element("button", {type: "button"});
      button.addEventListener("click", () => this.listen(button));
      this.buttons.push({button, player, deed, name});
      return element("td", {}, button);
    })));
    return element("table", {className: "keys"}, element("thead", {}, head), element("tbody", {}, ...rows));
  }

  listen(button) {
    this.listening = this.buttons.find(entry => entry.button === button);
    this.refresh();
  }

  heard(event) {
    if (!this.listening) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    const {player, deed, button} = this.listening;
    if (event.code === "Delete") this.devices.keyboard.bind(player, deed, "");
    else if (event.code !== "Escape") this.devices.keyboard.bind(player, deed, event.code);
    this.listening = null;
    this.refresh();
    button.focus();
  }

  /** The few keys one must know to begin, under the picture, for the sides that persons hold. */
  hint(persons) {
    const lines = persons.map((person, player) => {
      const {up, left, down, right, ...keys} = this.devices.keyboard.bindings[player];
      const key = code => element("kbd", {textContent: keyName(code)});
      const line = element("span", {hidden: !person}, element("b", {textContent: `P${player + 1} `}), ...[up, left, down, right].map(key), " move");
      for (const [deed, name] of [["button_x", "jump"], ["button_a", "attack"], ["button_b", "special"], ["button_l", "shield"], ["button_z", "grab"]]) line.append(" · ", key(keys[deed]), ` ${name}`);
      line.style.setProperty("--side", PLAYER_COLORS[player]);
      return line;
    });
    byId("hint").replaceChildren(...lines);
  }

  refresh() {
    this.hint(this.persons());
    for (const entry of this.buttons) {
      const key = keyName(this.devices.keyboard.bindings[entry.player][entry.deed]), waits = entry === this.listening;
      say(entry.button, waits ? "press…" : key);
      entry.button.classList.toggle("listening", waits);
      entry.button.setAttribute("aria-label", `Player ${entry.player + 1}, ${entry.name}: ${waits ? "press a key" : key}`);
    }
    const names = connectedPads().map(padName);
    say(this.pads, names.length ? `Pads: ${names.join("; ")}` : "No pad seen yet: plug one in and press a button on it.");
  }
}
