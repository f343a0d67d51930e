// What every walk over the canvas starts with. playwright-core is found through PLAYWRIGHT_CORE (its folder) or NODE_PATH.
import { createRequire } from "node:module";

const { chromium } = createRequire(import.meta.url)(process.env.PLAYWRIGHT_CORE || "playwright-core");
const args = [
  "--no-sandbox",
  "--disable-gpu",
  "--no-proxy-server",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--no-first-run",
];

/** A browser with one empty page, and what will be wrong on it: errors, failedRequests, and what it asks of others. */
export async function openBrowser(url, executablePath, options = {}) {
  const seen = { errors: [], failedRequests: [], outside: [] };
  const browser = await chromium.launch({ executablePath, args });
  const context = await browser.newContext({ viewport: { width: 1800, height: 1000 }, ...options });
  const page = await context.newPage();
  page.on("console", (message) => {
    if (message.type() === "error") seen.errors.push(`${message.text()} (${message.location().url})`);
  });
  page.on("pageerror", (error) => seen.errors.push(`page error: ${error.stack || error.message}`));
  page.on("request", (request) => {
    const own = [url, "blob:", "data:"].some((start) => request.url().startsWith(start));
    if (!own) seen.outside.push(request.url());
  });
  page.on("response", (response) => {
    if (response.status() >= 400) seen.failedRequests.push(`${response.status()} ${response.url()}`);
  });
  return { browser, page, seen };
}

/** Go to ComfyUI and wait until its canvas knows Ark's nodes. */
export async function openCanvas(page, url) {
  await page.goto(url, { waitUntil: "domcontentloaded", timeout: 60000 });
  await page.waitForFunction(() => window.LiteGraph?.registered_node_types?.ArkSampler4Step, null, { timeout: 60000 });
  await page.waitForFunction(() => window.app?.graph, null, { timeout: 60000 });
}

/** Wait for the picture that Save Image shows on itself: its size and how many colours it has. */
export async function shownImage(page, timeout = 20000) {
  const saved = () =>
    (app.graph.nodes ?? app.graph._nodes).find((node) => node.type === "SaveImage")?.imgs?.find((image) => image.naturalWidth);
  try {
    await page.waitForFunction(`(${saved})()`, null, { timeout });
  } catch (error) {
    return { error: error.message };
  }
  return await page.evaluate(`(() => {
    const image = (${saved})();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const colours = new Set(new Uint32Array(context.getImageData(0, 0, canvas.width, canvas.height).data.buffer));
    return { width: canvas.width, height: canvas.height, colours: colours.size };
  })()`);
}

/** Pairs of nodes that cover each other, in the design that the canvas has now. */
export const covered = (page) =>
  page.evaluate(() => {
    const { scale } = app.canvas.ds;
    const title = LiteGraph.NODE_TITLE_HEIGHT;
    const boxes = app.graph.nodes.map((node) => {
      const element = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`);
      const { x, y, width, height } = element
        ? element.getBoundingClientRect()
        : { x: scale * node.pos[0], y: scale * (node.pos[1] - title), width: scale * node.size[0], height: scale * (node.size[1] + title) };
      return { type: node.type, left: x, top: y, right: x + width, bottom: y + height };
    });
    const cover = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
    return boxes.flatMap((a, place) => boxes.slice(place + 1).filter((b) => cover(a, b)).map((b) => `${a.type}, ${b.type}`));
  });
