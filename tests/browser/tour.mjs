// Walks through everything that Ark adds to a ComfyUI's canvas, as a user would, in headless Chromium.
// node tour.mjs PLAN.json : prints one line of JSON with what it saw. The plan has url, chromium, folder (for screenshots),
// add ({node type: what to type into the search}), languages, and workflow (a file that has been run on this server).
import { readFileSync } from "node:fs";
import { openBrowser, openCanvas } from "./browser.mjs";

const plan = JSON.parse(readFileSync(process.argv[2], "utf8"));
const { browser, page, seen } = await openBrowser(plan.url, plan.chromium, { viewport: { width: 2200, height: 1200 } });

const shot = (name, clip) => page.screenshot({ path: `${plan.folder}/${name}.png`, ...(clip ? { clip } : {}) });
const setting = (name, value) =>
  page.evaluate(([name, value]) => app.extensionManager.setting.set(name, value), [name, value]);
const badges = () =>
  page.evaluate(() => {
    const told = (box) => ({ label: box.ariaLabel, text: box.dataset.text, known: box.dataset.known, width: box.offsetWidth });
    return [...document.querySelectorAll(".ark-badge")].map(told);
  });

let since = Date.now();
const phase = (name) => {
  (seen.seconds ??= {})[name] = (Date.now() - since) / 1000;
  since = Date.now();
};

async function open() {
  await openCanvas(page, plan.url);
  await page.waitForTimeout(1500); // the page's own first graph
}

async function load(file) {
  await page.evaluate((json) => app.loadGraphData(json), JSON.parse(readFileSync(file, "utf8")));
  await page.waitForTimeout(500);
}

/** Find each node by typing, choose it, put it down; says what was listed for it. */
async function addBySearch() {
  const listed = {};
  await page.evaluate(() => app.extensionManager.command.execute("Comfy.NewBlankWorkflow"));
  await page.waitForTimeout(500);
  for (const [type, [query, title]] of Object.entries(plan.add)) {
    await page.mouse.move(1150, 550, { steps: 2 });
    for (const clickCount of [1, 2]) {
      await page.mouse.down({ clickCount });
      await page.waitForTimeout(40);
      await page.mouse.up({ clickCount });
      await page.waitForTimeout(60);
    }
    await page.waitForSelector("input:focus", { timeout: 5000 });
    await page.keyboard.type(query);
    const option = page.locator('[role="option"]', { hasText: title }).first();
    await option.waitFor({ timeout: 5000 });
    listed[type] = await page.locator('[role="option"]').allInnerTexts();
    if (type === "ArkSageCombustion") await shot("search");
    await option.click();
    await page.waitForTimeout(300);
    const count = () => page.evaluate((type) => app.graph.nodes.filter((node) => node.type === type).length, type);
    await page.mouse.move(900, 420, { steps: 3 });
    await page.mouse.click(900, 420); // newer frontends: the node hangs on the pointer until here
    await page.waitForTimeout(200);
    if ((await count()) !== 1) throw new Error(`${type} was put down ${await count()} times`);
    await page.evaluate((type) => {
      const node = app.graph.nodes.find((node) => node.type === type);
      node.pos = [-5000, -5000]; // out of the way of the next one
      app.canvas.deselectAllNodes?.();
    }, type);
  }
  return listed;
}

/** Wire the nodes that were found into a graph that uses every one of them. */
const wire = () =>
  page.evaluate(() => {
    for (const type of ["LoadImage", "VAEDecode", "SaveImage"]) app.graph.add(LiteGraph.createNode(type));
    const node = (type) => app.graph.nodes.find((node) => node.type === type);
    const link = (from, output, to, input) => {
      const slot = (slots, name) => slots.findIndex((slot) => slot.name === name);
      const made = node(from).connect(slot(node(from).outputs, output), node(to), slot(node(to).inputs, input));
      if (!made) throw new Error(`${from}.${output} does not go to ${to}.${input}`);
    };
    link("ArkFastLoader", "MODEL", "ArkSageCombustion", "model");
    link("ArkSageCombustion", "MODEL", "ArkPrewarm", "model");
    link("ArkPrewarm", "MODEL", "ArkSampler4Step", "model");
    link("ArkPrewarm", "MODEL", "ArkReport", "model");
    link("ArkFastLoader", "CLIP", "ArkTextEncode", "clip");
    link("ArkTextEncode", "CONDITIONING", "ArkReferenceImages", "conditioning");
    link("ArkFastLoader", "VAE", "ArkReferenceImages", "vae");
    link("LoadImage", "IMAGE", "ArkReferenceImages", "image1");
    link("ArkReferenceImages", "CONDITIONING", "ArkSampler4Step", "positive");
    link("ArkReferenceImages", "LATENT", "ArkSampler4Step", "latent_image");
    link("ArkReferenceImages", "LATENT", "ArkScheduler", "latent_image");
    link("ArkScheduler", "SIGMAS", "ArkSampler4Step", "sigmas");
    link("ArkSampler4Step", "LATENT", "VAEDecode", "samples");
    link("ArkFastLoader", "VAE", "VAEDecode", "vae");
    link("VAEDecode", "IMAGE", "SaveImage", "images");
    const put = (type, name, value) => (node(type).widgets.find((widget) => widget.name === name).value = value);
    put("ArkTextEncode", "text", "a large red circle in the center on a white background");
    put("ArkPrewarm", "sizes", "64x64");
    put("ArkReport", "size", "64x64");
    put("LoadImage", "image", "example.png");
    const rows = [
      ["ArkFastLoader", "ArkSageCombustion", "ArkPrewarm", "ArkSampler4Step", "VAEDecode", "SaveImage"],
      ["LoadImage", "ArkTextEncode", "ArkReferenceImages", "ArkScheduler", "ArkReport", "ArkDoctor"],
    ];
    rows.forEach((row, down) => row.forEach((type, across) => (node(type).pos = [40 + 420 * across, 80 + 600 * down])));
    for (const type of ["ArkFastLoader", "ArkTextEncode", "ArkReport", "ArkDoctor"]) node(type).size = [380, node(type).size[1]];
    app.canvas.setDirty(true, true);
  });

const fit = async () => {
  await page.evaluate(() => {
    app.canvas.deselectAllNodes?.(); // else only what is selected is fitted: a focused badge selects its node
    return app.extensionManager.command.execute("Comfy.Canvas.FitView");
  });
  await page.waitForTimeout(800);
};

const queue = () =>
  page.evaluate(async () => {
    const ended = new Promise((resolve) => {
      for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(kind, ({ detail }) => resolve({ kind, message: detail.exception_message }), { once: true });
      setTimeout(() => resolve({ kind: "timeout" }), 120000);
    });
    await app.queuePrompt(0);
    return await ended;
  });

/** A picture of each node as it stands, for its help page. */
async function portraits() {
  await page.mouse.move(60, 700);
  for (const type of Object.keys(plan.add)) {
    const clip = await page.evaluate((type) => {
      const node = app.graph.nodes.find((node) => node.type === type);
      const edge = 8;
      app.canvas.ds.scale = 1;
      node.setSize([Math.max(node.size[0], 340), node.computeSize()[1]]);
      const [width, height] = [node.size[0] + 2 * edge, node.size[1] + LiteGraph.NODE_TITLE_HEIGHT + 2 * edge];
      app.canvas.ds.offset = [600 - node.pos[0], 200 - node.pos[1]];
      app.canvas.setDirty(true, true);
      return { x: 600 - edge, y: 200 - LiteGraph.NODE_TITLE_HEIGHT - edge, width, height: Math.min(height, 760) };
    }, type);
    await page.waitForTimeout(250);
    await shot(type, clip);
  }
}

/** Open each node's help as the info button does. */
async function help() {
  const pages = {};
  for (const type of Object.keys(plan.add)) {
    await page.evaluate((type) => {
      const node = app.graph.nodes.find((node) => node.type === type);
      app.canvas.deselectAllNodes?.();
      app.canvas.selectNode(node);
      app.canvas.ds.scale = 1;
      app.canvas.ds.offset = [900 - node.pos[0], 300 - node.pos[1]];
      app.canvas.setDirty(true, true);
    }, type);
    const button = page.locator('[data-testid="info-button"]');
    await button.waitFor({ timeout: 5000 });
    await page.waitForTimeout(300);
    await button.click();
    const content = page.locator(".node-help-content").first();
    try {
      await content.locator(`img[src*="${type}"]`).waitFor({ timeout: 5000 });
      await page.waitForTimeout(200);
    } catch (error) {
      seen.errors.push(`help of ${type}: ${error.message}`);
    }
    pages[type] = await content.evaluate((box) => ({
      text: box.innerText,
      pictures: [...box.querySelectorAll("img")].map((image) => image.naturalWidth),
    }));
    if (type === "ArkFastLoader") await shot("help");
    await page.keyboard.press("Escape");
  }
  return pages;
}

/** What the Tab key reaches of Ark. */
async function keyboard() {
  const reached = new Set();
  await page.evaluate(() => document.activeElement?.blur());
  for (let press = 0; press < 150; press++) {
    await page.keyboard.press("Tab");
    const label = await page.evaluate(() => {
      const now = document.activeElement;
      return now?.matches(".ark-badge, .ark-scroll, .ark-tab-button") ? now.className.split(" ")[0] + now.ariaLabel : "";
    });
    if (label) reached.add(label);
  }
  return [...reached];
}

/** Close and open the panel from the keyboard alone; whether it was there after each. */
async function panelByKeys() {
  await page.evaluate(() => document.activeElement?.blur());
  const there = [];
  for (let press = 0; press < 150 && !there.length; press++) {
    await page.keyboard.press("Tab");
    if (!(await page.evaluate(() => document.activeElement?.matches(".ark-tab-button")))) continue;
    for (const key of ["Enter", "Space"]) {
      await page.keyboard.press(key);
      await page.waitForTimeout(500);
      there.push(await page.locator(".ark-panel").isVisible());
    }
  }
  return there;
}

const colours = () =>
  page.evaluate(() => {
    const of = (selector) => getComputedStyle(document.querySelector(selector));
    return { badge: of(".ark-badge").backgroundColor, text: of(".ark-badge").color, panel: of(".ark-panel").color };
  });

async function inLanguage(language) {
  await setting("Comfy.Locale", language);
  await page.waitForTimeout(3000); // the page reads the definitions again
  await load(plan.workflow);
  if (!(await page.locator(".ark-panel").count())) await page.locator(".ark-tab-button").click();
  await page.locator(".ark-panel h2").first().waitFor({ timeout: 5000 });
  const found = await page.evaluate(() => {
    const named = (slot) => slot.label ?? slot.localized_name ?? slot.name;
    const ark = app.graph.nodes.filter((node) => node.type.startsWith("Ark"));
    return ark.map((node) => ({
      type: node.type,
      title: LiteGraph.registered_node_types[node.type].title,
      shown: node.title,
      tooltips: node.constructor.nodeData.outputs.map((output) => output.tooltip),
      inputs: Object.fromEntries(node.inputs.map((slot) => [slot.name, named(slot)])),
    }));
  });
  await fit();
  await shot(`language-${language}`);
  return { nodes: found, badges: await badges(), panel: await page.locator(".ark-panel").innerText() };
}

try {
  await open();
  seen.idle = await badges();
  phase("start");
  seen.listed = await addBySearch();
  phase("search");
  await wire();
  await fit();
  seen.run = await queue();
  const told = () => {
    const badges = [...document.querySelectorAll(".ark-badge")];
    const resident = badges.some((badge) => badge.textContent.includes("transformer 13 MB")); // asked for when a run has ended
    return resident && badges.every((badge) => badge.dataset.known === "yes");
  };
  await page.waitForFunction(told, null, { timeout: 10000 }).catch(() => {}); // the test says which one was not
  seen.badges = await badges();
  await page.mouse.move(60, 700);
  await fit();
  await shot("every-node");
  const saved = await page.evaluate(() => app.graph.serialize());
  seen.saved = JSON.stringify(saved).includes("ark_state");
  phase("run");
  await open(); // a new page knows what the last one saw
  await page.evaluate((json) => app.loadGraphData(json), saved);
  await page.waitForTimeout(500);
  seen.reloaded = await badges();
  await portraits();
  phase("portraits");
  await page.locator(".ark-tab-button").click();
  await page.locator(".ark-panel h2").first().waitFor({ timeout: 5000 });
  await fit();
  await shot("panel-dark");
  seen.panel = await page.evaluate(() => ({
    text: document.querySelector(".ark-panel").innerText,
    bars: document.querySelectorAll(".ark-panel svg rect").length,
    label: document.querySelector(".ark-panel svg").getAttribute("aria-label"),
  }));
  phase("panel");
  seen.keyboard = await keyboard();
  seen.panelByKeys = await panelByKeys();
  phase("keyboard");
  seen.dark = await colours();
  await setting("Comfy.ColorPalette", "light");
  await page.waitForTimeout(1000);
  await fit();
  seen.light = await colours();
  await shot("panel-light");
  await setting("Comfy.ColorPalette", "dark");
  phase("themes");
  seen.help = await help();
  phase("help");
  seen.languages = {};
  for (const language of plan.languages) seen.languages[language] = await inLanguage(language);
  phase("languages");
  await setting("Comfy.VueNodes.Enabled", true);
  await page.waitForTimeout(2000);
  await fit();
  seen.vue = await badges();
  await shot("nodes-2");
  await setting("Comfy.VueNodes.Enabled", false);
} catch (error) {
  seen.failure = error.stack;
  await shot("failure");
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
