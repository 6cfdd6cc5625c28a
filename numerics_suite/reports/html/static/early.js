// Before anything is painted: say that programs run, and take the theme that was chosen for an earlier report.
document.documentElement.classList.add("js");
try {
  const kept = localStorage.getItem("numerics-suite-theme");
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
} catch { /* not allowed here */ }
