// State, controls, keyboard and links.  The address holds the state, so a link restores the view:
// #layer=0&head=1&example=0&token=3&layer2=1&head2=-1&colour=row&from=0&find=cat

const by = id => document.getElementById(id);
const NUMBERS = {layer: 0, head: -1, example: 0, token: -1, layer2: -1, head2: -1, from: 0};
const COLOURS = ["row", "log", "linear"], THEMES = ["auto", "light", "dark"];
const state = {...NUMBERS, colour: "row", find: ""};
let held = false;     // whether a click or the keyboard holds the token against the pointer
let placed = false;   // whether a link says which window of the text to show
let matches = [], linkTimer = 0;

const texts = {keys: new Text(by("keys"), choosePosition), queries: new Text(by("queries"), chooseQuery)};
const heads = new Heads(by("heads"), chooseHead);

function readLink() {
  Object.assign(state, NUMBERS, {colour: "row", find: ""});
  for (const part of location.hash.slice(1).split("&")) {
    const [name, value = ""] = part.split("=");
    if (name in NUMBERS && /^-?\d+$/.test(value)) state[name] = Number(value);
    if (name === "colour" && COLOURS.includes(value)) state.colour = value;
    if (name === "find") state.find = unescaped(value);
  }
  held = /[#&]token=\d/.test(location.hash);
  placed = /[#&]from=\d/.test(location.hash);
}

function unescaped(value) {   // a link that was cut short is no error
  try {
    return decodeURIComponent(value);
  } catch {
    return "";
  }
}

// Browsers refuse addresses that change too often, and those of a page without one (a notebook's).
function writeLink() {
  if (location.protocol === "about:") return;
  clearTimeout(linkTimer);
  linkTimer = setTimeout(() => history.replaceState(null, "", "#" + linkOf()), 400);
}

function linkOf() {
  const names = Object.keys(NUMBERS).filter(n => state.layer2 >= 0 || !n.endsWith("2"));
  const parts = names.map(n => `${n}=${state[n]}`);
  parts.push(`colour=${state.colour}`);
  if (state.find) parts.push(`find=${encodeURIComponent(state.find)}`);
  return parts.join("&");
}

// State that the data do not have becomes the first; no token becomes the last, which sees most.
function fit() {
  const within = (name, low, size, other) => {
    if (!(state[name] >= low && state[name] < size)) state[name] = other;
  };
  within("layer", 0, index.layers.length, 0);
  const layer = index.layers[state.layer];
  within("example", 0, layer.batch, 0);
  within("head", -1, layer.heads, -1);
  within("token", 0, layer.seqlenQ, layer.seqlenQ - 1);
  within("layer2", 0, index.layers.length, -1);
  if (state.layer2 >= 0) {
    const second = index.layers[state.layer2];
    if (second.seqlenQ !== layer.seqlenQ || second.seqlenK !== layer.seqlenK) state.layer2 = -1;
    else within("head2", -1, second.heads, -1);
  }
}

function fill(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => {
    const option = element("option", "", text);
    option.value = value;
    return option;
  }));
}

const headPairs = layer => Array.from({length: layer.heads + 1}, (_, i) =>
  [i - 1, i ? String(i - 1) : `mean of ${layer.heads}`]);

function fillControls() {
  const layer = index.layers[state.layer];
  const alike = index.layers.map((l, i) => [i, l.name]).filter(([i]) =>
    index.layers[i].seqlenQ === layer.seqlenQ && index.layers[i].seqlenK === layer.seqlenK);
  fill(by("layer"), index.layers.map((l, i) => [i, l.name]));
  fill(by("head"), headPairs(layer));
  fill(by("example"), Array.from({length: layer.batch}, (_, i) => [i, i]));
  fill(by("layer2"), [[-1, "nothing"], ...alike]);
  if (state.layer2 >= 0) fill(by("head2"), headPairs(index.layers[state.layer2]));
  by("examples").hidden = layer.batch === 1;
  by("heads2").hidden = state.layer2 < 0;
  for (const id of ["layer", "head", "example", "layer2", "head2", "colour"]) by(id).value = state[id];
  by("find").value = state.find;
  by("legend").textContent = legendOf(layer, state.colour);
}

// The whole page anew: after a change of layer, example or colours.
function setup(paintHeads = true) {
  fit();
  fillControls();
  matches = search(textsOf(state.layer, state.example, "keys"), state.find);
  if (paintHeads) heads.paint(state.example, state.colour);
  heads.choose(state.layer, state.head,
    state.layer2 < 0 ? null : {number: state.layer2, head: state.head2});
  if (placed) paint();
  else showToken();
  placed = false;
}

// Moves the window so that a position of the keys is in it.
function bring(position) {
  const length = index.layers[state.layer].seqlenK;
  if (position < state.from || position >= state.from + WINDOW)
    state.from = Math.max(0, Math.min(position - WINDOW / 2, length - WINDOW));
}

const keyPosition = () => {
  const {offset} = index.layers[state.layer];
  return offset === null ? -1 : offset + state.token;
};

function showToken() {
  if (keyPosition() >= 0) bring(keyPosition());
  paint();
}

function sidesOf() {
  const style = getComputedStyle(document.documentElement);
  const made = (number, head, name) => ({
    number, head, rgb: style.getPropertyValue(name).trim(),
    row: rowOf(number, Math.min(state.example, index.layers[number].batch - 1), head, state.token),
  });
  const sides = [made(state.layer, state.head, "--hot")];
  if (state.layer2 >= 0) sides.push(made(state.layer2, state.head2, "--cool"));
  return sides;
}

function paint() {
  const layer = index.layers[state.layer], sides = sidesOf(), among = layer.offset !== null;
  const keys = textsOf(state.layer, state.example, "keys");
  const queries = textsOf(state.layer, state.example, "queries");
  const query = {text: queries[state.token], position: state.token, example: state.example};
  const first = among ? layer.offset : 0;
  texts.keys.show(keys, state.from, first, among ? first + layer.seqlenQ : 0);
  by("other").hidden = among;
  by("keys-title").textContent = among ? "Text" : "Keys";
  if (!among) {
    texts.queries.show(queries, state.token - WINDOW / 2, 0, queries.length);
    texts.queries.choose(state.token);
  }
  const rows = sides.map(({row, rgb}) => ({pairs: row.pairs, rgb}));
  texts.keys.colour(rows, sides.map(s => index.layers[s.number]), state.colour);
  texts.keys.choose(keyPosition());
  texts.keys.mark(matches);
  showAnswer(by("answer"), query, sides, goTo);
  by("spoken").textContent = sides.map(side => spoken(query, side)).join("; ");
  paintMaps(sides);
  paintPlaces(keys, rows);
  writeLink();
}

function paintMaps(sides) {
  const tell = words => { by("cell").textContent = words; };
  const ramps = ["--ramp", "--ramp2"].map(rampOf);
  by("maps").className = sides.length > 1 ? "pair" : "";
  by("maps").replaceChildren(...sides.map((side, at) => {
    const example = Math.min(state.example, index.layers[side.number].batch - 1);
    return mapFigure(side, example, state.token, ramps[at], state.colour, tell,
      hold);
  }));
}

// The overview and the window's place; both only where the text is longer than the window.
function paintPlaces(keys, rows) {
  const long = keys.length > WINDOW;
  by("window").hidden = by("overview").hidden = !long;
  by("range").textContent = `tokens ${texts.keys.from} to ${texts.keys.to - 1} of ${keys.length}`;
  by("found").textContent = !state.find ? "" : matches.length === 1 ? "1 place"
    : `${matches.length} places`;
  if (long) paintOverview(by("overview"), {length: keys.length, from: texts.keys.from,
    to: texts.keys.to, token: keyPosition(), rows, marks: matches, colour: state.colour});
}

// After a link that names a token: scrolls to it where it is out of sight, or behind the answer.
function reveal() {
  const {offset} = index.layers[state.layer];
  const span = offset === null ? texts.queries.span(state.token) : texts.keys.span(keyPosition());
  if (!held || !span) return;
  const box = span.getBoundingClientRect(), answer = by("right").getBoundingClientRect();
  const below = answer.left < box.right ? answer.top : innerHeight;   // the answer is over the text
  if (box.top < 0 || box.bottom > Math.min(below, innerHeight)) span.scrollIntoView({block: "center"});
}

function hold(query) {
  const layer = index.layers[state.layer];
  state.token = Math.max(0, Math.min(query, layer.seqlenQ - 1));
  held = true;
  showToken();
}

// The pointer on the keys' text, which holds the queries too where they stand in it.
function choosePosition(position, click) {
  chooseQuery(position - index.layers[state.layer].offset, click);
}

function chooseQuery(query, click) {
  if (click) {
    const again = held === true && state.token === query;
    hold(query);
    held = !again;
  } else if (held !== true && query !== state.token) {
    state.token = query;
    paint();
  }
}

function chooseHead(number, head, compared) {
  const names = compared ? ["layer2", "head2"] : ["layer", "head"];
  const same = state[names[0]] === number && state[names[1]] === head;
  state[names[0]] = compared && same ? -1 : number;
  state[names[1]] = head;
  setup(false);
}

function goTo(position) {
  held = true;
  bring(position);
  paint();
  texts.keys.span(position)?.scrollIntoView({block: "center"});
}

function moveWindow(from) {
  const length = index.layers[state.layer].seqlenK;
  state.from = Math.max(0, Math.min(from, length - WINDOW));
  paint();
}

function nextMatch(step) {
  if (!matches.length) return;
  const now = keyPosition() < 0 ? state.from : keyPosition();
  const after = step > 0 ? matches.find(m => m > now) : matches.findLast(m => m < now);
  const found = after ?? matches[step > 0 ? 0 : matches.length - 1];
  const {offset, seqlenQ} = index.layers[state.layer];
  if (offset !== null && found >= offset && found < offset + seqlenQ) hold(found - offset);
  else goTo(found);
  texts.keys.span(found)?.scrollIntoView({block: "center"});
}

function compareHere() {
  if (state.layer2 >= 0) state.layer2 = -1;
  else Object.assign(state, {layer2: state.layer, head2: state.head});
  setup(false);
}

// What each key does anywhere on the page but in a field; the value is the new query, if any.
const KEYS = {
  ArrowLeft: () => hold(state.token - 1), ArrowRight: () => hold(state.token + 1),
  ArrowUp: () => hold(state.token - 1), ArrowDown: () => hold(state.token + 1),
  Home: () => hold(0), End: () => hold(Infinity),
  PageUp: () => hold(state.token - 64), PageDown: () => hold(state.token + 64),
  "[": () => chooseHead(state.layer, Math.max(state.head - 1, -1), false),
  "]": () => chooseHead(state.layer, Math.min(state.head + 1, index.layers[state.layer].heads - 1), false),
  "{": () => chooseHead(Math.max(state.layer - 1, 0), state.head, false),
  "}": () => chooseHead(Math.min(state.layer + 1, index.layers.length - 1), state.head, false),
  c: compareHere, "/": () => by("find").focus(), Escape: () => { held = false; },
};

document.addEventListener("keydown", event => {
  const field = event.target.closest("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (field) {
    if (field.id === "find" && event.key === "Enter") nextMatch(event.shiftKey ? -1 : 1);
    if (field.id === "find" && event.key === "Escape") texts.keys.box.focus();
    return;
  }
  if (!Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
  const box = texts[index.layers[state.layer].offset === null ? "queries" : "keys"];
  if (document.activeElement === box.box)
    box.box.querySelector(".on")?.scrollIntoView({block: "nearest"});
});

for (const id of ["layer", "head", "example", "layer2", "head2"])
  by(id).onchange = event => {
    state[id] = Number(event.target.value);
    setup(id === "example");
  };
by("colour").onchange = event => {
  state.colour = event.target.value;
  setup();
};
by("find").oninput = event => {
  state.find = event.target.value;
  matches = search(textsOf(state.layer, state.example, "keys"), state.find);
  paint();
};
by("earlier").onclick = () => moveWindow(state.from - WINDOW / 2);
by("later").onclick = () => moveWindow(state.from + WINDOW / 2);
by("overview").onclick = event => {
  const box = by("overview").getBoundingClientRect();
  const length = index.layers[state.layer].seqlenK;
  moveWindow(Math.round((event.clientX - box.left) / box.width * length) - WINDOW / 2);
};
by("theme").onclick = () => {
  const root = document.documentElement, now = root.dataset.theme || "auto";
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  root.dataset.theme = next;
  by("theme").textContent = `theme: ${next}`;
  setup();
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setup());
addEventListener("resize", () => paint());
addEventListener("hashchange", () => { readLink(); setup(); reveal(); });
readLink();
setup();
reveal();
