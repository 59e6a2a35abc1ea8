// Colours and canvases: thumbnails, maps, the overview of a long text.

const DECADES = 4;   // of logarithmic colours

// How strong a weight's colour is, 0 to 1; `largest` is that of its row.
function strength(weight, largest, colour) {
  if (!(weight > 0)) return 0;
  if (colour === "linear") return Math.min(weight, 1);
  const part = weight / largest;
  return colour === "log" ? Math.max(0, 1 + Math.log10(part) / DECADES) : part;
}

// 256 colours along the stops of a custom property of the style, as canvases store a pixel.
function rampOf(name) {
  const stops = getComputedStyle(document.documentElement).getPropertyValue(name).trim()
    .split(/\s+/).map(hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16)));
  return Uint32Array.from({length: 256}, (_, i) => {
    const place = i / 255 * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
    const [r, g, b] = stops[low].map((from, c) =>
      Math.round(from + (stops[low + 1][c] - from) * (place - low)));
    return (255 << 24 | b << 16 | g << 8 | r) >>> 0;
  });
}

const GREY = 0xff808080;   // of a cell that is no number

// Paints a map [rows x cols] into a canvas, a pixel a cell.
function paintMap(canvas, map, rows, cols, ramp, colour) {
  canvas.width = cols;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(cols, rows);
  const pixels = new Uint32Array(image.data.buffer);
  const largest = map.reduce((top, cell) => cell > top ? cell : top, 0);
  for (let r = 0; r < rows; r++) {
    const row = map.subarray(r * cols, (r + 1) * cols);
    const top = colour === "linear" ? largest : row.reduce((most, cell) => cell > most ? cell : most, 0);
    for (let c = 0; c < cols; c++) {
      const part = strength(row[c] / (top || 1), 1, colour);
      pixels[r * cols + c] = Number.isNaN(row[c]) ? GREY : ramp[Math.round(255 * part)];
    }
  }
  context.putImageData(image, 0, 0);
}

// Draws where the keys of some rows stand in the whole text, and the window that is shown.
// rows: [{pairs, rgb}]; marks: positions that are searched for.
function paintOverview(canvas, {length, from, to, token, rows, marks, colour}) {
  const width = canvas.width = canvas.clientWidth || 600, height = canvas.height = 28;
  const context = canvas.getContext("2d"), x = position => position / length * width;
  const ink = getComputedStyle(document.body).color;
  context.clearRect(0, 0, width, height);
  context.globalAlpha = 0.12;
  context.fillStyle = ink;
  context.fillRect(x(from), 0, x(to) - x(from), height);
  context.globalAlpha = 1;
  const high = height / rows.length;
  rows.forEach(({pairs, rgb}, at) => {
    const top = pairs.length ? pairs[0][1] : 1;
    for (const [key, weight] of pairs) {
      context.fillStyle = `rgba(${rgb}, ${0.25 + 0.75 * strength(weight, top, colour)})`;
      context.fillRect(x(key) - 1, at * high, 3, high);
    }
  });
  context.fillStyle = "#2e9e4f";
  for (const position of marks) context.fillRect(x(position), height - 5, 2, 5);
  context.fillStyle = ink;
  if (token >= 0) context.fillRect(x(token), 0, 1.5, height);
}
