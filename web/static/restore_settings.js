() => {
  // The settings are kept in the browser: for another visit, the other language, and another start of the server. They
  // are also put back there: an answer of the server could come after the visitor has typed, and replace that.
  // INITIAL: what the fields hold at first; CHOICES: what some are limited to.
  const initial = INITIAL, choices = CHOICES, kept = JSON.parse(localStorage.getItem("onecard-settings") ?? "{}");
  const two = (number) => String(number).padStart(2, "0"), now = new Date();
  const day = `${now.getFullYear()}${two(now.getMonth() + 1)}${two(now.getDate())}`;
  const fresh = `run-${day}-${two(now.getHours())}${two(now.getMinutes())}${two(now.getSeconds())}`;
  const fits = (n) => typeof (kept[n] ?? undefined) === typeof initial[n] && (choices[n]?.includes(kept[n]) ?? true);
  const values = Object.keys(initial).map((n) => (fits(n) ? kept[n] : initial[n]));
  window.onecardRestored = true;
  // a name that the page had made is made anew
  return [/^run-\d{8}-\d{6}$/.test(kept.run ?? "") ? fresh : kept.run || fresh, ...values];
}
