// Sorts the tables marked data-sortable, and hides categories where <div data-filter> is.
"use strict";

for (const table of document.querySelectorAll("table[data-sortable]")) makeSortable(table);
for (const place of document.querySelectorAll("[data-filter]")) makeFilter(place);

function makeSortable(table) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headings = headingsOfColumns(table.tHead);
  const heads = headings.map((levels) => levels.at(-1));  // right above each column
  const names = headings.map((levels) => [...new Set(levels)].map((cell) => cell.textContent.trim()).join(", "));
  heads.forEach((head, column) => {
    if (heads.indexOf(head) !== column) return;  // of a wider heading the first column counts
    const texts = original.some((row) => typeof value(row.cells[column]) === "string");
    const orders = [null, ...(texts ? ["ascending", "descending"] : ["descending", "ascending"])];
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Sort by ${names[column]}`);
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = orders[(orders.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (order) head.setAttribute("aria-sort", order);
      body.append(...sorted(original, column, order));
      original.forEach((row) => { if (isSection(row)) row.classList.toggle("off", Boolean(order)); });
    });
  });
}

// The cells above each column, from the top; a cell may span rows and columns.
function headingsOfColumns(head) {
  const grid = [...head.rows].map(() => []);
  [...head.rows].forEach((row, y) => {
    for (const cell of row.cells) {
      let x = 0;
      while (grid[y][x]) x++;
      for (let dy = 0; dy < cell.rowSpan; dy++)
        for (let dx = 0; dx < cell.colSpan; dx++) grid[y + dy][x + dx] = cell;
    }
  });
  return grid[0].map((_, x) => grid.map((row) => row[x]));
}

function sorted(rows, column, order) {
  if (!order) return rows;
  const last = (row) => isSection(row) || row.classList.contains("mean");
  const values = new Map(rows.map((row) => [row, value(row.cells[column])]));
  const sign = order === "ascending" ? 1 : -1;
  const free = rows.filter((row) => !last(row)).sort((a, b) => {
    const [x, y] = [values.get(a), values.get(b)];
    if (x === null || y === null) return (x === null) - (y === null);  // no value: always behind
    const numbers = typeof x === "number" && typeof y === "number";
    return sign * (numbers ? x - y : String(x).localeCompare(String(y)));
  });
  return [...free, ...rows.filter(last)];
}

// The number that a cell begins with, else its text, or null if it is empty or a dash.
function value(cell) {
  const text = cell ? cell.textContent.trim() : "";
  if (text === "" || text === "–") return null;
  const number = parseFloat(text.replace("−", "-"));
  return cell.tagName === "TH" || Number.isNaN(number) ? text : number;
}

function isSection(row) {
  return row.classList.contains("section");
}

function makeFilter(place) {
  const marked = [...document.querySelectorAll("[data-category]")];
  const titles = new Map();
  for (const element of marked) {
    if (!titles.has(element.dataset.category))
      titles.set(element.dataset.category, element.dataset.title || element.dataset.category);
  }
  if (titles.size < 2) return;
  const details = document.createElement("details");
  const fields = document.createElement("fieldset");
  const legend = document.createElement("legend");
  const summary = document.createElement("summary");
  const both = document.createElement("div");
  const status = document.createElement("p");
  summary.textContent = "Filter categories";
  legend.textContent = "Categories that are shown";
  status.setAttribute("role", "status");
  fields.append(legend, both);
  const boxes = [...titles].map(([name, title]) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = true;
    box.value = name;
    box.addEventListener("change", update);
    label.append(box, " ", title);
    fields.append(label);
    return box;
  });
  for (const [text, checked] of [["All", true], ["None", false]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => {
      boxes.forEach((box) => { box.checked = checked; });
      update();
    });
    both.append(button, " ");
  }
  details.append(summary, fields);
  place.append(details, status);

  function update() {
    const shown = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    for (const element of marked) element.hidden = !shown.has(element.dataset.category);
    status.textContent = shown.size === boxes.length ? "" :
      `${shown.size || "None"} of the ${boxes.length} categories ${shown.size === 1 ? "is" : "are"} shown. Means are over all ${boxes.length}.`;
  }
}
