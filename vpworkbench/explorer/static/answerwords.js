// The words of an answer, each with a bar: hover shows where a word looked on the image, a click pins it. The second
// picture shows a second word: another pinned one, or the one under the pointer.

export default widget("answer", (model, page) => {
  const picture = decoder(model, "image");
  let [bitmap, geometry, tokens, hovered] = [null, regions(null, true), [], -1];
  let [looks, shares, nulls] = [new Float32Array(), new Float32Array(), new Float32Array()];
  const words = () => model.get("words");
  const pinned = () => model.get("pinned");
  const row = (word) => looks.subarray(word * geometry.count, (word + 1) * geometry.count);
  const isSink = (token) => model.get("sinks").includes(token);

  // ---- two pictures, the words, and a switch
  const panels = [0, 1].map((side) => {
    const hover = (token, event) => {
      panels[side].stage.hover(token);
      const word = shown()[side];
      const text = token < 0 || word < 0 ? "" : `“${words()[word]}” looks at ${geometry.name(token)}: ${percent(row(word)[token])}`;
      page.tell(text || describe(), text ? event : null);
    };
    const of = stage({ geometry: () => geometry, hover, pick: () => {} });
    const caption = make("figcaption");
    return { stage: of, caption, figure: make("figure", {}, of.element, caption) };
  });
  const hover = (word) => word !== hovered && ((hovered = word), show());
  const sentence = wordList({ hover, pin: (word) => pin(word), unpin: () => send("pinned", []) });
  sentence.element.setAttribute("aria-multiselectable", "true");
  const skip = make("input", { type: "checkbox" });
  const option = make("label", {}, skip, " leave sinks (hatched) out of the colour scale");
  skip.addEventListener("change", () => send("skip_sinks", skip.checked));
  page.body.append(...panels.map((panel) => panel.figure), make("div", { class: "vpw-side" }, sentence.element, option));

  const send = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const pin = (word) => {
    const kept = pinned().filter((one) => one !== word);
    send("pinned", kept.length < pinned().length ? kept : [...kept.slice(0, 1), word]);
  };
  /** The words of the two pictures, -1 for none. */
  const shown = () => {
    const all = [...pinned(), ...(hovered < 0 || pinned().includes(hovered) ? [] : [hovered])];
    return [all[0] ?? -1, all[1] ?? -1];
  };
  const describe = () => {
    const word = hovered >= 0 ? hovered : (pinned().at(-1) ?? -1);
    return word < 0 ? "Hover over a word; click pins it, a second click compares." : model.get("notes")[word];
  };

  const show = () => {
    shown().forEach((word, side) => {
      const { stage, caption, figure } = panels[side];
      figure.hidden = side === 1 && !pinned().length; // not while the pointer moves: the words would move away from it
      const context = drawPicture(stage.canvas, bitmap, width());
      stage.element.style.width = `${width()}px`;
      caption.textContent = word < 0 ? "\u00a0" : `“${words()[word]}”: ${percent(shares[word])} on the image, mean of all layers`;
      if (word < 0 || !geometry.count) return drawGrid(context, geometry);
      const skipped = (share, token) => (model.get("skip_sinks") && isSink(token) ? 0 : share);
      drawShade(context, geometry, row(word).map(skipped));
      drawHatched(context, geometry, isSink);
    });
    tokens.forEach((token, word) => token.classList.toggle("vpw-framed", word === hovered));
    page.tell(describe());
  };
  const width = () => Math.min(270, 0.33 * model.get("width"));

  /** Each word over its bar: the length is its share on the image, the line its share if attention were uniform. */
  const rebuild = () => {
    const top = Math.max(1e-12, ...shares, ...nulls);
    tokens = sentence.fill(words(), (word) => {
      const [fill, line] = [make("span", { class: "vpw-fill" }), make("span", { class: "vpw-uniform" })];
      fill.style.width = percent(shares[word] / top);
      line.style.left = percent(nulls[word] / top);
      return [make("span", { class: "vpw-bar" }, fill, line)];
    });
  };
  page.exports(() => [
    ["word", "token", "attention"],
    ...words().flatMap((text, word) => Array.from(row(word), (share, token) => [`${word} ${text}`, token, share])),
  ]);

  return async () => {
    bitmap = await picture();
    geometry = regions(model.get("boxes"), model.get("on_grid"));
    [looks, shares, nulls] = ["looks", "shares", "nulls"].map((name) => floats(model.get(name)));
    hovered = Math.min(hovered, words().length - 1);
    rebuild();
    skip.checked = model.get("skip_sinks");
    option.hidden = !model.get("sinks").length;
    sentence.element.setAttribute("aria-label", "Answer. Arrow keys move, Enter pins.");
    panels.forEach(({ stage }) => stage.element.setAttribute("aria-label", `Image. ${model.get("alt")}`));
    tokens.forEach((token, word) => {
      token.classList.toggle("vpw-picked", pinned().includes(word));
      token.setAttribute("aria-selected", pinned().includes(word));
    });
    show();
  };
});
