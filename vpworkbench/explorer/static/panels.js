// Copies of one image side by side; each shows one value per token.

export default widget("panels", (model, page) => {
  const picture = decoder(model, "image");
  let [geometry, panels, over] = [regions(null, true), [], [-1]];
  const values = (panel) => floats(model.get("values")).subarray(panel * geometry.count, (panel + 1) * geometry.count);

  const told = (kind, value) => (kind === "mask" ? (value >= 0.5 ? "hidden" : "seen") : percent(value));
  const describe = (token) => {
    const [kinds, captions] = [model.get("kinds"), model.get("captions")];
    const shown = kinds.flatMap((kind, panel) =>
      kind === "plain" ? [] : [`${captions[panel]}: ${told(kind, values(panel)[token])}`],
    );
    return [geometry.name(token), ...shown].join(" · ");
  };
  const hover = (token, event) => {
    over = [token, event];
    for (const { stage } of panels) stage.hover(token);
    page.tell(token < 0 ? "" : describe(token), event);
  };
  const pick = (token) => {
    if (token < 0 || token >= geometry.count) return;
    model.set("picked", token);
    model.save_changes();
  };
  const rebuild = (count) => {
    panels = Array.from({ length: count }, () => {
      const one = stage({ geometry: () => geometry, hover, pick });
      return { stage: one, caption: make("figcaption") };
    });
    page.body.replaceChildren(...panels.map(({ stage, caption }) => make("figure", {}, stage.element, caption)));
    page.body.style.gridTemplateColumns = `repeat(${count}, minmax(0, 1fr))`;
  };
  page.exports(() => {
    const rows = Array.from({ length: geometry.count }, (_, token) => [
      token,
      ...geometry.box(token),
      ...model.get("kinds").map((_, panel) => values(panel)[token]),
    ]);
    return [["token", "x0", "y0", "x1", "y1", ...model.get("captions")], ...rows];
  });

  return async () => {
    const bitmap = await picture();
    geometry = regions(model.get("boxes"), model.get("on_grid"));
    const [kinds, captions, alt] = [model.get("kinds"), model.get("captions"), model.get("alt")];
    if (kinds.length !== panels.length) rebuild(kinds.length);
    const width = (model.get("width") - 12 * (kinds.length - 1)) / Math.max(1, kinds.length);
    panels.forEach(({ stage, caption }, panel) => {
      const context = drawPicture(stage.canvas, bitmap, width);
      if (kinds[panel] === "shade") drawShade(context, geometry, values(panel));
      if (kinds[panel] === "mask") drawHatched(context, geometry, (token) => values(panel)[token] >= 0.5);
      drawGrid(context, geometry);
      drawOutline(context, geometry, model.get("outlined"));
      stage.element.setAttribute("aria-label", `${captions[panel]}. ${alt} Arrow keys move, Enter picks.`);
      stage.pick(model.get("picked"));
      caption.textContent = captions[panel];
    });
    if (over[0] >= 0 && over[0] < geometry.count) hover(...over); // the new numbers under a pointer at rest
    if (!bitmap && model.get("image")?.byteLength) page.tell("This picture cannot be read."); // else it is on its way
  };
});
