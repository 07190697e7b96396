"use strict";

// Heat maps: read single cells with the pointer or the keys.
const components = JSON.parse(document.querySelector("main").dataset.components);

// The codes of an indexed PNG of eight bits whose lines are not filtered, as they are made here.
const codesOf = async (uri) => {
  const bytes = Uint8Array.from(atob(uri.slice(uri.indexOf(",") + 1)), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  for (let at = 8; at < bytes.length; at += 12 + view.getUint32(at)) {
    if (view.getUint32(at + 4) !== 0x49444154) continue; // IDAT
    const packed = new Blob([bytes.subarray(at + 8, at + 8 + view.getUint32(at))]).stream();
    const unpacked = packed.pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(unpacked).arrayBuffer());
  }
};

for (const figure of document.querySelectorAll("figure.heat")) {
  const cells = figure.querySelector(".cells");
  const cursor = figure.querySelector(".cursor");
  const reading = figure.querySelector(".reading");
  const columns = Number(figure.dataset.columns);
  let made; // names and codes, once they are asked for
  const make = async () => {
    const {rows: some, columnNames: steps} = figure.dataset;
    const names = some ? JSON.parse(some).map((k) => components[k]) : components;
    return {
      names,
      columnNames: steps ? JSON.parse(steps).map((step) => `step ${step}`) : names,
      labels: figure.dataset.labels.split("|"),
      codes: await codesOf(cells.querySelector("img").src),
    };
  };
  const rows = Number(cells.querySelector("img").getAttribute("height"));
  let row = 0, column = -1;

  const show = async (r, c) => {
    row = Math.min(Math.max(r, 0), rows - 1);
    column = Math.min(Math.max(c, 0), columns - 1);
    Object.assign(cursor.style, {
      left: `${100 * column / columns}%`, width: `${100 / columns}%`,
      top: `${100 * row / rows}%`, height: `${100 / rows}%`,
    });
    cursor.hidden = false;
    const {names, columnNames, labels, codes} = await (made ??= make());
    if (cursor.hidden) return; // left meanwhile
    const label = labels[codes[row * (columns + 1) + 1 + column]];
    reading.textContent = `${names[row]}, ${columnNames[column]}: ${label}`;
  };
  const hide = () => { cursor.hidden = true; reading.textContent = ""; };
  cells.addEventListener("pointermove", (event) => {
    const box = cells.getBoundingClientRect();
    show(Math.floor(rows * (event.clientY - box.top) / box.height),
         Math.floor(columns * (event.clientX - box.left) / box.width));
  });
  cells.addEventListener("pointerleave", hide);
  cells.addEventListener("blur", hide);
  const moves = {
    ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    Home: [0, -columns], End: [0, columns],
  };
  cells.addEventListener("keydown", (event) => {
    if (event.target !== cells || !(event.key in moves)) return;
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
  let order = "";
  const refresh = () => {
    const wanted = filter.value.toLowerCase();
    for (const row of rows) {
      const text = `${row.cells[0].textContent} ${row.cells[1].textContent}`.toLowerCase();
      row.hidden = !text.includes(wanted) || (onlyFound.checked && row.cells[2].dataset.rank === "-1");
    }
    const left = rows.filter((row) => !row.hidden).length;
    shown.textContent = `${left} of ${rows.length} components${order}`;
  };
  filter.addEventListener("input", refresh);
  onlyFound.addEventListener("change", refresh);
  filter.closest(".controls").hidden = false;
  refresh();

  const heads = [...table.tHead.rows[0].cells];
  const valueOf = (cell) => {
    const text = cell.dataset.rank ?? cell.textContent.replace("Inf", "Infinity");
    return Number.parseFloat(text);
  };
  heads.forEach((head, index) => {
    const named = index < 2; // by name, or in the model's order: from the start; numbers: the largest first
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.firstElementChild.textContent;
    head.firstElementChild.replaceWith(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const up = before ? before === "descending" : named;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.classList.toggle("by-layer", index === 1); // else no row begins a layer
      const sign = up ? 1 : -1;
      const byName = (a, b) => sign * a.cells[0].textContent.localeCompare(
        b.cells[0].textContent, undefined, {numeric: true});
      const byNumber = (a, b) => {
        const [x, y] = [valueOf(a.cells[index]), valueOf(b.cells[index])];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // last
        return x === y ? 0 : sign * (x < y ? -1 : 1);
      };
      body.append(...[...rows].sort(index === 0 ? byName : byNumber));
      const first = named ? (up ? "from the start" : "from the end") : (up ? "smallest first" : "largest first");
      order = `, by ${button.textContent}, ${first}`;
      refresh();
    });
  });
}

// A link to a finding opens it; what is printed is open as long as it prints.
const open = () => {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
};
addEventListener("hashchange", open);
open();
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open])")];
  for (const details of unfolded) details.open = true;
});
addEventListener("afterprint", () => {
  for (const details of unfolded) details.open = false;
});
