// The grid of heads, a row a layer, to choose from; and the large map of the chosen one.

const AT_ONCE = 64;   // thumbnails that are painted before the page answers again

class Heads {
  // choose(number, head, compared): what a click does
  constructor(box, choose) {
    this.box = box;
    this.buttons = new Map();
    this.waiting = 0;
    index.layers.forEach((layer, number) => box.append(this.rowOf(layer, number, choose)));
    box.addEventListener("keydown", event => this.key(event, choose));
  }

  rowOf(layer, number, choose) {
    const row = element("div", "layer"), name = element("span", "name", layer.name);
    name.title = layer.name;
    row.append(name);
    for (let head = -1; head < layer.heads; head++) {
      const button = element("button", layer.flags[head] ? "flag" : "");
      const flag = layer.flags[head] ? `: ${layer.flags[head]}` : "";
      button.type = "button";
      button.setAttribute("role", "radio");
      button.setAttribute("aria-label", `${layer.name}, ${headName(layer, head)}${flag}`);
      button.title = button.getAttribute("aria-label");
      button.append(element("canvas"), element("small", "", head < 0 ? "mean" : head));
      button.onclick = event => choose(number, head, event.shiftKey);
      this.buttons.set(`${number}.${head}`, button);
      row.append(button);
    }
    return row;
  }

  // Arrows move the choice, as in every group of radio buttons.
  key(event, choose) {
    const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const number = Math.max(0, Math.min(this.number + step[0], index.layers.length - 1));
    const head = Math.max(-1, Math.min(this.head + step[1], index.layers[number].heads - 1));
    choose(number, head, false);
    this.buttons.get(`${number}.${head}`).focus();
  }

  // Marks the chosen head and the one that it is compared with (or null).
  choose(number, head, second) {
    Object.assign(this, {number, head});
    for (const [place, button] of this.buttons) {
      const on = place === `${number}.${head}`;
      button.setAttribute("aria-checked", on);
      button.tabIndex = on ? 0 : -1;
      button.classList.toggle("second", second !== null && place === `${second.number}.${second.head}`);
    }
    this.reveal(this.buttons.get(`${number}.${head}`));
  }

  // Scrolls the grid, and never the page, until the button is seen.
  reveal(button) {
    const box = this.box.getBoundingClientRect(), at = button.getBoundingClientRect();
    const names = this.box.querySelector(".name").offsetWidth;
    if (at.top < box.top) this.box.scrollTop -= box.top - at.top + 4;
    if (at.bottom > box.bottom) this.box.scrollTop += at.bottom - box.bottom + 4;
    if (at.left < box.left + names) this.box.scrollLeft -= box.left + names - at.left + 4;
    if (at.right > box.right) this.box.scrollLeft += at.right - box.right + 4;
  }

  // Paints all thumbnails, some at a time.
  paint(example, colour) {
    clearTimeout(this.waiting);
    const ramp = rampOf("--ramp"), places = [...this.buttons.keys()];
    const some = from => {
      for (const place of places.slice(from, from + AT_ONCE)) {
        const [number, head] = place.split(".").map(Number), layer = index.layers[number];
        const shown = Math.min(example, layer.batch - 1);
        paintMap(this.buttons.get(place).querySelector("canvas"), mapOf(number, shown, head),
          layer.rows, layer.cols, ramp, colour);
      }
      if (from + AT_ONCE < places.length) this.waiting = setTimeout(some, 0, from + AT_ONCE);
    };
    some(0);
  }
}

// The map of one side beside the text.  tell(words): shows a cell; choose(query): a click.
function mapFigure(side, example, query, ramp, colour, tell, choose) {
  const layer = index.layers[side.number], map = mapOf(side.number, example, side.head);
  const figure = element("figure"), canvas = element("canvas"), axis = element("div", "axis");
  paintMap(canvas, map, layer.rows, layer.cols, ramp, colour);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `map of ${layer.name}, ${headName(layer, side.head)}: ` +
    `queries 0 to ${layer.seqlenQ - 1} downwards, keys 0 to ${layer.seqlenK - 1} to the right`);
  const cellAt = event => {
    const box = canvas.getBoundingClientRect();
    const place = (at, size, cells) => Math.max(0, Math.min(Math.floor(at / size * cells), cells - 1));
    return [place(event.clientY - box.top, box.height, layer.rows),
      place(event.clientX - box.left, box.width, layer.cols)];
  };
  canvas.onpointermove = event => tell(cellWords(layer, map, ...cellAt(event)));
  canvas.onclick = event => choose(cellSpan(cellAt(event)[0], layer.rows, layer.seqlenQ)[0]);
  const queries = element("span", "", "queries ↓");
  queries.append(element("span", "range", ` 0 to ${layer.seqlenQ - 1}`));   // too wide for two maps
  axis.append(element("span", "", "key 0"), queries, element("span", "", `key ${layer.seqlenK - 1}`));
  const frame = element("div", "frame");
  frame.append(canvas, rowFrame(Math.floor(query * layer.rows / layer.seqlenQ), layer.rows));
  figure.append(element("figcaption", "", `${layer.name} · ${headName(layer, side.head)}`), frame, axis);
  return figure;
}

// A frame around the row of cells that the query is in.
function rowFrame(row, rows) {
  const frame = element("div", "row");
  frame.style.top = `${100 * row / rows}%`;
  frame.style.height = `${100 / rows}%`;
  return frame;
}

function cellWords(layer, map, row, col) {
  const spans = [cellSpan(row, layer.rows, layer.seqlenQ), cellSpan(col, layer.cols, layer.seqlenK)];
  const [queries, keys] = spans.map(([low, high]) => high - low === 1 ? `${low}` : `${low} to ${high - 1}`);
  const value = map[row * layer.cols + col];
  const mean = spans.every(([low, high]) => high - low === 1) ? "weight" : "mean weight";
  return `queries ${queries}, keys ${keys}: ${mean} ${share(layer, value)}`;
}
