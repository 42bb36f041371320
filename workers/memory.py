"""Memory that an answer takes, reckoned from a model's sizes before any of it is loaded."""

from workers.bundle import Bundle

VALUE_BYTES = 4  # of float32, what a CPU computes with; a GPU's 16-bit types take half
PREFILL_ROWS = 4096  # rows that the LLM takes in at once, so that its activations stay bounded


def answer_bytes(bundle: Bundle, row_count: int) -> int:
    """What the LLM keeps of a context of so many rows, and what it works with on the way; linear in the rows."""
    llama = bundle.config.llama
    heads = llama["num_attention_heads"]
    head_width = llama.get("head_dim") or llama["hidden_size"] // heads
    kept = 2 * llama["num_hidden_layers"] * (llama.get("num_key_value_heads") or heads) * head_width
    at_once = min(row_count, PREFILL_ROWS)
    working = at_once * (3 * llama["intermediate_size"] + 8 * llama["hidden_size"])
    embeds = row_count * llama["hidden_size"]
    return VALUE_BYTES * (row_count * kept + working + embeds)
