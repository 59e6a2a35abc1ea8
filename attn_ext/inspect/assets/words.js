// Numbers and tokens as the page shows them.

// Tokens of nothing but white space, line breaks and tabs are seen.
function visible(text) {
  const shown = text.replace(/\r/g, "\u240d").replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5");
  return (/^[ \r\n\t]*$/.test(text) ? shown.replace(/ /g, "\u2423") : shown) || "\u2205";
}

// The same within the text, where lines are kept.
function inText(text) {
  return visible(text).replace(/\u23ce/g, "\u23ce\n");
}

// A weight in per cent, or of sigmoid calls as it is: three digits, never a false 0 or 100.
function share(layer, weight) {
  if (Number.isNaN(weight)) return "not a number";
  const sigmoid = layer.kind === "sigmoid", value = sigmoid ? weight : 100 * weight;
  const unit = sigmoid ? "" : " %", whole = sigmoid ? 1 : 100;
  if (value === 0 || value === whole) return value + unit;
  if (value < 1e-4) return `under 0.0001${unit}`;
  if (value < whole && value > 0.9995 * whole) return `over ${0.9995 * whole}${unit}`;
  const digits = Math.max(0, 2 - Math.floor(Math.log10(value)));
  return value.toFixed(digits) + unit;
}

function headName(layer, head) {
  return head < 0 ? `mean of ${layer.heads} heads` : `head ${head}`;
}

// What a row's list leaves out, in sentences; [] where it holds the whole row.
function leftOut(layer, row) {
  if (!row.pairs.length && !row.more) return ["sees no key"];
  const keys = row.more === 1 ? "1 key" : `${row.more} keys`;
  if (Number.isNaN(row.total)) return [`its weights are not numbers (${keys})`];
  const said = [];
  if (row.more) said.push(`and ${keys} more, ${share(layer, row.rest)}`);
  if (layer.kind !== "sigmoid" && 1 - row.total >= 0.00005)
    said.push(`to no key ${share(layer, 1 - row.total)}`);
  return said;
}

// What the colours mean.
function legendOf(layer, colour) {
  const text = {
    row: "A token's colour is its weight / the largest of the row; a map's cell is its mean weight " +
      "/ the largest of its row of cells.",
    log: "Colours are logarithmic over four decades, from a ten-thousandth of the row's largest " +
      "weight (in a map: of its row of cells) to the largest.",
    linear: "A token's colour is its weight, full at 1; a map's cell is its mean weight / the " +
      "largest of the map.",
  }[colour];
  return text + " Only listed keys are coloured. " + (layer.kind === "sigmoid"
    ? "Sigmoid weights need not sum to 1."
    : "To no key goes what a sink takes, and in a mean the heads that see no key.") +
    " A mean over heads is made of whole rows.";
}
