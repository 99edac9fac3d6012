// Elements are built from text, never from markup: what a spec or an error says cannot become part of the page.

const byId = (id) => document.getElementById(id);

function el(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    // the policy forbids style attributes; properties set one by one are no attribute
    else if (name === "style") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...present(children));
  return element;
}

const present = (children) => children.flat(Infinity).filter((child) => ![undefined, null, false, 0, ""].includes(child));

// Replace what is in `parent`; whoever has the keyboard's focus keeps it if an element with the same key is there again.
function replace(parent, ...children) {
  const key = parent.contains(document.activeElement) ? document.activeElement.dataset.focus : undefined;
  parent.replaceChildren(...present(children));
  if (key !== undefined) [...parent.querySelectorAll("[data-focus]")].find((each) => each.dataset.focus === key)?.focus();
}

// Radio buttons of the form: one choice of a few that are all in sight.
function choice(legend, name, options, chosen, choose) {
  const radios = options.map(([value, label]) =>
    el("label", {},
      el("input", {
        type: "radio", name, value, checked: value === chosen, "data-focus": `${name} ${value}`,
        onchange: () => choose(value),
      }),
      el("span", {}, label),
    ));
  return el("fieldset", {}, el("legend", {}, legend), el("div", { class: "radios" }, radios));
}

// A spec, to be broken after its name and its settings where it is broken at all.
function code(spec) {
  return el("code", {}, spec.split(/(?<=^[^:]*:|,)/).map((part, i) => [i && el("wbr"), part]));
}

function copyButton(spec) {
  const call = `registry.parse(${pythonString(spec)})`;
  const button = el("button", { type: "button", class: "copy", title: call, "aria-label": `Copy ${call}` }, "copy");
  button.addEventListener("click", async (event) => {
    event.stopPropagation();
    button.textContent = (await copied(call)) ? "copied" : "not allowed";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
  return button;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // browsers that keep the clipboard from local files still copy what is selected
    const area = el("textarea", { class: "offstage" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

function pythonString(text) {
  const quote = text.includes('"') && !text.includes("'") ? "'" : '"';
  const escapes = { "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", [quote]: `\\${quote}` };
  return quote + [...text].map((letter) => escapes[letter] ?? letter).join("") + quote;
}
