// Matrices side by side in one colour scale, with one shared pick.

// Cividis, even steps for all eyes: 256 colours, red green blue.
const CIVIDIS = bytesOf("ACJOACNPACRRACVTACVUACZWACdYAChZAChbACldACpfACphACtiACxkACxmAC1oAC5qAC5sAC9tADBvADBwADFwADFxATJxBTNxCDNwDDRwDzVwEjVwFDZwFjdwGDdvGjhvHDlvHjpvIDpvITtuIzxuJDxuJj1uJz5uKT9uKj9tK0BtLUFtLkFtL0JtMUNtMkNtM0RtNEVsNUVsNkZsOEdsOUhsOkhsO0lsPEpsPUpsPktsP0xsQExsQU1sQk5sQ05sRE9sRVBsRlFsR1FsSFJsSVNsSlNsS1RsTFVsTVVsTlZsT1dsUFdsUVhtUlltU1ptVFptVVttVVxtVlxtV11tWF5tWV5uWl9uW2BuXGFuXWFuXmJuXmNvX2NvYGRvYWVvYmVvY2ZwZGdwZWhwZWhwZmlwZ2pxaGpxaWtxamxxa21ybG1ybG5ybW9ybm9zb3BzcHFzcXJ0cnJ0cnN0c3R1dHR1dXV1dnZ2d3d2d3d3eHh3eXl3enp4e3p4fHt4fXx4fnx4fn14f354gH94gX94goB5g4F5hIJ5hYJ5hoN5h4R4iIV4iYV4ioZ4i4d4jIh4jYh4jol4j4p4kIt4kYt4kox4ko14k454lI53lY93lpB3l5F3mJJ3mZJ3mpN2m5R2nJV2nZV2npZ2n5d1oJh1oZl1opl1o5p0pJt0pZx0ppx0p51zqJ5zqZ9zqqBzq6ByrKFyraJyrqNxr6RxsKVxsaVws6ZwtKdvtahvtqlvt6luuKpuuattuqxtu61tvK5sva5svq9rv7BrwLFqwbJqwrNpw7NpxLRoxbVoxrZnx7dnyLhmyblly7llzLpkzbtjzrxjz71i0L5i0b9h0sBg08Bf1MFf1cJe1sNd18Rc2cVc2sZb28da3MhZ3chY3slY38pX4MtW4cxV4s1U5M5T5c9S5tBR59FQ6NJP6dNO6tNM69RL7dVK7tZJ79dI8NhG8dlF8tpE89tC9dxB9t0/994++N88+eA6++E4/OI2/eM0/uQ0/uU1/uY2/ug4");
const COLOURS = new Uint32Array(256); // as the canvas stores them: opaque, blue green red from the top byte
for (let step = 0; step < 256; step++) {
  const [red, green, blue] = CIVIDIS.subarray(3 * step, 3 * step + 3);
  COLOURS[step] = ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

const short = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(3))) : "none");

/** Cells of one size, as shares of the canvas. */
function matrix(rows, columns) {
  const within = (value, count) => Math.max(0, Math.min(count - 1, value));
  const box = (place) => {
    const [row, column] = [Math.floor(place / columns), place % columns];
    return [column / columns, row / rows, (column + 1) / columns, (row + 1) / rows];
  };
  const at = (x, y) => within(Math.floor(y * rows), rows) * columns + within(Math.floor(x * columns), columns);
  const beside = (place, x, y) =>
    within(Math.floor(place / columns) + y, rows) * columns + within((place % columns) + x, columns);
  return { count: rows * columns, box, at: rows * columns ? at : () => -1, beside };
}

export default widget("maps", (model, page) => {
  let [geometry, maps, numbers, drawn, over] = [matrix(0, 0), [], new Float32Array(), null, [-1]];
  const shape = () => model.get("shape");
  const values = (map) => numbers.subarray(map * geometry.count, (map + 1) * geometry.count);
  const told = (value) => (Number.isNaN(value) ? "none" : model.get("percent") ? percent(value) : short(value));
  const isHatched = (map, row, column) =>
    model.get("hatched").some(([of, top, left, bottom, right]) => of === map && row >= top && row < bottom && column >= left && column < right);
  const pair = (place) => [Math.floor(place / shape()[2]), place % shape()[2]];

  const describe = (place) => {
    const [row, column] = pair(place).map((index) => index + model.get("count_from"));
    const value = (map) => (isHatched(map, ...pair(place)) ? "blocked" : told(values(map)[place]));
    const shown = model.get("names").map((name, map) => `${name}: ${value(map)}`);
    return [`${model.get("row_name")} ${row}, ${model.get("column_name")} ${column}`, ...shown].join(" · ");
  };
  const hover = (place, event) => {
    over = [place, event];
    for (const { stage } of maps) stage.hover(place);
    page.tell(place < 0 ? "" : describe(place), event);
  };
  const pick = (place) => {
    if (place < 0) return;
    model.set("picked", pair(place));
    model.save_changes();
  };

  /** Range of colours: as given, or that of what is there. */
  const range = (map) => {
    if (model.get("low").length) return [model.get("low")[map], model.get("high")[map]];
    let [low, high] = [Infinity, -Infinity];
    for (const value of values(map)) if (Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
    return low <= high ? [low, high] : [0, 1];
  };
  const paint = (canvas, map, [low, high]) => {
    const [, rows, columns] = shape();
    [canvas.width, canvas.height] = [columns, rows]; // one dot per cell; the style sheet enlarges, without blur
    if (!rows || !columns) return;
    const context = canvas.getContext("2d");
    const cells = context.createImageData(columns, rows);
    const dots = new Uint32Array(cells.data.buffer);
    const scale = high > low ? 255 / (high - low) : 0;
    values(map).forEach((value, place) => {
      if (Number.isFinite(value)) dots[place] = COLOURS[Math.max(0, Math.min(255, Math.round((value - low) * scale)))];
    });
    context.putImageData(cells, 0, 0);
  };
  /** Numbers along an axis, few enough to be read. */
  const ticks = (element, count, room, side) => {
    const least = (step) => (side === "left" ? 22 : step > 1 ? 30 : 13);
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => (room / count) * step >= least(step)) ?? count;
    const labels = [];
    for (let index = 0; index < count; index += step) {
      const label = make("span", {}, String(index + model.get("count_from")));
      label.style[side] = `${(100 * (index + 0.5)) / count}%`;
      labels.push(label);
    }
    element.replaceChildren(...labels);
  };
  const rebuild = (count) => {
    maps = Array.from({ length: count }, () => {
      const one = stage({ geometry: () => geometry, hover, pick });
      one.canvas.classList.add("vpw-cells");
      const parts = { stage: one, lines: make("div", { class: "vpw-lines" }) };
      for (const part of ["rows", "columns", "low", "high"]) parts[part] = make("div", { class: `vpw-${part}` });
      parts.caption = make("figcaption");
      parts.axes = make("div", { class: "vpw-axes" });
      const bar = make("canvas", { class: "vpw-cells", width: 256, height: 1, "aria-hidden": "true" });
      const context = bar.getContext("2d");
      const strip = context.createImageData(256, 1);
      new Uint32Array(strip.data.buffer).set(COLOURS);
      context.putImageData(strip, 0, 0);
      one.canvas.after(parts.lines); // below the marks
      parts.plot = make("div", { class: "vpw-plot" }, parts.rows, one.element, parts.columns);
      const scale = make("div", { class: "vpw-scale" }, parts.low, bar, parts.high);
      parts.figure = make("figure", {}, parts.caption, parts.plot, parts.axes, scale);
      return parts;
    });
    page.body.replaceChildren(...maps.map(({ figure }) => figure));
    page.body.style.gridTemplateColumns = `repeat(${count}, minmax(0, 1fr))`;
  };
  /** Lines where a modality begins, and what is blocked. */
  const drawOver = (element, map, width, height) => {
    const [, rows, columns] = shape();
    const boxes = model.get("hatched").filter(([of]) => of === map);
    const hatched = boxes.map(([, top, left, bottom, right]) => {
      const canvas = make("canvas", { class: "vpw-hatched", "aria-hidden": "true" });
      const [x, y, wide, high] = [left / columns, top / rows, (right - left) / columns, (bottom - top) / rows];
      const context = sized(canvas, wide * width, high * height);
      context.fillStyle = hatch();
      context.fillRect(0, 0, canvas.width, canvas.height);
      Object.assign(canvas.style, { left: `${100 * x}%`, top: `${100 * y}%`, width: `${100 * wide}%`, height: `${100 * high}%` });
      return canvas;
    });
    const line = (side, size, split, count) => {
      const one = make("div", { class: "vpw-line" });
      one.style[side] = `calc(${(100 * split) / count}% - 1px)`;
      one.style[size] = "2px";
      return one;
    };
    const inside = (count) => model.get("splits").filter((split) => split > 0 && split < count);
    const across = inside(rows).map((split) => line("top", "height", split, rows));
    const down = inside(columns).map((split) => line("left", "width", split, columns));
    element.replaceChildren(...hatched, ...across, ...down);
  };
  page.exports(() => {
    const rows = [["map", model.get("row_name"), model.get("column_name"), "value"]];
    const first = model.get("count_from");
    model.get("names").forEach((name, map) => {
      values(map).forEach((value, place) => {
        const [row, column] = pair(place);
        rows.push([name, row + first, column + first, Number.isNaN(value) ? "" : value]);
      });
    });
    return rows;
  });

  return () => {
    const [count, rows, columns] = shape();
    geometry = matrix(rows, columns);
    if (count !== maps.length) [drawn] = [null, rebuild(count)];
    const fresh = drawn !== model.get("values"); // a pick alone colours nothing anew
    if (fresh) numbers = floats((drawn = model.get("values")));
    const width = (model.get("width") - 16 * (count - 1)) / Math.max(1, count) - 30;
    const height = Math.max(90, Math.min((width * rows) / Math.max(1, columns), width, 420));
    const [row, column] = model.get("picked").length ? model.get("picked") : [-1, -1];
    maps.forEach((one, map) => {
      const limits = range(map);
      paint(one.stage.canvas, map, limits);
      one.stage.canvas.classList.toggle("vpw-dense", columns > width || rows > height);
      one.stage.element.style.height = `${height}px`;
      ticks(one.rows, rows, height, "top");
      ticks(one.columns, columns, width, "left");
      drawOver(one.lines, map, width, height);
      const name = model.get("names")[map];
      one.stage.element.setAttribute("aria-label", `${name}. ${model.get("alt")} Arrow keys move, Enter picks.`);
      one.stage.pick(row < 0 ? -1 : row * columns + column);
      one.caption.textContent = name;
      one.axes.textContent = `down: ${model.get("row_name")} · across: ${model.get("column_name")}`;
      [one.low.textContent, one.high.textContent] = limits.map(told);
    });
    if (over[0] >= 0 && over[0] < geometry.count) hover(...over); // the new numbers under a pointer at rest
  };
});
