"""What DESIGN.md says, written again in the simplest way: loops over tokens, and sets of nodes. Shares no code with leattn."""

from __future__ import annotations


def seen_by(node, visibility="parents"):
    """The set of nodes that ``node`` sees, itself not included."""
    seen = set(node.parents)
    if visibility == "ancestors":
        for parent in node.parents:
            seen |= seen_by(parent, visibility)
    return seen


def relation(nodes, visibility="parents"):
    return {node: seen_by(node, visibility) for node in nodes}


def tokens_of(nodes):
    """``(node, index in the node)`` of every token; nodes hold token ids."""
    return [(node, i) for node in nodes for i in range(len(node.content))]


def dense(nodes, sees):
    """``mask[q][k]``: a token sees its own node up to itself, and all of the nodes its node sees."""
    tokens = tokens_of(nodes)
    mask = []
    for query_node, i in tokens:
        row = []
        for key_node, j in tokens:
            row.append(j <= i if query_node is key_node else key_node in sees[query_node])
        mask.append(row)
    return mask


def positions(nodes, sees, scheme="after_parents"):
    """The position of every token, without pins."""
    start = {}
    total = 0
    for node in nodes:
        if scheme == "sequential":
            start[node] = total
        elif scheme == "restart":
            start[node] = 0
        else:
            start[node] = max((start[other] + len(other.content) for other in sees[node]), default=0)
        total += len(node.content)
    return [start[node] + i for node, i in tokens_of(nodes)]


PAD = "padding"
NEW = "continuation"


def row_tokens(nodes, width, beyond):
    """The columns of one batch row: padding on the left, the prompt, then generated tokens."""
    tokens = tokens_of(nodes)
    padding = [(PAD, i) for i in range(width - len(tokens))]
    return padding + tokens + [(NEW, i) for i in range(beyond)]


def row_positions(token_positions, width, beyond):
    padding = [0] * (width - len(token_positions))
    return padding + token_positions + [token_positions[-1] + 1 + i for i in range(beyond)]


def row_mask(nodes, sees, width, beyond, position, window=None):
    """The mask of one batch row with padding and continuation, optionally under a sliding window in positions."""
    tokens = row_tokens(nodes, width, beyond)
    sink = nodes[-1]
    mask = []
    for q, (query_node, i) in enumerate(tokens):
        row = []
        for k, (key_node, j) in enumerate(tokens):
            if query_node is PAD or key_node is PAD:
                allowed = q == k
            elif query_node is key_node:
                allowed = j <= i
            elif query_node is NEW:
                allowed = key_node is sink or key_node in sees[sink]
            elif key_node is NEW:
                allowed = False
            else:
                allowed = key_node in sees[query_node]
            if window is not None and not position[q] - position[k] < window:
                allowed = False
            row.append(allowed)
        mask.append(row)
    return mask


def word_tokenizer(text):
    """A fast tokenizer whose tokens are the words and marks of ``text``; words and marks are split, spaces are dropped."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0}
    for word in text.split():
        vocabulary.setdefault(word, len(vocabulary))
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Whitespace()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
