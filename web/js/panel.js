// The tab in the sidebar: the last runs as a chart and a table, and what of the models is resident.
import { resident } from "./lines.js";
import { lastRuns, loaders } from "./state.js";
import { clock, figure, say } from "./words.js";

const PARTS = ["encode", "sample", "rest"]; // of a run, from the bottom of its bar
const WIDTH = 320;
const HEIGHT = 140;
const TOP = 16;
const panel = document.createElement("section");
panel.className = "ark-panel";

export const tab = {
  id: "ark",
  icon: "pi pi-bolt",
  title: "Ark",
  tooltip: "Ark",
  type: "custom",
  render(place) {
    redraw();
    place.replaceChildren(panel); // the same element each time: the canvas calls this as often as it likes
  },
};

/** Draw what is known now, if the tab has been opened. */
export function redraw() {
  const runs = lastRuns().map(measured);
  const content = runs.length
    ? [chart(runs), legend(), table(runs.toReversed())]
    : [made("p", { textContent: say("noRuns") })];
  panel.ariaLabel = say("runs");
  panel.replaceChildren(made("h2", { textContent: say("runs") }), ...content, ...models());
}

/** A run with its whole time and the parts of it, in seconds. */
function measured(run) {
  const encode = (run.encode_ms ?? 0) / 1000;
  const sample = run.sample_ms / 1000;
  const seconds = run.seconds ?? encode + sample;
  return { ...run, seconds, encode, sample, rest: Math.max(0, seconds - encode - sample) };
}

function made(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function drawn(name, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function chart(runs) {
  const longest = Math.max(...runs.map((run) => run.seconds));
  const step = Math.min(40, WIDTH / runs.length);
  const bars = runs.flatMap((run, place) => {
    let top = HEIGHT;
    return PARTS.map((part) => {
      const height = ((HEIGHT - TOP) * run[part]) / longest;
      top -= height;
      const box = { x: place * step + 1, y: top, width: step - 2, height };
      return drawn("rect", { ...box, class: `ark-${part}` }, titled(`${say(part)}: ${figure(run[part])} s`));
    });
  });
  const label = drawn("text", { x: 0, y: 11 }, say("longest", { time: figure(longest) }));
  const line = drawn("line", { x1: 0, x2: WIDTH, y1: TOP, y2: TOP });
  const named = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": say("chart", { count: runs.length }) };
  return drawn("svg", named, label, line, ...bars);
}

const titled = (text) => Object.assign(drawn("title", {}), { textContent: text });

function legend() {
  const keys = PARTS.map((part) => made("li", {}, made("span", { className: `ark-${part}` }), say(part)));
  return made("ul", { className: "ark-legend" }, ...keys);
}

function table(runs) {
  const columns = ["time", "size", "steps", "sample", "whole"];
  const head = columns.map((name) => made("th", { scope: "col", textContent: say(name) }));
  const rows = runs.map((run) => {
    const cells = [clock(run.at), run.size, run.steps, `${figure(run.sample)} s`, `${figure(run.seconds)} s`];
    return made("tr", {}, ...cells.map((text) => made("td", { textContent: text })));
  });
  const body = made("table", {}, made("thead", {}, made("tr", {}, ...head)), made("tbody", {}, ...rows));
  const scrolled = made("div", { className: "ark-scroll", tabIndex: 0, ariaLabel: say("runs") }, body);
  scrolled.setAttribute("role", "region");
  return scrolled;
}

function models() {
  const latest = loaders().at(-1);
  if (!latest) return [];
  const text = made("p", { textContent: resident(latest) });
  return [made("h2", { textContent: say("models") }), text];
}
