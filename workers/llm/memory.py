"""The memory that an answer needs, computed from a model's sizes before it is loaded."""

from workers.models.bundle import Bundle

VALUE_BYTES = 4  # float32, as on a CPU; the 16-bit types of a GPU take half
PREFILL_ROWS = 4096  # most rows that the LLM reads at once; limits its activations
MASK_BYTES = 128 << 20  # most memory of the mask between these rows and all rows
_MASK_VALUE_BYTES = 5  # for each pair of rows: a boolean, and a number made from it


def rows_at_once(row_count: int) -> int:
    """Rows that the LLM reads at once in a context of row_count rows."""
    return max(1, min(PREFILL_ROWS, MASK_BYTES // (_MASK_VALUE_BYTES * max(1, row_count))))


def answer_bytes(bundle: Bundle, row_count: int, is_reserved: bool = False) -> int:
    """Memory of a context; linear in the number of rows.

    Args:
        row_count: of the context, with its answer.
        is_reserved: whether the engine has reserved memory for keys, values and activations.
    """
    llama = bundle.config.llama
    embeds = 3 * llama["hidden_size"] // 2  # the LLM's input, and the stored tokens, which take half of it
    if is_reserved:
        return VALUE_BYTES * row_count * embeds
    heads = llama["num_attention_heads"]
    head_width = llama.get("head_dim") or llama["hidden_size"] // heads
    kept = 2 * llama["num_hidden_layers"] * (llama.get("num_key_value_heads") or heads) * head_width
    layer = 2 * heads * head_width  # keys and values of one layer, copied for attention
    # Counted for PREFILL_ROWS, not for rows_at_once, so that the sum is linear.
    working = min(row_count, PREFILL_ROWS) * (3 * llama["intermediate_size"] + 8 * llama["hidden_size"])
    # Rows that are read in one piece need no mask.
    mask = 0 if rows_at_once(row_count) >= row_count else MASK_BYTES
    return VALUE_BYTES * (row_count * (kept + layer + embeds) + working) + mask
