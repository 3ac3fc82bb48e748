// Code to take along.

export default widget("copy", (model, page) => {
  const code = make("pre", { class: "vpw-code", tabindex: 0 });
  const button = make("button", { type: "button", "aria-label": "Copy the code" }, "Copy");
  page.tools.append(button);
  page.body.append(code);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(model.get("text")).then(
      () => page.tell("Copied."),
      () => {
        getSelection().selectAllChildren(code); // the browser keeps the clipboard to itself
        page.tell("Selected: press Ctrl+C.");
      },
    );
  });
  return () => {
    code.textContent = model.get("text");
    code.setAttribute("aria-label", model.get("alt") || "Code");
  };
});
