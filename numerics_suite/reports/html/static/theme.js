// Light or dark: the system's choice until the button is used; kept for the next report where the browser allows it.
function startTheme() {
  const root = document.documentElement, button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Switch to the light theme" : "Switch to the dark theme");
  };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("numerics-suite-theme", root.dataset.theme); } catch { /* not allowed here */ }
    show();
  });
  system.addEventListener("change", show);
  show();
}
