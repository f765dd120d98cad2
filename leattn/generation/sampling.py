"""How the next token of a branch is chosen: transformers' own configuration and logits processors, one set per branch.

A branch's draws come from a generator of its own, seeded by the run's seed and the branch's name, so that what its neighbours
do never changes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from leattn.errors import LeattnError
from leattn.generation.branch import Branch, Decode

ONE_SEQUENCE = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "prompt_lookup_num_tokens": 0,
    "assistant_early_exit": 0,
    "guidance_scale": 1,
    "use_cache": True,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict_in_generate": False,
    "max_time": 0,
}
"""What generation configs hold that is about one sequence alone, with the value that asks for nothing."""


class Sampling:
    """The caller's options for a whole run, and what each branch makes of them. ``stop`` are its ``stop_strings``.

    Raises
    ------
    LeattnError
        An option that nobody knows, or one that is about a single sequence: beams, return sequences, assistants.
    """

    def __init__(self, model: Any, options: Mapping[str, Any], device: torch.device) -> None:
        given = dict(options)
        self.model, self.device = model, device
        self.processors = list(given.pop("logits_processor", None) or [])
        self.criteria = list(given.pop("stopping_criteria", None) or [])
        self.base = given.pop("generation_config", None)
        self.given = given
        stop = self._asked({}, "stop_strings")
        given.pop("stop_strings", None)
        self.stop: tuple[str, ...] = (stop,) if isinstance(stop, str) else tuple(stop or ())
        self._configs: dict[str, GenerationConfig] = {}

    def config(self, own: Mapping[str, Any]) -> GenerationConfig:
        """The configuration of a branch: the model's, then the caller's, then its own."""
        key = json.dumps(dict(own), sort_keys=True, default=repr)
        if key not in self._configs:
            options = {**self.given, **own}
            _check_one_sequence(options)
            config, unknown = self.model._prepare_generation_config(self.base, **options)
            if unknown:
                raise LeattnError(
                    f"{', '.join(map(repr, unknown))}: no such option where several branches are generated; there are those of "
                    "transformers' GenerationConfig, logits_processor, stopping_criteria, streamer, on_finished, progress, "
                    "token_budget and on_interrupt"
                )
            _check_one_sequence({name: getattr(config, name, None) for name in ONE_SEQUENCE})
            self.model._prepare_special_tokens(config, True, device=self.device)
            self._configs[key] = config
        return self._configs[key]

    def branch(
        self, name: str, own: Mapping[str, Any], seen: list[int], *, limit: int, stop: Sequence[str], decode: Decode, seed: int
    ) -> Branch:
        """A branch that starts now; ``own`` are its own options, ``seen`` the ids that processors see in front of it."""
        config, ids = self.config(own), torch.tensor([seen], dtype=torch.long, device=self.device)
        processors = self.model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=ids.shape[1],
            encoder_input_ids=ids,
            prefix_allowed_tokens_fn=None,
            logits_processor=list(self.processors),
            device=ids.device,
            model_kwargs={},
        )
        return Branch(
            name,
            limit=limit,
            ends=self.ends(own),
            stop=stop,
            decode=decode,
            seen=ids,
            processors=processors,
            criteria=self.criteria,
            do_sample=bool(config.do_sample),
            seed=branch_seed(seed, name),
        )

    def ends(self, own: Mapping[str, Any]) -> frozenset[int]:
        """The ids that end a branch."""
        tokens = self.config(own)._eos_token_tensor
        return frozenset() if tokens is None else frozenset(tokens.flatten().tolist())

    def limit(self, own: Mapping[str, Any], prompt_length: int) -> int:
        """How many tokens a branch may get at most, as transformers counts: 20 if nothing says otherwise."""
        new, total = (self._asked(own, name) for name in ("max_new_tokens", "max_length"))
        if new is not None:
            return int(new)
        return 20 if total is None else max(0, int(total) - prompt_length)

    def _asked(self, own: Mapping[str, Any], name: str) -> Any:
        """An option as somebody gave it: a prepared configuration holds a default, which no longer says that nobody did."""
        for options in (own, self.given):
            if options.get(name) is not None:
                return options[name]
        values = (getattr(config, name, None) for config in (self.base, self.model.generation_config))
        return next((value for value in values if value is not None), None)


def _check_one_sequence(options: Mapping[str, Any]) -> None:
    for name, nothing in ONE_SEQUENCE.items():
        value = options.get(name)
        if value is not None and value != nothing:
            raise LeattnError(
                f"{name}={value!r} is for one branch; here several are generated together, or nodes that others wait for. "
                "Leave it out, or generate from a graph with one sink and no GenNode"
            )


def branch_seed(seed: int, name: str) -> int:
    """A seed of 63 bits for the branch ``name`` of a run with ``seed``."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


Streamer = Callable[[str, str], None]
