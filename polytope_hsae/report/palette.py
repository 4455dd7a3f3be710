"""Colours: one list for figures and page. A figure is drawn in the light theme's colours; on the page each is replaced
by its CSS variable, so that it follows the theme. The series are told apart with every common colour blindness
(after Okabe and Ito), and by line style where they repeat.
"""

from ..config import Config

# name: (light, dark)
INKS = {
    "ink": ("#1d2125", "#e7e9ec"),
    "muted": ("#5b6670", "#9ea8b3"),
    "line": ("#d9dad5", "#363d45"),
    "band": ("#e4ede8", "#1d2f2b"),
}
SERIES = {
    "s1": ("#0067a8", "#5ab4ee"),
    "s2": ("#737a82", "#aab3bd"),
    "s3": ("#c4520a", "#f0914b"),
    "s4": ("#00876a", "#36c6a0"),
    "s5": ("#a04c8a", "#dd94c8"),
    "s6": ("#8f6b00", "#dcb83c"),
}
PAGE = {
    "bg": ("#fbfbf9", "#14181c"),
    "panel": ("#f2f2ee", "#1c2126"),
    "link": ("#005f9e", "#7cc0f5"),
    "pass": ("#006b54", "#4fd0ad"),
    "fail": ("#a8400a", "#f59a66"),
    "undecided": ("#6d5600", "#dfc159"),
    "mark": ("#fbe3a2", "#6a5310"),
}
LIGHT = {name: light for name, (light, _) in (INKS | SERIES).items()}
LINE_STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
PREFERRED = {"teacher": "s1", "random": "s2", "permuted_teacher": "s3", "random_teacher": "s5"}
FLAT = "s4"


def arm_styles(config: Config) -> dict[str, tuple[str, int]]:
    """(colour name, number of the line style) of every arm: by what the arm is, then whatever no arm prefers."""
    wanted = {arm.name: PREFERRED[arm.init] if arm.kind == "hsae" else FLAT for arm in config.arms}
    spare = [name for name in SERIES if name not in wanted.values()]
    styles: dict[str, tuple[str, int]] = {}
    for arm, own in wanted.items():
        used = [colour for colour, _ in styles.values()]
        colour = next((name for name in (own, *spare) if name not in used), own)
        styles[arm] = (colour, used.count(colour) % len(LINE_STYLES))
    return styles


def css_variables(theme: int) -> str:
    """`--ink: #...;` for every colour of theme 0 (light) or 1 (dark)."""
    return " ".join(f"--{name}: {pair[theme]};" for name, pair in (INKS | SERIES | PAGE).items())


def themed(svg: str) -> str:
    """The drawing with every colour replaced by its CSS variable."""
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
