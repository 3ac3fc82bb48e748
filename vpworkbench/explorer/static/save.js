// A button that asks the kernel for a file, and the browser to keep it.

export default widget("save", (model, page) => {
  const button = make("button", { type: "button" }, "save as one page");
  page.tools.append(button);
  button.addEventListener("click", () => {
    button.disabled = true;
    page.tell("The page is built …");
    model.send({ ask: "file" });
  });
  model.on("msg:custom", ({ name, type, failed }, buffers) => {
    if (!button.disabled) return; // another view of this widget has asked
    button.disabled = false;
    if (failed) return page.tell(`Not saved: ${failed}`);
    download(buffers[0], type, name);
    page.tell(`${name} is saved.`);
  });
  return () => {
    button.title = model.get("alt");
  };
});
