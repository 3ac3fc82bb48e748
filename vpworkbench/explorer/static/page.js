// Runs the widgets of a page without a kernel: each gets a model that keeps its values here.

const island = (name) => JSON.parse(document.getElementById(name).textContent);
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
const value = (held) => (held?.base64 === undefined ? held : bytes(held.base64));

function standing(traits) {
  const values = Object.fromEntries(Object.entries(traits).map(([name, held]) => [name, value(held)]));
  const listeners = new Set();
  return {
    get: (name) => values[name],
    set: (name, held) => {
      values[name] = held;
      for (const [event, callback] of listeners) if (["change", `change:${name}`].includes(event)) callback();
    },
    save_changes: () => {}, // nobody listens
    on: (event, callback) => listeners.add([event, callback]),
    off: (event, callback) => {
      for (const pair of listeners) if (pair[0] === event && pair[1] === callback) listeners.delete(pair);
    },
  };
}

const modules = {};
for (const [name, text] of Object.entries(island("modules"))) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
  modules[name] = (await import(address)).default;
}
const places = document.querySelectorAll("[data-widget]");
island("values").forEach(({ name, traits }, place) => {
  const live = places[place];
  modules[name].render({ model: standing(traits), el: live });
  live.closest(".part").querySelector(".still").hidden = true;
});
