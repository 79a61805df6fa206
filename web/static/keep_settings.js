(run, ...values) => {
  const set = Object.fromEntries(NAMES.map((name, i) => [name, values[i]]));
  if (window.onecardRestored) localStorage.setItem("onecard-settings", JSON.stringify({run, ...set}));
}
