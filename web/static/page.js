// This runs before Gradio's own scripts. LANGUAGE and LOCALE are those of the page.
for (const key of ["language", "languages"])
  Object.defineProperty(navigator, key, {get: () => (key === "language" ? "LOCALE" : ["LOCALE"])});
document.documentElement.lang = "LOCALE";
document.cookie = "language=LANGUAGE; path=/; max-age=31536000; SameSite=Strict";
(() => {
  const url = new URL(location), chosen = localStorage.getItem("onecard-theme");
  if (chosen && !url.searchParams.has("__theme")) {
    url.searchParams.set("__theme", chosen);
    history.replaceState(null, "", url);
  }
})();
// the open tab stays open when the page is loaded again, or in the other language
addEventListener("click", (event) => {
  const tab = event.target.closest("[id^=tab-][id$=-button]"), link = event.target.closest("a.language");
  if (tab) history.replaceState(null, "", `#${tab.id.slice(4, -7)}`);
  if (link) link.hash = location.hash;
}, true);
function onecardTab(name) {
  document.getElementById(`tab-${name}-button`).click();
  scrollTo({top: 0, behavior: "smooth"});
}
function onecardTheme() {
  const dark = document.body.classList.toggle("dark"), url = new URL(location);
  localStorage.setItem("onecard-theme", dark ? "dark" : "light");
  url.searchParams.set("__theme", dark ? "dark" : "light");
  history.replaceState(null, "", url);
}
// the Enter that ends a word of an input method sends no message
for (const kind of ["keydown", "keypress"])
  addEventListener(kind, (event) => (event.isComposing || event.keyCode === 229) && event.stopPropagation(), true);
