/** One view of a frame, wherever it came from: a live session, or a column of a rollout file. */
import {BUTTONS, CONTROLS} from "./grid.js";

const HEADER = 5;                       // frame number, flags, model ms, lateness ms, budget ms
const BUTTON_BITS = {button_a: 0x100, button_b: 0x200, button_x: 0x400, button_y: 0x800, button_z: 0x10, button_l: 0x40, button_r: 0x20, button_d_up: 0x08};
const CLIMBERS = 14;                    // nobody can choose them, but replays have them
const INVULNERABLE = 0x04, HITSTUN = 0x02;

/** Names, stages and actions of about.json, ready to look up. */
export class Lexicon {
  constructor(about) {
    this.about = about;
    this.fields = about.fields;
    this.place = Object.fromEntries(about.fields.map((name, index) => [name, index]));
    this.actions = new Map(about.actions.map(action => [action.id, action]));
    this.stages = new Map(about.stages.map(stage => [stage.id, stage]));
    this.characters = new Map(about.characters.map(character => [character.id, character.name]));
    this.internal = new Map(about.characters.filter(character => character.internal !== undefined).map(character => [character.internal, character.name]));
    this.slots = about.fields.filter(name => /^item\d+_type$/.test(name)).map(name => name.replace("type", ""));
  }

  action(id) { return this.actions.get(Math.round(id)) ?? {id, name: `Action${id}`, category: "special"}; }

  /** A fighter's name; the frame's own id wins, for Zelda becomes Sheik in the middle of a match. */
  fighter(external, internal) { return this.internal.get(internal) ?? this.characters.get(external) ?? (external === CLIMBERS ? "Ice Climbers" : `character ${external}`); }
}

/** What both sources share of one player, with the derived signs a picture needs. */
function asFighter(lexicon, player, external) {
  const action = lexicon.action(player.action_state);
  return {...player, facing: player.facing > 0.5 ? 1 : -1, action, name: lexicon.fighter(external, player.character),
    dead: action.id <= 10, stunned: player.hitstun > 0, frozen: player.hitlag > 0,
    hurt: Math.max(player.hurtbox_state ?? 0, player.invulnerable ? 1 : 0), grounded: (player.on_ground ?? 1) > 0.5,
    shielding: [178, 179, 181, 182].includes(action.id)};
}

/** The newest frame of a live session: header, then both players' fields. */
export function liveFrame(lexicon, numbers, characters) {
  const width = lexicon.fields.length, items = [];
  const players = [0, 1].map(player => {
    const start = HEADER + player * width, values = {};
    for (let i = 0; i < width; i++) values[lexicon.fields[i]] = numbers[start + i];
    for (const slot of lexicon.slots) if (values[slot + "type"] > 0) items.push({x: values[slot + "x"], y: values[slot + "y"], owner: player});
    values.controls = Object.fromEntries(CONTROLS.map(name => [name, values[name] ?? 0]));
    return asFighter(lexicon, values, characters[player]);
  });
  return {frame: numbers[0], paused: (numbers[1] & 1) > 0, ended: (numbers[1] & 2) > 0, stepMs: numbers[2], lateMs: numbers[3], budgetMs: numbers[4], players, items};
}

/** Values of one field of one player of a live frame. */
export function valueOf(lexicon, numbers, player, name) {
  return numbers[HEADER + player * lexicon.fields.length + lexicon.place[name]];
}

/** One frame of a rollout's columns (`frames` or `truth`), by its row. */
export function storedFrame(lexicon, part, row, characters) {
  const players = part.players.map((columns, player) => {
    const values = {};
    for (const name in columns) if (columns[name]) values[name] = columns[name][row];
    if (columns.velocity) [values.speed_air_x, values.speed_y, values.speed_ground_x, values.knockback_x, values.knockback_y] = columns.velocity[row];
    values.invulnerable = values.state_flags_2 & INVULNERABLE;
    if (values.state_flags_4 !== undefined && !(values.state_flags_4 & HITSTUN)) values.hitstun = 0;
    values.controls = Object.fromEntries(CONTROLS.map(name => [name, values[name] ?? 0]));
    for (const name of BUTTONS) values.controls[name] = values.buttons & BUTTON_BITS[name] ? 1 : 0;
    return asFighter(lexicon, values, characters[player]);
  });
  return {frame: part.frame[row], players, items: itemsAt(part, part.frame[row])};
}

function itemsAt(part, frame) {
  const items = part.items;
  if (!items) return [];
  part.itemRows ??= items.frame.reduce((rows, number, row) => rows.set(number, [...(rows.get(number) ?? []), row]), new Map());
  return (part.itemRows.get(frame) ?? []).map(row => ({x: items.x[row], y: items.y[row], owner: items.owner?.[row] === 1 ? 1 : 0}));
}

/** The frames of a session that this page has seen, and of the branch that was last dropped. */
export class History {
  constructor() { this.clear(); }

  clear() {
    this.frames = new Map();
    this.dropped = new Map();
    this.newest = this.lastDropped = this.present = -Infinity;
  }

  /** Where the longer of the two branches ends. */
  get end() { return Math.max(this.newest, this.lastDropped); }

  /** Take in a frame; going on from the middle with other frames makes the old ones a dropped branch. */
  add(numbers) {
    const frame = numbers[0], before = this.frames.get(frame);
    if (before && frame <= this.newest && differ(before, numbers)) this.drop(frame);
    this.frames.set(frame, numbers);
    this.newest = Math.max(this.newest, frame);
    this.present = frame;
  }

  /** Keep the frames from this one on as the dropped branch. */
  drop(first) {
    this.dropped = new Map([...this.frames].filter(([frame]) => frame >= first));
    for (const frame of this.dropped.keys()) this.frames.delete(frame);
    this.lastDropped = Math.max(-Infinity, ...this.dropped.keys());
    this.newest = first - 1;
  }

  /** The server's word on where its history ends. */
  endsAt(last) { if (last < this.newest && this.frames.has(last)) this.drop(last + 1); }

  /** Exchange what was played since the last branch for what it dropped. */
  swap() {
    if (!this.dropped.size) return;
    const other = this.dropped, first = Math.min(...other.keys());
    this.drop(first);
    for (const [frame, numbers] of other) this.frames.set(frame, numbers);
    this.newest = Math.max(...other.keys());
  }

  /** The last frames up to the present one without a gap, oldest first. */
  recent(count) {
    const found = [];
    for (let frame = this.present; found.length < count && this.frames.has(frame); frame--) found.unshift(this.frames.get(frame));
    return found;
  }
}

/** Whether two frames of the same number hold different fighters (the header's times always differ). */
function differ(one, other) {
  for (let i = HEADER; i < one.length; i++) if (one[i] !== other[i]) return true;
  return false;
}
