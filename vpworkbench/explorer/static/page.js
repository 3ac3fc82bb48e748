// Runs the widgets of a page without a kernel: each gets a model that keeps its values here. Then the plotly figures.

function bytes(text) {
  const letters = atob(text);
  const found = new Uint8Array(letters.length);
  for (let place = 0; place < letters.length; place++) found[place] = letters.charCodeAt(place);
  return found;
}
const unpacked = (name) => {
  const packed = new Blob([bytes(document.getElementById(name).textContent)]);
  return new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
};
const script = (text) => URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
const value = (stored) => (stored?.base64 === undefined ? stored : new DataView(bytes(stored.base64).buffer));
const still = (element) => element.closest(".part").querySelector(".still");
const alive = (element) => (still(element).hidden = true);

/** A model whose values stay in the page. */
function modelOf(traits) {
  const values = Object.fromEntries(Object.entries(traits).map(([name, stored]) => [name, value(stored)]));
  const listeners = new Set();
  return {
    get: (name) => values[name],
    set: (name, changed) => {
      values[name] = changed;
      for (const [event, callback] of listeners) if (["change", `change:${name}`].includes(event)) callback();
    },
    save_changes: () => {}, // nobody listens
    on: (event, callback) => listeners.add([event, callback]),
    off: (event, callback) => {
      for (const pair of listeners) if (pair[0] === event && pair[1] === callback) listeners.delete(pair);
    },
  };
}

const page = JSON.parse(await unpacked("values"));
const modules = {};
for (const [name, text] of Object.entries(page.modules)) modules[name] = (await import(script(text))).default;
const places = document.querySelectorAll("[data-widget]");
page.values.forEach(({ name, traits }, place) => {
  modules[name].render({ model: modelOf(traits), el: places[place] });
  alive(places[place]);
});

if (page.figures.length) {
  await new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn))); // the widgets are seen first
  const plotly = document.createElement("script");
  const loaded = new Promise((done) => plotly.addEventListener("load", done));
  plotly.src = script(await unpacked("plotly"));
  document.head.append(plotly);
  await loaded;
  document.querySelectorAll("[data-figure]").forEach((element, place) => {
    const { data, layout } = page.figures[place];
    alive(element);
    element.setAttribute("role", "img"); // plotly says nothing of what it draws
    element.setAttribute("aria-label", still(element).querySelector("img")?.alt ?? "");
    Plotly.newPlot(element, data, layout, { displaylogo: false, modeBarButtonsToRemove: ["sendChartToCloud"] });
  });
}
