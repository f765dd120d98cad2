"""Which families are checked, and how their configs differ from the small default; the one place for both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families.loading import LOADED
from families.overrides import AFTER, OPTIONS, PARTS, TAKE_NO_TEXT, WRAPPERS
from families.variants import VARIANTS


@dataclass(frozen=True)
class Family:
    """One line of the table.

    ``options`` go to the config in place of the small sizes, ``after`` is set on it once it is made (past its validation). A
    ``wrapper`` is built as a model of text and pictures or sound. ``part`` is the part of the config that the model is made of,
    where the auto class does not find it. ``takes_no_text`` says why there is nothing to check. ``loaded`` is the way it is
    loaded, where that is not plainly in fp32.
    """

    name: str
    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    wrapper: bool = False
    part: str | None = None
    takes_no_text: str | None = None
    loaded: str | None = None


def families() -> dict[str, Family]:
    """All of them by name: causal language models, variants of their configs, wrappers, and llama loaded in all ways."""
    found: dict[str, Family] = {}
    for kind in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        found[kind] = _family(kind, kind, {}, wrapper=False)
        for name, options in VARIANTS.get(kind, {}).items():
            found[f"{kind} ({name})"] = _family(f"{kind} ({name})", kind, options, wrapper=False)
    for kind in WRAPPERS:
        name = kind if kind not in found else f"{kind} (wrapper)"
        found[name] = _family(name, kind, {}, wrapper=True)
    found |= {f"llama, {way}": replace(found["llama"], name=f"llama, {way}", loaded=way) for way in LOADED}
    return found


def _family(name: str, kind: str, options: Mapping[str, Any], *, wrapper: bool) -> Family:
    return Family(
        name,
        kind,
        options={**OPTIONS.get(kind, {}), **options},
        after=AFTER.get(kind, {}),
        wrapper=wrapper,
        part=PARTS.get(kind),
        takes_no_text=TAKE_NO_TEXT.get(kind),
    )
