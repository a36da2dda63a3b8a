/** The few things every part of the page needs of the document. */

/** The element of that id. */
export const byId = id => document.getElementById(id);

/** A new element with properties and children. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Set a text only where it differs, so that the page is laid out no more than needed. */
export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Fill a select with [value, name] pairs, keeping the choice where it still exists. */
export function fill(select, pairs, chosen = select.value) {
  select.replaceChildren(...pairs.map(([value, name]) => element("option", {value, textContent: name})));
  if (pairs.some(([value]) => String(value) === String(chosen))) select.value = chosen;
}

/** A line at the top of the page: what went wrong, or (plain) what is happening; nothing hides it. */
export function notice(text = "", plain = false) {
  const line = byId("notice");
  say(line, text);
  line.hidden = !text;
  line.classList.toggle("plain", plain);
}

/** Whether a key press belongs to a form field and not to the match; a slider wants only the keys that move it. */
export function isTyping(event) {
  if (event.target.matches?.("input[type=range]")) return /^(Arrow|Page|Home|End)/.test(event.code ?? "");
  return Boolean(event.target.matches?.("select, input, textarea"));
}

/** Hand a file to the person. */
export function save(blob, name) {
  const link = element("a", {href: URL.createObjectURL(blob), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
