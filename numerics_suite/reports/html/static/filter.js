// One filter for findings and map: text and four choices.
const FIELDS = ["text", "status", "group", "subject", "precision"];

// Where sections are laid out as they come into view, what is above the target grows while it is scrolled to.
function settle(target, frames) {
  target.scrollIntoView({ behavior: "instant" });
  if (frames) requestAnimationFrame(() => settle(target, frames - 1));
}

function startFilter(changed) {
  const form = document.getElementById("filter");
  if (!form) return;
  const cards = [...document.querySelectorAll("#findings .card")].map((card) => ({
    card,
    status: card.dataset.status,
    group: card.dataset.group,
    subject: JSON.parse(card.dataset.subject),
    precision: JSON.parse(card.dataset.precision),
    text: null,
  }));
  const nothing = document.querySelector("#findings .none");
  const read = () => Object.fromEntries(FIELDS.map((name) => [name, form.elements[name]?.value.trim() ?? ""]));
  const apply = () => {
    const wanted = read(), words = wanted.text.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of cards) {
      if (words.length && item.text === null) item.text = item.card.textContent.toLowerCase();
      const fits = (!wanted.status || item.status === wanted.status) && (!wanted.group || item.group === wanted.group)
        && (!wanted.subject || item.subject.includes(wanted.subject))
        && (!wanted.precision || item.precision.includes(wanted.precision))
        && words.every((word) => item.text.includes(word));
      item.card.hidden = !fits;
      shown += fits;
    }
    if (nothing) nothing.hidden = shown > 0;
    const rows = changed(wanted, words);
    const told = cards.length ? [`${shown} of ${cards.length} findings`] : [];
    if (rows) told.push(rows);
    document.getElementById("shown").textContent = told.join(", ");
  };
  let waiting = 0;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 120); });
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", (event) => event.preventDefault());
  // A link to a card that the filter hides shows everything again.
  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    if (target.hidden) {
      form.reset();
      apply();
      target.scrollIntoView();
    }
    for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    if (target.classList.contains("card")) target.focus({ preventScroll: true });
    if (document.body.classList.contains("big")) settle(target, 8);
  };
  window.addEventListener("hashchange", reveal);
  apply();
  reveal();
}
