// Opens each of Ark's templates by clicking it in ComfyUI's template browser, and runs the first, in headless Chromium.
// node templates.mjs URL CHROMIUM FOLDER NAME ... : prints one line of JSON with what it saw: `listed` (the width of each
// thumbnail), `opened` (the nodes of each graph), and of the first template `clicks` from the open page to its `image` on the
// canvas and `seconds`, the page's start among them. Screenshots go to FOLDER.
import { openBrowser, openCanvas, shownImage } from "./browser.mjs";

const [url, chromium, folder, ...names] = process.argv.slice(2);
const started = Date.now();
const { browser, page, seen } = await openBrowser(url, chromium);
const card = (name) => page.getByTestId(`template-workflow-${name}`);
Object.assign(seen, { clicks: 0, opened: {} });

async function click(place) {
  await place.click({ timeout: 20000 });
  seen.clicks++;
}

/** Open the template browser, and in it what Ark brings. */
async function browse() {
  await click(page.getByRole("button", { name: "Templates" }));
  await click(page.getByRole("button", { name: "ark", exact: true }));
}

/** Choose a template; what is on the canvas then. */
async function choose(name) {
  await click(card(name));
  await card(name).waitFor({ state: "detached" });
  await page.waitForFunction(() => app.graph.nodes.some((node) => node.type === "ArkFastLoader"), null, { timeout: 20000 });
  return await page.evaluate(() => {
    const missing = app.graph.nodes.filter((node) => !LiteGraph.registered_node_types[node.type]);
    return { nodes: app.graph.nodes.map((node) => node.type), missing: missing.length };
  });
}

try {
  await openCanvas(page, url);
  await page.waitForTimeout(1500); // the page's own first graph
  for (const name of names) {
    const first = name === names[0];
    await browse();
    await card(name).waitFor({ timeout: 20000 });
    if (first) {
      const cards = [...names].map((name) => card(name).locator("img").first());
      const width = (image) => image.decode().then(() => image.naturalWidth);
      const widths = await Promise.all(cards.map((image) => image.evaluate(width)));
      seen.listed = Object.fromEntries(names.map((name, place) => [name, widths[place]]));
      await page.screenshot({ path: `${folder}/templates.png` });
    }
    seen.opened[name] = await choose(name);
    if (first) {
      await click(page.getByRole("button", { name: "Run", exact: true }).first());
      const { clicks } = seen;
      seen.image = await shownImage(page, 180000);
      seen.first = { clicks, seconds: (Date.now() - started) / 1000 };
      await page.waitForTimeout(500);
      await page.screenshot({ path: `${folder}/newcomer.png` });
    }
    await page.evaluate(() => app.extensionManager.command.execute("Comfy.NewBlankWorkflow"));
    await page.waitForFunction(() => app.graph.nodes.length === 0, null, { timeout: 20000 });
  }
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
