// Light, dark, or what the system says.

const NAME = "vmalloc-theme";

function stored() {
  try {
    return localStorage.getItem(NAME) ?? "auto";
  } catch {
    return "auto"; // storage may be switched off
  }
}

function apply(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

/** Wire the toggle; `onChange` runs whenever colours change. */
export function startTheme(onChange) {
  const current = stored();
  apply(current);
  for (const input of document.querySelectorAll("input[name=theme]")) {
    input.checked = input.value === current;
    input.addEventListener("change", () => {
      apply(input.value);
      try {
        localStorage.setItem(NAME, input.value);
      } catch {
        // It holds for this visit then.
      }
      onChange();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
}
