// Ark on the canvas: what its nodes are doing, on the nodes and in a tab of the sidebar. Everything shown comes from this
// page's own server (nodes/live.py) and goes nowhere else.
import { app } from "../../../scripts/app.js";
import { addBadge, refreshBadges } from "./badge.js";
import { addCopyButton } from "./doctor.js";
import { redraw, tab } from "./panel.js";
import { followServer, onChange } from "./state.js";
import { translateDefinition, translateSlots } from "./translate.js";
import { loadWords } from "./words.js";

app.registerExtension({
  name: "ark.canvas",
  async init() {
    const style = Object.assign(document.createElement("link"), {
      rel: "stylesheet",
      href: new URL("./ark.css", import.meta.url).href,
    });
    document.head.append(style);
    await loadWords();
  },
  async setup() {
    onChange(refreshBadges);
    onChange(redraw);
    app.extensionManager.registerSidebarTab(tab);
    await followServer();
  },
  beforeRegisterNodeDef: translateDefinition,
  nodeCreated(node) {
    translateSlots(node);
    addCopyButton(node);
    addBadge(node);
  },
  afterConfigureGraph() {
    refreshBadges();
    redraw(); // the language may be another one
  },
});
