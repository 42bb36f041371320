"""Memory that an answer takes, reckoned from a model's sizes before any of it is loaded."""

from workers.models.bundle import Bundle

VALUE_BYTES = 4  # of float32, what a CPU computes with; a GPU's 16-bit types take half
PREFILL_ROWS = 4096  # rows that the LLM takes in at once at most, so that its activations stay bounded
MASK_BYTES = 128 << 20  # that the mask between those and all rows may take
_MASK_VALUE_BYTES = 5  # of one row and another: a boolean, and a number made of it


def rows_at_once(row_count: int) -> int:
    """Rows that the LLM takes in at once of a context of so many."""
    return max(1, min(PREFILL_ROWS, MASK_BYTES // (_MASK_VALUE_BYTES * max(1, row_count))))


def answer_bytes(bundle: Bundle, row_count: int, is_reserved: bool = False) -> int:
    """What a context of so many rows takes; linear in the rows.

    Args:
        bundle: the model.
        row_count: of the context, answer included.
        is_reserved: the LLM's engine holds what it keeps of rows, and what it works with, in any case.
    """
    llama = bundle.config.llama
    embeds = 3 * llama["hidden_size"] // 2  # what enters the LLM, and the stored tokens, of half the bytes
    if is_reserved:
        return VALUE_BYTES * row_count * embeds
    heads = llama["num_attention_heads"]
    head_width = llama.get("head_dim") or llama["hidden_size"] // heads
    kept = 2 * llama["num_hidden_layers"] * (llama.get("num_key_value_heads") or heads) * head_width
    layer = 2 * heads * head_width  # keys and values of one layer, copied for attention
    # for as many rows as are ever taken in at once, so that all of it is linear
    working = min(row_count, PREFILL_ROWS) * (3 * llama["intermediate_size"] + 8 * llama["hidden_size"])
    # one piece alone is plainly causal, and needs none
    mask = 0 if rows_at_once(row_count) >= row_count else MASK_BYTES
    return VALUE_BYTES * (row_count * (kept + layer + embeds) + working) + mask
