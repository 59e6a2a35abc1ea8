// The data of the page: attn_ext/inspect/page.py says how they are laid out.
// A row is {pairs: [[key, weight], ...], more: keys that are left out, rest: their weight, total}.

const index = JSON.parse(document.getElementById("index").textContent);
const decoded = new Map();   // id of a data element -> its bytes; layers come when they are looked at

function bytesOf(id) {
  if (!decoded.has(id)) {
    const text = atob(document.getElementById(id).textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    decoded.set(id, bytes.buffer);
  }
  return decoded.get(id);
}

// The four lists of a layer, as views of its bytes.
function listsOf(number) {
  const layer = index.layers[number];
  if (!layer.lists) {
    const buffer = bytesOf(`rows-${number}`), rows = layer.batch * (layer.heads + 1) * layer.seqlenQ;
    const entries = rows * layer.listed, Keys = layer.wide ? Uint32Array : Uint16Array;
    layer.lists = {
      weights: new Float32Array(buffer, 0, entries),
      total: new Float32Array(buffer, 4 * entries, rows),
      seen: new Uint32Array(buffer, 4 * (entries + rows), rows),
      keys: new Keys(buffer, 4 * (entries + 2 * rows), entries),
    };
  }
  return layer.lists;
}

// The row of a query; head -1 is the mean over heads.
function rowOf(number, example, head, query) {
  const layer = index.layers[number], {weights, total, seen, keys} = listsOf(number);
  const slot = head < 0 ? layer.heads : head;
  const row = (example * (layer.heads + 1) + slot) * layer.seqlenQ + query;
  if (Number.isNaN(total[row])) return {pairs: [], more: seen[row], rest: NaN, total: NaN};
  const pairs = [];
  let listed = 0;
  for (let e = 0; e < Math.min(layer.listed, seen[row]); e++) {
    const at = row * layer.listed + e;
    pairs.push([keys[at], weights[at]]);
    listed += weights[at];
  }
  const more = seen[row] - pairs.length;
  return {pairs, more, rest: more ? Math.max(total[row] - listed, 0) : 0, total: total[row]};
}

// The pooled map of a head [rows x cols]; head -1: the mean over heads.
function mapOf(number, example, head) {
  const layer = index.layers[number], size = layer.rows * layer.cols;
  const all = new Float32Array(bytesOf(`maps-${number}`));
  const first = example * layer.heads * size;
  if (head >= 0) return all.subarray(first + head * size, first + (head + 1) * size);
  const mean = new Float32Array(size);
  for (let h = 0; h < layer.heads; h++)
    for (let i = 0; i < size; i++) mean[i] += all[first + h * size + i] / layer.heads;
  return mean;
}

// First position of cell `c` of `cells` over `length` positions, and one past its last: cells of
// adaptive_avg_pool2d, which overlap where `cells` does not divide `length`.
function cellSpan(c, cells, length) {
  return [Math.floor(c * length / cells), Math.ceil((c + 1) * length / cells)];
}

// Texts of a layer's queries and keys: those of the example, or of all.
function textsOf(number, example, which) {
  const lists = index.layers[number][which];
  return index.texts[lists[Math.min(example, lists.length - 1)]];
}
