/** What stands under the picture: percent, stocks, the action in plain words, and what each controller holds. */
import {PLAYER_COLORS} from "./cast.js";
import {element, say} from "./elements.js";
import {inPlainWords} from "./words.js";

const STOCKS = 4, LIGHTED = "#e8edf5", DARK = "#2a3342";

/** White when fresh, through yellow and orange, to dark red. */
export function percentColor(percent) {
  const stops = [[0, [244, 246, 250]], [35, [255, 226, 150]], [70, [255, 168, 90]], [110, [250, 100, 86]], [160, [226, 62, 84]], [999, [200, 50, 90]]];
  const next = Math.max(1, stops.findIndex(([limit]) => limit > percent)), [[from, one], [to, other]] = [stops[next - 1], stops[next]];
  const share = Math.max(0, Math.min(1, (percent - from) / (to - from)));
  return `rgb(${one.map((value, i) => Math.round(value + (other[i] - value) * share)).join(" ")})`;
}

/** One player's card; `inputs` adds the picture of the controller. */
class Card {
  constructor(player, inputs) {
    this.player = player;
    this.percent = element("div", {className: "percent"});
    this.digits = element("span");
    this.percent.append(this.digits, element("small", {textContent: "%"}));
    this.who = element("span");
    this.deed = element("div", {className: "deed"});
    this.stocks = element("div", {className: "stocks"}, ...Array.from({length: STOCKS}, () => element("i")));
    const name = element("div", {className: "who"}, element("b", {textContent: `P${player + 1} `}), this.who);
    this.root = element("div", {className: "hud"}, this.percent, element("div", {}, name, this.deed, this.stocks));
    this.root.style.setProperty("--side", PLAYER_COLORS[player]);
    this.inputs = inputs ? new InputDisplay(player) : null;
    if (inputs) this.root.append(this.inputs.canvas);
  }

  show(fighter, controls) {
    say(this.digits, String(Math.floor(fighter.percent ?? 0)));
    this.percent.style.color = percentColor(fighter.percent ?? 0);
    say(this.who, fighter.name);
    say(this.deed, inPlainWords(fighter.action.name) + (fighter.hurt ? " · untouchable" : fighter.stunned ? ` · stunned ${Math.ceil(fighter.hitstun)}` : ""));
    const left = Math.round(fighter.stocks ?? 0);
    [...this.stocks.children].forEach((stock, i) => stock.classList.toggle("lost", i >= left));
    this.stocks.title = `${left} stocks`;
    this.inputs?.show(controls ?? fighter.controls);
  }
}

/** Both players' cards. */
export class Hud {
  constructor(root, inputs = true) {
    this.cards = [0, 1].map(player => new Card(player, inputs));
    root.replaceChildren(...this.cards.map(card => card.root));
  }

  show(view) { view.players.forEach((fighter, player) => this.cards[player].show(fighter)); }
}

/** A controller as a small picture: both sticks in their gates, the trigger, eight buttons. */
export class InputDisplay {
  constructor(player) {
    this.color = PLAYER_COLORS[player];
    this.canvas = element("canvas", {role: "img", ariaLabel: `What player ${player + 1} holds`});
    this.ctx = this.canvas.getContext("2d");
    this.shown = "";
  }

  show(controls) {
    const {canvas, ctx} = this, width = canvas.clientWidth, height = canvas.clientHeight;
    const now = JSON.stringify([controls, width, height, devicePixelRatio]);
    if (now === this.shown || !width) return;
    this.shown = now;
    canvas.width = width * devicePixelRatio;
    canvas.height = height * devicePixelRatio;
    const unit = Math.min(height / 58, width / 184);
    ctx.setTransform(devicePixelRatio * unit, 0, 0, devicePixelRatio * unit, 0, 0);
    this.stick(30, 29, controls.main_x, controls.main_y, this.color);
    this.stick(84, 29, controls.c_x, controls.c_y, "#f4d35e");
    this.trigger(112, controls.shoulder);
    this.buttons(controls);
  }

  stick(x, y, right, up, color) {
    const {ctx} = this, rim = 23;
    ctx.strokeStyle = DARK; ctx.lineWidth = 2;
    ctx.beginPath();
    for (let i = 0; i < 8; i++) ctx.lineTo(x + rim * Math.sin(i * Math.PI / 4), y - rim * Math.cos(i * Math.PI / 4));
    ctx.closePath(); ctx.stroke();
    ctx.strokeStyle = color; ctx.lineWidth = 3; ctx.lineCap = "round";
    ctx.beginPath(); ctx.moveTo(x, y); ctx.lineTo(x + right * rim * 0.8, y - up * rim * 0.8); ctx.stroke();
    ctx.fillStyle = right || up ? color : "#6b778b";
    ctx.beginPath(); ctx.arc(x + right * rim * 0.8, y - up * rim * 0.8, 6, 0, 2 * Math.PI); ctx.fill();
  }

  trigger(x, value) {
    const {ctx} = this;
    ctx.fillStyle = DARK; ctx.beginPath(); ctx.roundRect(x, 6, 7, 46, 3); ctx.fill();
    ctx.fillStyle = this.color; ctx.beginPath(); ctx.roundRect(x, 52 - 46 * value, 7, 46 * value, 3); ctx.fill();
  }

  buttons(controls) {
    const {ctx} = this;
    const layout = [["A", "button_a", 150, 33, 9, "#4fd1a1"], ["B", "button_b", 132, 42, 6.5, "#ff6b6b"], ["X", "button_x", 168, 30, 6.5, LIGHTED], ["Y", "button_y", 146, 15, 6.5, LIGHTED],
      ["Z", "button_z", 168, 11, 6, "#b08cff"], ["L", "button_l", 131, 23, 5.5, LIGHTED], ["R", "button_r", 170, 47, 5.5, LIGHTED], ["↑", "button_d_up", 150, 51, 5, LIGHTED]];
    ctx.textAlign = "center"; ctx.textBaseline = "middle";
    for (const [name, control, x, y, radius, color] of layout) {
      ctx.fillStyle = controls[control] ? color : DARK;
      ctx.beginPath(); ctx.arc(x, y, radius, 0, 2 * Math.PI); ctx.fill();
      ctx.fillStyle = controls[control] ? "#0d1015" : "#8b97aa";
      ctx.font = `600 ${radius * 1.15}px system-ui, sans-serif`;
      ctx.fillText(name, x, y + 0.5);
    }
  }
}
