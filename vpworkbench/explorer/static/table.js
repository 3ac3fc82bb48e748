// A small table: what is told in words, saved as the pictures are.

export default widget("table", (model, page) => {
  const line = (tag, cells, more = {}) => make("tr", {}, ...cells.map((cell) => make(tag, more, cell)));
  page.exports(() => [model.get("names"), ...model.get("rows")]);
  return () => {
    const head = make("thead", {}, line("th", model.get("names"), { scope: "col" }));
    const body = make("tbody", {}, ...model.get("rows").map((cells) => line("td", cells)));
    page.body.replaceChildren(make("table", {}, head, body));
  };
});
