// The text: a window of at most WINDOW tokens at a time, so that long texts stay quick.

const WINDOW = 512;

class Text {
  // box: the element; choose(position, held): what a pointer on a query does
  constructor(box, choose) {
    this.box = box;
    this.tokens = [];
    this.from = this.to = 0;
    box.addEventListener("pointerover", event => this.pointed(event, choose, false));
    box.addEventListener("click", event => this.pointed(event, choose, true));
  }

  pointed(event, choose, held) {
    const span = event.target.closest("span.query");
    if (span && (held || event.pointerType === "mouse")) choose(Number(span.dataset.i), held);
  }

  // Shows tokens from `from`; positions first to end (one past) are queries.
  show(tokens, from, first, end) {
    const start = Math.max(0, Math.min(from, tokens.length - WINDOW));
    const same = this.tokens === tokens && this.from === start && this.first === first;
    if (same && this.end === end) return;
    Object.assign(this, {tokens, from: start, first, end,
      to: Math.min(start + WINDOW, tokens.length)});
    const spans = [];
    for (let i = this.from; i < this.to; i++) {
      const span = document.createElement("span");
      span.textContent = inText(tokens[i]);
      span.dataset.i = i;
      span.id = `${this.box.id}-${i}`;
      span.setAttribute("role", "option");
      if (i >= first && i < end) span.className = "query";
      spans.push(span);
      // a place to break the line between tokens that have no space of their own
      spans.push(document.createElement("wbr"));
    }
    this.box.replaceChildren(...spans);
  }

  span(position) {
    return position >= this.from && position < this.to
      ? this.box.children[2 * (position - this.from)] : null;
  }

  // Marks the chosen query, or none (-1), for eyes and for screen readers.
  choose(position) {
    const before = this.box.querySelector(".on");
    if (before) {
      before.classList.remove("on");
      before.removeAttribute("aria-selected");
    }
    const span = this.span(position);
    if (span) {
      span.classList.add("on");
      span.setAttribute("aria-selected", "true");
      this.box.setAttribute("aria-activedescendant", span.id);
    } else this.box.removeAttribute("aria-activedescendant");
  }

  // Colours the keys of one or two rows: the first fills, the second underlines.
  // rows: [{pairs, rgb}]; layer: for the words of the tips.
  colour(rows, layer, colour) {
    const weights = rows.map(({pairs}) => new Map(pairs));
    const largest = rows.map(({pairs}) => pairs.length ? pairs[0][1] : 1);
    for (let i = this.from; i < this.to; i++) {
      const span = this.span(i), found = weights.map(w => w.get(i));
      const shades = found.map((w, at) => w === undefined ? ""
        : `rgba(${rows[at].rgb}, ${(0.8 * strength(w, largest[at], colour)).toFixed(3)})`);
      span.style.backgroundColor = shades[0] || "";
      span.style.borderBottomColor = shades[1] || "";
      span.classList.toggle("dim", rows.length > 0 && found.every(w => w === undefined));
      if (found[0] === undefined) delete span.dataset.w;
      else span.dataset.w = found[0];
      const said = found.map(w => w === undefined ? "not listed, or not seen" : share(layer[0], w));
      span.title = rows.length ? `${i}: ${said.join("; ")}` : String(i);
    }
  }

  mark(positions) {
    for (const span of this.box.querySelectorAll(".found")) span.classList.remove("found");
    for (const position of positions) this.span(position)?.classList.add("found");
  }
}

// Positions of the tokens of which `sought` begins in: a search across borders of tokens, without
// regard to upper and lower case.
function search(tokens, sought) {
  if (!sought) return [];
  const starts = [], wanted = sought.toLowerCase();
  let text = "";
  for (const token of tokens) {
    starts.push(text.length);
    text += token.toLowerCase();
  }
  const found = [];
  let token = 0;
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + 1)) {
    while (token + 1 < starts.length && starts[token + 1] <= at) token++;
    if (found[found.length - 1] !== token) found.push(token);
  }
  return found;
}
