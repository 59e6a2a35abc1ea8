// The answer panel: what the chosen query attends to, in numbers, for one head or two.

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// One list.  side: {number, head, row, rgb}; go(position) is called when a key is clicked.
function listOf(side, keys, go) {
  const layer = index.layers[side.number], box = element("section", "list");
  const top = side.row.pairs.length ? side.row.pairs[0][1] : 1;
  box.append(element("p", "which", `${layer.name} · ${headName(layer, side.head)}`));
  if (layer.flags[side.head]) box.append(element("p", "flags", layer.flags[side.head]));
  const list = element("ol");
  for (const [key, weight] of side.row.pairs) {
    const item = element("li"), button = element("button");
    button.type = "button";
    button.append(element("span", "key", visible(keys[key])), element("span", "at", `(${key})`),
      element("span", "share", share(layer, weight)));
    const part = top > 0 ? 100 * weight / top : 0;
    button.style.backgroundImage =
      `linear-gradient(90deg, rgba(${side.rgb}, .28) ${part}%, transparent ${part}%)`;
    button.onclick = () => go(key);
    item.append(button);
    list.append(item);
  }
  box.append(list);
  for (const said of leftOut(layer, side.row)) box.append(element("p", "rest", said));
  return box;
}

// Fills the panel.  sides: one or two; query: text and position.
function showAnswer(box, query, sides, go) {
  const parts = [element("h3", "", `${visible(query.text)} (${query.position}) attends to`)];
  const lists = sides.map(side => listOf(side, textsOf(side.number, query.example, "keys"), go));
  const holder = element("div", lists.length > 1 ? "pair" : "");
  holder.append(...lists);
  box.replaceChildren(...parts, holder);
}

// The same in a sentence, for screen readers.
function spoken(query, side) {
  const layer = index.layers[side.number], keys = textsOf(side.number, query.example, "keys");
  const first = side.row.pairs.slice(0, 5).map(([k, w]) => `${visible(keys[k])} ${share(layer, w)}`);
  const others = side.row.pairs.length - first.length;
  if (others > 0) first.push(`${others} more in the list`);
  return `${visible(query.text)}, ${headName(layer, side.head)}: ` +
    [...first, ...leftOut(layer, side.row)].join(", ");
}
