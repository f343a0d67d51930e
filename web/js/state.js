// What the server told of each node, and of the last runs. A node is named by its graph and its place in it, so that two
// workflows in two tabs do not show each other's numbers.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const states = new Map();
const listeners = [];
let runs = [];

const keyOf = (graph, node) => `${graph}/${node}`;

/** Call a function whenever something changed. */
export function onChange(listener) {
  listeners.push(listener);
}

function changed() {
  for (const listener of listeners) listener();
}

/** Ask for everything, then listen. */
export async function followServer() {
  api.addEventListener("ark.state", ({ detail }) => {
    states.set(keyOf(detail.graph, detail.node), detail);
    changed();
  });
  // a prompt has ended: its whole time is known, and models may have left the card
  api.addEventListener("executing", ({ detail }) => detail === null && ask());
  api.addEventListener("reconnected", ask);
  await ask();
}

async function ask() {
  try {
    const reply = await api.fetchApi("/ark/state");
    if (!reply.ok) return;
    const found = await reply.json();
    runs = found.runs;
    states.clear();
    for (const state of found.states) states.set(keyOf(state.graph, state.node), state);
  } catch {
    return; // the server is away; "reconnected" follows
  }
  changed();
}

/** The last runs, the oldest first. */
export const lastRuns = () => runs;

/** The states of the loaders, the latest last. */
export const loaders = () => [...states.values()].filter((state) => state.type === "ArkFastLoader");

/** The open graph's nodes that have a state, each with it; `3:5` is node 5 in the subgraph of node 3. */
export function* shownNodes() {
  for (const state of states.values()) {
    if (state.graph !== app.graph?.id) continue;
    let graph = app.graph;
    const path = String(state.node).split(":");
    const last = path.pop();
    for (const id of path) graph = find(graph, id)?.subgraph;
    const node = find(graph, last);
    if (node?.comfyClass === state.type) yield [node, state];
  }
}

const find = (graph, id) => graph?.getNodeById(Number(id)) ?? graph?.getNodeById(id);
