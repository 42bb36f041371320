"""Prompt: converts a question to the token ids on which LLaVA-Mini was trained, and ids to text.

Source: LLaVA-Mini's released code, `conv_llava_llama_3` and `tokenizer_image_token`: the tokenizer's chat template, the
frames' placeholder before the question, no assistant header at the end. The template writes <|begin_of_text|> and the
tokenizer adds another, so there are two. Imports no torch, so that a prompt can be measured before a model is loaded.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

from storage.errors import UsageError
from workers.models.bundle import Bundle
from workers.models.checkpoint import read_json

PLACEHOLDER_ID = -200  # stands for the frames (released code, IMAGE_TOKEN_INDEX)
PLACEHOLDER_TEXT = "<image>"
SYSTEM_MESSAGE = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# The replacements of transformers' clean_up_tokenization, in its order.
_SPACED_MARKS = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"))
_CLEAN_UP = (*_SPACED_MARKS, (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))
_UNFINISHED = "\ufffd"  # what a decoder gives for an incomplete character, and for bytes that are no character
_CHARACTER_IDS = 4  # most ids of a character: it has at most four bytes
# Ids that are decoded again with each new id: the least, the number above which they are reduced, and the most.
_CONTEXT_IDS, _WINDOW_IDS, _MOST_IDS = 4, 12, 48
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, repr=False)
class PromptTokenizer:
    """A bundle's tokenizer and chat template.

    Attributes:
        tokenizer: from tokenizer.json.
        template: the chat template, which runs in jinja2's sandbox because it comes from the model's files.
        special: names such as bos_token -> their text, for the template.
        system_message: the system's turn.
        clean_up: whether spaces before punctuation are removed from decoded text.
    """

    tokenizer: tokenizers.Tokenizer
    template: jinja2.Template
    special: Mapping[str, str]
    system_message: str
    clean_up: bool


def load_tokenizer(bundle: Bundle, system_message: str = SYSTEM_MESSAGE) -> PromptTokenizer:
    """The tokenizer and chat template of a bundle.

    Raises:
        UsageError: tokenizer.json or the template is missing or broken.
    """
    path = bundle.directory / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception, also for a missing file
        raise UsageError(f"{path}: no usable tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = read_json(bundle.directory / "tokenizer_config.json")
    tokens = {name: settings[name] for name in _SPECIAL_TOKENS if settings.get(name)}
    special = {name: token if isinstance(token, str) else token["content"] for name, token in tokens.items()}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_template_error
    try:
        template = environment.from_string(_template_text(bundle.directory, settings))
    except jinja2.TemplateError as error:
        raise UsageError(f"{bundle.directory}: the chat template is broken: {error}") from error
    clean_up = bool(settings.get("clean_up_tokenization_spaces", False))
    return PromptTokenizer(tokenizer, template, special, system_message, clean_up)


Turns = Sequence[tuple[str, str]]  # questions and answers, the oldest first


def build_prompt(tokenizer: PromptTokenizer, question: str, history: Turns = ()) -> str:
    """The text of the prompt for a question; the placeholder for the frames comes before the first question.

    Raises:
        UsageError: the chat template refuses the turns or omits the placeholder.
    """
    said = [text for turn in history for text in turn] + [question]
    turns = [{"role": "system", "content": tokenizer.system_message}]
    for number, text in enumerate(said):
        content = f"{PLACEHOLDER_TEXT}\n{text}" if number == 0 else text
        turns.append({"role": "assistant" if number % 2 else "user", "content": content})
    try:
        prompt = tokenizer.template.render(messages=turns, add_generation_prompt=False, **tokenizer.special)
    except jinja2.TemplateError as error:
        raise UsageError(
            f"the model's chat template refuses a system turn followed by {len(said)} turns of user and model: {error}"
        ) from error
    if PLACEHOLDER_TEXT not in prompt:
        raise UsageError(f"the model's chat template omits {PLACEHOLDER_TEXT}, the placeholder for the frames")
    return prompt


def prompt_ids(tokenizer: PromptTokenizer, question: str, history: Turns = ()) -> list[int]:
    """The ids of the prompt for a question, with PLACEHOLDER_ID in place of the frames.

    Only the first <image> is the placeholder; further ones are the user's text. Text before and after the placeholder
    is encoded separately. Each part gets a begin-of-text token, and that of the second part is removed (released code,
    `tokenizer_image_token`).
    """
    before, _, after = build_prompt(tokenizer, question, history).partition(PLACEHOLDER_TEXT)
    before_ids, after_ids = (tokenizer.tokenizer.encode(text).ids for text in (before, after))
    begin = tokenizer.tokenizer.token_to_id(tokenizer.special.get("bos_token", ""))
    if begin is not None and before_ids[:1] == after_ids[:1] == [begin]:
        after_ids = after_ids[1:]
    return [*before_ids, PLACEHOLDER_ID, *after_ids]


def context_needed(bundle: Bundle, ids: Sequence[int], frame_count: int, max_new_tokens: int) -> int:
    """Tokens of prompt, frames and answer in the LLM's context; the limit is bundle.context_length."""
    return len(ids) - 1 + frame_count * bundle.tokens_per_frame + max_new_tokens


def frames_that_fit(bundle: Bundle, ids: Sequence[int], max_new_tokens: int) -> int:
    """The most frames for one answer, by the LLM's context and by the model's training."""
    room = max(0, bundle.context_length - context_needed(bundle, ids, 0, max_new_tokens)) // bundle.tokens_per_frame
    return room if bundle.card.most_frames is None else min(room, bundle.card.most_frames)


def decode_ids(tokenizer: PromptTokenizer, ids: Sequence[int]) -> str:
    """The text of generated ids, without special tokens."""
    text = tokenizer.tokenizer.decode(list(ids), skip_special_tokens=True)
    if tokenizer.clean_up:
        for spaced, tight in _CLEAN_UP:
            text = text.replace(spaced, tight)
    return text


def stream_text(tokenizer: PromptTokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of generated ids, piece by piece while the ids arrive.

    Each id is decoded together with a few ids before it. Text that a later id may change is held back: an incomplete
    character, and a space that clean-up may remove.
    """
    pieces = _decoded(tokenizer, ids)
    if tokenizer.clean_up:
        for spaced, tight in _CLEAN_UP:
            pieces = _replaced(pieces, spaced, tight)
    return pieces


def _decoded(tokenizer: PromptTokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids piece by piece, without special tokens and without clean-up.

    A window of the last ids is decoded each time. It begins with ids whose text was given before, because some decoders
    treat the first id of a text differently. tokenizers' DecodeStream cannot be used: it fails ("Invalid prefix") with
    Llama 2's decoders, and takes quadratic time on bytes that are no text.
    """
    special = {id_ for id_, token in tokenizer.tokenizer.get_added_tokens_decoder().items() if token.special}

    def decode(window: Sequence[int]) -> str:
        return tokenizer.tokenizer.decode(list(window), skip_special_tokens=True)

    window: list[int] = []
    given = waiting = 0  # characters of the window's text that were given; ids since then
    for token in ids:
        if token in special or tokenizer.tokenizer.id_to_token(token) is None:
            continue  # has no text
        window.append(token)
        text, waiting = decode(window), waiting + 1
        settled = len(text.rstrip(_UNFINISHED))
        is_broken = waiting > _CHARACTER_IDS  # the bytes are no character; only the last ones may become one
        if is_broken:
            settled = max(settled, len(text) - _CHARACTER_IDS + 1)
        if settled > given:
            yield text[given:settled]
            given, waiting = settled, 0
        if len(window) > _WINDOW_IDS:
            window, given = _shorter(decode, window, text, given, is_broken)
    rest = decode(window)[given:]
    if rest:
        yield rest


def _shorter(
    decode: Callable[[Sequence[int]], str], window: list[int], text: str, given: int, is_broken: bool
) -> tuple[list[int], int]:
    """The last ids of a window, with the same text at the end, and how much of that text was given.

    Args:
        given: characters of the text that were given.
        is_broken: whether the bytes at the end of the text are no character.
    """
    new = len(text) - given
    for count in range(_CONTEXT_IDS, _CONTEXT_IDS + 2 * _CHARACTER_IDS + 1):
        end = decode(window[-count:])
        certain = end.lstrip(_UNFINISHED)  # it may begin in the middle of a character
        if not certain and is_broken:
            certain = end
        if text.endswith(certain) and len(certain) > new:
            return window[-count:], len(end) - new
    if len(window) < _MOST_IDS:
        return window, given
    return [], 0  # many bytes that are no text


def _replaced(pieces: Iterable[str], old: str, new: str) -> Iterator[str]:
    """str.replace for text that comes in pieces; the end of a piece that may begin `old` is held back."""
    held = ""
    for piece in pieces:
        *before, rest = (held + piece).split(old)
        count = next((n for n in range(min(len(old) - 1, len(rest)), 0, -1) if rest.endswith(old[:n])), 0)
        held = rest[len(rest) - count :]
        settled = new.join([*before, rest[: len(rest) - count]])
        if settled:
            yield settled
    if held:
        yield held


def _template_text(directory: Path, settings: Mapping[str, Any]) -> str:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if not isinstance(template, str):
        raise UsageError(f"{directory}: no chat template in tokenizer_config.json or chat_template.jinja")
    return template


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
