"""answer: a question -> frames -> fused text -> the LLM's answer, with the moments it was given."""

from collections.abc import Callable, Sequence

from pipeline.filter import Filter
from pipeline.fuse import fuse as fuse_frames
from pipeline.moments import adjoin
from pipeline.query import Query, Term, check_text
from pipeline.search import Wanted, search
from storage.archive import Archive
from storage.cells import read_tokens
from storage.errors import UsageError
from storage.records import Answer, FrameRef, Moment
from workers.bundle import Bundle
from workers.llava_mini import answer_embeds, generate, load_model
from workers.prompt import context_needed, frames_that_fit, load_tokenizer, prompt_ids, stream_text

MOMENTS = 8  # asked of the search; the best ones fill the frames
EDGE_SECONDS = 5e-4  # shrinks a moment, so that the rounding of ticks to seconds takes in no neighbour


def answer(
    archive: Archive,
    bundle: Bundle,
    question: str,
    within: Filter,
    *,
    frame_limit: int | None,
    fuse: str | None,
    max_tokens: int,
    device: str,
    dtype: str,
    stream: Callable[[str], None],
) -> Answer | None:
    """The model's answer from the frames that fit the question best.

    Args:
        archive: what is asked.
        bundle: the archive's model.
        question: any text.
        within: the part of the archive that is asked.
        frame_limit: at most so many frames. A narrowed range that holds no more is taken whole, without a search; of
            anything else, those of the best moments. None takes every frame within the range.
        fuse: the source of pre-fusion; None takes the best at hand for found frames, the best stored for all.
        max_tokens: length of the answer at most.
        device: for the model, as workers.load.choose_device takes it.
        dtype: for the model, as workers.load.choose_dtype takes it.
        stream: gets the answer's text piece by piece.
    Returns:
        The answer, or None where the range has no frames or none of them fits the question.
    Raises:
        UsageError: an empty question, or more frames than the model's context holds.
    """
    check_text("question", question)
    moments, frames = _choose(archive, bundle, question, within, frame_limit)
    if not frames:
        return None
    ids = prompt_ids(load_tokenizer(bundle), question)
    _check_context(bundle, ids, len(frames), max_tokens)
    model = load_model(bundle, device, dtype)
    wanted = fuse or ("stored" if frame_limit is None else "exact")
    fused = fuse_frames(archive, model, ids, frames, wanted)
    embeds = answer_embeds(model, ids, fused.features, read_tokens(archive.frames_uri, frames))
    pieces = []
    for piece in stream_text(model.tokenizer, generate(model, embeds, max_tokens)):
        stream(piece)
        pieces.append(piece)
    return Answer(
        question=question,
        text="".join(pieces),
        moments=tuple(moments),
        fuse=fused.source,
        fuse_note=fused.note,
        frame_count=len(frames),
        video_bytes_read=fused.video_bytes_read,
    )


def _choose(
    archive: Archive, bundle: Bundle, question: str, within: Filter, frame_limit: int | None
) -> tuple[Sequence[Moment], list[FrameRef]]:
    """Moments, and their frames in order of video and time.

    A search would only lose frames where all of a chosen range can be shown, and many a question ("how many are
    there?") says nothing of what a frame shows.
    """
    if frame_limit is None or not within.is_everything:
        frames = within.frames(archive)
        if frame_limit is None or len(frames) <= frame_limit:
            return _stretches(frames, archive.uris({frame.video_number for frame in frames})), frames
    query = Query((Term(question),))
    found = search(archive, bundle, query, within, Wanted(MOMENTS)).moments
    return _frames_of_moments(archive, found, frame_limit)


def _frames_of_moments(
    archive: Archive, found: Sequence[Moment], frame_limit: int
) -> tuple[list[Moment], list[FrameRef]]:
    """The best moments until the frames are full, the last one thinned out evenly."""
    moments, frames = [], []
    for moment in found:
        room = frame_limit - len(frames)
        if room == 0:
            break
        start, end = moment.start_seconds + EDGE_SECONDS, moment.end_seconds - EDGE_SECONDS
        inside = archive.frames(
            video_numbers=[moment.video_number], start_seconds=start, end_seconds=max(end, start + EDGE_SECONDS)
        )
        frames += _evenly(inside, room)
        moments.append(moment)
    return moments, sorted(frames, key=lambda frame: (frame.video_number, frame.ticks))


def _evenly(frames: list[FrameRef], count: int) -> list[FrameRef]:
    if len(frames) <= count:
        return frames
    return [frames[(2 * i + 1) * len(frames) // (2 * count)] for i in range(count)]


def _stretches(frames: Sequence[FrameRef], uris: dict[int, str]) -> list[Moment]:
    """Moments without a score: the runs of adjoining frames, in order of video and time."""
    runs: list[list[FrameRef]] = []
    for frame in frames:
        if runs and runs[-1][-1].video_number == frame.video_number and adjoin(runs[-1][-1], frame):
            runs[-1].append(frame)
        else:
            runs.append([frame])
    moments = []
    for run in runs:
        first, last = run[0], run[-1]
        uri, end = uris[first.video_number], last.time_seconds + last.duration_seconds
        moments.append(
            Moment(first.video_id, first.video_number, uri, first.time_seconds, end, first.time_seconds, None)
        )
    return moments


def _check_context(bundle: Bundle, ids: Sequence[int], frame_count: int, max_tokens: int) -> None:
    needed = context_needed(bundle, ids, frame_count, max_tokens)
    if needed > bundle.context_length:
        raise UsageError(
            f"{frame_count} frames with the question and an answer of {max_tokens} tokens (--max-tokens) need {needed} "
            f"tokens of context, and {bundle.name} has {bundle.context_length}, room for "
            f"{frames_that_fit(bundle, ids, max_tokens)} frames; narrow with --video, --from and --to"
        )
