(text, name) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = `${name || "chats"}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}
