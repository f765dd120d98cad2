"""What a call of ``generate`` asks for, wherever it was said: in the call, in ``generation_config=``, or on the model.

Everything that asks for an option asks here, so that each has one meaning, whoever set it: the call before
``generation_config=``, and that before the model's own, as transformers has it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, StopStringCriteria

from leattn.errors import BackendError, LeattnError

HARMLESS = (
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "synced_gpus",
    "tokenizer",
)
"""Arguments of transformers' ``generate`` that choose tokens or report them, and never reach the model."""


class Refusal(NamedTuple):
    """Values of an option that ask for nothing, and why any other cannot be had: a sentence about ``{shown}`` or ``{name}``."""

    nothing: tuple[Any, ...]
    why: str
    fix: str = "leave it out"


_LOST = Refusal((False,), "{shown} asks for more than a Generation holds", "call model.generate inside leattn.attend")
_OTHER_TEXT = "{shown} runs the model on another text than the prompt's, which follows no graph"
NOWHERE = {
    "output_scores": _LOST,
    "output_logits": _LOST,
    "output_attentions": _LOST,
    "output_hidden_states": _LOST,
    "guidance_scale": Refusal((1,), _OTHER_TEXT),
    "negative_prompt_ids": Refusal((), _OTHER_TEXT),
    "negative_prompt_attention_mask": Refusal((), _OTHER_TEXT),
    "token_healing": Refusal((False,), "{shown} replaces the last tokens of a prompt, which here stays as it was compiled"),
}
"""What nothing in leattn can serve."""

_CACHE = "cache_implementation"
_TWO_WAYS = ("{name} and kv_store are two ways to hand over keys and values", "give one of them")
_GUESSES = (
    "{name}: transformers' assisted decoding begins with an empty cache, and kv_store fills it before",
    "give one of them",
)
_OWN_LOOP = "{shown} decodes in a loop of its own, which kv_store is not tried with"
WITHOUT_A_STORE = {
    _CACHE: Refusal(("dynamic", "hybrid"), *_TWO_WAYS),
    "past_key_values": Refusal((), *_TWO_WAYS),
    "use_cache": Refusal((True,), "{shown} computes everything again for every token, and kv_store spares just that"),
    "assistant_model": Refusal((), *_GUESSES),
    "prompt_lookup_num_tokens": Refusal((), *_GUESSES),
    "assistant_early_exit": Refusal((), *_GUESSES),
    "use_mtp": Refusal((False,), *_GUESSES),
    "custom_generate": Refusal((), _OWN_LOOP),
    "penalty_alpha": Refusal((0,), _OWN_LOOP),
    "dola_layers": Refusal((), _OWN_LOOP),
    "constraints": Refusal((), _OWN_LOOP),
    "force_words_ids": Refusal((), _OWN_LOOP),
    "num_beam_groups": Refusal((1,), _OWN_LOOP),
}
"""What one sink is continued with, unless there is a store."""

_ONE_BRANCH = "{shown} is for one branch; here several are generated together, or nodes that others wait for"
_ALONE = "leave it out, or generate from a graph with one sink and no GenNode"
ONE_SINK = {
    # How keys are held changes nothing of what is computed, and a program has a cache of its own.
    **{name: Refusal(nothing, _ONE_BRANCH, _ALONE) for name, (nothing, *_) in WITHOUT_A_STORE.items() if name != _CACHE},
    "num_beams": Refusal((1,), _ONE_BRANCH, _ALONE),
    "num_return_sequences": Refusal((1,), _ONE_BRANCH, _ALONE),
    "max_time": Refusal((), _ONE_BRANCH, _ALONE),
    "is_assistant": Refusal((False,), _ONE_BRANCH, _ALONE),
    "speculation_type": Refusal((), _ONE_BRANCH, _ALONE),
    "synced_gpus": Refusal((False,), _ONE_BRANCH, _ALONE),
}
"""What one sink is continued with, and no program."""


Way = Literal["one sink", "one sink and a store", "a program"]


class Options:
    """The options of one call, for what is going to be done with them.

    Attributes
    ----------
    call
        The arguments as they were given.
    config
        What all places come to.

    Raises
    ------
    BackendError
        A model without ``generate``; an option that cannot be served here, with the place where it was set.
    LeattnError
        A ``generation_config`` that is none; arguments that nobody knows here; what transformers itself refuses.
    """

    def __init__(self, model: Any, call: Mapping[str, Any], way: Way) -> None:
        if not hasattr(model, "_prepare_generation_config"):
            raise BackendError(
                f"{type(model).__name__} has no generate; load it with its language-model head (AutoModelForCausalLM)"
            )
        self.model, self.call = model, dict(call)
        base = call.get("generation_config")
        if base is not None and not isinstance(base, GenerationConfig):
            raise LeattnError(f"generation_config is a transformers.GenerationConfig, not {type(base).__name__}")
        self._places = {"the model's generation_config": model.generation_config}
        if base is not None:
            self._places = {"the generation_config": base, **self._places}
        self._refuse(NOWHERE)
        if way == "a program":
            self._refuse_in_a_program()
        elif way == "one sink and a store":
            self._refuse_with_a_store()
        self.config = self._prepared()

    def _prepared(self) -> GenerationConfig:
        options = {name: value for name, value in self.call.items() if name not in HARMLESS}
        try:
            config, _ = self.model._prepare_generation_config(self.call.get("generation_config"), **options)
        except ValueError as error:
            raise LeattnError(f"transformers refuses these options: {error}") from error
        return cast(GenerationConfig, config)

    @property
    def _for_the_model(self) -> list[str]:
        """Arguments that are no options of ``generate``, and would go on to the model's ``forward``."""
        known = {*HARMLESS, *NOWHERE, *ONE_SINK, *vars(GenerationConfig())}  # type: ignore[no-untyped-call]
        return sorted(name for name in self.call if name not in known)

    def _refuse(self, refusals: Mapping[str, Refusal]) -> None:
        """Raise if one of these options is asked for, and say where, and what to do."""
        for name, (nothing, why, fix) in refusals.items():
            value, where = self._asked(name)
            if value is None or value in nothing:
                continue
            shown = f"{name}={value!r}" if isinstance(value, bool | int | float | str) else name
            if where:
                fix = f"give {name}={(*nothing, None)[0]!r} in the call (it is set in {where})"
            raise BackendError(f"{why.format(name=name, shown=shown)}; {fix}")

    def _refuse_in_a_program(self) -> None:
        """Refuse what is about one sequence alone, and what nobody knows."""
        self._refuse(ONE_SINK)
        if self._for_the_model:
            raise LeattnError(
                f"{', '.join(map(repr, self._for_the_model))}: no such option where several branches are generated; there are "
                "those of transformers' GenerationConfig, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, "
                "streamer, on_finished, progress, token_budget and on_interrupt"
            )

    def _refuse_with_a_store(self) -> None:
        """Refuse what cannot go on from stored keys and values, and every argument that would reach the model."""
        self._refuse(WITHOUT_A_STORE)
        if self._for_the_model:
            raise LeattnError(
                f"{', '.join(map(repr, self._for_the_model))}: what a store holds was computed from the prompt alone, so with "
                "kv_store there are the options of transformers' GenerationConfig, logits_processor, stopping_criteria, "
                "prefix_allowed_tokens_fn, streamer and synced_gpus; leave it out, or leave kv_store out"
            )

    def for_transformers(self, tokenizer: Any) -> dict[str, Any]:
        """The arguments for ``model.generate``.

        Stop strings go as the criterion that transformers makes of them: a tokenizer would go on to the model, and from there
        to the attention of its layers. A model without a padding id gets one: transformers would warn, and do the same.

        Raises
        ------
        LeattnError
            Stop strings without a tokenizer.
        """
        arguments = dict(self.call)
        if self.stop:
            if tokenizer is None:
                raise LeattnError(
                    "stop strings are text, and there is no tokenizer to decode with; give one, or use eos_token_id"
                )
            criterion = StopStringCriteria(tokenizer, list(self.stop))
            arguments |= {"stop_strings": None, "stopping_criteria": [*(self.call.get("stopping_criteria") or ()), criterion]}
        if "assistant_tokenizer" in self.call:  # which translates between two
            arguments["tokenizer"] = tokenizer
        if self.config.pad_token_id is None:
            arguments["pad_token_id"] = next(iter(self.ends), 0)
        return arguments

    def processors(self, seen: Tensor, limit: int) -> Any:
        """What changes the scores of a branch that goes on from ids ``[1, n]`` for ``limit`` tokens at most."""
        config = copy.copy(self.config)
        config.max_length = seen.shape[1] + limit  # what some of them count to
        self.model._prepare_special_tokens(config, True, device=seen.device)
        return self.model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=seen.shape[1],
            encoder_input_ids=seen,
            prefix_allowed_tokens_fn=self.call.get("prefix_allowed_tokens_fn"),
            logits_processor=list(self.call.get("logits_processor") or []),
            device=seen.device,
            model_kwargs={},
        )

    @property
    def ends(self) -> list[int]:
        """The ids that end a text."""
        end = self.config.eos_token_id
        return [] if end is None else [int(token) for token in torch.as_tensor(end).flatten().tolist()]

    @property
    def stop(self) -> tuple[str, ...]:
        """The strings that end a text."""
        stop = self.config.stop_strings or ()
        return (stop,) if isinstance(stop, str) else tuple(stop)

    @property
    def rows(self) -> int:
        """Rows that each prompt takes: beams, or return sequences."""
        return max(int(self.config.num_beams or 1), int(self.config.num_return_sequences or 1))

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens may be written at most, as transformers counts: 20 if nobody says otherwise."""
        if self.config.max_new_tokens is not None:
            return int(self.config.max_new_tokens)
        # The config holds a default, which no longer says that nobody asked; None in the call leaves it to the others.
        places = (self.call.get("max_length"), *(config.max_length for config in self._places.values()))
        total = next((place for place in places if place is not None), None)
        return 20 if total is None else max(0, int(total) - prompt_length)

    def _asked(self, name: str) -> tuple[Any, str]:
        """An option as the first place has it that says something, and that place: nothing for the call itself."""
        if name in self.call:
            return self.call[name], ""
        for place, config in self._places.items():
            value = getattr(config, name, None)
            if value is not None:
                return value, place
        return None, ""
