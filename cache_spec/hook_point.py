"""Hook points: where in the model an activation is read, in every spelling the field uses."""

import re
from dataclasses import dataclass

from cache_spec.errors import UserError

SITES = ("resid_post", "resid_pre", "mlp_out", "attn_out")

_LAYER = "[0-9]{1,6}"

# Spelling -> site; `{layer}` stands for the number. The first match wins.
_SPELLINGS = (
    (rf"({_LAYER})", "resid_post"),
    (rf"layer_({_LAYER})", "resid_post"),
    (rf"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h)\.({_LAYER})", "resid_post"),
)


@dataclass(frozen=True, order=True)
class HookPoint:
    """One place in one layer, e.g. `HookPoint("resid_post", 12)`; layers count from 0."""

    site: str
    layer: int

    @classmethod
    def parse(cls, text: str) -> "HookPoint":
        """Read any spelling: `12`, `layer_12`, `layers.12`, `model.layers.12`, `gpt_neox.layers.12`, `h.12`,
        `blocks.12.hook_mlp_out`, `resid_post.12`, `layer_12_mlp_out`.

        Raises UserError for any other spelling.
        """
        text = str(text).strip()
        sites = "|".join(SITES)
        for pattern, site in _SPELLINGS:
            if match := re.fullmatch(pattern, text):
                return cls(site, int(match[1]))
        if match := re.fullmatch(rf"({sites})\.({_LAYER})", text):
            return cls(match[1], int(match[2]))
        if match := re.fullmatch(rf"(?:blocks\.({_LAYER})\.hook_|layer_({_LAYER})_)({sites})", text):
            return cls(match[3], int(match[1] or match[2]))
        raise UserError(
            f"'{text:.60}' is not a hook point; write a layer (12, layers.12) or a site and a layer, "
            f"such as resid_post.12 (sites: {', '.join(SITES)})"
        )

    @property
    def group(self) -> str:
        """Its group in the cache: `layer_12`, or `layer_12_mlp_out` for a site other than resid_post."""
        return f"layer_{self.layer}" if self.site == "resid_post" else f"layer_{self.layer}_{self.site}"

    @property
    def tl_name(self) -> str:
        """Its TransformerLens name."""
        return f"blocks.{self.layer}.hook_{self.site}"

    def __str__(self) -> str:
        return f"{self.site}.{self.layer}"
