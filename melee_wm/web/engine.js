/** Where the frames come from: a server over a WebSocket, or the model in this very page. Both speak melee-wm-play/1. */
import {packed} from "./grid.js";

const here = path => new URL(path, document.baseURI);

/** One line out of whatever a server answered to a request that failed. */
async function refusal(response) {
  const text = await response.text();
  try {
    const {what, detail, expected, got, do: advice} = JSON.parse(text);
    const parts = [what ?? (typeof detail === "string" ? detail : undefined), expected && `expected ${expected}`, got && `got ${got}`, advice];
    return parts.filter(Boolean).join("; ") || `${response.status} ${response.statusText}`;
  } catch { return text.slice(0, 200) || `${response.status} ${response.statusText}`; }
}

async function answered(request) {
  const response = await request;
  if (!response.ok) throw new Error(await refusal(response));
  return response;
}

/** Frames from the Python server that gave out this page. */
export class ServerEngine {
  constructor(about) {
    this.about = about;
    this.onframe = this.onsay = this.onlost = () => {};
    this.token = null;
    this.waiting = [];
    const address = here("play");
    address.protocol = address.protocol.replace("http", "ws");
    this.socket = new WebSocket(address);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => { for (const message of this.waiting.splice(0)) this.socket.send(message); };
    this.socket.onmessage = ({data}) => typeof data === "string" ? this.heard(JSON.parse(data)) : this.onframe(new Float32Array(data));
    this.socket.onclose = () => this.onlost();
  }

  heard(message) {
    if (message.say === "began") this.token = message.token;
    this.onsay(message);
  }

  transmit(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(message);
    else if (this.socket.readyState === WebSocket.CONNECTING) this.waiting.push(message);
  }

  /** Send a command, e.g. {do: "pause"}. */
  send(command) { this.transmit(JSON.stringify(command)); }

  /** Hold these controls for a player until told otherwise. */
  pad(player, controls) { this.transmit(packed(player, controls)); }

  /** Hand in a replay; its token stands for it from then on. */
  async upload(file) {
    return (await answered(fetch(here("replay"), {method: "POST", body: file, headers: {"Content-Type": "application/octet-stream"}}))).json();
  }

  /** The model under a replay's inputs beside what happened, as a rollout. */
  async watch(question) {
    return (await answered(fetch(here("watch"), {method: "POST", body: JSON.stringify(question), headers: {"Content-Type": "application/json"}}))).json();
  }

  /** The whole match so far as a file of that kind. */
  async download(kind) {
    if (!this.token) throw new Error("no match has begun");
    return (await answered(fetch(here(`match/${this.token}.${kind}`)))).blob();
  }

  close() { this.socket.onclose = null; this.socket.close(); }
}

/** The engine this page was given out with; `onloading(done, of)` hears of a model that is being fetched. */
export async function openEngine(about, onloading = () => {}) {
  if (about.engine !== "browser") return new ServerEngine(about);
  const {LocalEngine} = await import("./local.js");
  const engine = new LocalEngine(about);
  engine.onsay = message => { if (message.say === "loading") onloading(message.done, message.of); };
  await engine.ready;
  return engine;
}
