// Opens a ComfyUI in headless Chromium as a user would: loads a workflow into the canvas, runs it, waits for the image.
// node open_workflow.mjs URL WORKFLOW.json CHROMIUM SCREENSHOT.png [OTHER.json ...] : prints one line of JSON with what it
// saw. The others are opened first and run small: `others` has for each what `seen` has of the one that is run as it is.
import { readFileSync } from "node:fs";
import { covered, openBrowser, openCanvas, shownImage } from "./browser.mjs";

const [url, workflowFile, chromium, screenshot, ...otherFiles] = process.argv.slice(2);
const read = (file) => JSON.parse(readFileSync(file, "utf8"));
const { browser, page, seen } = await openBrowser(url, chromium);
seen.others = {};

try {
  await openCanvas(page, url);
  const open = (workflow) =>
    page.evaluate(async (json) => {
      await app.loadGraphData(json);
      const nodes = app.graph.nodes ?? app.graph._nodes;
      const links = app.graph.links instanceof Map ? app.graph.links.size : Object.keys(app.graph.links).length;
      const prompt = await app.graphToPrompt();
      return {
        nodes: nodes.map((node) => node.type),
        missing: nodes.filter((node) => node.has_errors || !LiteGraph.registered_node_types[node.type]).map((n) => n.type),
        links,
        prompt: prompt.output,
        dialog: document.querySelector('[role="dialog"]')?.innerText ?? "",
      };
    }, workflow);
  const run = () =>
    page.evaluate(async () => {
      const progress = [];
      const watch = (event) => progress.push([event.detail.value, event.detail.max]);
      app.api.addEventListener("progress", watch);
      const ended = new Promise((resolve) => {
        for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
          app.api.addEventListener(kind, (event) => resolve({ kind, detail: event.detail }), { once: true });
        setTimeout(() => resolve({ kind: "timeout" }), 180000);
      });
      await app.queuePrompt(0);
      const { kind, detail } = await ended;
      app.api.removeEventListener("progress", watch);
      const badges = [...document.querySelectorAll(".ark-badge")];
      // what the page asks for at the end of a run is on its way
      for (let wait = 0; wait < 100 && badges.some((badge) => badge.dataset.known !== "yes"); wait++)
        await new Promise((resolve) => setTimeout(resolve, 100));
      const texts = badges.map((badge) => [badge.ariaLabel, badge.dataset.known, badge.dataset.text]);
      return { kind, detail, progress, badges: texts };
    });
  const small = () =>
    page.evaluate(() => {
      const sizes = { width: 64, height: 64, size: "64x64", megapixels: 0.01, compare: false };
      for (const node of app.graph.nodes)
        for (const widget of node.widgets ?? []) widget.value = sizes[widget.name] ?? widget.value;
    });
  for (const file of otherFiles) {
    const opened = await open(read(file));
    await small();
    seen.others[file] = { ...opened, run: await run() };
  }
  Object.assign(seen, await open(read(workflowFile)));
  seen.run = await run();
  seen.image = await shownImage(page);
  await page.locator(".ark-tab-button").click();
  await page.locator(".ark-panel h2").first().waitFor({ timeout: 5000 });
  await page.mouse.move(900, 960);
  await page.evaluate(() => {
    Object.assign(app.canvas.ds, { scale: 0.74, offset: [540, 60] }); // beside the panel
    app.canvas.setDirty(true, true);
  });
  await page.waitForTimeout(1500);
  await page.screenshot({ path: screenshot });
  seen.covered = {}; // with what the nodes show of their run
  for (const newer of [false, true]) {
    await page.evaluate((newer) => app.extensionManager.setting.set("Comfy.VueNodes.Enabled", newer), newer);
    await page.waitForTimeout(1500);
    for (const file of [workflowFile, ...otherFiles]) {
      await open(read(file));
      await page.evaluate(() => app.extensionManager.command.execute("Comfy.Canvas.FitView"));
      await page.waitForTimeout(1000);
      (seen.covered[file] ??= []).push(...(await covered(page)));
      if (newer && file === workflowFile) await page.screenshot({ path: screenshot.replace(".png", "-2.png") });
    }
  }
  await page.evaluate(() => app.extensionManager.setting.set("Comfy.VueNodes.Enabled", false));
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
