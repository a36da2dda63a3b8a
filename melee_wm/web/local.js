/** The engine of a page without a server: the model runs in a worker beside the page, and this hands words to and fro. */
import {CONTROLS, STICK, TRIGGER} from "./grid.js";

const onGrid = (name, value) => name.startsWith("button_") ? Number(value > 0.5) : Math.round(value * (name === "shoulder" ? TRIGGER : STICK)) / (name === "shoulder" ? TRIGGER : STICK);

/** Frames from the model in this browser. It speaks as the server does, but reads and writes no .slp. */
export class LocalEngine {
  constructor(about) {
    this.about = about;
    this.onframe = this.onsay = this.onlost = () => {};
    this.questions = new Map();
    this.worker = new Worker(new URL("./local_worker.js", import.meta.url), {type: "module"});
    this.ready = new Promise((resolve, reject) => { this.opened = {resolve, reject}; });
    this.worker.onmessage = ({data}) => this.heard(data);
    this.worker.onerror = event => this.opened.reject(new Error(event.message || "the model's worker could not be started"));
  }

  heard({frame, say, answer, opened, error}) {
    if (frame) this.onframe(frame);
    else if (say) this.onsay(say);
    else if (opened !== undefined) opened ? this.opened.resolve() : this.opened.reject(new Error(error));
    else {
      const {resolve, reject} = this.questions.get(answer.to);
      this.questions.delete(answer.to);
      if (answer.error) reject(new Error(answer.error)); else resolve(answer.value);
    }
  }

  ask(question) {
    const to = this.questions.size && Math.max(...this.questions.keys()) + 1;
    return new Promise((resolve, reject) => { this.questions.set(to, {resolve, reject}); this.worker.postMessage({question, to}); });
  }

  /** Send a command, e.g. {do: "pause"}. */
  send(command) { this.worker.postMessage({command}); }

  /** Hold these controls for a player until told otherwise. */
  pad(player, controls) { this.worker.postMessage({player, pad: Float32Array.from(CONTROLS, name => onGrid(name, controls[name] ?? 0))}); }

  /** A page without a server cannot read replays. */
  async upload() { throw new Error("this page runs without a server and reads no .slp; drop a .json rollout here, or run melee-wm play for replays"); }
  async watch() { return this.upload(); }

  /** The whole match so far: as JSON only. */
  async download(kind) {
    if (kind !== "json") throw new Error(`this page runs without a server and writes no .${kind}; take the JSON, or run melee-wm play for replays`);
    return new Blob([JSON.stringify(await this.ask({record: true}))], {type: "application/json"});
  }

  close() { this.worker.terminate(); }
}
