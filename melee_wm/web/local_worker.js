/** The model's worker: sixty steps a second, and between two steps whatever the page asks for. */
import {FPS, Match, Refusal} from "./local_match.js";
import {Model} from "./local_model.js";
import {recorded} from "./local_record.js";

const PATIENCE = 6, HEADER = 5, MOST_GHOSTS = 16, MOST_FRAMES = 120, STARVED = 3;   // ticks made up for after a hiccup; ...; ticks without time for ghosts

let model, match, paused = false, speed = 1, phase = 0, future = null, starved = 0, late = 0;
let start = performance.now(), ticks = 0, wake = () => {};
const wishes = [];

const tell = message => postMessage({say: message});
const tellState = () => tell({say: "state", paused, speed, ...match.told()});

function show(ms = 0) {
  const frame = new Float32Array(HEADER + model.width);
  frame.set([match.number(match.at), Number(paused) + 2 * Number(match.ended !== null), ms, late, 1000 / FPS]);
  frame.set(match.fields, HEADER);
  postMessage({frame}, [frame.buffer]);
}

async function stepped() {
  await match.step();
  show(match.ms);
  if (match.ended) tellState();
}

const within = (value, low, high, what) => {
  if (typeof value !== "number" || !(value >= low && value <= high)) throw new Refusal(what, {expected: `${low} to ${high}`, got: value});
  return value;
};

const COMMANDS = {
  begin(command) {
    if (command.replay !== undefined) throw new Refusal("no replays in a page without a server", {do: "run melee-wm play"});
    match = new Match(model, command);
    [paused, speed, phase, future] = [false, 1, 0, null];
    tell({say: "began", token: "", stage: match.stage, characters: match.characters, ports: [0, 1], frame: match.number(match.at), fields: model.fields, controllers: match.controllers});
    show();
  },
  pause() { paused = true; show(); },
  resume() { paused = false; },
  async step() { paused = true; if (match.ended) show(); else await stepped(); },
  rewind({frames}) { match.seek(Math.max(match.number(match.first), match.number(match.at) - Math.round(within(frames, 0, 1e6, "frames to go back")))); show(); },
  seek({frame}) { match.seek(frame); show(); },
  swap() { match.swap(); show(); },
  speed({value}) { speed = within(value, 0.1, 1, "speed"); },
  controllers({controllers}) { match.hold(controllers); },
  ghosts({count = 8, frames = 30}) {
    future = match.futures(Math.round(within(count, 1, MOST_GHOSTS, "ghosts")), Math.round(within(frames, 1, MOST_FRAMES, "frames of ghosts")));
    starved = 0;
  },
};

async function obey(command) {
  try {
    if (!Object.hasOwn(COMMANDS, command?.do)) throw new Refusal("unknown command", {expected: Object.keys(COMMANDS).join(", "), got: command?.do});
    if (!match && command.do !== "begin") throw new Refusal("no match has begun", {do: "begin one"});
    await COMMANDS[command.do](command);
    if (command.do !== "ghosts") tellState();
  } catch (error) {
    tell({say: "refused", ...(error instanceof Refusal ? error.parts : {what: `the model failed: ${error.message}`})});
  }
}

function answer(question, to) {
  try {
    if (!match) throw new Error("no match has begun");
    postMessage({answer: {to, value: recorded(match)}});
  } catch (error) { postMessage({answer: {to, error: error.message}}); }
}

async function grant({command, player, pad, question, to}) {
  if (pad) match?.pads[player].set(pad);
  else if (question) answer(question, to);
  else await obey(command);
}

const until = () => start + ticks * 1000 / FPS - performance.now();

/** Take the next tick; what is too late to make up for is skipped. */
function tick() {
  late = -until();
  if (late > PATIENCE * 1000 / FPS) { const missed = Math.floor(late * FPS / 1000); ticks += missed; late -= missed * 1000 / FPS; }
  ticks++;
  if (!match || paused || match.ended) return false;
  phase += speed;
  if (phase < 1 - 1e-6) return false;
  phase -= 1;
  return true;
}

/** Go on with the ghosts while there is time. */
async function imagine() {
  const {done, value} = await future.next();
  if (!done) return;
  future = null;
  if (value.frame === match.number(match.at) || !paused) tell(value);
}

const pause = ms => new Promise(resolve => { wake = resolve; setTimeout(resolve, ms); });

async function live() {
  for (;;) {
    while (wishes.length) await grant(wishes.shift());
    if (until() <= 0) { if (tick()) try { await stepped(); } catch (error) { paused = true; tell({say: "refused", what: `the model failed: ${error.message}`}); } else starved = STARVED; }
    if (future && (paused || starved++ >= STARVED || until() > 1000 / FPS / 2)) { starved = 0; await imagine(); }
    const wait = until();
    if (wait > 0 && !wishes.length) await pause(future && paused ? 0 : wait);
  }
}

onmessage = ({data}) => { wishes.push(data); wake(); };

try {
  model = await Model.open((done, of) => tell({say: "loading", done, of}));
  postMessage({opened: true});
  start = performance.now();
  live();
} catch (error) { postMessage({opened: false, error: error.message}); }
