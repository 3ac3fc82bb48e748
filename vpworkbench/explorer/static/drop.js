// Choose an image or drop one; what is too large for one message is refused here, without sending.

export default widget("drop", (model, page) => {
  const input = make("input", { type: "file", accept: "image/*", class: "vpw-file" });
  const text = make("span", {}, "Choose an image, or drop one here");
  const zone = make("label", { class: "vpw-zone" }, input, text);
  page.body.append(zone);
  const mib = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;

  const send = async (file) => {
    if (!file) return;
    const limit = model.get("limit_mib");
    if (file.size > limit * 2 ** 20) {
      page.tell(`${file.name} has ${mib(file.size)}; at most ${limit} MiB can be sent. Choose a smaller one.`);
      return;
    }
    page.tell(`${file.name} (${mib(file.size)}) is sent …`);
    const bytes = await file.arrayBuffer().catch(() => null); // a folder is dropped as a file that cannot be read
    if (!bytes) return page.tell(`${file.name} cannot be read.`);
    model.set("file", new DataView(bytes));
    model.set("file_name", file.name);
    model.set("count", model.get("count") + 1);
    model.save_changes();
  };
  input.addEventListener("change", async () => {
    await send(input.files[0]);
    input.value = ""; // or the same file could not be chosen twice
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      event.stopPropagation();
      zone.classList.toggle("vpw-over", name === "dragover");
      if (name === "drop") send(event.dataTransfer.files[0]);
    });
  }

  let seen = null;
  return () => {
    zone.title = model.get("alt");
    const now = `${model.get("version")} ${model.get("message")}`;
    if (now !== seen) page.tell(model.get("message"));
    seen = now;
  };
});
