// Puts Ark Doctor on the canvas of a ComfyUI in headless Chromium, queues it and presses its button.
// node copy_report.mjs URL CHROMIUM SCREENSHOT.png : prints one line of JSON with what it saw.
import { openBrowser, openCanvas } from "./browser.mjs";

const [url, chromium, screenshot] = process.argv.slice(2);
const permissions = ["clipboard-read", "clipboard-write"];
const { browser, page, seen } = await openBrowser(url, chromium, { viewport: { width: 1400, height: 900 }, permissions });
try {
  await openCanvas(page, url);
  seen.before = await page.evaluate(async () => {
    app.graph.clear();
    window.doctor = LiteGraph.createNode("ArkDoctor");
    doctor.pos = [300, 300];
    app.graph.add(doctor);
    doctor.widgets[0].value = false; // measure nothing
    window.button = doctor.widgets.find((widget) => widget.name === "copy_report");
    await button.callback();
    return button.label;
  });
  seen.saved = await page.evaluate(() => app.graph.serialize().nodes[0].widgets_values);
  seen.prompt = (await page.evaluate(() => app.graphToPrompt())).output;
  seen.report = await page.evaluate(async () => {
    const ended = new Promise((resolve) => {
      app.api.addEventListener("executed", (event) => resolve(event.detail.output.text[0]));
      setTimeout(() => resolve("timeout"), 120000);
    });
    await app.queuePrompt(0);
    return ended;
  });
  seen.after = await page.evaluate(() => button.callback().then(() => button.label));
  seen.clipboard = await page.evaluate(() => navigator.clipboard.readText());
  await page.evaluate(() => Object.defineProperty(navigator, "clipboard", { value: undefined })); // as over plain http
  seen.without = await page.evaluate(() => button.callback().then(() => button.label));
  await page.screenshot({ path: screenshot });
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
