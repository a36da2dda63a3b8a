/** The form that sets up a match: fighters, stage, who controls whom, and where to begin. */
import {PLAYER_COLORS} from "./cast.js";
import {byId, element, fill, say} from "./elements.js";
import {CONTROLLERS, clock} from "./words.js";

const FAVOURITES = ["Fox", "Marth"], HOME = "Battlefield";

function labelled(text, control) { return element("label", {}, text, control); }

/** The set-up form. Calls `onbegin(command)` and, during a match, `oncontrollers(controllers)`. */
export class Setup {
  constructor(about, devices) {
    this.about = about;
    this.devices = devices;
    this.replay = null;
    this.onbegin = this.oncontrollers = this.onpreview = this.onhands = () => {};
    this.sides = [0, 1].map(player => this.side(player));
    byId("sides").append(...this.sides.map(side => side.root));
    fill(byId("stage"), about.stages.map(stage => [stage.id, stage.name]), about.stages.find(stage => stage.name === HOME)?.id);
    byId("stage").addEventListener("change", () => this.onpreview());
    byId("setup").addEventListener("submit", event => { event.preventDefault(); this.onbegin(this.command()); });
    byId("frame").addEventListener("input", () => this.moveTo(byId("frame").value));
    byId("frame-range").addEventListener("input", () => this.moveTo(byId("frame-range").value));
    for (const radio of document.getElementsByName("origin")) radio.addEventListener("change", () => this.refresh());
    for (const name of ["gamepadconnected", "gamepaddisconnected"]) addEventListener(name, () => this.refresh());
    this.refresh();
  }

  side(player) {
    const character = element("select", {id: `character-${player}`}), controller = element("select", {id: `controller-${player}`}), device = element("select", {id: `device-${player}`});
    this.cast(character, FAVOURITES[player]);
    fill(controller, this.offered(), player && this.about.policies.length ? "policy" : "person");
    character.addEventListener("change", () => this.onpreview());
    controller.addEventListener("change", () => { this.refresh(); this.oncontrollers(this.controllers()); });
    device.addEventListener("change", () => { this.devices.choice[player] = device.value; this.refresh(); });
    const held = labelled("with", device);
    const root = element("fieldset", {className: "side"}, element("legend", {}, element("b", {textContent: `Player ${player + 1}`})), labelled("Fighter", character),
      element("div", {className: "row"}, labelled("Controlled by", controller), held));
    root.style.setProperty("--side", PLAYER_COLORS[player]);
    return {root, character, controller, device, held};
  }

  /** The fighters of a list: first those the model has seen at play, where that is known. */
  cast(select, favourite) {
    const names = [...this.about.characters].sort((one, other) => one.name.localeCompare(other.name));
    const options = some => some.map(({id, name}) => element("option", {value: id, textContent: name, selected: name === favourite}));
    const strangers = names.filter(({taught}) => taught === false), friends = names.filter(({taught}) => taught !== false);
    if (!strangers.length) return select.replaceChildren(...options(names));
    return select.replaceChildren(element("optgroup", {label: "the model has seen them play"}, ...options(friends)), element("optgroup", {label: "never seen: anything may happen"}, ...options(strangers)));
  }

  /** Who may hold a controller: [value, name], each policy by its name where there are several. */
  offered() {
    const {controllers, policies} = this.about;
    return controllers.map(word => [word, word === "policy" && policies.length > 1 ? `policy: ${policies[0]}` : CONTROLLERS[word] ?? word.replace(":", ": ")]);
  }

  get fromReplay() { return byId("from-replay").checked && this.replay !== null; }
  get stage() { return this.fromReplay ? this.replay.stage : Number(byId("stage").value); }
  get characters() { return this.fromReplay ? this.replay.characters : this.sides.map(side => Number(side.character.value)); }

  controllers() { return this.sides.map(side => side.controller.value); }

  /** The command that begins this match. */
  command() {
    const from = this.fromReplay ? {replay: this.replay.token, frame: Number(byId("frame").value)} : {};
    return {do: "begin", stage: this.stage, characters: this.characters, controllers: this.controllers(), ...from};
  }

  /** Bring the form in line with what is chosen and plugged in. */
  refresh() {
    const replayed = this.fromReplay;
    this.sides.forEach(({character, controller, device, held}, player) => {
      fill(device, this.devices.options(), this.devices.choice[player]);
      this.devices.choice[player] = device.value;
      held.hidden = controller.value !== "person";
      character.disabled = replayed;
      if (replayed) character.value = this.replay.characters[player];
      for (const option of controller.options) option.disabled = option.value === "replay" && !replayed;
      if (!replayed && controller.value === "replay") controller.value = "neutral";
    });
    byId("stage").disabled = replayed;
    if (replayed) byId("stage").value = this.replay.stage;
    byId("replay-frame").hidden = !replayed;
    byId("from-replay").disabled = this.replay === null;
    this.onpreview();
    this.onhands();
  }

  /** Take in an uploaded replay and offer to begin from it. */
  useReplay(info, name) {
    this.replay = info;
    say(byId("replay-name"), name);
    const last = info.first + info.frames - 1;
    for (const id of ["frame", "frame-range"]) Object.assign(byId(id), {min: info.first, max: last});
    byId("from-replay").disabled = false;
    byId("from-replay").checked = true;
    this.refresh();
    this.moveTo(Math.min(Math.max(info.first, 120), last));
  }

  moveTo(frame) {
    const {min, max} = byId("frame"), kept = Math.max(Number(min), Math.min(Number(max), Math.round(Number(frame) || 0)));
    byId("frame").value = byId("frame-range").value = kept;
    byId("frame-range").setAttribute("aria-valuetext", `frame ${kept}, ${clock(kept).minutes} on the clock`);
  }

  /** Who controls whom, as the server says. */
  setControllers(controllers) {
    const known = this.offered().map(([value]) => value);
    controllers.forEach((name, player) => { this.sides[player].controller.value = known.includes(name) ? name : name.split(":")[0]; });
    this.refresh();
  }
}
