"""Prompt: a question as the token ids that LLaVA-Mini was trained on, and ids as text again.

Source: LLaVA-Mini's released code, `conv_llava_llama_3` and `tokenizer_image_token`: the tokenizer's own chat template,
the frames' placeholder before the question, no assistant header at the end; the template writes <|begin_of_text|> and
the tokenizer adds one more, so there are two. Imports no torch: a question can be measured before a model is loaded.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

from storage.errors import UsageError
from workers.models.bundle import Bundle

PLACEHOLDER_ID = -200  # stands for the frames (released code, IMAGE_TOKEN_INDEX)
PLACEHOLDER_TEXT = "<image>"
SYSTEM_MESSAGE = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# What transformers' clean_up_tokenization does, in its order.
_SPACED_MARKS = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"))
_CLEAN_UP = (*_SPACED_MARKS, (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))
_UNFINISHED = "\ufffd"  # what a decoder gives for the first bytes of a character, and for bytes that are none
_CHARACTER_IDS = 4  # a character has at most four bytes, and an id stands for one byte or more
# Ids that are decoded again with each new one: at least, before they are made fewer, and at most.
_CONTEXT_IDS, _WINDOW_IDS, _MOST_IDS = 4, 12, 48
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, repr=False)
class PromptTokenizer:
    """A bundle's tokenizer and chat template.

    Attributes:
        tokenizer: as tokenizer.json describes it.
        template: the chat template, compiled in a sandbox: it comes with the model.
        special: names such as bos_token -> their text, for the template.
        system_message: what the template gets as the system's turn.
        clean_up: spaces before punctuation are taken out of decoded text.
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
    except Exception as error:  # the library raises bare Exception, for a missing file too
        raise UsageError(f"{path}: no usable tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _read_settings(bundle.directory / "tokenizer_config.json")
    special = {name: _token_text(settings[name]) for name in _SPECIAL_TOKENS if settings.get(name)}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise_template_error
    try:
        template = environment.from_string(_template_text(bundle.directory, settings))
    except jinja2.TemplateError as error:
        raise UsageError(f"{bundle.directory}: the chat template is broken: {error}") from error
    clean_up = bool(settings.get("clean_up_tokenization_spaces", False))
    return PromptTokenizer(tokenizer, template, special, system_message, clean_up)


Turns = Sequence[tuple[str, str]]  # questions and their answers, the oldest first


def build_prompt(tokenizer: PromptTokenizer, question: str, history: Turns = ()) -> str:
    """The text around a question, with the placeholder for the frames in front of it, or of the first one before it.

    Raises:
        UsageError: the template refuses the turns or drops the placeholder.
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
            f"the model's chat template refuses a system turn and {len(said)} of user and model: {error}"
        ) from error
    if PLACEHOLDER_TEXT not in prompt:
        raise UsageError(f"the model's chat template drops {PLACEHOLDER_TEXT}, which stands for the frames")
    return prompt


def prompt_ids(tokenizer: PromptTokenizer, question: str, history: Turns = ()) -> list[int]:
    """A question's whole prompt as ids, PLACEHOLDER_ID where the frames go.

    Only the first <image> is a placeholder: one in the question is the user's text.
    """
    return encode_prompt(tokenizer, build_prompt(tokenizer, question, history))


def encode_prompt(tokenizer: PromptTokenizer, prompt: str) -> list[int]:
    """A prompt's ids.

    Text before and after the placeholder is encoded apart, each with its begin-of-text, and the second one is taken off
    again (released code, `tokenizer_image_token`).
    """
    before, _, after = prompt.partition(PLACEHOLDER_TEXT)
    before_ids, after_ids = (tokenizer.tokenizer.encode(text).ids for text in (before, after))
    begin = tokenizer.tokenizer.token_to_id(tokenizer.special.get("bos_token", ""))
    if begin is not None and before_ids[:1] == after_ids[:1] == [begin]:
        after_ids = after_ids[1:]
    return [*before_ids, PLACEHOLDER_ID, *after_ids]


def context_needed(bundle: Bundle, ids: Sequence[int], frame_count: int, max_new_tokens: int) -> int:
    """Tokens of the LLM's context that a prompt, frames and an answer take; compare with bundle.context_length."""
    return len(ids) - 1 + frame_count * bundle.tokens_per_frame + max_new_tokens


def frames_that_fit(bundle: Bundle, ids: Sequence[int], max_new_tokens: int) -> int:
    """The most frames that the context holds, and that the model was trained on, in one answer."""
    room = max(0, bundle.context_length - context_needed(bundle, ids, 0, max_new_tokens)) // bundle.tokens_per_frame
    return room if bundle.card.most_frames is None else min(room, bundle.card.most_frames)


def decode_ids(tokenizer: PromptTokenizer, ids: Sequence[int]) -> str:
    """The text of generated ids, special tokens left out."""
    text = tokenizer.tokenizer.decode(list(ids), skip_special_tokens=True)
    if tokenizer.clean_up:
        for spaced, tight in _CLEAN_UP:
            text = text.replace(spaced, tight)
    return text


def stream_text(tokenizer: PromptTokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The same text piece by piece as ids arrive.

    Each id is decoded with a few before it, however long the answer is. What a later id may still change is held back:
    an unfinished character, and a space where the tokenizer takes out spaces.
    """
    pieces = _decoded(tokenizer, ids)
    if tokenizer.clean_up:
        for spaced, tight in _CLEAN_UP:
            pieces = _replaced(pieces, spaced, tight)
    return pieces


def _decoded(tokenizer: PromptTokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids piece by piece, special tokens left out, spaces as they are.

    A window of the last ids is decoded. What it begins with has been told, since some decoders treat the first id of a
    text otherwise than the others.
    """
    special = {id_ for id_, token in tokenizer.tokenizer.get_added_tokens_decoder().items() if token.special}

    def decode(window: Sequence[int]) -> str:
        return tokenizer.tokenizer.decode(list(window), skip_special_tokens=True)

    window: list[int] = []
    told = waiting = 0  # characters of the window's text that were told; ids since something was told
    for token in ids:
        if token in special or tokenizer.tokenizer.id_to_token(token) is None:
            continue  # without text, whatever stands beside it
        window.append(token)
        text, waiting = decode(window), waiting + 1
        settled = len(text.rstrip(_UNFINISHED))
        are_none = waiting > _CHARACTER_IDS  # the bytes are no character, but perhaps for the last ones
        if are_none:
            settled = max(settled, len(text) - _CHARACTER_IDS + 1)
        if settled > told:
            yield text[told:settled]
            told, waiting = settled, 0
        if len(window) > _WINDOW_IDS:
            window, told = _shorter(decode, window, text, told, are_none)
    rest = decode(window)[told:]
    if rest:
        yield rest


def _shorter(
    decode: Callable[[Sequence[int]], str], window: list[int], text: str, told: int, are_none: bool
) -> tuple[list[int], int]:
    """The last ids of a window whose text ends as the whole text does, and how much of that text was told.

    Args:
        are_none: bytes at the end that are no character never will be one.
    """
    untold = len(text) - told
    for count in range(_CONTEXT_IDS, _CONTEXT_IDS + 2 * _CHARACTER_IDS + 1):
        end = decode(window[-count:])
        certain = end.lstrip(_UNFINISHED)  # it may begin in the middle of a character
        if not certain and are_none:
            certain = end
        if text.endswith(certain) and len(certain) > untold:
            return window[-count:], len(end) - untold
    if len(window) < _MOST_IDS:
        return window, told
    return [], 0  # a long run of bytes that are no text


def _replaced(pieces: Iterable[str], old: str, new: str) -> Iterator[str]:
    """`str.replace` of text that comes in pieces; the end of one that may be the beginning of `old` waits."""
    held = ""
    for piece in pieces:
        *before, rest = (held + piece).split(old)
        begun = next((n for n in range(min(len(old) - 1, len(rest)), 0, -1) if rest.endswith(old[:n])), 0)
        held = rest[len(rest) - begun :]
        settled = new.join([*before, rest[: len(rest) - begun]])
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


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON; a model needs its tokenizer's settings") from error


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
