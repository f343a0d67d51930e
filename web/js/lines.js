// A state in words: the first line is what matters most, the others say more.
import { figure, say } from "./words.js";

const giga = (bytes) => figure(bytes / 1e9);
const amount = (bytes) => (bytes < 1e8 ? `${figure(bytes / 1e6)} MB` : `${giga(bytes)} GB`);
const time = (ms) => (ms < 1000 ? `${figure(ms)} ms` : `${figure(ms / 1000)} s`);
const rate = (tflops) => (tflops < 1 ? `${figure(tflops * 1000)} GFLOP/s` : `${figure(tflops)} TFLOP/s`);

function loader(state) {
  const lines = state.transfers.map((sent) => {
    const share = sent.share ? say("ofLink", { share: figure(sent.share * 100) }) : "";
    return say("transfer", { file: sent.file, rate: giga(sent.rate), path: sent.path, share, why: sent.why });
  });
  const { bytes, seconds } = state.opened;
  const moved = state.transfers.reduce((sum, sent) => sum + sent.nbytes, 0);
  const spent = Math.max(...state.transfers.map((sent) => sent.seconds));
  const opened = say("opened", { size: amount(bytes), time: time(seconds * 1000) });
  const first = moved ? say("moved", { rate: giga(moved / spent), size: amount(moved) }) : opened;
  const { pinned } = state;
  const kept = moved && pinned.limit ? [say("pinned", { size: amount(pinned.bytes), limit: amount(pinned.limit) })] : [];
  return [first, resident(state), ...kept, ...(moved ? [opened] : []), ...lines];
}

/** What of a loader's parts lies where it is computed with. */
export function resident(state) {
  const there = state.resident.filter((part) => part.bytes);
  if (!there.length) return say("noneResident");
  const parts = there.map((part) => `${say(part.part)} ${part.bytes < part.of ? `${amount(part.bytes)} / ` : ""}${amount(part.of)}`);
  return say("resident", { device: deviceOf(there[0]), parts: parts.join(", ") });
}

const deviceOf = (part) => (part.device === "cuda" ? "GPU" : part.device.toUpperCase());

function settings(state) {
  const engine = state.engine === "fused" ? say("fused", { precision: state.precision }) : say("host");
  const kernel = state.kernel ?? say("hostKernel");
  return say("settings", { kernel, engine }) + (state.compile ? say("compiled", { mode: state.compile }) : "");
}

const instead = (state) => state.instead.map((why) => say("instead", { why }));

function combustion(state) {
  return [settings(state), ...instead(state), ...state.why.split("\n")];
}

function sampler(state) {
  const size = `${state.width}x${state.height}`;
  const beside = state.references ? say("withReferences", { count: state.references }) : "";
  const floor = state.floor_ms ? say("floor", { time: time(state.floor_ms) }) : "";
  const all = say("inAll", { time: time(state.ms), floor, steps: state.steps, batch: state.batch, size, beside });
  const first = state.step_ms === null ? all : say("aStep", { time: time(state.step_ms), rate: rate(state.tflops) });
  return [first, ...(state.step_ms === null ? [] : [all]), settings(state), ...instead(state)];
}

const SOURCES = { memory: "fromMemory", disk: "fromDisk", encoder: "encoded" };

const KINDS = {
  ArkFastLoader: loader,
  ArkSageCombustion: combustion,
  ArkSampler4Step: sampler,
  ArkTextEncode: (state) => [say(SOURCES[state.source], { time: time(state.ms) })],
  ArkPrewarm: (state) => [say("warm", { count: state.sizes, time: time(state.seconds * 1000) })],
  ArkReport: (state) => state.lines,
  ArkDoctor: (state) => state.lines,
};

/** How many lines a node has room for before it scrolls. */
export const ROOM = {
  ArkFastLoader: 3,
  ArkSageCombustion: 3,
  ArkSampler4Step: 3,
  ArkTextEncode: 1,
  ArkPrewarm: 1,
  ArkReport: 5,
  ArkDoctor: 12,
};

/** The lines of a node; without a state one that says so. */
export const linesOf = (type, state) => (state ? KINDS[type](state) : [say("idle")]);
