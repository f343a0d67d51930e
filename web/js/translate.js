// Names and tooltips of Ark's nodes in the canvas's language. Newer frontends do this themselves, one language late when it
// is switched; the one of 0.3.75 forgets what a node pack brings for every language but English.
import { wordsOf } from "./words.js";

/** Translate a definition before the canvas takes it. */
export function translateDefinition(_type, definition) {
  const words = wordsOf(definition.name);
  if (!words) return;
  Object.assign(definition, { display_name: words.display_name, description: words.description });
  for (const inputs of [definition.input?.required, definition.input?.optional])
    for (const [name, [, options]] of Object.entries(inputs ?? {}))
      if (options && words.inputs[name]) options.tooltip = words.inputs[name].tooltip;
  definition.output_tooltips = definition.output_tooltips?.map((tip, slot) => words.outputs[slot]?.tooltip ?? tip);
}

/** Translate what a new node shows of its slots and widgets. */
export function translateSlots(node) {
  const words = wordsOf(node.comfyClass);
  if (!words) return;
  for (const input of node.inputs ?? []) input.localized_name = words.inputs[input.name]?.name ?? input.localized_name;
  for (const widget of node.widgets ?? []) widget.label = words.inputs[widget.name]?.name ?? widget.label;
  (node.outputs ?? []).forEach((output, slot) => (output.localized_name = words.outputs[slot]?.name ?? output.localized_name));
}
