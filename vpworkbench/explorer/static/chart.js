// The plotly figure beside it, saved as the other views are: by plotly's own camera, and its numbers as CSV.

export default widget("chart", (model, page) => {
  /** The nearest, outwards: in the same column of an explorer, in the same section of a page. */
  const figure = () => {
    for (let outer = page.root; outer; outer = outer.parentElement) {
      const found = outer.querySelector(".js-plotly-plot");
      if (found) return found;
    }
    return null;
  };
  const picture = (format) => ({ name }) => {
    const plot = figure();
    const camera = plot?.querySelector(".modebar-btn[data-title^='Download plot']");
    if (!camera) return page.tell("The figure is not drawn yet.");
    const context = plot._context; // the camera reads its options when it is pressed
    const before = context.toImageButtonOptions;
    context.toImageButtonOptions = { format, filename: slug(name), scale: format === "png" ? 2 : 1 };
    camera.click();
    context.toImageButtonOptions = before;
  };
  const table = () => {
    const axis = (trace, side) => {
      const name = `${side}axis${(trace[`${side}axis`] ?? side).slice(1)}`;
      return figure()?.layout[name]?.title?.text ?? side;
    };
    const rows = [["trace", "x axis", "y axis", "x", "y", "value"]];
    for (const trace of figure()?.data ?? []) {
      const [xs, ys] = [Array.from(trace.x ?? []), Array.from(trace.y ?? [])];
      const add = (x, y, value) => rows.push([trace.name ?? "", axis(trace, "x"), axis(trace, "y"), x, y, value]);
      if (trace.z) {
        ys.forEach((y, row) => xs.forEach((x, column) => trace.z[row][column] != null && add(x, y, trace.z[row][column])));
      } else {
        xs.forEach((x, place) => add(x, ys[place] ?? "", ""));
      }
    }
    return rows;
  };
  page.exports(table, { PNG: picture("png"), SVG: picture("svg") });
  /** What is seen, in words: plotly says nothing of it. */
  const describe = () => {
    const plot = figure();
    plot?.setAttribute("role", "img");
    plot?.setAttribute("aria-label", model.get("alt") || model.get("label"));
  };
  // It is drawn after its title, and anew for other models: watched in the column, once this is seen there.
  const later = new MutationObserver(describe);
  const seen = () => later.observe(page.root.parentElement.parentElement, { childList: true, subtree: true });
  new ResizeObserver(() => page.root.isConnected && (seen(), describe())).observe(page.root);
  return describe;
});
