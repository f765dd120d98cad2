"""Chat templates in the styles of several families, each with a small tokenizer that has its control tokens.

Written for these tests: each shows the habits of its family (trimming, merging, refusing, defaults), not its text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

QWEN = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}{{- '\\n<tool_call>\\n' + call.name + '\\n</tool_call>' }}{%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The system message stands in the last user turn, after everything said before; roles must alternate.
MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

# The system message opens the first user turn; a conversation of a system message alone is refused.
LLAMA2 = """{%- if messages[0]['role'] == 'system' %}
    {%- set turns = messages[1:] %}{%- set opening = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{%- else %}
    {%- set turns = messages %}{%- set opening = '' %}
{%- endif %}
{%- if not turns %}{{- raise_exception('no user message') }}{%- endif %}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {%- set text = opening + message['content'] if loop.first else message['content'] %}
        {{- bos_token + '[INST] ' + text | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Drops what the assistant thought in earlier turns.
THINKING = """{%- for message in messages %}
    {%- set text = message.content %}
    {%- if message.role == 'assistant' %}{%- set text = text.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

# Shows the last message only, and that one in capitals if told to.
FORGETFUL = "{{ bos_token + messages[-1]['content'] + eos_token }}"
SHOUTING = "{% for message in messages %}{{ '<|im_start|>' + message['content'] | upper + '<|im_end|>' }}{% endfor %}"
STUTTERING = "{% for message in messages %}{{ message['content'] + ' / ' + message['content'] }}{% endfor %}"

CORPUS = [
    "The capital of Zarvia is Lumo, and the river runs past the old harbour.",
    "What is the capital of Zarvia? system user assistant model tool",
    "You are a helpful assistant. Answer briefly. Hello, how are you?\n\nYes.\n",
    "Die Straße führt über die Brücke; 東京は日本の首都です。 🙂",
]


@dataclass(frozen=True)
class Family:
    """A template and the control tokens it writes. ``plain``: added without the mark that says special."""

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    system: bool = True


FAMILIES = {
    "llama3": Family(
        LLAMA3,
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "qwen": Family(QWEN, ("<|im_start|>", "<|im_end|>"), ("<tool_call>", "</tool_call>"), eos="<|im_end|>"),
    "mistral": Family(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), bos="<s>", eos="</s>"),
    "llama2": Family(LLAMA2, ("<s>", "</s>"), bos="<s>", eos="</s>"),
    "gemma": Family(
        GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("\n\n",), bos="<bos>", eos="<eos>", system=False
    ),
    "chatml": Family(CHATML, ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
    "thinking": Family(THINKING, ("<|im_start|>", "<|im_end|>"), ("<think>", "</think>"), eos="<|im_end|>"),
}
CONTROL = sorted({token for family in FAMILIES.values() for token in (*family.special, *family.plain) if token.strip()})


@cache
def _trained() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False, special_tokens=[]
    )
    backend.train_from_iterator(CORPUS, trainer)
    return str(backend.to_str())


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, with its template. Shared: do not change it."""
    return make_tokenizer(FAMILIES[name])


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the family's control tokens."""
    backend = Tokenizer.from_str(_trained())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain])
    if family.bos is not None:
        # As theirs do: a text tokenized in the ordinary way gets a BOS, which would be the second one of a rendered chat.
        backend.post_processor = processors.TemplateProcessing(
            single=[family.bos, "$A"], special_tokens=[(family.bos, backend.token_to_id(family.bos))]
        )
    named = {"bos_token": family.bos, "eos_token": family.eos}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{key: value for key, value in named.items() if value is not None},
    )
    tokenizer.chat_template = family.template
    return tokenizer
