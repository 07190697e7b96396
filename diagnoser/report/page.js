"use strict";

// Heat maps: read single cells with the pointer or the arrow keys.
for (const figure of document.querySelectorAll("figure.heat")) {
  const codes = Uint8Array.from(atob(figure.dataset.codes), (c) => c.charCodeAt(0));
  const labels = JSON.parse(figure.dataset.labels);
  const columnNames = JSON.parse(figure.dataset.columnNames);
  const names = [...figure.querySelectorAll(".names li span")].map((span) => span.textContent);
  const columns = Number(figure.dataset.columns);
  const cells = figure.querySelector(".cells");
  const cursor = figure.querySelector(".cursor");
  const reading = figure.querySelector(".reading");
  const where = (name) => (typeof name === "number" ? `step ${name}` : name);
  let row = 0, column = -1;

  const show = (r, c) => {
    row = Math.min(Math.max(r, 0), names.length - 1);
    column = Math.min(Math.max(c, 0), columns - 1);
    Object.assign(cursor.style, {
      left: `${100 * column / columns}%`, width: `${100 / columns}%`,
      top: `${100 * row / names.length}%`, height: `${100 / names.length}%`,
    });
    cursor.hidden = false;
    reading.textContent = `${names[row]}, ${where(columnNames[column])}: ${labels[codes[row * columns + column]]}`;
  };
  cells.addEventListener("pointermove", (event) => {
    const box = cells.getBoundingClientRect();
    show(Math.floor(names.length * (event.clientY - box.top) / box.height),
         Math.floor(columns * (event.clientX - box.left) / box.width));
  });
  cells.addEventListener("pointerleave", () => { cursor.hidden = true; reading.textContent = ""; });
  const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  figure.addEventListener("keydown", (event) => {
    if (event.target !== figure || !(event.key in moves)) return;
    event.preventDefault();
    show(row + moves[event.key][0], column + moves[event.key][1]);
  });
}

// The table of components: filter by name, sort by any column.
const table = document.getElementById("components-table");
if (table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const filter = document.getElementById("filter");
  const onlyFound = document.getElementById("only-found");
  const shown = document.getElementById("shown");
  const refresh = () => {
    const wanted = filter.value.toLowerCase();
    for (const row of rows) {
      const named = row.cells[0].textContent.toLowerCase().includes(wanted);
      row.hidden = !named || (onlyFound.checked && row.cells[1].dataset.rank === "-1");
    }
    shown.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  filter.addEventListener("input", refresh);
  onlyFound.addEventListener("change", refresh);
  filter.closest(".controls").hidden = false;
  refresh();

  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[index];
        if (index === 0) return cell.textContent;
        const number = Number.parseFloat(cell.dataset.rank ?? cell.textContent.replace("Inf", "Infinity"));
        return Number.isNaN(number) ? -Infinity : number; // not measured: below everything
      };
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (index === 0) return x.localeCompare(y);
        return x === y ? 0 : x < y ? -1 : 1;
      };
      body.append(...[...rows].sort((a, b) => (down ? -1 : 1) * compare(a, b)));
    });
  });
}

// A link to a finding opens it; printing opens them all.
const open = () => {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
};
addEventListener("hashchange", open);
open();
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
