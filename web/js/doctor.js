// The button on Ark Doctor that copies its report.
import { app } from "../../../scripts/app.js";

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // over plain http from another machine there is no clipboard: the old way still works
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    if (!copied) throw new Error("this browser does not let a page copy");
  }
}

app.registerExtension({
  name: "Ark.Doctor",
  nodeCreated(node) {
    if (node.comfyClass !== "ArkDoctor") return;
    let report = "";
    const button = node.addWidget("button", "copy_report", null, async () => {
      const said = report ? "Copied" : "Queue it first";
      button.label = await (report ? copy(report) : Promise.resolve()).then(() => said, (error) => error.message);
      node.setDirtyCanvas(true, true);
      setTimeout(() => {
        button.label = "Copy report";
        node.setDirtyCanvas(true, true);
      }, 1500);
    });
    button.label = "Copy report";
    button.serialize = false; // no value of the graph
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.apply(this, arguments);
      report = output?.text?.join("\n") ?? "";
    };
  },
});
