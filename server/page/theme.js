// Applies a stored theme before the first paint, so that the page does not flash. Runs without `defer`.
const theme = localStorage.getItem("hyper.theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
