// The page works without this: it only lights up what belongs together, and opens everything for the printer.
(() => {
  const light = (row, on) => {
    const body = row.closest(".body");
    const end = row.id.replace(/^g\d+/, "");
    for (const path of body.querySelectorAll(".ribbon"))
      if (path.dataset.ends.split(" ").includes(end)) path.classList.toggle("lit", on);
    const group = row.id.slice(0, -end.length);
    for (const other of row.dataset.to.split(" ").filter(Boolean))
      document.getElementById(group + other)?.classList.toggle("lit-row", on);
  };
  const rowOf = (event) => (event.target instanceof Element ? event.target.closest(".op") : null);
  for (const [name, on] of [["pointerover", true], ["pointerout", false], ["focusin", true], ["focusout", false]])
    document.addEventListener(name, (event) => {
      const row = rowOf(event);
      if (!row || row.contains(event.relatedTarget)) return;
      document.body.classList.remove("hushed");
      light(row, on);
    });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.body.classList.add("hushed");
  });
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details.block:not([open])")];
    for (const each of closed) each.open = true;
  });
  addEventListener("afterprint", () => {
    for (const each of closed) each.open = false;
  });
})();
