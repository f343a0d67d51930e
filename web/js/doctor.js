// The button on Ark Doctor that copies its report.
import { say } from "./words.js";

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
    if (!copied) throw new Error(say("cannotCopy"));
  }
}

/** Give a new Ark Doctor its button. */
export function addCopyButton(node) {
  if (node.comfyClass !== "ArkDoctor") return;
  let report = "";
  const press = async () => {
    const said = say(report ? "copied" : "queueFirst");
    button.label = await (report ? copy(report) : Promise.resolve()).then(() => said, (error) => error.message);
    node.setDirtyCanvas(true, true);
    setTimeout(() => {
      button.label = say("copyReport");
      node.setDirtyCanvas(true, true);
    }, 1500);
  };
  const button = node.addWidget("button", "copy_report", null, press, { serialize: false }); // no input of the node
  button.serialize = false; // and nothing to save
  button.label = say("copyReport");
  const executed = node.onExecuted;
  node.onExecuted = function (output) {
    executed?.apply(this, arguments);
    report = output?.text?.join("\n") ?? "";
  };
}
