// An image beside a sentence: a word shows where it looks, a patch which words it reads. Hover shows, click pins.

export default widget("reader", (model, page) => {
  const picture = decoder(model, "image");
  let [bitmap, geometry, tokens] = [null, regions(null, true), []];
  let [looks, reads, shown] = [new Float32Array(), new Float32Array(), -1];
  const words = () => model.get("words");
  const row = (matrix, place, length) => matrix.subarray(place * length, (place + 1) * length);
  const image = stage({ geometry: () => geometry, hover: hoverPatch, pick: (patch) => pin(patch, words().length) });
  const sentence = wordList({ hover: hoverWord, pin: (word) => pin(word, 0), unpin: () => pin(-1, 0) });
  page.body.append(make("figure", {}, image.element), sentence.element);

  // ---- what is said
  const quoted = (word) => `“${words()[word]}”`;
  const describe = (place) => {
    if (place < 0) return "Hover over a word or a patch; click pins it.";
    if (place < words().length) {
      if (model.get("looks_blocked")) return `${quoted(place)} cannot look at the image: blocked`;
      const shares = row(looks, place, geometry.count);
      const best = largest(shares);
      const most = shares.length ? `; most at ${geometry.name(best)}: ${percent(shares[best])}` : "";
      return `${quoted(place)} looks ${percent(sum(shares))} at the image${most}`;
    }
    const patch = place - words().length;
    if (model.get("reads_blocked")) return `${geometry.name(patch)} cannot read the words: blocked`;
    const shares = row(reads, patch, words().length);
    const best = largest(shares);
    const most = shares.length ? `; most ${quoted(best)}: ${percent(shares[best])}` : "";
    return `${geometry.name(patch)} reads the words by ${percent(sum(shares))}${most}`;
  };
  /** One number: what the pinned place gives to the one under the pointer. */
  const between = (pinned, word, patch) =>
    pinned < words().length
      ? `${quoted(pinned)} looks at ${geometry.name(patch)}: ${percent(row(looks, pinned, geometry.count)[patch])}`
      : `token ${pinned - words().length} reads ${quoted(word)}: ${percent(reads[(pinned - words().length) * words().length + word])}`;

  // ---- what is shown
  const show = (place) => {
    shown = place;
    const patch = place - words().length;
    const context = drawPicture(image.canvas, bitmap, imageWidth());
    if (place >= 0 && patch < 0) {
      if (model.get("looks_blocked")) drawHatched(context, geometry, () => true);
      else drawShade(context, geometry, row(looks, place, geometry.count));
    }
    if (place < 0 || patch >= 0 || !geometry.grid) drawGrid(context, geometry);
    const shares = patch >= 0 ? row(reads, patch, words().length) : null;
    const top = shares?.length ? Math.max(1e-12, shares[largest(shares)]) : 1;
    tokens.forEach((token, word) => {
      token.classList.toggle("vpw-framed", word === place);
      token.classList.toggle("vpw-blocked", patch >= 0 && model.get("reads_blocked"));
      token.style.backgroundColor = shares && !model.get("reads_blocked") ? `rgba(28, 130, 196, ${(0.75 * shares[word]) / top})` : "";
    });
    image.hover(patch);
    page.tell(describe(place));
  };
  const imageWidth = () => Math.min(340, 0.5 * model.get("width"));
  const free = () => model.get("pinned") < 0;
  function hoverPatch(patch, event) {
    const place = patch < 0 ? -1 : patch + words().length;
    hover(place, patch, (pinned) => (pinned < words().length ? between(pinned, null, patch) : null), event);
  }
  function hoverWord(word, event) {
    hover(word, -1, (pinned) => (pinned < words().length ? null : between(pinned, word, null)), event);
  }
  /** While something is pinned the picture stays, and the pointer reads single numbers from it. */
  const hover = (place, patch, number, event) => {
    if (free()) return place !== shown && show(place);
    const pinned = model.get("pinned");
    image.hover(patch >= 0 ? patch : pinned - words().length);
    page.tell((place >= 0 && number(pinned)) || describe(pinned), place >= 0 && number(pinned) ? event : null);
  };
  const pin = (index, offset) => {
    const place = index < 0 || index + offset === model.get("pinned") ? -1 : index + offset;
    model.set("pinned", place);
    model.save_changes();
  };

  page.exports(() => {
    const texts = words();
    const rows = [["from", "to", "attention"]];
    texts.forEach((text, word) => {
      row(looks, word, geometry.count).forEach((share, patch) => rows.push([`${word} ${text}`, `token ${patch}`, share]));
    });
    for (let patch = 0; patch < geometry.count; patch++) {
      row(reads, patch, texts.length).forEach((share, word) => rows.push([`token ${patch}`, `${word} ${texts[word]}`, share]));
    }
    return rows;
  });

  return async () => {
    bitmap = await picture();
    geometry = regions(model.get("boxes"), model.get("on_grid"));
    [looks, reads] = [floats(model.get("looks")), floats(model.get("reads"))];
    if (words().length !== tokens.length || words().some((text, word) => text !== tokens[word].textContent)) tokens = sentence.fill(words());
    const pinned = model.get("pinned");
    image.pick(pinned - words().length);
    image.element.setAttribute("aria-label", `Image. ${model.get("alt")} Arrow keys move, Enter pins.`);
    image.element.style.width = `${imageWidth()}px`;
    sentence.element.setAttribute("aria-label", "Sentence. Arrow keys move, Enter pins.");
    tokens.forEach((token, word) => {
      token.classList.toggle("vpw-picked", word === pinned);
      token.setAttribute("aria-selected", word === pinned);
    });
    show(free() ? Math.min(shown, words().length + geometry.count - 1) : pinned);
  };
});
