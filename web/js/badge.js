// What a node shows of itself: a few lines below its widgets. They are the page's, not the workflow's: nothing of them is
// saved or queued.
import { app } from "../../../scripts/app.js";
import { linesOf, ROOM } from "./lines.js";
import { shownNodes } from "./state.js";
import { say } from "./words.js";

const LINE = 15; // px
const WIDTH = 320; // px, at least, of a new node
const AROUND = 24; // px: the widget's margin, the box's border and padding
const badges = new WeakMap();

/** Give a new node of Ark its lines. */
export function addBadge(node) {
  const room = ROOM[node.comfyClass];
  if (!room) return;
  const box = document.createElement("div");
  box.className = "ark-badge";
  box.setAttribute("role", "group");
  box.tabIndex = 0; // the lines may be longer than the box
  box.append(Object.assign(document.createElement("div"), { ariaLive: "polite" }));
  // the wheel zooms the canvas unless the lines were chosen to be read
  box.addEventListener("wheel", (event) => {
    if (document.activeElement === box && box.scrollHeight > box.clientHeight) event.stopPropagation();
    else app.canvas.processMouseWheel(event);
  });
  const height = room * LINE + AROUND;
  const widget = node.addDOMWidget("ark_state", "ark_state", box, {
    serialize: false,
    getMinHeight: () => height,
    getMaxHeight: () => height,
    getValue: () => "",
    setValue: () => {},
    margin: 6,
  });
  widget.serialize = false;
  node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]);
  badges.set(node, box);
  write(node, undefined);
}

function write(node, state) {
  const box = badges.get(node);
  const lines = linesOf(node.comfyClass, state);
  const text = lines.join("\n");
  box.ariaLabel = say("stateOf", { node: node.title });
  if (box.dataset.text === text) return;
  Object.assign(box.dataset, { text, known: state ? "yes" : "no" });
  const rows = lines.map((line) => Object.assign(document.createElement("p"), { textContent: line, title: line }));
  box.firstChild.replaceChildren(...rows);
}

/** Write what is known now to the nodes of the open graph. */
export function refreshBadges() {
  for (const [node, state] of shownNodes()) if (badges.has(node)) write(node, state);
}
