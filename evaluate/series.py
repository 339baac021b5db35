"""Who is drawn how: a colour, a mark and a kind of line for each treatment, the same in every picture."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from evaluate.recipes import CONTROLS, KINDS, PRETRAINED, TRAINED, Recipe

N_COLOURS, N_SHAPES = 8, 8
CONTROL = -1  # colour of what was not trained
LEARNED = (TRAINED, PRETRAINED)


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a treatment (a recipe whatever its architecture and k) is drawn, and what it is called.

    dash: "" for plain and masked training, "dashed" for trained controls, "dotted" for what was not trained.
    """

    label: str
    colour: int
    shape: int
    dash: str = ""


def looks(recipes: Iterable[Recipe]) -> dict[Recipe, Look]:
    """One look per treatment; the first treatment gets the first colour and mark."""
    recipes = list(recipes)
    largest = max((recipe.d_sae for recipe in recipes if recipe.kind == TRAINED), default=0)
    order: dict[tuple[bool, str], int] = {}
    for recipe in recipes:
        key = (recipe.kind in LEARNED, treatment(recipe, largest))
        order.setdefault(key, sum(is_learned is key[0] for is_learned, _ in order))
    found = {}
    for recipe in recipes:
        is_learned, label = recipe.kind in LEARNED, treatment(recipe, largest)
        place = order[is_learned, label]
        found[recipe] = Look(
            label=label,
            colour=place % N_COLOURS if is_learned else CONTROL,
            shape=place % N_SHAPES,
            dash="dotted" if not is_learned else "dashed" if recipe.control in CONTROLS else "",
        )
    return found


def treatment(recipe: Recipe, largest: int) -> str:
    """The name of a recipe without its architecture and k: "masked 0.5", "unmasked, 220 latents"."""
    if recipe.kind not in LEARNED:
        return recipe.kind
    size = f"{recipe.d_sae} latents" if recipe.kind == TRAINED and recipe.d_sae != largest else ""
    return ", ".join(filter(None, [recipe.name, size, recipe.settings]))


def legend(recipes: Mapping[Recipe, Look]) -> list[Look]:
    """Every look of a trained treatment once, then those of the controls."""
    found = list(dict.fromkeys(recipes.values()))
    return sorted(found, key=lambda look: (look.colour == CONTROL, look.dash == "dotted"))


def by_look(recipes: Iterable[Recipe], looks: Mapping[Recipe, Look]) -> dict[Look, list[Recipe]]:
    """The recipes of each treatment."""
    found: dict[Look, list[Recipe]] = {}
    for recipe in recipes:
        found.setdefault(looks[recipe], []).append(recipe)
    return found


def several(recipes: Iterable[Recipe]) -> bool:
    """Whether some trained treatment has more than one k, so that there are lines to draw across L0."""
    found: dict[tuple, set[int]] = {}
    for recipe in recipes:
        if recipe.kind in LEARNED:
            key = (recipe.bench, recipe.arch, recipe.name, recipe.d_sae, recipe.settings)
            found.setdefault(key, set()).add(recipe.k)
    return any(len(ks) > 1 for ks in found.values())


def panels(recipes: Iterable[Recipe], *, by_k: bool = False) -> dict[str, list[Recipe]]:
    """Title -> the recipes of one panel: an architecture (with by_k also a k) of one cache, controls last.

    A control without an architecture is in no panel. A title names only what differs; in a panel the k of one treatment
    follow one another.
    """
    recipes = list(recipes)
    learned = [recipe for recipe in recipes if recipe.kind in LEARNED]
    keys = list(dict.fromkeys((recipe.bench, recipe.arch, recipe.k if by_k else None) for recipe in learned))
    several_k, several_benches = len({recipe.k for recipe in learned}) > 1, len({bench for bench, _, _ in keys}) > 1
    found = {}
    for bench, arch, k in keys:
        words = [arch, f"k {k}" if by_k and several_k else "", f"({bench})" if several_benches else ""]
        here = [r for r in recipes if r.bench == bench and arch in r.arch.split(", ") and k in (None, r.k)]
        found[" ".join(filter(None, words))] = _in_order(here)
    return found


def _in_order(recipes: list[Recipe]) -> list[Recipe]:
    """By kind, then by treatment as they come, then by k."""
    treatments = list(dict.fromkeys((recipe.name, recipe.d_sae, recipe.settings) for recipe in recipes))

    def place(recipe: Recipe) -> tuple[int, int, int]:
        treatment = recipe.name, recipe.d_sae, recipe.settings
        return KINDS.index(recipe.kind), treatments.index(treatment), recipe.k

    return sorted(recipes, key=place)
