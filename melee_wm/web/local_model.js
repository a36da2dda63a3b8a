/** The exported graphs: the whole step of the world, rules and all, and the fighters. Everything that is learned or ruled is in them. */
import * as ort from "./onnxruntime/ort.wasm.bundle.min.mjs";

const here = path => new URL(path, import.meta.url).href;
const floats = (values, ...shape) => new ort.Tensor("float32", values, shape);

async function fetched(name, onbytes) {
  const response = await fetch(here(name));
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  const parts = [];
  for (const reader = response.body.getReader();;) {
    const {done, value} = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    onbytes(value.length);
  }
}

/** What the exporter wrote beside the page; `local.json` says how its graphs are to be used. */
export class Model {
  /** Fetch and prepare everything; `onprogress(bytes so far, of how many)`. */
  static async open(onprogress = () => {}) {
    const local = await (await fetch(here("local.json"))).json();
    ort.env.wasm.wasmPaths = {wasm: here("onnxruntime/ort-wasm-simd-threaded.wasm")};
    ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.max(1, Math.min(4, navigator.hardwareConcurrency >> 1)) : 1;
    let done = 0;
    const session = async ({graph}) => ort.InferenceSession.create(await fetched(graph, bytes => onprogress(done += bytes, local.bytes)), {executionProviders: ["wasm"]});
    const model = new Model();
    Object.assign(model, {local, fields: local.fields, width: 2 * local.fields.length, context: local.context_len, fighters: {}});
    model.world = await session(local.world);
    for (const [name, fighter] of Object.entries(local.fighters)) model.fighters[name] = {...fighter, session: await session(fighter)};
    model.place = Object.fromEntries(local.fields.map((name, index) => [name, index]));
    model.calm = new Float32Array(0);
    return model;
  }

  /** The coming frame of some matches in one batch: windows (B, K, 2, F), clocks (B, 5, 2), controls (B, 2, 13); without `noise` the likeliest. */
  async step(windows, clocks, stage, controls, noise) {
    const count = clocks.length / 10, doubts = this.local.doubts.length;
    if (!noise && this.calm.length !== count * 2 * doubts) this.calm = new Float32Array(count * 2 * doubts);
    const {frame, next_clock: clock} = await this.world.run({
      frames: floats(windows, count, this.context, 2, this.fields.length), clock: floats(clocks, count, 5, 2), stage: floats(new Float32Array(count).fill(stage), count),
      controls: floats(controls, count, 2, 13), noise: floats(noise ?? this.calm, count, 2, doubts)});
    return {frame: frame.data, clock: clock.data};
  }

  /** What a fighter does in the coming frame, (B, 13), from the last frames (B, N, 2, F) of some matches and the player it is in each. */
  async act(name, frames, stage, me) {
    const {session, choices} = this.fighters[name], count = me.length, seen = frames.length / (count * this.width);
    const {pad} = await session.run({frames: floats(frames, count, seen, 2, this.fields.length), stage: floats(new Float32Array(count).fill(stage), count),
      me: floats(Float32Array.from(me), count), uniforms: floats(Float32Array.from({length: count * choices}, Math.random), count, choices)});
    return pad.data;
  }

  /** Randomness under which the likeliest is a draw: logistic for bits, Gumbel for classes, (count, 2, doubts). */
  noise(count) {
    const {doubts} = this.local, values = new Float32Array(count * 2 * doubts.length);
    for (let i = 0; i < values.length; i++) {
      const u = Math.random() * (1 - 2e-7) + 1e-7;
      values[i] = doubts[i % doubts.length] ? Math.log(u / (1 - u)) : -Math.log(-Math.log(u));
    }
    return values;
  }
}
