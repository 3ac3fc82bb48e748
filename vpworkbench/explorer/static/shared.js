// What all widgets of the explorer share. Each module is this text followed by its own: no build step, no import.
// Text from data only ever becomes a text node. Colours as in vpworkbench/figures/style.py.

const SVG = "http://www.w3.org/2000/svg";
const EXPORTS = [
  ["PNG", "Save as a PNG picture", savePng],
  ["SVG", "Save as an SVG picture", saveSvg],
  ["CSV", "Save the numbers as CSV", saveCsv],
];

// ---- elements

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children); // a string becomes text, never markup
  return element;
}

/** An anywidget module: `build(model, page)` makes the parts once and returns the function that draws the traits. */
function widget(kind, build) {
  const render = ({ model, el }) => {
    const page = frame(model, kind);
    el.append(page.root);
    const draw = build(model, page);
    const changed = async () => {
      page.title.textContent = model.get("label");
      page.root.setAttribute("aria-label", model.get("label") || kind);
      page.root.style.width = `${model.get("width")}px`;
      await draw();
      page.root.dataset.version = model.get("version");
      page.root.dataset.drawnAt = performance.now();
      page.root.dataset.drawn = Number(page.root.dataset.drawn) + 1;
    };
    model.on("change", changed); // once per message, however many traits it carries
    changed();
    return () => model.off("change", changed);
  };
  return { render };
}

/** Title, body, status line and tip; `page.exports(table, own)` adds the buttons that save what is seen. */
function frame(model, kind) {
  const title = make("span", { class: "vpw-title" });
  const tools = make("span", { class: "vpw-tools" });
  const body = make("div", { class: "vpw-body" });
  const status = make("div", { class: "vpw-status", role: "status" });
  const tip = make("div", { class: "vpw-tip", "aria-hidden": "true", hidden: "" });
  const head = make("div", { class: "vpw-head" }, title, tools);
  // Without the attribute JupyterLab would take arrows and Enter for its own cells.
  const attributes = { class: `vpw vpw-${kind}`, role: "group", "data-drawn": 0, "data-lm-suppress-shortcuts": "true" };
  const root = make("div", attributes, head, body, status, tip);

  /** Say it in the status line and, where the pointer is, beside the pointer. */
  const tell = (text, event) => {
    status.textContent = text;
    tip.hidden = !(text && event);
    if (tip.hidden) return;
    tip.textContent = text;
    const outer = root.getBoundingClientRect();
    const [x, y] = [event.clientX - outer.left, event.clientY - outer.top];
    const flip = x + 16 + tip.offsetWidth > outer.width; // stays inside: a cell's output cuts off what sticks out
    tip.style.left = `${Math.max(0, flip ? x - tip.offsetWidth - 10 : x + 14)}px`;
    tip.style.top = `${Math.max(0, Math.min(y + 14, outer.height - tip.offsetHeight))}px`;
  };
  const exports = (table, own = {}) => {
    for (const [name, title, save] of EXPORTS) {
      const button = make("button", { type: "button", title, "aria-label": title }, name);
      const what = () => ({ root, table, name: model.get("label"), alt: model.get("alt") });
      button.addEventListener("click", async () => {
        try {
          await (own[name] ?? save)(what());
        } catch (error) {
          tell(`The ${name} cannot be saved: ${error.message}`);
        }
      });
      tools.append(button);
    }
  };
  return { root, title, tools, body, status, tell, exports };
}

/** A canvas with marks over it: pointer and arrow keys move over the places of `geometry()`, click and Enter pick. */
function stage({ geometry, hover, pick }) {
  const canvas = make("canvas", { "aria-hidden": "true" });
  const mark = (kind) => make("div", { class: `vpw-mark ${kind}`, hidden: "" });
  const marks = { picked: mark("vpw-picked"), cursor: mark("vpw-cursor") };
  const attributes = { class: "vpw-stage", tabindex: 0, role: "application" };
  const element = make("div", attributes, canvas, marks.cursor, marks.picked);
  let current = -1;
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return geometry().at((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  };
  const move = (place, event) => hover((current = place), event);
  element.addEventListener("pointermove", (event) => move(at(event), event));
  element.addEventListener("pointerleave", () => move(-1));
  element.addEventListener("blur", () => move(-1));
  element.addEventListener("click", (event) => at(event) >= 0 && pick(at(event)));
  onKeys(element, {
    step: (x, y) => move(current < 0 ? Math.max(0, self.picked) : geometry().beside(current, x, y)),
    enter: () => current >= 0 && pick(current),
    escape: () => (move(-1), pick(-1)),
  });
  const show = (mark, place) => {
    const box = place >= 0 && place < geometry().count ? geometry().box(place) : null;
    marks[mark].hidden = !box;
    if (!box) return;
    const [x0, y0, x1, y1] = Array.from(box, (share) => `${100 * share}%`);
    Object.assign(marks[mark].style, { left: x0, top: y0, width: `calc(${x1} - ${x0})`, height: `calc(${y1} - ${y0})` });
  };
  const self = { element, canvas, picked: -1, show };
  self.pick = (place) => show("picked", (self.picked = place));
  self.hover = (place) => show("cursor", place);
  return self;
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onKeys(element, { step, enter, escape }) {
  element.addEventListener("keydown", (event) => {
    if (event.key in STEPS) step(...STEPS[event.key]);
    else if (event.key === "Enter" || event.key === " ") enter();
    else if (event.key === "Escape") escape();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
}

/** Words as a list: one stop of the tab key. Pointer and arrow keys move over them, click and Enter pin. */
function wordList({ hover, pin, unpin }) {
  const element = make("div", { class: "vpw-sentence", role: "listbox", tabindex: 0 });
  let [tokens, current] = [[], -1];
  const at = (event) => tokens.indexOf(event.target.closest(".vpw-word"));
  const move = (word, event) => hover((current = word), event);
  element.addEventListener("pointermove", (event) => move(at(event), event));
  element.addEventListener("pointerleave", () => move(-1));
  element.addEventListener("blur", () => move(-1));
  element.addEventListener("click", (event) => at(event) >= 0 && pin(at(event)));
  onKeys(element, {
    step: (x, y) => {
      move(Math.max(0, Math.min(tokens.length - 1, current + x + y)));
      tokens[current]?.scrollIntoView({ block: "nearest" });
      element.setAttribute("aria-activedescendant", tokens[current]?.id ?? "");
    },
    enter: () => current >= 0 && pin(current),
    escape: unpin,
  });
  /** Make and return the elements of the words; `below(word)` are elements under the text. */
  const fill = (texts, below = () => []) => {
    const key = Math.random().toString(36).slice(2); // ids are the page's, and a widget may be seen twice
    const attributes = (word) => ({ class: "vpw-word", role: "option", id: `vpw-${key}-${word}` });
    tokens = texts.map((text, word) => make("span", attributes(word), text, ...below(word)));
    element.replaceChildren(...tokens.flatMap((token) => [token, " "]));
    current = Math.min(current, tokens.length - 1);
    return tokens;
  };
  return { element, fill };
}

// ---- numbers

/** Bytes as float32; copied, as a message's bytes need not start at a multiple of four. */
function floats(view) {
  return new Float32Array(view?.byteLength ? view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength) : 0);
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

function largest(values) {
  let best = 0;
  for (let place = 1; place < values.length; place++) if (values[place] > values[best]) best = place;
  return best;
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

// ---- geometry: what is where, as shares of the canvas

/** Boxes of a grid or anywhere; where they overlap the smallest is hit. */
function regions(view, onGrid) {
  const numbers = floats(view);
  const count = numbers.length / 4;
  const box = (place) => numbers.subarray(4 * place, 4 * place + 4);
  const centre = (place) => [(box(place)[0] + box(place)[2]) / 2, (box(place)[1] + box(place)[3]) / 2];
  const area = (place) => (box(place)[2] - box(place)[0]) * (box(place)[3] - box(place)[1]);
  const at = (x, y) => {
    let best = -1;
    for (let place = 0; place < count; place++) {
      const [x0, y0, x1, y1] = box(place);
      if (x >= x0 && x < x1 && y >= y0 && y < y1 && (best < 0 || area(place) < area(best))) best = place;
    }
    return best;
  };
  /** The nearest in this direction; what lies aside counts double. */
  const beside = (from, stepX, stepY) => {
    let [best, least] = [from, Infinity];
    for (let place = 0; place < count; place++) {
      const [x, y] = [centre(place)[0] - centre(from)[0], centre(place)[1] - centre(from)[1]];
      const ahead = x * stepX + y * stepY;
      const distance = ahead + 2 * Math.abs(x * stepY + y * stepX);
      if (ahead > 1e-4 && distance < least - 1e-6) [best, least] = [place, distance];
    }
    return best;
  };
  const edges = (side) => [...new Set(Array.from({ length: count }, (_, place) => box(place)[side].toFixed(3)))];
  const [columns, rows] = [0, 1].map((side) => edges(side).sort((one, other) => one - other));
  const grid = onGrid && columns.length * rows.length === count;
  const name = (place) => {
    if (!grid) return `token ${place}`;
    const [row, column] = [rows.indexOf(box(place)[1].toFixed(3)), columns.indexOf(box(place)[0].toFixed(3))];
    return `token ${place} (row ${row + 1}, column ${column + 1})`;
  };
  const order = Array.from({ length: count }, (_, place) => place).sort((one, other) => area(other) - area(one));
  return { count, box, at, beside, name, grid, order };
}

// ---- pictures

/** The picture of a trait, decoded once for each value; null where it cannot be read. */
function decoder(model, trait) {
  let [view, bitmap] = [null, null];
  return async () => {
    while (model.get(trait) !== view) { // a newer one may come meanwhile
      const now = model.get(trait);
      bitmap = now?.byteLength ? await createImageBitmap(new Blob([now])).catch(() => null) : null;
      view = now;
    }
    return bitmap;
  };
}

/** Canvas of so many page pixels, sharp on screens that pack several dots into one. */
function sized(canvas, width, height) {
  const dots = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.round(width * dots), Math.round(height * dots)];
  canvas.style.aspectRatio = `${width} / ${height}`;
  return canvas.getContext("2d");
}

/** The image, or grey where there is none. */
function drawPicture(canvas, bitmap, width) {
  const share = bitmap ? Math.min(1.6, Math.max(0.3, bitmap.height / bitmap.width)) : 1;
  const context = sized(canvas, width, Math.round(width * share));
  if (bitmap) {
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  } else {
    context.fillStyle = "#808080";
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  return context;
}

/** A box in dots of the canvas. */
const dotsOf = ({ canvas }, box) => box.map((share, side) => Math.round(share * (side % 2 ? canvas.height : canvas.width)));

/** Fill each box with `paint(value)`, the smallest last, which the pointer hits; `outside` is what no box covers. */
function drawBoxes(context, geometry, values, paint, outside = null) {
  const { width, height } = context.canvas;
  const layer = new OffscreenCanvas(width, height);
  const ink = layer.getContext("2d");
  const fill = (colour, x, y, wide, high) => {
    ink.clearRect(x, y, wide, high);
    ink.fillStyle = colour;
    ink.fillRect(x, y, wide, high);
  };
  if (outside) fill(outside, 0, 0, width, height);
  for (const place of geometry.order) {
    const [x0, y0, x1, y1] = dotsOf(context, geometry.box(place));
    fill(paint(values[place]), x0, y0, x1 - x0, y1 - y0);
  }
  context.drawImage(layer, 0, 0);
}

/** Darker where a value is small beside the largest. */
function drawShade(context, geometry, values) {
  const top = Math.max(1e-12, values[largest(values)]);
  const paint = (value) => `rgba(0, 0, 0, ${0.8 * (1 - Math.max(0, value) / top)})`;
  drawBoxes(context, geometry, values, paint, "rgba(0, 0, 0, 0.8)");
}

/** What is hidden or blocked: dark with fine lines, told from any picture. */
function hatch(side = 8) {
  const tile = new OffscreenCanvas(side, side);
  const ink = tile.getContext("2d");
  ink.fillStyle = "rgba(40, 40, 48, 0.94)";
  ink.fillRect(0, 0, side, side);
  [ink.strokeStyle, ink.lineWidth] = ["rgba(255, 255, 255, 0.4)", 1.2];
  for (const shift of [-side, 0, side]) {
    ink.moveTo(shift - 1, side + 1);
    ink.lineTo(shift + side + 1, -1);
  }
  ink.stroke();
  return ink.createPattern(tile, "repeat");
}

/** Hatch the boxes of the tokens of which `is` is true. */
function drawHatched(context, geometry, is) {
  const hidden = hatch();
  const tokens = Array.from({ length: geometry.count }, (_, token) => token);
  drawBoxes(context, geometry, tokens, (token) => (is(token) ? hidden : "transparent"));
}

/** The edges of all tokens, light on dark: fainter where they are a grid than where boxes lie anywhere. */
function drawGrid(context, geometry) {
  const [dark, light] = geometry.grid ? [0.2, 0.6] : [0.5, 1];
  const lines = [[3, `rgba(0, 0, 0, ${dark})`], [1, `rgba(255, 255, 255, ${light})`]];
  for (const [thick, colour] of lines) {
    [context.lineWidth, context.strokeStyle] = [thick, colour];
    for (let place = 0; place < geometry.count; place++) {
      const [x0, y0, x1, y1] = dotsOf(context, geometry.box(place));
      context.strokeRect(x0 + 0.5, y0 + 0.5, x1 - x0, y1 - y0); // neighbours share a line
    }
  }
}

/** The outline of some tokens together: the edges that only one of them has. */
function drawOutline(context, geometry, tokens) {
  const edges = new Map();
  for (const token of tokens) {
    const [x0, y0, x1, y1] = dotsOf(context, geometry.box(token));
    for (const edge of [[x0, y0, x1, y0], [x0, y1, x1, y1], [x0, y0, x0, y1], [x1, y0, x1, y1]]) {
      edges.set(`${edge}`, edges.has(`${edge}`) ? null : edge);
    }
  }
  for (const [thick, colour] of [[6, "rgba(0, 0, 0, 0.75)"], [3, "#f0e442"]]) {
    [context.lineWidth, context.strokeStyle] = [thick, colour];
    context.beginPath();
    for (const [x0, y0, x1, y1] of [...edges.values()].filter(Boolean)) {
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
    }
    context.stroke();
  }
}

// ---- saving, in the page

const slug = (name) => name.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "view";

function download(content, type, name) {
  const link = make("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

function saveCsv({ table, name }) {
  const cell = (value) => (/[",\n\r]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  download(table().map((row) => row.map(cell).join(",")).join("\n") + "\n", "text/csv", `${slug(name)}.csv`);
}

function saveSvg({ root, name, alt }) {
  download(new XMLSerializer().serializeToString(snapshot(root, name, alt)), "image/svg+xml", `${slug(name)}.svg`);
}

async function savePng({ root, name, alt }) {
  const svg = snapshot(root, name, alt);
  const image = new Image();
  await new Promise((loaded, failed) => {
    Object.assign(image, { onload: loaded, onerror: () => failed(new Error("the browser cannot draw it.")) });
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(svg))}`;
  });
  const canvas = make("canvas");
  [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  // Not toBlob: it waits until the page is idle, on a busy machine longer than a browser counts a download to a click.
  const [, content] = canvas.toDataURL("image/png").split(",");
  if (!content) throw new Error("the picture is too large for this browser.");
  download(bytesOf(content), "image/png", `${slug(name)}.png`);
}

/** What is seen as an SVG on white: canvases as images, marks and tints as rectangles, text word by word. */
function snapshot(root, name, alt) {
  const outer = root.getBoundingClientRect();
  const [width, height] = [Math.ceil(outer.width), Math.ceil(outer.height)];
  const shape = (tag, attributes, text) => {
    const element = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text.replace(/[\x00-\x08\x0b\x0c\x0e-\x1f]/g, ""); // XML has no place for them
    return element;
  };
  const place = (box) => ({ x: box.left - outer.left, y: box.top - outer.top, width: box.width, height: box.height });
  const family = getComputedStyle(root).fontFamily;
  const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "font-family": family });
  svg.append(shape("title", {}, name), shape("desc", {}, alt), shape("rect", { width, height, fill: "#fff" }));
  for (const element of root.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height || element.closest(".vpw-tools, .vpw-tip")) continue;
    if (element.tagName === "CANVAS") {
      const href = enlarged(element).toDataURL();
      svg.append(shape("image", { ...place(box), href, preserveAspectRatio: "none" }));
      continue;
    }
    const style = getComputedStyle(element);
    const [fill, line] = [style.backgroundColor, parseFloat(style.borderTopWidth)];
    if (!/^(transparent|rgba\(.*, 0\))$/.test(fill)) svg.append(shape("rect", { ...place(box), fill }));
    if (line) svg.append(shape("rect", { ...place(box), fill: "none", stroke: style.borderTopColor, "stroke-width": line }));
    for (const node of element.childNodes) if (node.nodeType === Node.TEXT_NODE) svg.append(...words(node, style));
  }
  return svg;

  function words(node, style) {
    const [size, weight] = [parseFloat(style.fontSize), style.fontWeight];
    return Array.from(node.data.matchAll(/\S+/g), (match) => {
      const range = document.createRange();
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      const box = place(range.getBoundingClientRect());
      const where = { x: box.x, y: box.y + box.height / 2 + 0.35 * size };
      return shape("text", { ...where, "font-size": size, "font-weight": weight, fill: "#222" }, match[0]);
    });
  }
}

/** Small matrices blown up: viewers show square cells. */
function enlarged(canvas) {
  const factor = canvas.classList.contains("vpw-cells") ? Math.max(1, Math.ceil(400 / canvas.width)) : 1;
  if (factor === 1) return canvas;
  const large = make("canvas");
  [large.width, large.height] = [factor * canvas.width, factor * canvas.height];
  const context = large.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, 0, 0, large.width, large.height);
  return large;
}

