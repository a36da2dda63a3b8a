"use strict"
// Light or dark, the contents on a phone, where one is on the page, and the search. Works from a folder of files: the index is a script (search.js), loaded at the first search.
const up = document.currentScript.dataset.up
const theme = localStorage.getItem("theme")
if (theme) document.documentElement.style.colorScheme = theme

// The words of a query, each of which a result must hold; a result's points say how well: names first, then headings, then text.
function points(words, query, entry) {
  const name = entry.name.toLowerCase(), text = entry.lower
  if (!words.every(w => name.includes(w) || text.includes(w))) return 0
  const last = name.split(".").pop()
  const title = name === query || last === query ? 100 : name.startsWith(query) || last.startsWith(query) ? 60 : name.includes(query) ? 40 : words.every(w => name.includes(w)) ? 30 : 0
  const told = entry.text.toLowerCase().includes(query) ? 8 : 2
  return title + told + (entry.kind === "name" ? (title ? 10 : 0) : 3) - Math.min(name.length, 60)/30
}

function matches(query, entries) {
  const asked = query.trim().toLowerCase(), words = asked.split(/\s+/).filter(Boolean)
  if (!words.length) return []
  return entries.map(entry => ({ entry, points: points(words, asked, entry) })).filter(r => r.points > 0).sort((a, b) => b.points - a.points).map(r => r.entry)
}

// The page's pieces are made by hand, not as HTML: what the index holds can never become markup.
const element = (tag, parent, text) => { const made = document.createElement(tag); if (text) made.textContent = text; return parent.append(made), made }

function marked(tag, parent, text, words) {
  const made = element(tag, parent), pattern = new RegExp(`(${words.map(w => w.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&")).join("|")})`, "giu")
  text.split(pattern).forEach((piece, i) => piece && (i % 2 ? element("mark", made, piece) : made.append(piece)))
  return made
}

function excerpt(entry, words) {
  const text = entry.text, used = entry.uses.filter(name => words.some(w => name.toLowerCase().includes(w)))
  if (used.length && !words.some(w => text.toLowerCase().includes(w))) return "its code uses " + used.slice(0, 8).join(", ")
  const lower = text.toLowerCase(), at = Math.max(0, Math.min(...words.map(w => lower.indexOf(w)).filter(i => i >= 0)) - 50)
  const from = at && Number.isFinite(at) ? text.indexOf(" ", at) + 1 : 0
  return (from ? "… " : "") + text.slice(from, from + 170).trim() + (text.length > from + 170 ? " …" : "")
}

function show(found, words, list) {
  list.replaceChildren()
  for (const entry of found.slice(0, 40)) {
    const link = element("a", element("li", list))
    link.href = up + entry.page + (entry.anchor ? "#" + entry.anchor : "")
    if (entry.kind === "name") marked("code", link, entry.signature, words)
    else marked("b", link, entry.name, words)
    element("small", link, entry.where)
    if (entry.text || entry.uses.length) marked("p", link, excerpt(entry, words), words)
  }
}

// search.js calls this: pages [path, title, part], names [name, signature, doc, page, anchor], sections [page, anchor, heading, text, names its code uses].
let entries
window.melee_wm_index = index => {
  const where = i => [index.pages[i][2], index.pages[i][1]].filter(Boolean).join(" › ")
  entries = [...index.names.map(([name, signature, text, page, anchor]) => ({ kind: "name", name, signature, text, uses: [], lower: text.toLowerCase(), page: index.pages[page][0], anchor, where: where(page) })),
    ...index.sections.map(([page, anchor, name, text, uses]) => ({ kind: "text", name, text, uses: uses ? uses.split(" ") : [], lower: `${text} ${uses}`.toLowerCase(), page: index.pages[page][0], anchor, where: where(page) }))]
}

function search() {
  const dialog = document.querySelector(".search"), input = dialog.querySelector("input"), list = dialog.querySelector("ol"), told = dialog.querySelector(".told")
  let at = -1
  const choose = i => { const items = [...list.children]; items[at]?.classList.remove("at"); at = Math.max(-1, Math.min(items.length - 1, i)); items[at]?.classList.add("at"); items[at]?.scrollIntoView({ block: "nearest" }) }
  const ask = () => {
    if (!entries) return
    const words = input.value.trim().toLowerCase().split(/\s+/).filter(Boolean), found = matches(input.value, entries)
    show(found, words, list); list.scrollTop = 0; at = -1; choose(found.length ? 0 : -1)
    told.textContent = !words.length ? "Functions, classes and constants by name; headings and text by words." : found.length > 40 ? `the best 40 of ${found.length}` : found.length ? `${found.length} found` : "Nothing found. Every word must occur; fewer or shorter words find more."
  }
  const open = () => {
    if (!entries && !document.querySelector("script.index")) { const script = element("script", document.head); script.className = "index"; script.onload = ask; script.src = up + "search.js" }
    if (!dialog.open) dialog.showModal()
    input.select(); ask()
  }
  document.querySelector(".find").onclick = open
  input.oninput = ask
  dialog.onclick = event => { if (event.target === dialog || event.target.closest("a")) dialog.close() }
  dialog.onkeydown = event => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); choose(at + (event.key === "ArrowDown" ? 1 : -1)) }
    else if (event.key === "Enter" && at >= 0) list.children[at].firstChild.click()
  }
  document.addEventListener("keydown", event => {
    const writing = /^(input|textarea|select)$/i.test(event.target.tagName)
    if (event.key === "/" && !writing || event.key === "k" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); open() }
  })
}

addEventListener("DOMContentLoaded", () => {
  search()
  const menu = document.querySelector(".menu"), contents = document.querySelector(".contents")
  menu.onclick = () => menu.setAttribute("aria-expanded", document.body.classList.toggle("reading-contents"))
  const current = contents.querySelector("[aria-current]")
  if (current?.offsetTop > contents.clientHeight - 80) contents.scrollTop = current.offsetTop - contents.clientHeight/2
  document.querySelector(".theme").onclick = () => {
    const root = document.documentElement.style, dark = root.colorScheme ? root.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches
    localStorage.setItem("theme", root.colorScheme = dark ? "light" : "dark")
  }
  const links = new Map([...document.querySelectorAll(".toc a")].map(a => [decodeURIComponent(a.hash.slice(1)), a]))
  const heads = [...links.keys()].map(id => document.getElementById(id))
  const follow = () => { const now = heads.filter(h => h.getBoundingClientRect().top < 140).pop() || heads[0]; for (const [id, a] of links) a.classList.toggle("now", id === now?.id) }
  if (heads.length) { addEventListener("scroll", follow, { passive: true }); follow() }
})
